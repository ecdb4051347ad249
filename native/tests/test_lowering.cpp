// Which steps a program becomes: what is fused, folded and merely seen another way, and what is refused how.
#include <algorithm>
#include <set>

#include "../src/lowering/graph.hpp"
#include "../src/lowering/ops/registry.hpp"
#include "lowering_checks.hpp"

using namespace lowering_checks;

namespace {

const QParams kQ = codes(0.5f), kOther = codes(0.25f);

void activations_are_absorbed() {
    for (const char* target : {"relu.default", "clamp.default", "gelu.default"}) {
        Build b;
        const int sum = b.aten("add.Tensor", {Ref{b.input()}, Ref{b.input()}});
        const bool is_clamp = std::string(target) == "clamp.default";
        const int y = b.aten(target, is_clamp ? Args{Ref{sum}, 0.0, 6.0} : Args{Ref{sum}});
        const std::vector<InputForm> forms = {form({2, 3}), form({2, 3})};
        const Result alone = lowered(b, forms, {y});
        expect_steps(alone, "binary", std::string(target) + " is part of the addition");
        expect(alone.step(0).settings.find("epilogue 0") == std::string::npos, "its step has an epilogue");
        expect_steps(lowered(b, forms, {sum, y}), "binary unary", "what an output needs is not fused away");
    }
    Build twice;
    const int sum = twice.aten("add.Tensor", {Ref{twice.input()}, 1.5});
    const int first = twice.aten("relu.default", {Ref{sum}}), second = twice.aten("exp.default", {Ref{sum}});
    expect_steps(lowered(twice, {form({4})}, {first, second}), "unary unary unary",
                 "a value with two readers is not fused");

    Build tensors;
    const int x = tensors.input(), bound = tensors.input();
    const int bounded = tensors.aten("clamp.Tensor", {Ref{tensors.aten("mul.Tensor", {Ref{x}, 2.0})}, Ref{bound}});
    const Result refused = lowered(tensors, {form({4}), form({4})}, {bounded});
    expect(refused.error == "node 1: layer n1 (clamp.Tensor): an activation with bounds that are no numbers",
           "bounds that are tensors: " + refused.error);
}

void steps_hand_on_codes_as_they_are_stored() {
    Build b;
    const int y = b.conv(b.input(kQ), 3, 4, 3, kQ);
    const auto made = [&](DType dtype, bool is_step, bool stores_unsigned) {
        recording::RecordingBackend backend;
        backend.unsigned_codes = stores_unsigned;
        InputForm given = form({2, 3, 8, 8}, dtype);
        given.is_channels_last = true;
        return lowered(b, {given}, {y}, backend, is_step);
    };
    const Result step = made(DType::u8, true, true);
    expect_steps(step, "conv", "a step takes and gives codes as they are stored");
    expect(step.lowered.outputs[0].dtype == DType::u8 && step.lowered.outputs[0].is_channels_last, "and says so");
    expect_steps(made(DType::s8, true, true), "copy conv", "a step takes the program's own codes too");
    expect_steps(made(DType::s8, false, true), "copy conv copy", "a section takes and gives the program's own codes");
    const std::string refusal = "input 'v0' is not the int8 codes it should be";
    expect(made(DType::u8, false, true).error == refusal, "and no others: " + made(DType::u8, false, true).error);
    expect(made(DType::u8, true, false).error == refusal, "nor does a step where what is stored depends on the value");
    expect(made(DType::s8, true, false).lowered.outputs[0].dtype == DType::s8, "which gives the program's own");
}

void borders_are_left_to_convolutions() {
    const auto padded = [](Int left, double value, bool is_read_twice) {
        Build b;
        const int x = b.input(kQ);
        const int y = b.node(Op::shape, "constant_pad_nd.default", {Ref{x}, list({left, 1, 1, 1}), value}, kQ).output;
        const int out = b.conv(y, 3, 4, 3, kQ);
        return lowered(b, {form({2, 3, 8, 8}, DType::s8)},
                       is_read_twice ? std::vector<int>{out, y} : std::vector<int>{out});
    };
    const Result folded = padded(2, 0, false);
    expect_steps(folded, "copy copy conv copy", "padding in front of a convolution takes no step");
    expect(folded.step(2).settings.find("[ 1 1 ] [ 1 2 ] [ 1 1 ]") != std::string::npos,
           "the convolution pads:" + folded.step(2).settings);
    expect(folded.operand(2, "y").dims == Dims({2, 4, 8, 9}), "and its result has the padded size");
    expect_steps(padded(3, 0, false), "copy fill copy copy conv copy",
                 "more than the kernel reaches over is no padding");
    expect_steps(padded(2, 1, false), "copy fill copy copy conv copy", "only zeros are padding");
    expect_steps(padded(2, 0, true), "copy fill copy copy conv copy copy", "what others read must exist");
}

// x in two terms: both products are one step, and so are both terms of what is written.
void terms() {
    Build b;
    const int x = b.input(kQ), x_rest = b.input(kOther);
    const int first = b.linear(x, 8, 8);
    const int sum = b.linear(x_rest, 8, 8, std::nullopt, Ref{first});
    const int y = b.quantize(sum, kQ);
    const int back = b.dequantize(y);
    const int rest = b.quantize(b.aten("sub.Tensor", {Ref{sum}, Ref{back}}), kOther);
    const int out = b.aten("matmul.default", {Ref{b.dequantize(y)}, Ref{b.dequantize(rest)}});
    const std::vector<InputForm> forms = {form({8, 8}, DType::s8), form({8, 8}, DType::s8)};
    const Result r = lowered(b, forms, {out});
    expect_steps(r, "copy copy linear copy copy matmul", "a sum of products, written in two terms, is one step");
    const RecordedStep& step = r.step(2);
    expect(step.settings.find("product") != std::string::npos && step.operand("x0") != nullptr,
           "it has the first product");
    expect(step.operand("rest") != nullptr && step.operand("rest")->q->scale == kOther.scale, "and writes the rest");
    expect(r.lowered.steps[2].node == 1, "the step is the last product's");
    recording::RecordingBackend plain;
    plain.terms = false;
    expect_steps(lowered(b, forms, {out}, plain), "copy copy linear linear binary copy binary copy copy matmul",
                 "without terms each is a step");
    Build other = b;
    other.program.nodes[1].weights.dims = {8, 4};
    expect(!lowered(other, forms, {out}).error.empty(), "other shapes are not added");
}

void quantize_is_folded() {
    const auto steps = [](const QParams& second, bool leaves, const char* between = nullptr) {
        Build b;
        const int y = b.aten("exp.default", {Ref{b.input()}});
        const int moved = between == nullptr ? y : b.aten(between, {Ref{y}, list({8})});
        const int a = b.quantize(y, kQ), c = b.quantize(moved, second);
        std::vector<int> outputs = {b.aten("neg.default", {Ref{b.dequantize(a)}}),
                                    b.aten("neg.default", {Ref{b.dequantize(c)}})};
        if (leaves) outputs.push_back(y);
        return lowered(b, {form({2, 4})}, outputs);
    };
    const Result agreed = steps(kQ, false);
    expect_steps(agreed, "unary unary unary", "readers that agree: the result is written as their codes");
    expect(agreed.operand(0, "y").dtype == DType::u8 && agreed.operand(0, "y").q->zero_point == 128,
           "as they are stored");
    expect_steps(steps(kQ, false, "reshape.default"), "unary unary unary", "codes pass through moves");
    expect_steps(steps(kOther, false), "unary copy copy unary unary", "readers that don't agree");
    expect_steps(steps(kQ, true), "unary copy copy unary unary", "an output stays a float");

    Build past;
    const int y = past.aten("exp.default", {Ref{past.input()}});
    const int expanded = past.aten("expand.default", {Ref{y}, list({2, 4})});
    const int q = past.quantize(expanded, kQ);
    expect_steps(lowered(past, {form({2, 4})}, {q}), "unary copy copy", "not past what is no mere move");
}

// A sum with what is there by now is the product's; codes of a norm that others read as a float are the norm's.
void sums_and_norms() {
    const auto steps = [](const Dims& added, bool has_terms = true) {
        Build b;
        const int x = b.input(kQ), r = b.input();
        const int sum = b.aten("add.Tensor", {Ref{r}, Ref{b.linear(x, 8, 8)}});
        const int y = b.aten("layer_norm.default", {Ref{sum}, list({8})});
        const int next = b.linear(b.quantize(y, kQ), 8, 8);
        recording::RecordingBackend backend;
        backend.terms = has_terms;
        return lowered(b, {form({8, 8}, DType::s8), form(added)}, {b.aten("add.Tensor", {Ref{next}, Ref{y}})}, backend);
    };
    const Result r = steps({8, 8});
    expect_steps(r, "copy linear layer_norm linear", "sums and codes take no step");
    expect(r.step(1).operand("residual") != nullptr && r.step(3).operand("residual") != nullptr, "both products add");
    expect(r.step(2).operand("codes") != nullptr && r.step(2).operand("codes")->q->zero_point == 128,
           "codes as they are stored");
    expect_steps(steps({8}), "copy linear binary layer_norm linear", "a sum that broadcasts is a step");
    expect_steps(steps({8, 8}, false), "copy linear binary layer_norm copy linear binary", "without terms each is a step");
}

void layouts() {
    Build b;
    const int x = b.input();
    const int out = b.conv(b.quantize(x, kQ), 3, 4, 1);
    const Result r = lowered(b, {form({2, 3, 4, 4})}, {out});
    expect_steps(r, "copy conv copy", "codes for a convolution are written as it reads them");
    expect(is_channels_last(r.operand(0, "y")), "channels last");
    expect(is_row_major(r.operand(2, "y")), "what leaves is row-major");
    Build l;
    const int y = l.linear(l.quantize(l.input(), kQ), 4, 4);
    expect(is_row_major(lowered(l, {form({2, 3, 4, 4})}, {y}).operand(0, "y")), "and not for others");
}

void moves_take_no_step() {
    Build b;
    const int x = b.input();
    const int cut = b.aten("slice.Tensor", {Ref{x}, Int{1}, Int{1}, Int{3}});
    const int turned = b.aten("permute.default", {Ref{cut}, list({1, 0, 2})});
    const int picked = b.aten("select.int", {Ref{turned}, Int{0}, Int{1}});
    const int out = b.aten("exp.default", {Ref{b.aten("unsqueeze.default", {Ref{picked}, Int{0}})}});
    const Result r = lowered(b, {form({2, 4, 8})}, {out});
    expect_steps(r, "unary", "views take no step");
    const Tensor& read = r.operand(0, "x");
    expect(read.place.offset == 2 * 8 * 4 && read.dims == Dims({1, 2, 8}) && read.strides[1] == 32,
           "they are read where they lie");

    Build joined;
    const int transposed = joined.aten("transpose.int", {Ref{joined.input()}, Int{0}, Int{1}});
    const int flat = joined.aten("exp.default", {Ref{joined.aten("reshape.default", {Ref{transposed}, list({-1})})}});
    expect_steps(lowered(joined, {form({2, 4})}, {flat}), "copy unary", "a reshape that no strides can express copies");

    Build parts;
    const int split = parts.aten("split.Tensor", {Ref{parts.input()}, Int{2}, Int{1}});
    const int second = parts.aten("exp.default", {Ref{parts.aten("getitem", {Ref{split}, Int{1}})}});
    expect_steps(lowered(parts, {form({2, 4})}, {second}), "unary", "a part is a view");
}

// (lengths, batch * heads, width) as attention of several heads makes it, from x of (batch, lengths, heads * width).
void joined_dimensions_that_are_parted_again() {
    const auto steps = [](const Dims& parted, bool is_read_twice) {
        Build b;
        const int rows = b.aten("transpose.int", {Ref{b.input()}, Int{0}, Int{1}});
        const int joined = b.aten("reshape.default", {Ref{rows}, list({3, 8, -1})});
        const int turned = b.aten("transpose.int", {Ref{joined}, Int{0}, Int{-2}});
        const int out = b.aten("exp.default", {Ref{b.aten("reshape.default", {Ref{turned}, list(parted)})}});
        std::vector<int> outputs = {out};
        if (is_read_twice) outputs.push_back(b.aten("neg.default", {Ref{joined}}));
        return lowered(b, {form({2, 3, 20})}, outputs);
    };
    const Result r = steps({2, 4, 3, 5}, false);
    expect_steps(r, "unary copy", "where they were joined: no copy but of what leaves");
    expect(r.operand(0, "x").dims == Dims({2, 4, 3, 5}) && r.operand(0, "x").strides == Dims({60, 5, 20, 1}),
           "their elements are read where they lie");
    expect_steps(steps({4, 2, 3, 5}, false), "copy unary copy", "elsewhere");
    expect_steps(steps({24, 5}, false), "copy copy unary", "joined anew");
    expect(steps({2, 4, 3, 5}, true).names().substr(0, 4) == "copy", "not where something else reads them joined");
    expect(steps({2, 4, 3, 7}, false).error.find("120 elements can't have the shape") != std::string::npos,
           "sizes that don't fit: " + steps({2, 4, 3, 7}, false).error);
}

void linears_take_rows_as_they_lie() {
    // Of rows in (batch, lengths), seen as (lengths, batch) and, where `joins`, as one dimension. Its result is parted
    // with `parts` first, turned back where `turns`, and added to what lies row by row.
    const auto steps = [](bool joins, Int parts, bool turns, bool has_terms = true) {
        Build b;
        const int x = b.input(), r = b.aten("neg.default", {Ref{b.input()}});
        int y = b.aten("transpose.int", {Ref{b.aten("exp.default", {Ref{x}})}, Int{0}, Int{1}});
        if (joins) y = b.aten("reshape.default", {Ref{y}, list({6, 8})});
        y = b.linear(b.quantize(y, kQ), 8, 4);
        if (joins) y = b.aten("reshape.default", {Ref{y}, list({parts, -1, 4})});
        if (turns) y = b.aten("transpose.int", {Ref{y}, Int{1}, Int{0}});
        recording::RecordingBackend backend;
        backend.terms = has_terms;
        const Dims added = turns ? Dims{6 / parts, parts, 4} : Dims{parts, 6 / parts, 4};
        return lowered(b, {form({2, 3, 8}), form(added)}, {b.aten("add.Tensor", {Ref{r}, Ref{y}})}, backend);
    };
    for (bool joins : {false, true}) {
        const std::string what = joins ? "rows that are joined" : "rows";
        const Result r = steps(joins, 3, true);
        expect_steps(r, "unary unary linear", what + " take no copy, and the sum is the linear's");
        expect(r.operand(2, "x").dims == Dims({6, 8}) && r.operand(2, "y").dims == Dims({6, 4}) &&
                   r.operand(2, "residual").dims == Dims({6, 4}),
               what + " are a matrix for the kernel");
        expect(r.cell(2, "residual") == r.cell(0, "y") && r.lowered.outputs[0].dims == Dims({2, 3, 4}),
               what + " are added where they lie");
        expect_steps(steps(joins, 3, true, false), "unary unary linear binary", what + " without terms");
        expect_steps(steps(joins, 3, false), "unary unary copy linear", what + " in another order than the sum's");
    }
    expect_steps(steps(true, 2, true), "unary unary copy linear binary", "rows that are parted elsewhere");

    Build leaves;
    const int rows = leaves.aten("exp.default", {Ref{leaves.input()}});
    const int turned = leaves.aten("transpose.int", {Ref{rows}, Int{0}, Int{1}});
    const int y = leaves.linear(leaves.quantize(turned, kQ), 8, 4);
    expect_steps(lowered(leaves, {form({2, 3, 8})}, {y}), "unary copy linear", "what leaves is row-major");
}

void attention_keeps_the_order_of_rows() {
    const auto attended = [](bool is_batch_inside) {
        Build b;
        const int heads = b.aten("reshape.default", {Ref{b.input()}, list({is_batch_inside ? 3 : 2, -1, 4, 5})});
        const Dims order = is_batch_inside ? Dims{1, 2, 0, 3} : Dims{0, 2, 1, 3};
        const int q = b.aten("permute.default", {Ref{heads}, list(order)});
        const int y = b.aten("scaled_dot_product_attention.default", {Ref{q}, Ref{q}, Ref{q}});
        return lowered(b, {form(is_batch_inside ? Dims{3, 2, 20} : Dims{2, 3, 20})}, {b.aten("exp.default", {Ref{y}})});
    };
    expect(attended(false).operand(0, "y").strides == Dims({60, 5, 20, 1}), "lengths in the batch");
    expect(attended(true).operand(0, "y").strides == Dims({20, 5, 40, 1}), "the batch in the lengths");
}

void attention_written_out() {
    Build b;
    const int q = b.input(), k = b.input(), v = b.input();
    const int scores = b.aten("matmul.default", {Ref{q}, Ref{k}});
    const int scaled = b.aten("div.Tensor", {Ref{scores}, 2.0});
    const int soft = b.aten("softmax.int", {Ref{scaled}, Int{-1}});
    const int out = b.aten("matmul.default", {Ref{soft}, Ref{v}});
    const std::vector<InputForm> forms = {form({2, 3, 4}), form({2, 4, 5}), form({2, 5, 4})};
    const Result r = lowered(b, forms, {out});
    expect(r.error.empty() && r.step(0).name == "attention" && r.step(0).settings == " 0 0.5",
           "four nodes are one step");
    expect_steps(lowered(b, forms, {out, soft}), "matmul unary softmax matmul", "unless something else reads between");
}

void errors() {
    Build unknown;
    const int y = unknown.aten("fft_fft.default", {Ref{unknown.input()}});
    const Result r = lowered(unknown, {form({4})}, {y});
    expect(r.is_unsupported && r.error == "node 0: layer n0 (fft_fft.default): has no native kernel", r.error);
    expect(!is_supported(unknown.program.nodes[0]), "an op without a row is not supported");
    Build narrow;
    const int out = narrow.linear(narrow.input(kQ), 8, 8, kQ);
    const Result e = lowered(narrow, {form({2, 4}, DType::s8)}, {out});
    expect(!e.is_unsupported && e.error == "layer n0: takes 8 features, has 4", e.error);
    Build floats;
    const int given = floats.input(kQ);
    const Result f = lowered(floats, {form({2, 4})}, {given});
    expect(f.error == "input 'v0' is not the int8 codes it should be", f.error);
}

void registry() {
    using namespace quantflow::lowering;
    std::size_t rows = 0;
    std::set<std::string> names;
    for (const OpRows* family : {&shape_ops(), &piece_ops(), &size_ops(), &window_ops(), &elementwise_ops(),
                                 &activation_ops(), &linear_ops(), &attention_ops(), &float_math_ops(),
                                 &indexing_ops()}) {
        for (const OpRow& row : *family) {
            ++rows;
            const std::string name = row.name;
            expect(names.insert(name).second, name + " stands once");
            expect(name.find('.') == std::string::npos, name + " is no overload");
            Node n;
            n.is_in_table = true;
            n.target = name + ".default";
            if (name == "clamp") n.args = {Int{0}, Int{0}, Int{6}};  // without bounds it is none
            expect(find_op(n) == &row && is_supported(n), name + " is found");
            expect((row.activation == nullptr) == !activation_of(n).has_value(),
                   name + " is an activation if its row says so");
            Build b;
            const int none = b.node(Op::size, "add", {Int{1}, Int{1}}).output;
            const int out = b.aten(n.target, Args(8, Arg(Ref{none})));  // a number, where a tensor is due
            const Result r = lowered(b, {}, {out});
            expect(r.error.find("has no native kernel") == std::string::npos, name + " is lowered by its row");
            const bool needs_no_tensor = name == "zeros" || name == "ones" || name == "full";
            expect(needs_no_tensor || r.error.find("layer n1 (" + n.target + "): ") != std::string::npos,
                   name + " refuses: " + r.error);
        }
    }
    expect(rows == op_table().size(), "all rows are in the table");
    Node n;
    n.is_in_table = true;
    n.target = "reshape.default";
    expect(role_of(n) == Role::move, "an aten node has the role of its row");
    n.op = Op::shape;
    expect(role_of(n) == Role::none, "a node of codes has none");
    expect(base_name("softmax.int") == "softmax" && overload_name("softmax.int") == "int", "a target's parts");
    expect(base_name("getitem") == "getitem" && overload_name("getitem").empty(), "a target without overload");
}

}  // namespace

int main() {
    activations_are_absorbed();
    steps_hand_on_codes_as_they_are_stored();
    borders_are_left_to_convolutions();
    terms();
    quantize_is_folded();
    sums_and_norms();
    layouts();
    moves_take_no_step();
    joined_dimensions_that_are_parted_again();
    linears_take_rows_as_they_lie();
    attention_keeps_the_order_of_rows();
    attention_written_out();
    errors();
    registry();
    return report("lowering");
}
