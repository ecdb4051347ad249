#include "engine.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <map>
#include <numeric>

#include "micro_batches.hpp"

namespace quantflow {
namespace {

// More concurrent runs of one plan wait for an instance instead of taking more memory.
constexpr int kMaxInstances = 16;
// Of the steps of one shape, so many are timed when cuts are tried.
constexpr int kMostTimed = 2;

std::size_t bytes_of(DType dtype, const std::vector<std::int64_t>& dims) {
    std::int64_t n = size_of(dtype);
    for (auto d : dims) n *= d;
    return static_cast<std::size_t>(n);
}

// An arena for as long as a run takes.
class Lease {
public:
    Lease(Arenas& arenas, std::int64_t bytes) : arenas_(arenas), arena_(arenas.take(bytes)) {}
    ~Lease() { arenas_.give(arena_); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    std::byte* memory() const { return arena_.memory; }

private:
    Arenas& arenas_;
    Arenas::Arena arena_;
};

using Milliseconds = std::chrono::duration<double, std::milli>;
constexpr double kInfinite = std::numeric_limits<double>::infinity();

// How often a step runs at a call, one run after another.
double runs_of(const NamedStep& s, const Lowered& l) {
    return s.parts == 1 ? 1 : static_cast<double>(s.parts) / static_cast<double>(l.parts.size());
}

StepTime blank_time(const NamedStep& s) {
    return {s.node, s.step->kernel(), s.parts, kInfinite};
}

Milliseconds now() { return std::chrono::steady_clock::now().time_since_epoch(); }

// Runs a plan's steps in order, all or those of a selection, and takes their times if asked to.
class Sequence {
public:
    Sequence(Lowered& l, Backend& backend, bool takes_times, const std::vector<bool>* selection)
        : l_(l), backend_(backend), selection_(selection) {
        if (takes_times) times_.assign(l.steps.size(), 0);
    }

    void run() {
        std::size_t i = 0;
        for (const Band& b : l_.bands) {
            for (; i < slot(b.first); ++i) run(*l_.steps[i].step, i, times_);
            run_band(b);
            i = slot(b.last);
        }
        for (const MicroBatches& m : l_.micro_batches) {
            for (; i < static_cast<std::size_t>(m.first); ++i) run(*l_.steps[i].step, i, times_);
            run_in_parts(m);
            i = static_cast<std::size_t>(m.last);
        }
        for (; i < l_.steps.size(); ++i) run(*l_.steps[i].step, i, times_);
    }

    // Of each step, in milliseconds.
    const std::vector<double>& times() const { return times_; }

private:
    void run(Step& step, std::size_t i, std::vector<double>& times) {
        if (selection_ != nullptr && !(*selection_)[i]) return;
        if (times.empty()) return step.run();
        backend_.wait();
        const Milliseconds start = now();
        step.run();
        backend_.wait();
        times[i] += (now() - start).count();
    }

    // What it takes is shared out among its steps by what threads took for each.
    void run_band(const Band& b) {
        if (selection_ != nullptr && !(*selection_)[slot(b.first)]) return;
        const Milliseconds start = now();
        const std::size_t steps = slot(b.last - b.first);
        std::vector<double> took(times_.empty() ? 0 : static_cast<std::size_t>(b.tasks()) * steps);  // task by task
        for (int i = b.first; i < b.last; ++i) l_.steps[slot(i)].step->prepare();
        backend_.share_out(b.tasks(), [&](std::int64_t task) {
            const std::int64_t line = task * b.lines, lines = std::min(b.lines, b.count - line);
            for (int i = b.first; i < b.last; ++i) {
                Step& step = *l_.steps[slot(i)].step;
                if (took.empty()) {
                    step.run_lines(line, lines);
                    continue;
                }
                const Milliseconds began = now();
                step.run_lines(line, lines);
                took[static_cast<std::size_t>(task) * steps + slot(i - b.first)] = (now() - began).count();
            }
        });
        const Milliseconds taken = now() - start;
        std::vector<double> together(times_.empty() ? 0 : steps, 0);
        for (std::size_t i = 0; i < took.size(); ++i) together[i % steps] += took[i];
        share(taken, together, slot(b.first));
    }
    void share(Milliseconds taken, const std::vector<double>& together, std::size_t first) {
        const double sum = std::accumulate(together.begin(), together.end(), 0.0);
        const double share = sum > 0 ? taken.count() / sum : 0;
        for (std::size_t i = 0; i < together.size(); ++i) times_[first + i] += share * together[i];
    }

    // Each thread takes the next part of the batch, with cells of its own, until none is left.
    void run_in_parts(const MicroBatches& m) {
        const auto first = static_cast<std::size_t>(m.first), last = static_cast<std::size_t>(m.last);
        std::atomic<std::int64_t> next{0};
        std::mutex mutex;
        std::exception_ptr error;
        const Milliseconds start = now();
        std::vector<double> together(times_.size(), 0);  // of all threads
        backend_.spread(static_cast<std::int64_t>(l_.parts.size()), [&](std::int64_t thread) {
            Lowered& own = *l_.parts[static_cast<std::size_t>(thread)];
            std::vector<double> times(times_.size(), 0);
            std::exception_ptr failed;
            try {
                for (std::int64_t part; (part = next.fetch_add(1)) < l_.steps[first].parts;) {
                    for (const MicroBatches::Shared& s : m.shared)
                        own.cells[s.part_cell] = l_.cells[s.cell] + part * s.bytes;
                    for (std::size_t i = first; i < last; ++i) {
                        const NamedStep& s = l_.steps[i];
                        run(thread == 0 ? *s.step : *own.steps[static_cast<std::size_t>(s.part_step)].step, i, times);
                    }
                }
            } catch (...) {
                failed = std::current_exception();
            }
            const std::lock_guard<std::mutex> lock(mutex);
            if (failed) error = failed;
            for (std::size_t i = 0; i < times.size(); ++i) together[i] += times[i];
        });
        if (error) std::rethrow_exception(error);
        share(now() - start, together, 0);  // they took them side by side
    }

    Lowered& l_;
    Backend& backend_;
    const std::vector<bool>* selection_;  // null: all
    std::vector<double> times_;           // empty: not taken
};

}  // namespace

Arenas::~Arenas() {
    for (const Arena& arena : free_) backend_.release(arena.memory);
}

Arenas::Arena Arenas::take(std::int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    Arena old;
    if (!free_.empty()) {
        // The smallest that is large enough; else the largest makes room for a larger one.
        auto best = free_.begin();
        for (auto it = free_.begin(); it != free_.end(); ++it)
            if (best->bytes < bytes ? it->bytes > best->bytes : it->bytes >= bytes && it->bytes < best->bytes)
                best = it;
        old = *best;
        free_.erase(best);
        if (old.bytes >= bytes) return old;
        backend_.release(old.memory);
        bytes_ -= old.bytes;
    }
    // Sizes that grow a little from call to call need not be met one by one.
    Arena made;
    made.bytes = std::max({bytes, old.bytes + old.bytes / 4, std::int64_t{64}});
    made.memory = static_cast<std::byte*>(backend_.allocate(static_cast<std::size_t>(made.bytes)));
    bytes_ += made.bytes;
    return made;
}

void Arenas::give(Arena arena) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(arena);
}

std::int64_t Arenas::bytes() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
}

struct Plan::Instance {
    explicit Instance(Backend& device) : backend(device) {}
    ~Instance() {
        for (void* memory : owned) backend.release(memory);
    }
    void use(std::byte* memory) {
        if (memory == arena) return;
        arena = memory;
        place(lowered, arena);
        std::byte* next = arena + lowered.arena_bytes;
        for (auto& part : lowered.parts) {
            place(*part, next);
            next += part->arena_bytes;
        }
    }
    static void place(Lowered& l, std::byte* memory) {
        for (std::size_t i = 0; i < l.cells.size(); ++i)
            if (l.arena_offsets[i] >= 0) l.cells[i] = memory + l.arena_offsets[i];
    }
    std::int64_t arena_bytes() const {
        std::int64_t bytes = lowered.arena_bytes;
        for (const auto& part : lowered.parts) bytes += part->arena_bytes;
        return bytes;
    }
    std::byte* allocate(std::int64_t bytes) {
        void* memory = backend.allocate(static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)));
        owned.push_back(memory);
        return static_cast<std::byte*>(memory);
    }
    Backend& backend;
    Lowered lowered;
    std::byte* arena = nullptr;  // where its cells point
    std::vector<void*> owned;
};

Plan::Plan(std::shared_ptr<Engine> engine, Section section, std::vector<InputForm> forms)
    : engine_(std::move(engine)), section_(std::move(section)), forms_(std::move(forms)) {
    auto first = build();
    outputs_ = first->lowered.outputs;
    arena_bytes_ = first->arena_bytes();
    runs_in_parts_ = !first->lowered.micro_batches.empty();
    joins_lines_ = !first->lowered.bands.empty();
    built_ = 1;
    free_.push_back(std::move(first));
}

Plan::~Plan() = default;

std::unique_ptr<Plan::Instance> Plan::build(Joining joining) {
    std::lock_guard<std::mutex> lock(engine_->building);
    auto instance = std::make_unique<Instance>(*engine_->backend);
    const Program& program = engine_->program->program;
    Backend& backend = *engine_->backend;
    Constants& constants = engine_->constants;
    const std::optional<Nearness> nearness = engine_->nearness ? engine_->nearness : backend.nearness();
    instance->lowered = nearness
                            ? lower_in_micro_batches(program, section_, forms_, backend, constants, *nearness)
                            : lower(program, section_, forms_, backend, constants);
    if (nearness && instance->lowered.micro_batches.empty()) join_lines(instance->lowered, *nearness, joining);
    Lowered& l = instance->lowered;
    if (l.kept_bytes > 0) {
        std::byte* kept = instance->allocate(l.kept_bytes);
        for (std::size_t i = 0; i < l.cells.size(); ++i)
            if (l.kept_offsets[i] >= 0) l.cells[i] = kept + l.kept_offsets[i];
    }
    std::vector<Lowered*> all = {&l};
    for (auto& part : l.parts) all.push_back(part.get());
    for (Lowered* each : all)
        for (Literal& literal : each->literals) {
            auto& cell = each->cells[static_cast<std::size_t>(literal.cell)];
            if (engine_->backend->reads_process_memory()) {
                cell = literal.bytes.data();
            } else {
                cell = instance->allocate(static_cast<std::int64_t>(literal.bytes.size()));
                engine_->backend->copy(cell, literal.bytes.data(), literal.bytes.size());
            }
        }
    if (!engine_->backend->reads_process_memory()) {
        for (std::size_t i = 0; i < forms_.size(); ++i)
            if (l.input_cells[i] >= 0)
                l.cells[static_cast<std::size_t>(l.input_cells[i])] =
                    instance->allocate(static_cast<std::int64_t>(bytes_of(forms_[i].dtype, forms_[i].dims)));
        for (std::size_t i = 0; i < l.outputs.size(); ++i)
            if (l.output_cells[i] >= 0)
                l.cells[static_cast<std::size_t>(l.output_cells[i])] =
                    instance->allocate(static_cast<std::int64_t>(bytes_of(l.outputs[i].dtype, l.outputs[i].dims)));
    }
    for (const auto* steps : {&l.once, &l.steps})
        for (const NamedStep& s : *steps) s.step->share(engine_->lasting);
    for (Lowered* each : all) {
        ConstantBytes next;
        for (auto s = each->steps.rbegin(); s != each->steps.rend(); ++s) {
            if (!s->step) continue;
            s->step->expect(next);
            if (const ConstantBytes own = s->step->weights(); own.size > 0) next = own;
        }
    }
    run_once(*instance);
    return instance;
}

void Plan::run_once(Instance& instance) {
    Lowered& l = instance.lowered;
    if (!l.once.empty()) {
        const Lease arena(engine_->arenas, instance.arena_bytes());
        instance.use(arena.memory());
        for (const NamedStep& s : l.once) s.step->run();
        engine_->backend->wait();
    }
    l.once.clear();
}

std::unique_ptr<Plan::Instance> Plan::take() {
    {
        std::unique_lock<std::mutex> lock(mutex_);
        returned_.wait(lock, [&] { return !free_.empty() || built_ < kMaxInstances; });
        if (!free_.empty()) {
            auto instance = std::move(free_.back());
            free_.pop_back();
            return instance;
        }
        ++built_;
    }
    try {
        return build();
    } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        --built_;
        returned_.notify_one();
        throw;
    }
}

void Plan::give(std::unique_ptr<Instance> instance) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(instance));
    }
    returned_.notify_one();
}

void Plan::execute(Instance& instance, const void* const* inputs, void* const* outputs, std::vector<StepTime>* times,
                   const std::vector<bool>* selection) {
    Lowered& l = instance.lowered;
    for (std::size_t i = 0; i < forms_.size(); ++i)
        if (l.input_cells[i] >= 0 && (inputs == nullptr || inputs[i] == nullptr) &&
            bytes_of(forms_[i].dtype, forms_[i].dims) > 0)
            throw Error("input " + std::to_string(i) + " is null");
    for (std::size_t i = 0; i < l.outputs.size(); ++i)
        if (l.output_cells[i] >= 0 && (outputs == nullptr || outputs[i] == nullptr) &&
            bytes_of(l.outputs[i].dtype, l.outputs[i].dims) > 0)
            throw Error("output " + std::to_string(i) + " is null");
    Backend& backend = *engine_->backend;
    const bool direct = backend.reads_process_memory();
    const Lease arena(engine_->arenas, instance.arena_bytes());
    instance.use(arena.memory());
    for (std::size_t i = 0; i < forms_.size(); ++i) {
        if (l.input_cells[i] < 0) continue;
        auto& cell = l.cells[static_cast<std::size_t>(l.input_cells[i])];
        if (direct)  // steps only read their inputs; the cast fits the address into a cell
            cell = const_cast<std::byte*>(static_cast<const std::byte*>(inputs[i]));
        else
            backend.copy(cell, inputs[i], bytes_of(forms_[i].dtype, forms_[i].dims));
    }
    if (direct)
        for (std::size_t i = 0; i < l.outputs.size(); ++i)
            if (l.output_cells[i] >= 0)
                l.cells[static_cast<std::size_t>(l.output_cells[i])] = static_cast<std::byte*>(outputs[i]);
    Sequence sequence(l, backend, times != nullptr, selection);
    const auto all = [&] { sequence.run(); };
    if (l.steps.size() > 1)
        backend.during(all);
    else  // a small step alone may need no other thread
        all();
    for (std::size_t i = 0; i < sequence.times().size(); ++i)
        if (selection == nullptr || (*selection)[i])
            (*times)[i].milliseconds = std::min((*times)[i].milliseconds, sequence.times()[i]);
    if (!direct)
        for (std::size_t i = 0; i < l.outputs.size(); ++i)
            if (l.output_cells[i] >= 0)
                backend.copy(outputs[i], l.cells[static_cast<std::size_t>(l.output_cells[i])],
                             bytes_of(l.outputs[i].dtype, l.outputs[i].dims));
    backend.wait();
}

void Plan::run(const void* const* inputs, void* const* outputs) {
    auto instance = take();
    try {
        execute(*instance, inputs, outputs);
    } catch (...) {
        give(std::move(instance));
        throw;
    }
    give(std::move(instance));
}

std::vector<StepTime> Plan::profile(const void* const* inputs, void* const* outputs, int runs) {
    auto instance = take();
    std::vector<StepTime> times;
    for (const NamedStep& s : instance->lowered.steps)
        times.push_back(blank_time(s));
    try {
        for (int i = 0; i < runs; ++i) execute(*instance, inputs, outputs, &times);
    } catch (...) {
        give(std::move(instance));
        throw;
    }
    give(std::move(instance));
    return times;
}

double Plan::predicted_ms() {
    auto instance = take();
    double sum = 0;
    for (const NamedStep& s : instance->lowered.steps)
        if (const Decision* d = s.step->decision.get())
            sum += d->ways[d->taken].predicted_ms * runs_of(s, instance->lowered);
    give(std::move(instance));
    return sum;
}

void Plan::drop_free() {
    std::vector<std::unique_ptr<Instance>> dropped;
    std::lock_guard<std::mutex> lock(mutex_);
    dropped.swap(free_);
    built_ -= static_cast<int>(dropped.size());
}

std::vector<Tried> Plan::tune(const void* const* inputs, void* const* outputs, const Tuning& tuning) {
    using Times = std::vector<StepTime>;
    const auto made = [&](std::size_t rank) {
        Trial trial;
        trial.rank = rank;
        trial.most = tuning.most;
        trial.margin = tuning.margin;
        const InTrial now(trial);
        return build(Joining::none);
    };
    const auto blank = [](const Instance& instance) {
        Times times;
        for (const NamedStep& s : instance.lowered.steps)
            times.push_back(blank_time(s));
        return times;
    };
    std::vector<bool> timed;
    // Rounds in turn, so that what disturbs the machine disturbs all.
    const auto rounds = [&](const auto& round) {
        const Milliseconds start = now();
        for (int i = 0; i < tuning.runs; ++i) {
            if (i >= 2 && (now() - start).count() > tuning.budget_ms) break;
            round();
        }
    };
    const auto race = [&](const std::vector<Instance*>& instances, std::vector<Times>& times) {
        rounds([&] {
            for (std::size_t i = 0; i < instances.size(); ++i)
                execute(*instances[i], inputs, outputs, &times[i], &timed);
        });
    };
    // Keeps the way that took the least, if that is clearly less than what was predicted to.
    const auto settle = [](Tried& t) {
        for (const Way& way : t.ways) forget_way(way.shape);
        const auto best = std::min_element(t.milliseconds.begin(), t.milliseconds.end());
        if (*best > 0.97 * t.milliseconds[0]) return false;
        t.kept = static_cast<std::size_t>(best - t.milliseconds.begin());
        keep_way(t.ways[t.kept]);
        return true;
    };

    std::vector<std::unique_ptr<Instance>> instances;
    instances.push_back(made(0));
    const std::vector<NamedStep>& steps = instances[0]->lowered.steps;
    std::vector<Tried> found;
    std::vector<std::size_t> tried_of(steps.size());
    std::size_t ranks = 1;
    timed.assign(steps.size(), false);
    for (std::size_t i = 0; i < steps.size(); ++i) {
        const Decision* d = steps[i].step->decision.get();
        if (d == nullptr) continue;
        auto at = std::find_if(found.begin(), found.end(), [&](const Tried& t) { return t.shape == d->shape; });
        if (at == found.end()) {
            Tried tried;
            tried.node = steps[i].node;
            tried.kernel = steps[i].step->kernel();
            tried.shape = d->shape;
            tried.ways = d->ways;
            at = found.insert(found.end(), tried);
            ranks = std::max(ranks, d->ways.size());
        }
        tried_of[i] = static_cast<std::size_t>(at - found.begin());
        timed[i] = at->count++ < kMostTimed;
    }
    while (instances.size() < ranks) instances.push_back(made(instances.size()));
    std::vector<Instance*> racing;
    std::vector<Times> times;
    for (const auto& instance : instances) {
        racing.push_back(instance.get());
        times.push_back(blank(*instance));
    }
    race(racing, times);
    // Of one step of a shape, by the times of those that were taken.
    const auto mean_ms = [&](const Times& taken, std::size_t shape) {
        double sum = 0;
        for (std::size_t i = 0; i < steps.size(); ++i)
            if (timed[i] && tried_of[i] == shape)
                sum += taken[i].milliseconds / runs_of(steps[i], instances[0]->lowered);
        return sum / std::min(found[shape].count, kMostTimed);
    };
    const auto total = [&](const Times& taken) {
        double sum = 0;
        for (std::size_t shape = 0; shape < found.size(); ++shape) sum += found[shape].count * mean_ms(taken, shape);
        return sum;
    };
    bool differs = false;
    for (std::size_t shape = 0; shape < found.size(); ++shape) {
        Tried& t = found[shape];
        for (std::size_t way = 0; way < t.ways.size(); ++way) t.milliseconds.push_back(mean_ms(times[way], shape));
        if (settle(t)) differs = true;
    }
    if (differs) {
        // All of them at once, against what was predicted: steps find in the caches what those before them left there.
        instances.resize(1);
        instances.push_back(build(Joining::none));
        racing = {instances[0].get(), instances[1].get()};
        times = {blank(*instances[0]), blank(*instances[1])};
        race(racing, times);
        if (total(times[1]) > total(times[0]))
            for (Tried& t : found) {
                forget_way(t.ways[t.kept].shape);
                t.kept = 0;
            }
        drop_free();
    }
    // Steps that might run together, line by line, against each by itself.
    if (tuning.most < 2) return found;
    instances.clear();
    instances.push_back(build(Joining::all));
    const std::vector<Band>& bands = instances[0]->lowered.bands;
    if (bands.empty()) return found;
    instances.push_back(build(Joining::none));
    timed.assign(timed.size(), false);
    for (const Band& b : bands) std::fill(timed.begin() + b.first, timed.begin() + b.last, true);
    std::vector<std::array<double, 2>> least(bands.size(), {kInfinite, kInfinite});  // together, apart
    rounds([&] {
        for (std::size_t way = 0; way < 2; ++way) {
            Times taken = blank(*instances[way]);
            execute(*instances[way], inputs, outputs, &taken, &timed);
            for (std::size_t b = 0; b < bands.size(); ++b) {
                double sum = 0;
                for (int i = bands[b].first; i < bands[b].last; ++i) sum += taken[slot(i)].milliseconds;
                least[b][way] = std::min(least[b][way], sum);
            }
        }
    });
    std::map<std::string, Tried> joined;
    for (std::size_t i = 0; i < bands.size(); ++i) {
        const Band& b = bands[i];
        Tried& t = joined[b.shape];
        const std::size_t together = b.is_predicted() ? 0 : 1;  // the place of that way
        if (t.count++ == 0) {
            t.node = instances[0]->lowered.steps[slot(b.first)].node;
            t.kernel = "host.lines";
            t.shape = b.shape;
            t.ways.assign(2, Way{b.count, 1, b.apart_ms, b.shape});
            t.ways[together] = Way{b.lines, 1, b.together_ms, b.shape};
            t.milliseconds.assign(2, 0);
        }
        t.milliseconds[together] += least[i][0];
        t.milliseconds[1 - together] += least[i][1];
    }
    for (auto& [shape, t] : joined) {
        for (double& sum : t.milliseconds) sum /= t.count;
        settle(t);
        found.push_back(std::move(t));
    }
    drop_free();
    return found;
}

}  // namespace quantflow
