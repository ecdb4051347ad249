#include "bands.hpp"

#include <algorithm>
#include <map>

namespace quantflow {
namespace {

using lowering::Buffer;

// What is gained must be more than predictions are off, and what is worth a try may cost as much more.
constexpr double kSurely = 0.95, kNearly = 1.3;
// Of a run's time, what handing over its steps must take for a try.
constexpr double kHandedOver = 0.02;
// As many tasks for each thread are looked at.
constexpr std::int64_t kMostTasks = 8;
// Of a run, so that programs of any length take little time.
constexpr int kMostJoined = 64;

// What steps do with buffers, line by line.
class Access {
public:
    explicit Access(const Lowered& l) : l_(l) {
        for (std::size_t i = 0; i < l.cells.size(); ++i) cells_[&l.cells[i]] = static_cast<int>(i);
        for (const NamedStep& s : l.steps) {
            const Lines lines = s.step->lines();
            lines_.push_back(lines.count > 0 && fills_buffers(s, lines.count) ? lines.count : 0);
            far_.push_back(lines.far == nullptr ? -1 : cells_.at(lines.far));
        }
    }
    // Of step i's result; 0: it runs as a whole.
    std::int64_t lines(int i) const { return lines_[slot(i)]; }

    // Whether step i may go on with a line where [first, i) have just had it: nobody reads another line of what one of
    // them writes.
    bool may_follow(int first, int i) const {
        for (int before = first; before < i; ++before)
            if (touches(l_.steps[slot(before)].use.writes, far_[slot(i)]) ||
                touches(l_.steps[slot(i)].use.writes, far_[slot(before)]))
                return false;
        return lines(i) == lines(first);
    }

private:
    static bool touches(const std::vector<int>& buffers, int buffer) {
        return std::find(buffers.begin(), buffers.end(), buffer) != buffers.end();
    }
    // Whether operands and result fill their buffers, so that equal shares of these are lines; but for the far operand,
    // which nobody takes line by line.
    bool fills_buffers(const NamedStep& s, std::int64_t count) const {
        const std::vector<Tensor>& all = s.step->samples;
        return !all.empty() && std::all_of(all.begin(), all.end(), [&](const Tensor& t) {
            if (t.place.base == s.step->lines().far) return true;
            const std::int64_t bytes = l_.buffers[slot(cells_.at(t.place.base))].bytes;
            return t.place.offset == 0 && t.count() * size_of(t.dtype) == bytes && bytes % count == 0;
        });
    }

    const Lowered& l_;
    std::map<std::byte* const*, int> cells_;
    std::vector<std::int64_t> lines_;
    std::vector<int> far_;  // buffers; -1: none
};

// What a run costs, step by step and together.
class Cost {
public:
    Cost(const Lowered& l, const Nearness& near) : l_(l), near_(near) {}

    double apart_ms(const Band& b) const {
        double sum = 0;
        for (int i = b.first; i < b.last; ++i) {
            const Step& step = *l_.steps[slot(i)].step;
            sum += step.decision != nullptr
                       ? step.decision->ways[step.decision->taken].predicted_ms
                       : step.lines_ms(b.count) / near_.threads + near_.hand_over_ns * 1e-6;
        }
        return sum;
    }
    // Leaves the best number of lines.
    double together_ms(Band& b) const {
        double least = 0;
        for (std::int64_t each = 1; each <= kMostTasks; ++each) {
            const std::int64_t tasks = std::min(b.count, each * near_.threads), lines = (b.count + tasks - 1) / tasks;
            double task = 0;
            for (int i = b.first; i < b.last; ++i) task += l_.steps[slot(i)].step->lines_ms(lines);
            const std::int64_t rounds = ((b.count + lines - 1) / lines + near_.threads - 1) / near_.threads;
            const double ms = task * (static_cast<double>(rounds) + near_.last_task) + near_.hand_over_ns * 1e-6;
            if (each > 1 && ms >= least) continue;
            least = ms;
            b.lines = lines;
        }
        return least;
    }

private:
    const Lowered& l_;
    const Nearness& near_;
};

// Of steps that run in the same way, by whatever the costs depend on.
std::string shape_of(const Lowered& l, const Band& b, const Nearness& near) {
    std::string text = std::to_string(b.count) + " lines together, " + std::to_string(near.threads) + " threads";
    for (int i = b.first; i < b.last; ++i) {
        const Step& step = *l.steps[slot(i)].step;
        text += "; " + (step.decision != nullptr ? step.decision->shape : step.kernel());
        if (step.decision == nullptr)
            for (std::int64_t d : step.samples.back().dims) text += " " + std::to_string(d);
    }
    return text;
}

std::vector<Band> runs(const Lowered& l) {
    const Access access(l);
    std::vector<Band> found;
    for (int i = 0, n = static_cast<int>(l.steps.size()); i < n;) {
        Band band;
        band.first = i++;
        band.count = access.lines(band.first);
        if (band.count < 2) continue;
        while (i < std::min(n, band.first + kMostJoined) && access.may_follow(band.first, i)) ++i;
        band.last = i;
        if (band.last - band.first > 1) found.push_back(std::move(band));
    }
    return found;
}

}  // namespace

void join_lines(Lowered& l, const Nearness& near, Joining joining) {
    if (near.threads < 2 || joining == Joining::none) return;
    const Cost cost(l, near);
    const int once = static_cast<int>(l.once.size());
    for (Band& band : runs(l)) {
        band.together_ms = cost.together_ms(band);
        band.apart_ms = cost.apart_ms(band);
        band.shape = shape_of(l, band, near);
        const double handing_over_ms = (band.last - band.first - 1) * near.hand_over_ns * 1e-6;
        bool joins = band.together_ms < kNearly * band.apart_ms && handing_over_ms > kHandedOver * band.apart_ms;
        if (joining == Joining::decided) {
            joins = band.is_predicted();
            if (const std::optional<Way> way = measured_way(band.shape))
                joins = way->rows == band.lines || (joins && way->rows != band.count);
        }
        if (!joins) continue;
        // One thread may be at the last step where another is at the first: what any of them writes takes memory of its
        // own from the first one on.
        for (int i = band.first; i < band.last; ++i)
            for (int buffer : l.steps[slot(i)].use.writes) {
                Buffer& written = l.buffers[slot(buffer)];
                written.first = std::min(written.first, once + band.first);
            }
        l.bands.push_back(std::move(band));
    }
    if (!l.bands.empty()) l.place();
}

bool Band::is_predicted() const { return together_ms < kSurely * apart_ms; }

}  // namespace quantflow
