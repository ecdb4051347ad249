// Programs made ready to run: an engine binds a program to a backend, a plan is a section of it for one set of shapes.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bands.hpp"

namespace quantflow {

// A program, and the files that its tensors lie in when it was opened from disk.
struct LoadedProgram {
    std::unique_ptr<MappedFile> weights;
    Program program;
};

// Memory for activations, shared by all plans of an engine: one arena per run at a time, as large as the largest asked
// for.
class Arenas {
public:
    explicit Arenas(Backend& backend) : backend_(backend) {}
    ~Arenas();
    Arenas(const Arenas&) = delete;
    Arenas& operator=(const Arenas&) = delete;

    struct Arena {
        std::byte* memory = nullptr;
        std::int64_t bytes = 0;
    };
    Arena take(std::int64_t bytes);
    void give(Arena arena);
    // Of all arenas that there are.
    std::int64_t bytes() const;

private:
    Backend& backend_;
    mutable std::mutex mutex_;
    std::vector<Arena> free_;
    std::int64_t bytes_ = 0;
};

struct Engine {
    Engine(std::shared_ptr<const LoadedProgram> loaded, std::shared_ptr<Backend> device)
        : program(std::move(loaded)),
          backend(std::move(device)),
          constants(*backend, program->program),
          arenas(*backend) {}

    std::shared_ptr<const LoadedProgram> program;
    std::shared_ptr<Backend> backend;
    Constants constants;
    Arenas arenas;
    std::optional<Nearness> nearness;  // in place of the backend's
    std::mutex building;  // lowering packs weights and fills `constants`
    Lasting lasting;      // of all its plans, those that are gone too: packing takes longer than all else in a plan
};

struct StepTime {
    int node;
    std::string kernel;
    std::int64_t parts;   // of the batch, on each of which it runs
    double milliseconds;  // least of the runs
};

// A shape of steps that `Plan::tune` tried several ways of.
struct Tried {
    int node;           // the first of `count`
    std::string kernel;
    std::string shape;
    int count = 0;
    std::vector<Way> ways;             // the best prediction first
    std::vector<double> milliseconds;  // of each way, least of the runs, of one step
    std::size_t kept = 0;
};

// How `Plan::tune` looks: at most `most` ways per step, none predicted to take more than (1 + margin) of the best; at
// least two rounds, then as many of `runs` as fit into `budget_ms`.
struct Tuning {
    int runs = 5;
    std::size_t most = 3;
    double margin = 0.25, budget_ms = 1000;
};

// Safe to run from several threads: each run takes an instance and an arena for itself.
class Plan {
public:
    Plan(std::shared_ptr<Engine> engine, Section section, std::vector<InputForm> forms);
    ~Plan();

    const std::vector<OutputForm>& outputs() const { return outputs_; }
    std::int64_t arena_bytes() const { return arena_bytes_; }
    // Whether some steps take the batch in parts.
    bool runs_in_parts() const { return runs_in_parts_; }
    // Whether some steps run together, line by line, in the plan as it was made first.
    bool joins_lines() const { return joins_lines_; }
    // Dense tensors in the forms agreed on; numbers are null on both sides.
    void run(const void* const* inputs, void* const* outputs);
    std::vector<StepTime> profile(const void* const* inputs, void* const* outputs, int runs);
    // Times the steps that might be done in several ways, a few of each shape and nothing between them, and makes this
    // plan, and those made from now on, with the fastest. Ways that only seem faster, because something disturbed the
    // others, are not kept. Then steps that may run together, line by line, both ways. Leaves anything in the outputs.
    std::vector<Tried> tune(const void* const* inputs, void* const* outputs, const Tuning&);
    // What the steps with a decision are predicted to take together.
    double predicted_ms();

private:
    struct Instance;
    std::shared_ptr<Engine> engine_;
    Section section_;
    std::vector<InputForm> forms_;
    std::vector<OutputForm> outputs_;
    std::int64_t arena_bytes_ = 0;
    bool runs_in_parts_ = false, joins_lines_ = false;
    std::mutex mutex_;
    std::condition_variable returned_;
    std::vector<std::unique_ptr<Instance>> free_;
    int built_ = 0;

    std::unique_ptr<Instance> build(Joining joining = Joining::decided);
    std::unique_ptr<Instance> take();
    void give(std::unique_ptr<Instance> instance);
    void run_once(Instance& instance);
    void drop_free();
    // With a `selection`, the steps where it is true alone, on whatever their inputs hold.
    void execute(Instance& instance, const void* const* inputs, void* const* outputs,
                 std::vector<StepTime>* times = nullptr, const std::vector<bool>* selection = nullptr);
};

}  // namespace quantflow
