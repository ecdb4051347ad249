// What depends on sizes alone: positions and flags are known, what is left of them runs once per plan, and what plans
// share outlives them.
#include "../src/engine.hpp"
#include "../src/lowering/foreknown.hpp"
#include "../src/lowering/schedule.hpp"
#include "lowering_checks.hpp"

using namespace lowering_checks;
using namespace quantflow::lowering;

namespace {

void steps_in_their_order() {
    const auto at = Storage::arena;
    // 0: input, 1: constant; step 0 makes 2 of the constant, step 1 makes 3 of the input, step 2 makes 4 of 2, step 3
    // reads 3 and 4.
    std::vector<Buffer> buffers = {{Storage::input, 64}, {Storage::constant, 0}, {at, 64},
                                   {at, 64},             {at, 64},               {at, 64}};
    const std::vector<Use> steps = {{{1}, {2}}, {{0}, {3}}, {{2}, {4}}, {{3, 4}, {5}}};
    const Schedule s = schedule(buffers, steps);
    expect(s.order == std::vector<int>({0, 2, 1, 3}) && s.once == 2, "what reads constants alone comes first");
    expect(s.buffers[4].storage == Storage::kept && s.buffers[2].storage == at, "what later steps read is kept");
    expect(s.buffers[2].first == 0 && s.buffers[2].last == 1 && s.buffers[3].first == 2 && s.buffers[3].last == 3,
           "lifetimes follow the new order");
    buffers[4].bytes = kMostKeptBytes + 1;
    const Schedule large = schedule(buffers, steps);
    expect(large.once == 1 && large.buffers[4].storage == at && large.buffers[2].storage == Storage::kept,
           "a large result is computed at every run, of what is kept");
    // Two steps write parts of one buffer, one of them from the input.
    const Schedule joined = schedule({{Storage::input, 64}, {Storage::constant, 0}, {at, 64}, {at, 64}},
                                     {{{1}, {2}}, {{0}, {2}}, {{2}, {3}}});
    expect(joined.once == 0, "a part of what varies is written at every run");
    expect(schedule({{Storage::constant, 0}, {Storage::output, 64}}, {{{0}, {1}}}).once == 0, "and so is an output");
    const ArenaPlan kept = plan_arena(s.buffers, Storage::kept);
    expect(kept.bytes == 64 && kept.offsets[4] == 0 && kept.offsets[3] == -1, "kept buffers have memory of their own");
    std::vector<Buffer> two = {{Storage::kept, 64, 0, 0}, {Storage::kept, 64, 5, 6}};
    expect(plan_arena(two, Storage::kept).bytes == 128, "which is never used again");
}

int size_of_dim(Build& b, int x, Int dim) { return b.node(Op::size, "sym_size.int", {Ref{x}, dim}).output; }

// The mask of an encoder as PyTorch writes it: attention_mask[rows, columns] & (rows >= 0).
void masks_are_views() {
    Build b;
    const int mask = b.input();
    const int rows = b.aten("arange.default", {Ref{size_of_dim(b, mask, 0)}});
    const int columns = b.aten("add.Tensor", {Ref{b.aten("arange.default", {Ref{size_of_dim(b, mask, 1)}})}, Int{0}});
    const int row = b.aten("reshape.default", {Ref{rows}, list({-1, 1, 1, 1})});
    const int column = b.aten("reshape.default", {Ref{columns}, list({1, 1, 1, -1})});
    const int query = b.aten("reshape.default", {Ref{columns}, list({1, 1, -1, 1})});
    const int all = b.aten("ge.Scalar", {Ref{query}, Int{0}});
    const int looked = b.aten("index.Tensor", {Ref{mask}, Args{Ref{row}, Ref{column}}});
    const int both = b.aten("__and__.Tensor", {Ref{all}, Ref{looked}});
    const int out = b.aten("logical_not.default", {Ref{both}});
    const Result r = lowered(b, {form({2, 5}, DType::b8)}, {out});
    expect_steps(r, "copy unary", "positions, their comparison and the index take no step");
    expect(r.lowered.once.empty(), "neither once");
    const Tensor& read = r.operand(0, "x");
    expect(read.dims == Dims({2, 1, 5, 5}) && read.strides[0] == 5 && read.strides[2] == 0 && read.strides[3] == 1,
           "the mask is read where it lies");
}

void causal_masks_are_made_once() {
    Build b;
    const int mask = b.input();
    const int positions = b.aten("arange.default", {Ref{size_of_dim(b, mask, 1)}});
    const int down = b.aten("unsqueeze.default", {Ref{positions}, Int{1}});
    const int before = b.aten("le.Tensor", {Ref{positions}, Ref{down}});
    const int out = b.aten("bitwise_and.Tensor", {Ref{before}, Ref{mask}});
    const Result r = lowered(b, {form({4, 4}, DType::b8)}, {out});
    expect_steps(r, "binary", "one step per run");
    expect(r.lowered.once.size() == 1 && r.lowered.kept_bytes == 64, "the comparison is kept");
    expect(r.lowered.literals.size() == 1 && r.lowered.literals[0].bytes.size() == 32, "of positions that are written");
}

void positions_are_looked_up() {
    static const Int numbers[] = {3, 4, 5, 6};
    Build b;
    b.program.tensors["p"] = {DType::s64, {1, 4}, reinterpret_cast<const std::byte*>(numbers)};
    const int x = b.input();
    const int gathered = b.aten("gather.default", {Ref{x}, Int{1}, TensorRef{"p"}});
    expect_steps(lowered(b, {form({1, 8})}, {b.aten("exp.default", {Ref{gathered}})}), "unary",
                 "a gather of positions is a view");
    const Result outside = lowered(b, {form({1, 6})}, {b.aten("exp.default", {Ref{gathered}})});
    expect(outside.names().find("index") == 0, "outside of what is there the step says so");
    Build given;
    const int table = given.input(), which = given.input();
    const int found = given.aten("index.Tensor", {Ref{table}, Args{None{}, Ref{which}}});
    const int powers = given.aten("exp.default", {Ref{found}});
    const Result r = lowered(given, {form({3, 8, 2}), form({5}, DType::s64)}, {powers});
    expect_steps(r, "index unary", "indices that are data are looked up");
    expect(r.operand(1, "x").dims == Dims({3, 5, 2}), "in the place of their dimension");
    Build flags;
    const int y = flags.aten("index.Tensor", {Ref{flags.input()}, Args{Ref{flags.input()}}});
    expect(lowered(flags, {form({3}), form({3}, DType::b8)}, {y}).is_unsupported, "flags are no positions");
}

void comparisons() {
    const Counting low{0, {1}}, high{4, {2}};
    const auto decided = [&](Binary op, Int n) { return Foreknown::compared(op, low, {n}, high, {3}); };
    expect(decided(Binary::lt, 4) == true && decided(Binary::ge, 4) == false, "all of 0…3 are below all of 4, 6, 8");
    expect(!decided(Binary::lt, 5) && decided(Binary::le, 5) == true && !decided(Binary::eq, 5), "4 is not");
    expect(!decided(Binary::le, 6) && !decided(Binary::gt, 6), "some of 0…5 are, some are not");
}

// quantize → linear of 64 → dequantize.
std::shared_ptr<Engine> engine_of(std::vector<std::int8_t>& weight, std::vector<float>& scale, Section& section) {
    auto loaded = std::make_shared<LoadedProgram>();
    Build b;
    const int x = b.input();
    const int q = b.quantize(x, codes(0.02f));
    Node& n = b.product(q, 64, 64, 0, None{}, codes(0.05f));
    n.weights.codes = weight.data();
    n.weights.scale = scale.data();
    const int y = b.dequantize(n.output);
    loaded->program = std::move(b.program);
    section.last = static_cast<int>(loaded->program.nodes.size());
    section.inputs = loaded->program.inputs;
    section.outputs = {y};
    return std::make_shared<Engine>(loaded, std::shared_ptr<Backend>(make_host_backend(1)));
}

void plans_share() {
    std::vector<std::int8_t> weight(64 * 64, 3);
    std::vector<float> scale{0.01f};
    Section section;
    const auto engine = engine_of(weight, scale, section);
    Int largest = 0;
    std::size_t packed = 0;
    for (Int rows : {16, 4096, 64, 1024}) {
        Plan plan(engine, section, {form({rows, 64})});
        std::vector<float> x(static_cast<std::size_t>(rows * 64), 0.1f), y(x.size());
        const void* in[] = {x.data()};
        void* out[] = {y.data()};
        plan.run(in, out);
        expect(y[0] == y.back(), "all rows alike");
        largest = std::max(largest, plan.arena_bytes());
        expect(engine->arenas.bytes() <= std::max<Int>(largest, 64) * 5 / 4, "one arena for plans of all sizes");
        if (packed == 0) packed = engine->lasting.size();
        expect(packed == 1 && engine->lasting.size() == packed, "one packed weight, though each plan is gone");
    }
    expect(engine->arenas.bytes() >= largest, "as large as the largest");
    const auto first = engine->arenas.take(64), second = engine->arenas.take(64);
    expect(first.memory != second.memory, "runs at the same time have arenas of their own");
    engine->arenas.give(first);
    engine->arenas.give(second);
}

}  // namespace

int main() {
    steps_in_their_order();
    masks_are_views();
    causal_masks_are_made_once();
    positions_are_looked_up();
    comparisons();
    plans_share();
    return report("schedule");
}
