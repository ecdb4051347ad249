// A run of program nodes, for one set of input shapes → steps of a backend over one arena.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "lowering/schedule.hpp"
#include "program.hpp"

namespace quantflow {

// What arrives as an input: a dense tensor, or a plain integer (a size computed elsewhere).
struct InputForm {
    DType dtype = DType::f32;
    std::vector<std::int64_t> dims;
    bool is_channels_last = false;
    bool is_number = false;
    std::int64_t number = 0;
};

// What leaves: a dense row-major tensor in the program's own codes or plain numbers, or a number. Codes leave a step
// channels-last and as the backend stores them, if it stores all in one way.
struct OutputForm {
    DType dtype = DType::f32;
    std::vector<std::int64_t> dims;
    bool is_channels_last = false;
    bool is_number = false;
    std::int64_t number = 0;
};

// Of a step or a buffer, which are counted in int.
inline std::size_t slot(int i) { return static_cast<std::size_t>(i); }

struct NamedStep {
    std::unique_ptr<Step> step;
    int node;  // index into Program::nodes; -1: moves inputs or outputs
    lowering::Use use;
    std::int64_t parts = 1;  // of the batch, on each of which it runs
    int part_step = -1;      // where the parts have it; -1: nowhere
};

// Steps [first, last) run one after another on a part of the batch, then on the next, on several threads at once.
struct MicroBatches {
    int first = 0, last = 0;
    // A buffer that is used outside too: of which each part has so many bytes.
    struct Shared {
        std::size_t cell, part_cell;
        std::int64_t bytes;
    };
    std::vector<Shared> shared;
};

// Steps [first, last) run one after another on `lines` lines, then on the next, on several threads at once.
struct Band {
    int first = 0, last = 0;
    std::int64_t count = 0, lines = 1;         // all that there are, and those of a task
    double apart_ms = 0, together_ms = 0;      // predicted
    std::string shape;                         // bands of one shape have the same costs
    std::int64_t tasks() const { return (count + lines - 1) / lines; }
    // Whether predictions alone say that the steps should run together.
    bool is_predicted() const;
};

// Memory that holds a program's tensors where the backend can read them; shared by everything built from a program.
class Constants {
public:
    Constants(Backend& backend, const Program& program) : backend_(backend), program_(program) {}
    ~Constants();
    Constants(const Constants&) = delete;
    Constants& operator=(const Constants&) = delete;
    std::byte* get(const std::string& name);                           // a stored tensor
    std::byte* keep(const std::string& name, const void* data, std::size_t bytes);  // one computed once

private:
    Backend& backend_;
    const Program& program_;
    std::unordered_map<std::string, std::byte*> placed_;
    std::vector<void*> owned_;
};

// Data of a plan's own, where a cell is to point.
struct Literal {
    int cell;
    std::vector<std::byte> bytes;
};

struct Lowered {
    std::vector<NamedStep> once;   // in order, when the plan is made: what they compute depends on sizes alone
    std::vector<NamedStep> steps;  // in order, at every run
    std::vector<Literal> literals;
    std::vector<OutputForm> outputs;
    // Base address of each buffer; steps read their addresses through these cells.
    std::deque<std::byte*> cells;
    std::vector<int> input_cells;   // -1: a number
    std::vector<int> output_cells;  // -1: a number
    std::vector<std::int64_t> arena_offsets;  // per cell; -1: not in the arena
    std::int64_t arena_bytes = 0;
    std::vector<std::int64_t> kept_offsets;  // per cell; -1: not in the memory that `once` fills for all runs
    std::int64_t kept_bytes = 0;
    std::vector<lowering::Buffer> buffers;  // per cell
    // Whether something else than a shape depends on how large the inputs are.
    bool computes_with_sizes = false;
    std::vector<MicroBatches> micro_batches;  // in order
    std::vector<Band> bands;                  // likewise; a plan has not both
    // Lowered for a part of the batch, one for each thread; the first one's steps are among `steps`.
    std::vector<std::unique_ptr<Lowered>> parts;

    // Lays out arena and kept memory anew.
    void place();
};

// Whether a node's op has a kernel here, as far as that shows without shapes.
bool is_supported(const Node& node);

struct Section {
    int first = 0, last = 0;   // nodes [first, last)
    std::vector<int> inputs;   // value indices
    std::vector<int> outputs;  // value indices
    bool is_step = false;      // codes come from and go on to other steps, see OutputForm
};

// Raises Unsupported (its text begins with "node INDEX: ") or Error.
Lowered lower(const Program&, const Section&, const std::vector<InputForm>&, Backend&, Constants&);

}  // namespace quantflow
