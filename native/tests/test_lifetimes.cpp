// From which step to which a value keeps its memory, and which memory is whose.
#include "lowering_checks.hpp"

using namespace lowering_checks;

namespace {

const QParams kQ = codes(0.5f);

void views_keep_their_buffer() {
    // v, a part of a, is read after b and c were made: neither may lie where a does.
    Build b;
    const int a = b.aten("exp.default", {Ref{b.input()}});
    const int v = b.aten("slice.Tensor", {Ref{a}, Int{0}, Int{0}, Int{1}});
    const int c = b.aten("neg.default", {Ref{b.aten("sin.default", {Ref{a}})}});
    const int late = b.aten("mul.Tensor", {Ref{v}, Ref{c}});
    const int out = b.aten("neg.default", {Ref{late}});
    const Result r = lowered(b, {form({4, 64})}, {out});
    expect_steps(r, "unary unary unary binary unary", "five steps");
    const int base = r.cell(0, "y");
    expect(r.cell(3, "a") == base, "a view reads the memory of what it views");
    for (std::size_t i : {1, 2, 3}) expect(r.offset(r.cell(i, "y")) != r.offset(base), "until its last reader");
    // Without the view, the memory is free for the next.
    Build d;
    int x = d.input();
    for (int i = 0; i < 4; ++i) x = d.aten("exp.default", {Ref{x}});
    const Result chain = lowered(d, {form({4, 64})}, {x});
    expect(chain.lowered.arena_bytes == 2 * 4 * 64 * 4, "a chain takes two buffers");
    expect(chain.offset(chain.cell(2, "y")) == chain.offset(chain.cell(0, "y")), "in turns");
}

void residuals() {
    const auto build = [](bool is_read_later, bool is_input, bool is_own) {
        Build b;
        const int x = b.input(kQ), given = b.input(kQ);
        const int residual = is_input ? given : b.linear(given, 64, 64, kQ);
        const int y = b.linear(is_own ? residual : x, 64, 64, kQ, Ref{residual});
        const int z = b.linear(y, 64, 64, kQ, is_read_later ? Arg(Ref{residual}) : Arg(None{}));
        recording::RecordingBackend backend;
        backend.unsigned_codes = false;
        return lowered(b, {form({2, 64}, DType::s8), form({2, 64}, DType::s8)}, {z}, backend);
    };
    const auto in_place = [](const Result& r, std::size_t step) {
        return r.cell(step, "residual") == r.cell(step, "y");
    };
    expect(in_place(build(false, false, false), 1), "a residual that nothing reads later is overwritten");
    const Result later = build(true, false, false);
    expect(!in_place(later, 1), "one that is read later is not");
    expect(in_place(later, 2), "but at its last reader");
    expect(!in_place(build(false, true, false), 0), "an input is not");
    expect(!in_place(build(false, false, true), 1), "nor what the same step multiplies");
}

void inputs_and_outputs() {
    Build b;
    const int x = b.input();
    const int y = b.aten("exp.default", {Ref{x}});
    const int z = b.aten("neg.default", {Ref{y}});
    const int w = b.aten("sin.default", {Ref{z}});
    const Result r = lowered(b, {form({4, 64})}, {y, w});
    expect_steps(r, "unary unary unary", "results are written where they leave");
    expect(r.offset(r.lowered.input_cells[0]) == -1, "an input is not in the arena");
    for (int cell : r.lowered.output_cells)
        expect(r.offset(cell) == -1, "an output is not in the arena, so nothing reuses it");
    expect(r.cell(0, "y") == r.lowered.output_cells[0] && r.cell(2, "y") == r.lowered.output_cells[1],
           "owned by the caller");
    expect(r.lowered.arena_bytes == 4 * 64 * 4, "only what is between lies in it");

    // What the section doesn't own, or what lies otherwise, is copied out.
    const auto copies = [](const std::string& target, Args more, int times) {
        Build c;
        const int made = c.aten("exp.default", {Ref{c.input()}});
        Args args = {Ref{made}};
        args.insert(args.end(), more.begin(), more.end());
        const int view = c.aten(target, args);
        return lowered(c, {form({4, 6})}, std::vector<int>(static_cast<std::size_t>(times), view));
    };
    expect_steps(copies("reshape.default", {list({24})}, 1), "unary", "a reshape of all of it is owned");
    expect_steps(copies("slice.Tensor", {Int{0}, Int{0}, Int{2}}, 1), "unary copy", "a part is copied");
    expect_steps(copies("t.default", {}, 1), "unary copy", "another order is copied");
    expect_steps(copies("reshape.default", {list({24})}, 2), "unary copy", "what leaves twice is copied once");
    Build through;
    const int same = through.input();
    expect_steps(lowered(through, {form({4})}, {same}), "copy", "an input that leaves is copied");
    Build moved;
    const int q = moved.quantize(moved.input(), kQ);
    recording::RecordingBackend s8;
    s8.unsigned_codes = false;
    expect_steps(lowered(moved, {form({4})}, {q}, s8), "copy", "codes as the backend stores them are owned");
    expect_steps(lowered(moved, {form({4})}, {q}), "copy copy", "others are converted");
}

void numbers() {
    Build b;
    const int x = b.input();
    Node& size = b.node(Op::size, "sym_size.int", {Ref{x}, Int{1}});
    const int width = size.output;
    const int twice = b.node(Op::size, "mul", {Ref{width}, Int{2}}).output;
    const Result r = lowered(b, {form({4, 6})}, {twice});
    expect(r.size() == 0 && r.lowered.outputs[0].is_number && r.lowered.outputs[0].number == 12,
           "a size leaves as a number");
    expect(r.lowered.output_cells[0] == -1 && r.lowered.arena_bytes == 0, "and takes no memory");
}

void constants() {
    static const float numbers[8] = {};
    Build b;
    b.program.tensors["w"] = {DType::f32, {2, 4}, reinterpret_cast<const std::byte*>(numbers)};
    const int a = b.aten("linear.default", {Ref{b.input()}, TensorRef{"w"}});
    const int c = b.aten("linear.default", {Ref{b.input()}, TensorRef{"w"}});
    const Result r = lowered(b, {form({3, 4}), form({3, 4})}, {a, c});
    expect_steps(r, "float_linear float_linear", "two products");
    const int cell = r.cell(0, "w");
    expect(cell == r.cell(1, "w") && r.offset(cell) == -1, "a stored tensor has one cell, outside the arena");
    expect(r.lowered.cells[static_cast<std::size_t>(cell)] == reinterpret_cast<const std::byte*>(numbers),
           "at its own address");
}

}  // namespace

int main() {
    views_keep_their_buffer();
    residuals();
    inputs_and_outputs();
    numbers();
    constants();
    return report("lifetimes");
}
