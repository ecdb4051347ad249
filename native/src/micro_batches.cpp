#include "micro_batches.hpp"

#include <algorithm>
#include <map>
#include <optional>

namespace quantflow {
namespace {

using lowering::Buffer;
using lowering::Storage;

// Runs of more steps are looked at in pieces, so that programs of any length take little time.
constexpr int kMostSteps = 256;
// Of a call; less isn't worth a second lowering.
constexpr double kLeastGainNs = 20e3;

// The first dimension of all inputs; 0: they differ.
std::int64_t batch_of(const std::vector<InputForm>& forms) {
    std::int64_t batch = 0;
    for (const InputForm& form : forms) {
        if (form.is_number || form.dims.empty() || (batch != 0 && form.dims[0] != batch)) return 0;
        batch = form.dims[0];
    }
    return batch;
}

std::int64_t bytes_of(const Tensor& t) { return t.count() * size_of(t.dtype); }

// A part's view may have a dimension of 1 where the whole's has its samples among the rows.
Tensor of_rank(Tensor t, std::size_t rank) {
    for (std::size_t i = t.dims.size(); i-- > 0 && t.dims.size() > rank;)
        if (t.dims[i] == 1) {
            t.dims.erase(t.dims.begin() + static_cast<std::ptrdiff_t>(i));
            t.strides.erase(t.strides.begin() + static_cast<std::ptrdiff_t>(i));
        }
    return t;
}

// Whether a view of a part of the batch, in its own buffer, is what the whole has `times` times, one after the other.
bool is_part_of(const Tensor& part, const Tensor& whole, std::int64_t times, const Buffer& part_buffer,
                const Buffer& whole_buffer) {
    if (part.dtype != whole.dtype || !(part.q == whole.q) || part.place.offset != whole.place.offset ||
        part.rank() != whole.rank() || part.rank() == 0 || whole.dims[0] != times * part.dims[0] || part.dims[0] == 0)
        return false;
    for (std::size_t i = 0; i < part.dims.size(); ++i) {
        if (i > 0 && part.dims[i] != whole.dims[i]) return false;
        if (part.dims[i] != 1 && part.strides[i] != whole.strides[i]) return false;
    }
    if (whole_buffer.storage == Storage::constant)
        return part_buffer.storage == Storage::constant && whole.strides[0] == 0;
    return part_buffer.storage == whole_buffer.storage && whole_buffer.storage != Storage::kept &&
           whole_buffer.bytes == times * part_buffer.bytes &&
           part.dims[0] * whole.strides[0] * size_of(whole.dtype) == part_buffer.bytes;
}

class Cells {
public:
    explicit Cells(const Lowered& l) {
        for (std::size_t i = 0; i < l.cells.size(); ++i) index_[&l.cells[i]] = i;
    }
    std::size_t of(const Tensor& t) const { return index_.at(t.place.base); }

private:
    std::map<std::byte* const*, std::size_t> index_;
};

// Where the part has the steps and buffers of the whole. -1: nowhere. A node that takes more steps for one sample or fewer
// (copies, above all) has none of them in the part.
class Match {
public:
    Match(const Lowered& whole, const Lowered& part) : whole_(whole), part_(part) {
        for (const Literal& l : whole.literals) whole_literals_[l.cell] = &l;
        for (const Literal& l : part.literals) part_literals_[l.cell] = &l;
        to_part_.assign(whole.cells.size(), -1);
        to_whole_.assign(part.cells.size(), -1);
        std::map<int, int> more;  // steps of a node
        for (const NamedStep& w : whole.steps) ++more[w.node];
        for (const NamedStep& p : part.steps) --more[p.node];
        std::size_t next = 0;
        for (const NamedStep& w : whole.steps) {
            std::size_t j = next;
            while (j < part.steps.size() && part.steps[j].node != w.node) ++j;
            const bool found = j < part.steps.size() && more[w.node] == 0 && is_alike(w, part.steps[j]);
            steps_.push_back(found ? static_cast<int>(j) : -1);
            if (j < part.steps.size()) next = j + 1;
        }
    }
    int step(std::size_t whole_step) const { return steps_[whole_step]; }
    std::size_t cell(std::size_t whole_cell) const { return slot(to_part_[whole_cell]); }

    // Whether two buffers are each other's; they are from the first time on.
    bool pair(std::size_t w, std::size_t p) {
        if (to_part_[w] < 0 && to_whole_[p] < 0) {
            to_part_[w] = static_cast<int>(p);
            to_whole_[p] = static_cast<int>(w);
        }
        if (to_part_[w] != static_cast<int>(p) || to_whole_[p] != static_cast<int>(w)) return false;
        const bool is_constant = whole_.buffers[w].storage == Storage::constant;
        return is_constant == (part_.buffers[p].storage == Storage::constant) && (!is_constant || holds_same(w, p));
    }

private:
    static bool is_alike(const NamedStep& a, const NamedStep& b) {
        return a.use.reads.size() == b.use.reads.size() && a.use.writes.size() == b.use.writes.size() &&
               a.step->samples.size() == b.step->samples.size();
    }
    bool holds_same(std::size_t w, std::size_t p) const {
        const auto a = whole_literals_.find(static_cast<int>(w)), b = part_literals_.find(static_cast<int>(p));
        if (a != whole_literals_.end() && b != part_literals_.end()) return a->second->bytes == b->second->bytes;
        return a == whole_literals_.end() && b == part_literals_.end() && whole_.cells[w] == part_.cells[p];
    }

    const Lowered &whole_, &part_;
    std::map<int, const Literal*> whole_literals_, part_literals_;
    std::vector<int> steps_, to_part_, to_whole_;
};

// Which steps of the whole may run as the part's, `times` times.
std::vector<bool> steps_in_parts(const Lowered& whole, const Lowered& part, Match& match, std::int64_t times) {
    std::vector<bool> found(whole.steps.size(), false);
    const Cells whole_cells(whole), part_cells(part);
    for (std::size_t i = 0; i < found.size(); ++i) {
        if (match.step(i) < 0) continue;
        const NamedStep &w = whole.steps[i], &p = part.steps[slot(match.step(i))];
        const std::vector<Tensor>& all = w.step->samples;
        const std::vector<Tensor>& few = p.step->samples;
        bool holds = !all.empty();
        std::vector<std::size_t> known;
        for (std::size_t j = 0; j < all.size() && holds; ++j) {
            const std::size_t cell = whole_cells.of(all[j]), part_cell = part_cells.of(few[j]);
            holds = match.pair(cell, part_cell) &&
                    is_part_of(of_rank(few[j], all[j].dims.size()), all[j], times, part.buffers[part_cell],
                               whole.buffers[cell]);
            known.push_back(cell);
        }
        // What else it touches must be the same for all samples.
        const auto check = [&](const std::vector<int>& ours, const std::vector<int>& theirs) {
            for (std::size_t j = 0; j < ours.size(); ++j)
                holds = holds && match.pair(slot(ours[j]), slot(theirs[j])) &&
                        (whole.buffers[slot(ours[j])].storage == Storage::constant ||
                         std::find(known.begin(), known.end(), slot(ours[j])) != known.end());
        };
        check(w.use.reads, p.use.reads);
        check(w.use.writes, p.use.writes);
        found[i] = holds;
    }
    return found;
}

// Buffers that a step touches, each once.
std::vector<int> touched_by(const NamedStep& s) {
    std::vector<int> all = s.use.reads;
    all.insert(all.end(), s.use.writes.begin(), s.use.writes.end());
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
}

// What runs of steps gain by taking the batch in parts.
class Gains {
public:
    Gains(const Lowered& whole, std::int64_t times, const Nearness& near) : whole_(whole), times_(times), near_(near) {
        touches_.assign(whole.buffers.size(), 0);
        // Before the part's are known: as if it took a step's share.
        for (const NamedStep& s : whole.steps) {
            const auto& w = s.step->decision;
            predicted_ns_.push_back(w == nullptr ? std::nullopt
                                                 : std::optional(1e6 * near.waiting * w->ways[w->taken].predicted_ms +
                                                                 near.hand_over_ns));
        }
        for (const NamedStep& s : whole.steps) {
            touched_.push_back(touched_by(s));
            for (int buffer : touched_.back()) ++touches_[slot(buffer)];
            std::int64_t bytes = 0;
            for (const Tensor& t : s.step->samples) bytes += bytes_of(t);
            // Where parts fit no more, many of them still come nearer than the whole.
            const bool fits_whole = bytes <= near.threads * near.cache_bytes, fits = bytes / times <= near.cache_bytes;
            shares_.push_back(fits_whole ? 0 : fits ? 1 : times >= 8 ? 0.5 : 0);
        }
    }

    struct Run {
        int first = 0, last = 0;
        double gain_ns = 0;
    };
    // What steps take by their makers' predictions, once the part's are known.
    void know(const Lowered& part, const Match& match) {
        for (std::size_t i = 0; i < predicted_ns_.size(); ++i) {
            if (match.step(i) < 0) continue;
            const auto &w = whole_.steps[i].step->decision, &p = part.steps[slot(match.step(i))].step->decision;
            if (w == nullptr) continue;
            predicted_ns_[i].reset();
            if (p == nullptr) continue;
            const double each_ms = static_cast<double>(times_) / near_.threads * p->work_ms;
            predicted_ns_[i] = 1e6 * ((1 + near_.waiting) * w->ways[w->taken].predicted_ms - each_ms);
        }
    }
    // The best, in order, of steps that fit.
    std::vector<Run> runs(const std::vector<bool>& fits) const {
        std::vector<std::pair<int, int>> open;
        for (int i = 0, n = static_cast<int>(fits.size()); i < n; ++i) {
            if (!fits[slot(i)]) continue;
            const int first = i;
            while (i < n && fits[slot(i)]) ++i;
            open.emplace_back(first, i);
        }
        std::vector<Run> found;
        while (!open.empty()) {
            const auto [first, last] = open.back();
            open.pop_back();
            const Run run = best(first, last);
            if (run.gain_ns < kLeastGainNs) continue;
            found.push_back(run);
            open.emplace_back(first, run.first);
            open.emplace_back(run.last, last);
        }
        std::sort(found.begin(), found.end(), [](const Run& a, const Run& b) { return a.first < b.first; });
        return found;
    }

private:
    Run best(int first, int last) const {
        Run best;
        std::vector<int> inside(whole_.buffers.size(), 0);
        for (int from = first; from < last; ++from) {
            std::fill(inside.begin(), inside.end(), 0);
            double saved = 0, starting = 0;
            std::int64_t weights = 0;
            const double each = static_cast<double>(times_) / near_.threads;  // parts of a thread
            for (int to = from; to < std::min(last, from + kMostSteps); ++to) {
                for (int buffer : touched_[slot(to)]) {
                    const Buffer& b = whole_.buffers[slot(buffer)];
                    if (b.storage == Storage::constant) continue;
                    int& here = inside[slot(buffer)];
                    ++here;
                    // The first who touches a shared one goes as far as ever.
                    const bool is_own = b.storage == Storage::arena && here == touches_[slot(buffer)];
                    const int nearer = (here > 1 ? 1 : 0) + (is_own ? 1 : 0);
                    saved += nearer * shares_[slot(to)] * static_cast<double>(b.bytes);
                }
                // Predictions count the weights of a step; those of several may leave the cache before the next part.
                const std::int64_t own = whole_.steps[slot(to)].step->weights().size;
                if (!predicted_ns_[slot(to)] || 2 * own <= near_.cache_bytes) weights += own;
                const double again = 2 * weights > near_.cache_bytes ? (each - 1) * static_cast<double>(weights) : 0;
                starting += predicted_ns_[slot(to)].value_or(near_.hand_over_ns - each * near_.step_ns);
                const double gain = (saved / near_.threads - again) * near_.far_byte_ns + starting;
                if (gain > best.gain_ns) best = {from, to + 1, gain};
            }
        }
        return best;
    }

    const Lowered& whole_;
    const std::int64_t times_;
    const Nearness near_;
    std::vector<int> touches_;               // by how many steps, per buffer
    std::vector<std::vector<int>> touched_;  // per step
    std::vector<double> shares_;             // per step: of its bytes, those that come nearer
    std::vector<std::optional<double>> predicted_ns_;  // per step: less than at once, on all threads
};

// Steps [first, last) are the parts' from now on.
void take_over(Lowered& whole, const Match& match, const Gains::Run& at, std::int64_t times) {
    MicroBatches run;
    run.first = at.first;
    run.last = at.last;
    std::vector<int> inside(whole.buffers.size(), 0), all = inside;
    for (int i = 0; i < static_cast<int>(whole.steps.size()); ++i)
        for (int buffer : touched_by(whole.steps[slot(i)])) {
            ++all[slot(buffer)];
            inside[slot(buffer)] += i >= at.first && i < at.last;
        }
    const int once = static_cast<int>(whole.once.size());
    for (std::size_t cell = 0; cell < inside.size(); ++cell) {
        Buffer& b = whole.buffers[cell];
        if (inside[cell] == 0 || b.storage == Storage::constant) continue;
        if (b.storage == Storage::arena && inside[cell] == all[cell]) {
            b.storage = Storage::constant;  // it has no place in the arena
            for (auto& part : whole.parts) part->buffers[match.cell(cell)].storage = Storage::arena;
            continue;
        }
        b.first = std::min(b.first, once + at.first);
        b.last = std::max(b.last, once + at.last - 1);
        run.shared.push_back({cell, match.cell(cell), whole.parts[0]->buffers[match.cell(cell)].bytes});
    }
    for (int i = at.first; i < at.last; ++i) {
        NamedStep& s = whole.steps[slot(i)];
        s.part_step = match.step(slot(i));
        s.step = std::move(whole.parts[0]->steps[slot(s.part_step)].step);
        s.parts = times;
    }
    whole.micro_batches.push_back(std::move(run));
}

}  // namespace

Lowered lower_in_micro_batches(const Program& program, const Section& section, const std::vector<InputForm>& forms,
                               Backend& backend, Constants& constants, const Nearness& nearness) {
    Lowered whole = lower(program, section, forms, backend, constants);
    const std::int64_t batch = batch_of(forms), threads = nearness.threads;
    const bool is_even = batch % threads == 0 || batch >= 8 * threads;
    if (batch < 2 || batch < nearness.least_samples * threads || !is_even || whole.computes_with_sizes) return whole;
    Gains gains(whole, batch, nearness);
    std::vector<bool> fits;
    for (const NamedStep& s : whole.steps) fits.push_back(!s.step->samples.empty());
    std::vector<Gains::Run> runs = gains.runs(fits);
    if (runs.empty()) return whole;

    std::vector<InputForm> few = forms;
    for (InputForm& form : few) form.dims[0] = 1;
    std::vector<std::unique_ptr<Lowered>> parts;
    std::optional<Match> match;
    try {
        while (static_cast<int>(parts.size()) < nearness.threads) {
            parts.push_back(std::make_unique<Lowered>(lower(program, section, few, backend.alone(), constants)));
            if (parts.size() > 1) continue;
            match.emplace(whole, *parts[0]);
            const std::vector<bool> may = steps_in_parts(whole, *parts[0], *match, batch);
            gains.know(*parts[0], *match);
            runs = gains.runs(may);
            if (runs.empty()) return whole;
        }
    } catch (const Error&) {
        return whole;  // the batch's size is part of the program
    }
    whole.parts = std::move(parts);
    for (auto& part : whole.parts)
        for (Buffer& b : part->buffers)
            if (b.storage != Storage::constant) b.storage = Storage::input;  // no memory of its own
    for (const Gains::Run& run : runs) take_over(whole, *match, run, batch);
    std::vector<bool> is_taken(whole.parts[0]->steps.size(), false);
    for (const NamedStep& s : whole.steps)
        if (s.part_step >= 0) is_taken[slot(s.part_step)] = true;
    for (auto& part : whole.parts) {
        part->once.clear();
        for (std::size_t i = 0; i < is_taken.size(); ++i)
            if (!is_taken[i]) part->steps[i].step.reset();
        part->place();
    }
    whole.place();
    return whole;
}

}  // namespace quantflow
