#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

// The named dimensions in order; all of them where none is named.
std::vector<int> axes_of(Context& c, const View& x, std::size_t position, const char* name) {
    std::vector<int> axes;
    if (c.has(position, name))
        for (auto d : c.integers(position, name)) axes.push_back(axis(d, x.rank()));
    if (axes.empty()) {
        axes.resize(static_cast<std::size_t>(x.rank()));
        std::iota(axes.begin(), axes.end(), 0);
    }
    std::sort(axes.begin(), axes.end());
    if (std::adjacent_find(axes.begin(), axes.end()) != axes.end()) throw Error("a dimension is named twice");
    return axes;
}

// Into the value `output`, or into plain f32 where it is -1.
View reduced(Context& c, Reduction how, const View& x, const std::vector<int>& axes, bool keep, int output) {
    for (int a : axes)
        if (x.dims[static_cast<std::size_t>(a)] == 0) throw Unsupported("a reduction of nothing");
    Dims dims = x.dims;
    for (int a : axes) dims[static_cast<std::size_t>(a)] = 1;
    View y =
        output < 0 ? c.allocate(DType::f32, dims, row_major(dims)) : c.allocate_result(dims, row_major(dims), output);
    c.emit(c.backend.reduce(how, c.tensor(x), axes, c.tensor(y)), {&x}, {&y});
    if (!keep)
        for (auto it = axes.rbegin(); it != axes.rend(); ++it) erase_dim(y, *it);
    return y;
}

void reduce(Context& c, const Node& n, Reduction how) {
    const View x = c.operand(0, "self");
    if (!x.q && x.dtype != DType::f32) throw Unsupported("a reduction of integers");
    if (c.has(3, "dtype")) throw Unsupported("a reduction to another dtype");
    const bool has_dims = how == Reduction::max || how == Reduction::min || overload_name(n.target) != "default";
    const auto axes = has_dims ? axes_of(c, x, 1, "dim") : axes_of(c, x, 99, "");
    c.define(n.output, reduced(c, how, x, axes, has_dims && c.flag(2, "keepdim", false), n.output));
}

void vector_norm(Context& c, const Node& n) {
    const View x = c.real_operand(0, "self");
    if (c.has(4, "dtype")) throw Unsupported("a norm in another dtype");
    if (c.real(1, "ord", 2.0) != 2.0) throw Unsupported("a norm other than 2");
    const auto axes = axes_of(c, x, 2, "dim");
    View squares = c.allocate(DType::f32, x.dims, dense_like(x));
    c.emit(c.backend.binary(Binary::mul, c.tensor(x), c.tensor(x), {}, c.tensor(squares)), {&x}, {&squares});
    const View sum = reduced(c, Reduction::sum, squares, axes, c.flag(3, "keepdim", false), -1);
    View y = c.allocate_result(sum.dims, dense_like(sum), n.output);
    c.emit(c.backend.unary(Unary::sqrt, 0, 0, {}, c.tensor(sum), c.tensor(y)), {&sum}, {&y});
    c.define(n.output, y);
}

void softmax(Context& c, const Node& n, bool has_dtype) {
    const View x = c.real_operand(0, "self");
    if (!has_dtype && c.flag(2, "half_to_float", false)) throw Unsupported("softmax of halves");
    if (has_dtype && c.has(2, "dtype")) {
        const Word* word = c.argument(2, "dtype")->as<Word>();
        if (word == nullptr || word->name != "float32") throw Unsupported("softmax to another dtype");
    }
    if (x.rank() == 0) throw Unsupported("softmax of a scalar");
    const View source = c.spread_out(x);
    View y = c.allocate_result(source.dims, dense_like(source), n.output);
    c.emit(c.backend.softmax(c.tensor(source), axis(c.integer(1, "dim"), x.rank()), c.tensor(y)), {&source}, {&y});
    c.define(n.output, y);
}

void normalize(Context& c, const Node& n, const Dims& shape, std::size_t weight_at, double eps, bool is_rms) {
    View x = c.real_operand(0, "input");
    if (shape.empty() || shape.size() > x.dims.size() ||
        !std::equal(shape.rbegin(), shape.rend(), x.dims.rbegin()))
        throw Error("normalized_shape does not fit its input");
    const Dims given = x.dims;
    const std::int64_t width = checked_count(shape);
    if (width == 0) throw Unsupported("a norm of nothing");
    if (shape.size() > 1 || x.strides.back() != 1) x = c.in_row_major(x);
    if (shape.size() > 1) {
        Dims joined(given.begin(), given.end() - static_cast<std::ptrdiff_t>(shape.size()));
        joined.push_back(width);
        x = c.reshaped(x, joined);
    }
    if (x.dims.back() != width) throw Error("normalized_shape does not fit its input");
    std::optional<View> gamma, beta;
    if (c.has(weight_at, "weight")) gamma = c.operand(weight_at, "weight");
    if (!is_rms && c.has(weight_at + 1, "bias")) beta = c.operand(weight_at + 1, "bias");
    for (auto* v : {&gamma, &beta}) {
        if (!*v) continue;
        if ((*v)->q || (*v)->dtype != DType::f32) throw Unsupported("a norm whose weight is not float32");
        if ((*v)->dims != shape) throw Error("a norm whose weight has another shape");
        *v = c.reshaped(c.in_row_major(**v), {width});
    }
    View y = c.allocate_result(x.dims, row_major(x.dims), n.output);
    std::optional<View> codes;
    const int coded = y.q ? -1 : c.fusion.absorb_codes(n.output);
    if (coded >= 0) {
        const StoredAs s = c.graph.stored_as(coded);
        codes = c.allocate(s.dtype, x.dims, row_major(x.dims), s.q);
    }
    c.emit(c.backend.layer_norm(c.tensor(x), c.tensor(gamma).get(), c.tensor(beta).get(), static_cast<float>(eps),
                                is_rms, c.tensor(y), c.tensor(codes).get()),
           {&x, pointer_to(gamma), pointer_to(beta)}, {&y, pointer_to(codes)});
    const auto define = [&](int value, View v) {
        v.strides = row_major(given);
        v.dims = given;
        c.define(value, v);
    };
    define(n.output, y);
    if (codes) define(coded, *codes);
}

void layer_norm(Context& c, const Node& n) {
    normalize(c, n, c.integers(1, "normalized_shape"), 2, c.real(4, "eps", 1e-5), false);
}

void rms_norm(Context& c, const Node& n) {
    normalize(c, n, c.integers(1, "normalized_shape"), 2, c.real(3, "eps", 1.1920929e-07), true);
}

void batch_norm(Context& c, const Node& n) {
    const View x = c.real_operand(0, "input");
    if (c.flag(5, "training", false)) throw Unsupported("BatchNorm in training mode");
    if (x.rank() < 2) throw Unsupported("BatchNorm of a vector");
    const std::int64_t channels = x.dims[1];
    const double eps = c.real(7, "eps", 1e-5);
    if (!c.has(3, "running_mean") || !c.has(4, "running_var")) throw Unsupported("BatchNorm without statistics");
    const auto numbers = [&](std::size_t i, const char* name, float fallback) {
        if (!c.has(i, name)) return std::vector<float>(static_cast<std::size_t>(channels), fallback);
        const TensorRef* ref = c.argument(i, name)->as<TensorRef>();
        const Stored* stored = ref == nullptr ? nullptr : &c.program.tensors.at(ref->name);
        if (stored == nullptr || stored->data == nullptr || stored->dtype != DType::f32 || stored->count() != channels)
            throw Unsupported("BatchNorm whose numbers are not constant float32");
        std::vector<float> out(static_cast<std::size_t>(channels));
        if (!out.empty()) std::memcpy(out.data(), stored->data, out.size() * sizeof(float));
        return out;
    };
    // What must be there first: its number of channels is that of real memory.
    const auto mean = numbers(3, "running_mean", 0), variance = numbers(4, "running_var", 1),
               weight = numbers(1, "weight", 1), bias = numbers(2, "bias", 0);
    std::vector<float> scale(weight.size()), shift(weight.size());
    for (std::size_t i = 0; i < scale.size(); ++i) {
        const double s = weight[i] / std::sqrt(static_cast<double>(variance[i]) + eps);
        scale[i] = static_cast<float>(s);
        shift[i] = static_cast<float>(bias[i] - mean[i] * s);
    }
    const auto keep = [&](const char* suffix, const std::vector<float>& data) {
        View v;
        v.dtype = DType::f32;
        v.dims = {channels};
        v.strides = {1};
        v.buffer = c.new_buffer(
            Storage::constant, 0,
            c.constants.keep(std::to_string(c.node_index) + suffix, data.data(), data.size() * sizeof(float)));
        return v;
    };
    const View s = keep(".scale", scale), b = keep(".shift", shift);
    Epilogue epilogue;
    const int output = c.fusion.absorb_activation(n.output, epilogue);
    const View source = c.spread_out(x);
    View y = c.allocate_result(source.dims, dense_like(source), output);
    c.emit(c.backend.channel_affine(c.tensor(source), 1, c.tensor(s), c.tensor(b), epilogue, c.tensor(y)),
           {&source}, {&y});
    c.define(output, y);
}

// With statistics of x alone, over groups of channels.
void normalize_groups(Context& c, const Node& n, std::int64_t groups, std::size_t weight_at, double eps) {
    View x = c.real_operand(0, "input");
    const std::int64_t channels = x.dims[1];
    if (groups < 1 || channels % groups != 0)
        throw Error("has " + std::to_string(channels) + " channels in " + std::to_string(groups) + " groups");
    if (has_no_elements(x.dims)) throw Unsupported("a norm of nothing");
    std::optional<View> gamma, beta;
    if (c.has(weight_at, "weight")) gamma = c.operand(weight_at, "weight");
    if (c.has(weight_at + 1, "bias")) beta = c.operand(weight_at + 1, "bias");
    for (auto* v : {&gamma, &beta}) {
        if (!*v) continue;
        if ((*v)->q || (*v)->dtype != DType::f32) throw Unsupported("a norm whose weight is not float32");
        if ((*v)->dims != Dims{channels}) throw Error("a norm whose weight has another shape");
        *v = c.in_row_major(**v);
    }
    Epilogue epilogue;
    const int output = c.fusion.absorb_activation(n.output, epilogue);
    if (!same_layout(x.dims, x.strides, row_major(x.dims)) || (x.rank() > 2 && c.graph.feeds_conv(output)))
        x = x.rank() > 2 ? c.in_channels_last(x) : c.in_row_major(x);
    const View y = c.allocate_result(x.dims, dense_like(x), output);
    c.emit(c.backend.group_norm(c.tensor(x), groups, c.tensor(gamma).get(), c.tensor(beta).get(),
                                static_cast<float>(eps), epilogue, c.tensor(y)),
           {&x, pointer_to(gamma), pointer_to(beta)}, {&y});
    c.define(output, y);
}

void group_norm(Context& c, const Node& n) {
    if (c.real_operand(0, "input").rank() < 2) throw Unsupported("a norm of a vector");
    normalize_groups(c, n, c.integer(1, "num_groups"), 2, c.real(4, "eps", 1e-5));
}

void instance_norm(Context& c, const Node& n) {
    if (!c.flag(5, "use_input_stats", true)) return batch_norm(c, n);
    const View x = c.real_operand(0, "input");
    if (x.rank() < 3) throw Unsupported("InstanceNorm of single values");
    if (c.has(3, "running_mean") || c.has(4, "running_var"))
        throw Unsupported("InstanceNorm that changes its running statistics");
    normalize_groups(c, n, x.dims[1], 1, c.real(7, "eps", 1e-5));
}

void embedding(Context& c, const Node& n) {
    const View table = c.operand(0, "weight");
    View index = c.operand(1, "indices");
    if (table.dtype != DType::f32 || table.rank() != 2) throw Unsupported("an embedding that is not float32");
    if (index.dtype == DType::s32) index = c.copied(index, dense_like(index), DType::s64, std::nullopt);
    if (index.dtype != DType::s64) throw Unsupported("an embedding whose index is no integer");
    index = c.in_row_major(index);
    Dims dims = index.dims;
    dims.push_back(table.dims[1]);
    View y = c.allocate_result(dims, row_major(dims), n.output);
    c.emit(c.backend.gather(c.tensor(table), c.tensor(index), c.tensor(y)), {&table, &index}, {&y});
    c.define(n.output, y);
}

}  // namespace

const OpRows& float_math_ops() {
    static const OpRows rows = {
        {"mean", with<reduce, Reduction::mean>},
        {"sum", with<reduce, Reduction::sum>},
        {"amax", with<reduce, Reduction::max>},
        {"amin", with<reduce, Reduction::min>},
        {"linalg_vector_norm", vector_norm},
        {"softmax", with<softmax, true>, Role::softmax},
        {"_softmax", with<softmax, false>},
        {"layer_norm", layer_norm},
        {"rms_norm", rms_norm},
        {"batch_norm", batch_norm},
        {"group_norm", group_norm},
        {"instance_norm", instance_norm},
        {"embedding", embedding},
    };
    return rows;
}

}  // namespace quantflow::lowering
