#include <algorithm>

#include "../moves.hpp"
#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

// A stored tensor as it is stored, which kernels pack once.
bool is_weight(const Context& c, const View& v) {
    return c.is_constant(v) && v.dtype == DType::f32 && same_layout(v.dims, v.strides, row_major(v.dims));
}

void matmul(Context& c, const Node& n) {
    if (overload_name(n.target) == "dtype") throw Unsupported("a product in another dtype");
    if (written_out_attention(c, n)) return;
    const View b = c.as_f32(c.real_operand(1, "other")), a = c.as_f32(c.real_operand(0, "self"));
    if (base_name(n.target) == "bmm" && (a.rank() != 3 || b.rank() != 3)) throw Error("bmm takes three dimensions");
    multiply(c, a, b, n.output);
}

void float_linear(Context& c, const Node& n) {
    const View x = c.in_row_major(c.as_f32(c.real_operand(0, "input"))), w = c.operand(1, "weight");
    std::optional<View> bias = c.optional_operand(2, "bias");
    if (!is_weight(c, w) || w.rank() != 2 || (bias && !is_weight(c, *bias)))
        throw Unsupported("a weight that is computed at run time");
    if (bias && bias->dims != Dims{w.dims[0]}) {
        if (bias->rank() > 1 || bias->count() != 1) throw Unsupported("a bias of another shape");
        bias = c.in_row_major(expanded(*bias, {w.dims[0]}));  // one value for all features
    }
    if (x.rank() == 0 || x.dims.back() != w.dims[1]) throw Error("takes " + std::to_string(w.dims[1]) + " features");
    Dims dims = x.dims;
    dims.back() = w.dims[0];
    View y = c.allocate(DType::f32, dims, row_major(dims));
    c.emit(c.backend.float_linear(c.tensor(x), c.tensor(w), c.tensor(bias).get(), c.tensor(y)),
           {&x, &w, pointer_to(bias)}, {&y});
    c.define(n.output, y);
}

void float_conv(Context& c, const Node& n) {
    const View w = c.operand(1, "weight");
    const std::optional<View> bias = c.optional_operand(2, "bias");
    if (!is_weight(c, w) || (bias && !is_weight(c, *bias))) throw Unsupported("a weight that is computed at run time");
    if (w.rank() < 3 || w.rank() > 5) throw Unsupported("a weight of this layout");
    if (bias && bias->dims != Dims{w.dims[0]}) throw Error("a bias of another shape");
    if (w.rank() != n.target[4] - '0' + 2) throw Error("a weight of another number of dimensions");
    if (n.target.find(".padding") != std::string::npos) throw Unsupported("padding by name");
    const auto spatial = static_cast<std::size_t>(w.rank()) - 2;
    const auto each = [&](std::size_t position, const char* name, std::int64_t fallback) {
        Dims values = c.integers(position, name, Dims{fallback});
        if (values.size() == 1) values.resize(spatial, values[0]);
        if (values.size() != spatial) throw Error(std::string(name) + " of another number of dimensions");
        return values;
    };
    ConvGeometry g;
    g.stride = each(3, "stride", 1);
    if (c.has(4, "padding") && c.argument(4, "padding")->as<Args>() == nullptr) throw Unsupported("padding that is no list");
    g.padding = each(4, "padding", 0);
    g.dilation = each(5, "dilation", 1);
    g.groups = c.integer(6, "groups", 1);
    View x = c.as_f32(c.real_operand(0, "input"));
    if (x.rank() != w.rank()) throw Unsupported("a convolution without a batch dimension");
    if (g.groups < 1 || w.dims[0] % g.groups != 0 || x.dims[1] != w.dims[1] * g.groups)
        throw Error("takes other channels than it gets");
    Dims dims = x.dims;
    dims[1] = w.dims[0];
    for (std::size_t i = 0; i < spatial; ++i) {
        if (g.stride[i] < 1 || g.dilation[i] < 1 || g.padding[i] < 0)
            throw Error("an illegal stride, padding or dilation");
        if (std::max({g.stride[i], g.dilation[i], g.padding[i]}) > kMaxExtent)
            throw Unsupported("a stride, padding or dilation this large");
        const std::int64_t room = x.dims[i + 2] + 2 * g.padding[i] - g.dilation[i] * (w.dims[i + 2] - 1) - 1;
        if (room < 0) throw Error("its input is smaller than its kernel");
        dims[i + 2] = room / g.stride[i] + 1;
    }
    if (has_no_elements(dims) || has_no_elements(w.dims)) throw Unsupported("an empty convolution");
    x = c.in_channels_last(x);
    const View y = c.allocate(DType::f32, dims, channels_last(dims));
    c.emit(c.backend.float_conv(g, c.tensor(x), c.tensor(w), c.tensor(bias).get(), c.tensor(y)),
           {&x, &w, pointer_to(bias)}, {&y});
    c.define(n.output, y);
}

// Whether what the next node multiplies has x's shape.
bool is_alike_next(const Context& c, const View& x) {
    const Ref* next = c.graph.node(c.node_index + 1).args[0].as<Ref>();
    const View* other = next == nullptr ? nullptr : c.value(next->value).as<View>();
    return other != nullptr && other->dims == x.dims;
}

// Where a linear of x writes: its rows in x's order, unless only another one spares the sum that follows.
Dims strides_of_rows(Context& c, const Node& n, const View& x, const Dims& dims) {
    const Dims straight = row_major(dims);
    const auto as_they_lie = rows_as_they_lie(x, dims);
    if (!as_they_lie || same_layout(x.dims, x.strides, row_major(x.dims)) || !n.args[1].is_none() ||
        c.graph.is_output(n.output) || c.fusion.is_added_next(c.node_index))
        return straight;
    const auto spares_a_sum = [&](const Dims& strides) {
        View y = x;
        y.dims = dims;
        y.strides = strides;
        return n.epilogue.kind == Activation::none && sum_past_moves(c, n.output, y).has_value();
    };
    return spares_a_sum(straight) && !spares_a_sum(*as_they_lie) ? straight : *as_they_lie;
}

// What a linear reads or writes, as rows in the order in which they lie.
View as_rows(View v) {
    if (same_layout(v.dims, v.strides, row_major(v.dims))) return v;
    const std::int64_t width = v.dims.back();
    v.dims = {v.count() / width, width};
    v.strides = {width, 1};
    return v;
}

}  // namespace

void int8_linear(Context& c, const Node& n) {
    const bool is_conv = n.op == Op::conv;
    View x = c.operand(0, "input");
    ConvGeometry geometry = n.geometry;
    const std::int64_t out = n.weights.dims[0];
    Dims dims = x.dims;
    Dims strides;
    if (is_conv) {
        const std::size_t spatial = n.weights.dims.size() - 2;
        if (x.dims.size() != spatial + 2)
            throw Error("takes " + std::to_string(spatial + 2) + " dimensions, has " + std::to_string(x.rank()));
        if (x.dims[1] != n.weights.dims[1] * n.geometry.groups)
            throw Error("takes " + std::to_string(n.weights.dims[1] * n.geometry.groups) + " channels, has " +
                        std::to_string(x.dims[1]));
        dims[1] = out;
        const Border* border = c.fusion.border_of(n.args[0].as<Ref>()->value);
        for (std::size_t i = 0; i < spatial; ++i) {
            const std::int64_t span = geometry.dilation[i] * (n.weights.dims[i + 2] - 1) + 1;
            std::int64_t room = x.dims[i + 2] + 2 * geometry.padding[i] - span;
            if (border != nullptr) {
                room += border->before[i] + border->after[i];
                geometry.padding[i] += border->before[i];
            }
            if (room < 0) throw Error("its input is smaller than its kernel");
            dims[i + 2] = room / geometry.stride[i] + 1;
        }
        x = c.in_channels_last(x);
        strides = channels_last(dims);
    } else {
        if (x.dims.empty() || x.dims.back() != n.weights.dims[1])
            throw Error("takes " + std::to_string(n.weights.dims[1]) + " features, has " +
                        (x.dims.empty() ? std::string("none") : std::to_string(x.dims.back())));
        dims.back() = out;
        strides = strides_of_rows(c, n, x, dims);
        if (same_layout(dims, strides, row_major(dims))) x = c.in_row_major(x);
    }
    const bool is_empty = has_no_elements(dims);
    const auto given = [&](const View& v) { return c.tensor(is_conv ? v : as_rows(v)); };
    const auto step_of = [&](const View& to, const Tensor* residual, const Epilogue& epilogue,
                             const Terms& terms = {}) {
        return is_conv ? c.backend.conv(n.weights, geometry, given(x), residual, epilogue, given(to), terms)
                       : c.backend.linear(n.weights, given(x), residual, epilogue, given(to), terms);
    };
    std::vector<HeldProduct> products = c.fusion.take_products();
    std::optional<View> residual;
    bool adds_reals = false;
    if (!products.empty()) {
        residual = products[0].residual;
    } else if (!n.args[1].is_none()) {
        residual = c.operand(1, "residual");
        if (residual->dims != dims) throw Unsupported("a residual that broadcasts");
        adds_reals = !c.graph.value(n.args[1].as<Ref>()->value).q;
        if (adds_reals) residual = c.as_f32(*residual);
    }
    if (residual) residual = c.in_layout(*residual, strides);
    if (products.size() < Terms::kMost && c.fusion.is_added_next(c.node_index) && is_alike_next(c, x) &&
        !is_empty) {
        products.push_back({&n, x, products.empty() ? residual : std::nullopt});
        return c.fusion.hold(std::move(products));
    }
    int output = n.output;
    View result = x;  // as the readers of `output` see it
    result.dims = dims;
    result.strides = strides;
    if (!residual && n.epilogue.kind == Activation::none && !is_empty)
        if (auto sum = sum_past_moves(c, output, result)) {
            // What lies alike after the moves is read before them.
            residual = std::move(sum->other);
            residual->dims = dims;
            residual->strides = strides;
            result = std::move(sum->result);
            output = sum->output;
            c.fusion.absorb(sum->nodes);
        }
    const auto define = [&](int value, View v) {
        v.dims = result.dims;
        v.strides = result.strides;
        c.define(value, std::move(v));
    };
    const Form form = c.graph.form_of(output);
    if (adds_reals && !c.backend.takes_terms() && !is_empty) {
        const View product = c.allocate(DType::f32, dims, strides);
        c.emit(step_of(product, nullptr, {}), {&x}, {&product});
        const View y = c.allocate(form.dtype, dims, strides, form.q, form.is_real);
        c.emit(c.backend.binary(Binary::add, c.tensor(product), c.tensor(*residual), n.epilogue, c.tensor(y)),
             {&product, &*residual}, {&y});
        return c.define(n.output, y);
    }
    View y;
    if (residual && products.empty()) {
        const bool in_place = form.q && residual->dtype == form.dtype && !form.is_real && c.dies_here(*residual) &&
                              residual->buffer != x.buffer;
        if (in_place) {
            y = *residual;
            y.q = form.q;
        }
    }
    const std::optional<TwoTerms> written = is_empty ? std::nullopt : c.fusion.absorb_two_terms(output);
    std::optional<View> rest;
    if (written) {
        y = c.allocate(written->first.dtype, dims, strides, written->first.q);
        rest = c.allocate(written->second.dtype, dims, strides, written->second.q);
        define(written->codes, y);
        define(written->rest, *rest);
    } else {
        if (y.buffer < 0) y = c.allocate(form.dtype, dims, strides, form.q, form.is_real);
        define(output, y);
    }
    if (is_empty) return c.emit(c.backend.fill(0, c.plain_tensor(y)), {}, {&y});
    Terms terms;
    const OptionalTensor rest_tensor(rest ? std::optional(given(*rest)) : std::nullopt);
    terms.rest = rest_tensor.get();
    for (const HeldProduct& product : products) terms.products.push_back({product.node->weights, c.tensor(product.x)});
    const OptionalTensor added(residual ? std::optional(given(*residual)) : std::nullopt);
    c.emit(step_of(y, added.get(), n.epilogue, terms), {&x, pointer_to(residual)}, {&y, pointer_to(rest)});
    for (const HeldProduct& product : products) c.also_reads(product.x);
}

void int8_matmul(Context& c, const Node& n) {
    View a = c.operand(0, "a"), b = c.operand(1, "b");
    multiply(c, a, b, n.output);
}

void multiply(Context& c, View a, View b, int output) {
    if (a.rank() == 0 || b.rank() == 0) throw Unsupported("matmul of a scalar");
    const bool drop_row = a.rank() == 1, drop_column = b.rank() == 1;
    if (drop_row) insert_dim(a, 0, 0);
    if (drop_column) insert_dim(b, 1, 0);
    const auto ra = a.dims.size(), rb = b.dims.size();
    if (a.dims[ra - 1] != b.dims[rb - 2]) throw Error("inner sizes of the product differ");
    if (a.dims[ra - 1] == 0) throw Unsupported("a product of nothing");
    const Dims batch = broadcast_dims(Dims(a.dims.begin(), a.dims.end() - 2), Dims(b.dims.begin(), b.dims.end() - 2));
    Dims da = batch, db = batch, dims = batch;
    da.insert(da.end(), {a.dims[ra - 2], a.dims[ra - 1]});
    db.insert(db.end(), {b.dims[rb - 2], b.dims[rb - 1]});
    dims.insert(dims.end(), {a.dims[ra - 2], b.dims[rb - 1]});
    const View ea = expanded(a, da), eb = expanded(b, db);
    View y = c.allocate_result(dims, row_major(dims), output);
    c.emit(c.backend.matmul(c.tensor(ea), c.tensor(eb), c.tensor(y)), {&ea, &eb}, {&y});
    if (drop_row) erase_dim(y, static_cast<int>(dims.size()) - 2);
    if (drop_column) erase_dim(y, y.rank() - 1);
    c.define(output, y);
}

const OpRows& linear_ops() {
    static const OpRows rows = {
        {"matmul", matmul, Role::product},
        {"bmm", matmul},
        {"linear", float_linear},
        {"conv1d", float_conv},
        {"conv2d", float_conv},
        {"conv3d", float_conv},
    };
    return rows;
}

}  // namespace quantflow::lowering
