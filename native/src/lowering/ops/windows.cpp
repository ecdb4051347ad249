#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

void pad(Context& c, const Node& n, const Arg* mode, std::size_t value_at) {
    View x = c.operand(0, "self");
    const Dims pads = c.integers(1, "pad");
    const Word* word = mode == nullptr ? nullptr : mode->as<Word>();
    if (word != nullptr && word->name != "constant") throw Unsupported("padding other than constant");
    double value = c.real(value_at, "value", 0.0);
    if (pads.size() > 2 * x.dims.size() || pads.size() % 2 != 0) throw Error("pad does not fit its input");
    const bool is_code = x.q && !x.is_real, is_real = x.q || x.dtype == DType::f32;
    if (is_code && !(value >= -128 && value <= 255 && value == std::floor(value)))
        throw Error("padding with " + std::to_string(value) + ", which is no code");
    if (!is_real && !(std::abs(value) <= 127 && value == std::floor(value)))
        throw Unsupported("integers padded with this number");
    if (x.is_real && !std::isfinite(value)) x = c.plain(x);  // codes hold no such number
    Dims dims = x.dims;
    Dims before(x.dims.size(), 0);
    for (std::size_t i = 0; i < pads.size() / 2; ++i) {
        const std::size_t at = x.dims.size() - 1 - i;
        const std::int64_t left = pads[2 * i], right = pads[2 * i + 1];
        if (std::min(left, right) < -kMaxExtent || std::max(left, right) > kMaxExtent)
            throw Error("padding of " + std::to_string(left) + " and " + std::to_string(right));
        if (x.dims[at] + std::min<std::int64_t>(0, left) + std::min<std::int64_t>(0, right) < 0)
            throw Error("padding takes more away than there is");
        x = sliced(x, static_cast<int>(at), std::max<std::int64_t>(0, -left),
                   x.dims[at] + std::min<std::int64_t>(0, right), 1);
        before[at] = std::max<std::int64_t>(0, left);
        dims[at] = before[at] + x.dims[at] + std::max<std::int64_t>(0, right);
    }
    if (x.q && !x.is_real) {  // the program's fill is a code
        value += c.graph.stored_as(n.output).shift;
    } else if (x.q) {
        const double code = std::nearbyint(value / x.q->scale) + x.q->zero_point;
        value = std::clamp<double>(code, x.q->qmin, x.q->qmax);
    }
    if (value == (x.q ? x.q->zero_point : 0) && c.fusion.leave_border(n.output, x.dims, before, dims))
        return c.define(n.output, x);
    View y = c.allocate_like(x, dims, x.count() == 0 ? row_major(dims) : dense_like(x, dims));
    c.emit(c.backend.fill(value, c.plain_tensor(y)), {}, {&y});
    View inside = y;
    for (std::size_t i = 0; i < dims.size(); ++i)
        inside = sliced(inside, static_cast<int>(i), before[i], before[i] + x.dims[i], 1);
    c.put(x, inside);
    c.define(n.output, y);
}

// (batch, channels, *spatial): pools of PyTorch also take tensors without a batch.
View with_batch(const View& x, std::size_t spatial, bool& added) {
    View v = x;
    added = v.dims.size() == spatial + 1;
    if (added && v.count() == 0) throw Unsupported("a pool of nothing");
    if (added) insert_dim(v, 0, v.count());
    if (v.dims.size() != spatial + 2) throw Error("a pool over another number of dimensions");
    return v;
}

void pooled(Context& c, const Node& n, const PoolGeometry& g, const View& given, const Dims& dims, bool added) {
    View x = given;
    if (!is_dense(x)) x = c.in_channels_last(x);
    const Dims strides = dense_like(x, dims);
    View y;
    if (g.is_max && x.q && x.is_real) {  // max of codes is codes of the max
        y = c.allocate(x.dtype, dims, strides, x.q, true);
    } else {
        y = c.allocate_result(dims, strides, n.output);
        if (g.is_max && !x.q && y.q) y = c.allocate(DType::f32, dims, y.strides);
    }
    c.emit(c.backend.pool(g, c.tensor(x), c.tensor(y)), {&x}, {&y});
    if (added) erase_dim(y, 0);
    c.define(n.output, y);
}

void pad_in_mode(Context& c, const Node& n) { pad(c, n, c.argument(2, "mode"), 3); }
void pad_with_constant(Context& c, const Node& n) { pad(c, n, nullptr, 2); }

void pool(Context& c, const Node& n, bool is_max, std::size_t spatial) {
    bool added = false;
    View x = with_batch(c.real_operand(0, "self"), spatial, added);
    PoolGeometry g;
    g.is_max = is_max;
    g.kernel = spread(c.integers(1, "kernel_size"), spatial);
    Dims stride = c.integers(2, "stride", Dims{});
    g.stride = stride.empty() ? g.kernel : spread(stride, spatial);
    g.padding = spread(c.integers(3, "padding", Dims{0}), spatial);
    g.dilation = is_max ? spread(c.integers(4, "dilation", Dims{1}), spatial) : Dims(spatial, 1);
    const bool ceil = c.flag(is_max ? 5 : 4, "ceil_mode", false);
    if (!is_max) {
        g.count_include_pad = c.flag(5, "count_include_pad", true);
        g.divisor_override = c.integer(6, "divisor_override", 0);
        if (c.has(6, "divisor_override") && g.divisor_override == 0) throw Error("a pool that divides by 0");
        if (spatial == 1 && c.has(6, "divisor_override")) throw Error("avg_pool1d has no divisor");
    }
    Dims dims = x.dims;
    for (std::size_t i = 0; i < spatial; ++i) {
        for (const auto v : {g.stride.at(i), g.kernel.at(i), g.dilation.at(i)})
            if (v < 1) throw Error("a pool window of size or step " + std::to_string(v));
        if (std::max({g.stride[i], g.kernel[i], g.dilation[i]}) > kMaxExtent)
            throw Unsupported("a pool window of a size or step this large");
        if (g.padding.at(i) < 0 || g.padding[i] > g.kernel[i] / 2)
            throw Error("pool padding must be at most half of the window");
        const std::int64_t room = x.dims[i + 2] + 2 * g.padding[i] - (g.dilation[i] * (g.kernel[i] - 1) + 1);
        if (room < 0) throw Error("its input is smaller than its window");
        std::int64_t out = (ceil ? (room + g.stride[i] - 1) / g.stride[i] : room / g.stride[i]) + 1;
        if (ceil && (out - 1) * g.stride[i] >= x.dims[i + 2] + g.padding[i]) --out;
        if (x.dims[i + 2] == 0) throw Unsupported("a pool of nothing");
        dims[i + 2] = out;
    }
    checked_count(dims);
    pooled(c, n, g, x, dims, added);
}

void adaptive_pool(Context& c, const Node& n, std::size_t spatial) {
    bool added = false;
    View x = with_batch(c.real_operand(0, "self"), spatial, added);
    const Arg* sizes = c.argument(1, "output_size");
    Dims dims = x.dims;
    if (sizes == nullptr) throw Unsupported("a pool without a size");
    if (const auto* items = sizes->as<Args>()) {
        if (items->size() != spatial) throw Error("a pool to another number of sizes");
        for (std::size_t i = 0; i < spatial; ++i)
            if (!(*items)[i].is_none()) dims[i + 2] = as_integer(c.evaluated((*items)[i]), "output_size");
    } else {
        for (std::size_t i = 0; i < spatial; ++i) dims[i + 2] = as_integer(c.evaluated(*sizes), "output_size");
    }
    PoolGeometry g;
    g.is_max = false;
    g.is_adaptive = true;
    for (std::size_t i = 0; i < spatial; ++i)
        if (x.dims[i + 2] == 0) throw Unsupported("a pool of nothing");
    checked_count(dims);
    pooled(c, n, g, x, dims, added);
}

void upsample(Context& c, const Node& n, Interpolation how, std::size_t spatial) {
    const bool bilinear = how == Interpolation::bilinear;
    const View x = c.operand(0, "self");
    if (x.dims.size() != spatial + 2) throw Error("an image of another number of dimensions");
    if (bilinear && !x.q && x.dtype != DType::f32) throw Unsupported("interpolation of integers");
    const bool is_vec = n.target.find(".vec") != std::string::npos;
    const bool align = bilinear && c.flag(2, "align_corners", false);
    const std::size_t scales_at = bilinear ? 3 : 2;
    std::vector<double> given;
    if (is_vec) {
        if (c.has(scales_at, "scale_factors")) {
            const Val factors = c.evaluated(*c.argument(scales_at, "scale_factors"));
            if (const auto* items = factors.as<Vals>())
                for (const Val& s : *items) given.push_back(as_real(s, "scale"));
        }
    } else {
        for (std::size_t i = 0; i < spatial; ++i)
            if (scales_at + i < n.args.size() && !n.args[scales_at + i].is_none())
                given.push_back(as_real(c.evaluated(n.args[scales_at + i]), "scale"));
    }
    for (const double s : given)
        if (!(s > 0) || s > 1e6) throw Unsupported("a scale of " + std::to_string(s));
    if (!is_vec && !given.empty() && given.size() != spatial) throw Unsupported("a scale along some dimensions only");
    Dims dims = x.dims;
    if (c.has(1, "output_size")) {
        const Dims sizes = c.integers(1, "output_size");
        if (sizes.size() != spatial || (is_vec && !given.empty())) throw Error("a size of other dimensions, or two sizes");
        for (std::size_t i = 0; i < spatial; ++i) dims[i + 2] = sizes[i];
    } else {
        if (given.size() != spatial) throw Error("scales of another number of dimensions");
        for (std::size_t i = 0; i < spatial; ++i)
            dims[i + 2] = static_cast<std::int64_t>(std::floor(static_cast<double>(x.dims[i + 2]) * given[i]));
    }
    checked_count(dims);
    for (std::size_t i = 0; i < spatial; ++i)
        if (x.dims[i + 2] == 0 || dims[i + 2] == 0) throw Unsupported("an image without pixels");
    if (dims[1] == 0) throw Unsupported("an image without channels");
    std::vector<double> steps;
    for (std::size_t i = 0; i < spatial; ++i) {
        const double in = static_cast<double>(x.dims[i + 2]), out = static_cast<double>(dims[i + 2]);
        if (align)
            steps.push_back(out > 1 ? (in - 1) / (out - 1) : 0.0);
        else
            steps.push_back(given.size() == spatial && given[i] > 0 ? 1.0 / given[i] : in / out);
    }
    const View source = is_dense(x) ? x : c.in_row_major(x);
    const Dims strides = dense_like(source, dims);
    View y = !bilinear ? c.allocate(source.dtype, dims, strides, source.q, source.is_real)
                       : c.allocate_result(dims, strides, n.output);
    c.emit(c.backend.upsample(how, align, steps, c.tensor(source), c.tensor(y)),
         {&source}, {&y});
    c.define(n.output, y);
}

}  // namespace

const OpRows& window_ops() {
    static const OpRows rows = {
        {"pad", pad_in_mode},
        {"constant_pad_nd", pad_with_constant},
        {"max_pool1d", with<pool, true, 1>},
        {"max_pool2d", with<pool, true, 2>},
        {"max_pool3d", with<pool, true, 3>},
        {"avg_pool1d", with<pool, false, 1>},
        {"avg_pool2d", with<pool, false, 2>},
        {"avg_pool3d", with<pool, false, 3>},
        {"adaptive_avg_pool1d", with<adaptive_pool, 1>},
        {"adaptive_avg_pool2d", with<adaptive_pool, 2>},
        {"adaptive_avg_pool3d", with<adaptive_pool, 3>},
        {"upsample_nearest1d", with<upsample, Interpolation::nearest, 1>},
        {"upsample_nearest2d", with<upsample, Interpolation::nearest, 2>},
        {"upsample_nearest3d", with<upsample, Interpolation::nearest, 3>},
        {"upsample_bilinear2d", with<upsample, Interpolation::bilinear, 2>},
    };
    return rows;
}

}  // namespace quantflow::lowering
