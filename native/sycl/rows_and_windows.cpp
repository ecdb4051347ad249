// Steps that combine elements of a row or a window, by custom kernels.
#include <cmath>
#include <limits>

#include "steps.hpp"

namespace quantflow::xpu {
namespace {

static_assert(kMean == static_cast<int>(Reduction::mean) && kMax == static_cast<int>(Reduction::max) &&
              kMin == static_cast<int>(Reduction::min));

Dims without(const Dims& values, std::size_t axis) {
    Dims rest = values;
    rest.erase(rest.begin() + static_cast<std::ptrdiff_t>(axis));
    return rest;
}

// One row per element of `dims`.
Rows make_rows(const Dims& dims, const std::vector<const Dims*>& strides, std::int64_t n,
               const std::vector<std::int64_t>& steps) {
    if (n > std::numeric_limits<std::int32_t>::max()) throw Unsupported("rows of more than 2**31 elements");
    Rows rows{};
    rows.space = make_space(dims, strides, 1);
    rows.n = n;
    for (std::size_t i = 0; i < steps.size(); ++i) rows.stride[i] = steps[i];
    return rows;
}

std::size_t spatial(const Tensor& t) {
    if (t.rank() < 3 || t.rank() > 5)
        throw Unsupported("images have 1 to 3 spatial dimensions, not the shape " + text_of(t.dims));
    return t.dims.size() - 2;
}

// 1 to 3 values, one per spatial dimension, as (depth, height, width).
template <typename T>
void spread(const T& values, int fill, int (&to)[3]) {
    const std::size_t missing = 3 - values.size();
    for (std::size_t d = 0; d < 3; ++d) to[d] = d < missing ? fill : static_cast<int>(values[d - missing]);
}

void spread_strides(const Tensor& t, std::int64_t (&to)[5]) {
    const std::size_t missing = 3 - spatial(t);
    to[0] = t.strides[0];
    to[1] = t.strides[1];
    for (std::size_t d = 0; d < 3; ++d) to[2 + d] = d < missing ? 0 : t.strides[2 + d - missing];
}

Image make_image(const Tensor& x, const Tensor& y) {
    if (x.count() >= std::int64_t{1} << 31 || y.count() >= std::int64_t{1} << 31)
        throw Unsupported("the SYCL kernels take images of less than 2**31 elements");
    Image image{};
    const std::size_t missing = 3 - spatial(y);
    for (std::size_t d = 0; d < 5; ++d)
        image.extent[d] = static_cast<unsigned>(d < 2 ? y.dims[d] : d - 2 < missing ? 1 : y.dims[d - missing]);
    spread_strides(x, image.x_stride);
    spread_strides(y, image.y_stride);
    // Of 3 channels, lanes along them would leave 13 of 16 idle.
    image.lane_is_channel = y.dims[1] >= 8 && x.strides[1] == 1 && y.strides[1] == 1;
    return image;
}

Dims spatial_dims(const Tensor& t) { return Dims(t.dims.begin() + 2, t.dims.end()); }

}  // namespace

StepPtr make_softmax(Device& device, const Tensor& x, int axis, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    const auto at = static_cast<std::size_t>(axis < 0 ? axis + x.rank() : axis);
    if (at + 1 == x.dims.size())
        if (StepPtr step = try_softmax(device, x, y)) return step;
    const Dims dims = without(x.dims, at), sx = without(x.strides, at), sy = without(y.strides, at);
    const Rows rows = make_rows(dims, {&sx, &sy}, x.dims[at], {x.strides[at], y.strides[at]});
    return launch(device, "qf_softmax", row_range_of(device, rows.space), x.place, y.place, rows, value_of(x),
                  value_of(y));
}

StepPtr make_masked_softmax(Device& device, const Tensor& scores, const Tensor* mask, bool causal) {
    if (scores.count() == 0) return std::make_unique<NoStep>();
    const std::size_t last = scores.dims.size() - 1;
    const Dims strides = row_major(scores.dims);
    Dims dims = without(scores.dims, last), s = without(strides, last), m(last, 0);
    std::int64_t step = 0;
    if (mask != nullptr) {
        m = without(mask->strides, last);
        step = mask->strides[last];
    }
    // A causal row must know its position: batch dimensions are merged among themselves only.
    Rows rows{};
    const std::int64_t length = dims.back(), along = s.back(), mask_along = m.back();
    dims.pop_back();
    s.pop_back();
    m.pop_back();
    const Space batch = make_space(dims, {&s, &s, &m}, 1);
    if (batch.rank > 5) throw Unsupported("attention: more than 5 batch dimensions that can't be merged");
    rows.space = batch;
    for (int d = 5; d > 0; --d) {
        rows.space.extent[d] = batch.extent[d - 1];
        for (int n = 0; n < 3; ++n) rows.space.stride[n][d] = batch.stride[n][d - 1];
    }
    rows.space.extent[0] = static_cast<unsigned>(length);
    for (int n = 0; n < 2; ++n) rows.space.stride[n][0] = along;
    rows.space.stride[2][0] = mask_along;
    rows.n = scores.dims[last];
    rows.stride[0] = rows.stride[1] = 1;
    rows.stride[2] = step;
    return launch(device, "qf_masked_softmax", row_range_of(device, rows.space), scores.place,
                  mask == nullptr ? Place{} : mask->place, rows, static_cast<int>(causal),
                  static_cast<int>(mask == nullptr ? DType::f32 : mask->dtype));
}

StepPtr make_layer_norm(Device& device, const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps,
                        bool is_rms, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    const std::size_t last = x.dims.size() - 1;
    const Dims dims = without(x.dims, last), sx = without(x.strides, last), sy = without(y.strides, last);
    const Rows rows = make_rows(dims, {&sx, &sy}, x.dims[last], {x.strides[last], y.strides[last]});
    return launch(device, "qf_layer_norm", row_range_of(device, rows.space), x.place,
                  gamma == nullptr ? Place{} : gamma->place, beta == nullptr ? Place{} : beta->place, y.place, rows,
                  eps, static_cast<int>(is_rms), value_of(x), value_of(y));
}

StepPtr make_reduce(Device& device, Reduction op, const Tensor& x, const std::vector<int>& axes, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    if (!is_real(x)) throw Unsupported("reduce: x is f32 or codes");
    std::vector<bool> is_reduced(x.dims.size(), false);
    for (int axis : axes) is_reduced[static_cast<std::size_t>(axis < 0 ? axis + x.rank() : axis)] = true;
    Dims kept, kept_x, kept_y, reduced, reduced_x;
    ReduceArg arg{};
    arg.n = 1;
    for (std::size_t d = 0; d < x.dims.size(); ++d) {
        if (is_reduced[d]) {
            arg.n *= x.dims[d];
            reduced.push_back(x.dims[d]);
            reduced_x.push_back(x.strides[d]);
        } else {
            kept.push_back(x.dims[d]);
            kept_x.push_back(x.strides[d]);
            kept_y.push_back(y.strides[d]);
        }
    }
    arg.space = make_space(kept, {&kept_x, &kept_y}, 1);
    const Space sum = make_space(reduced, {&reduced_x}, 0);
    if (sum.rank > 4) throw Unsupported("reduce: more than 4 dimensions that can't be merged are reduced");
    for (int d = 0; d < 4; ++d) {
        arg.extent[d] = sum.extent[d];
        arg.stride[d] = sum.stride[0][d];
    }
    arg.op = static_cast<int>(op);
    arg.x = value_of(x);
    arg.y = value_of(y);
    const bool by_columns = arg.space.rank > 0 && arg.space.stride[0][0] == 1 && arg.space.extent[0] >= 16;
    if (by_columns)
        return launch(device, "qf_reduce_columns", range_of(device, arg.space), x.place, y.place, arg);
    return launch(device, "qf_reduce_rows", row_range_of(device, arg.space), x.place, y.place, arg);
}

StepPtr make_pool(Device& device, const PoolGeometry& g, const Tensor& x, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    if (g.is_max && !are_coded_alike(x, y))
        throw Unsupported("pool: the maximum moves codes, so x and y are coded alike");
    if (!is_real(x) || !is_real(y)) throw Unsupported("pool: x and y are f32 or codes");
    if (StepPtr step = try_max_pool(device, g, x, y)) return step;
    PoolArg arg{};
    arg.image = make_image(x, y);
    const std::size_t n = spatial(x);
    const Dims ones(n, 1), zeros(n, 0);
    spread(spatial_dims(x), 1, arg.in);
    spread(g.is_adaptive ? ones : g.kernel, 1, arg.kernel);
    spread(g.is_adaptive ? ones : g.stride, 1, arg.stride);
    spread(g.is_adaptive ? zeros : g.padding, 0, arg.padding);
    spread(g.is_adaptive || g.dilation.empty() ? ones : g.dilation, 1, arg.dilation);
    std::int64_t window = 1;
    for (int d = 0; d < 3; ++d) window *= g.is_adaptive ? arg.in[d] : arg.kernel[d];
    if (window > 1 << 23) throw Unsupported("pool: more than 2**23 elements in a window");
    arg.is_max = g.is_max;
    arg.count_include_pad = g.count_include_pad;
    arg.divisor_override = static_cast<int>(g.divisor_override);
    arg.is_adaptive = g.is_adaptive;
    arg.x = value_of(x);
    arg.y = value_of(y);
    return launch(device, "qf_pool", range_of(device, arg.image), x.place, y.place, arg);
}

StepPtr make_upsample(Device& device, Interpolation how, bool align_corners, const std::vector<double>& scales,
                      const Tensor& x, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    const Image image = make_image(x, y);
    const std::size_t n = spatial(x);
    if (how == Interpolation::nearest) {
        if (!are_coded_alike(x, y) || size_of(x.dtype) > 4)
            throw Unsupported("upsample: nearest moves codes or f32, so x and y are coded alike");
        std::vector<int> index(3 - n, 0);
        for (std::size_t d = 0; d < n; ++d)
            for (std::int64_t i = 0; i < y.dims[2 + d]; ++i) {
                // In float, as PyTorch does: 0.1f steps land on other rows than 0.1 steps do.
                const float at = std::floor(static_cast<float>(i) * static_cast<float>(scales[d]));
                index.push_back(static_cast<int>(std::min<std::int64_t>(static_cast<std::int64_t>(at),
                                                                        x.dims[2 + d] - 1)));
            }
        return launch(device, "qf_nearest", range_of(device, image), x.place, y.place,
                      device.constant(index.data(), index.size() * sizeof(int)), image,
                      static_cast<int>(size_of(x.dtype)));
    }
    if (n != 2) throw Unsupported("upsample: bilinear is for 2 spatial dimensions");
    std::vector<int> index;
    std::vector<float> weight;
    for (std::size_t d = 0; d < 2; ++d)
        for (std::int64_t i = 0; i < y.dims[2 + d]; ++i) {
            const auto scale = static_cast<float>(scales[d]);
            const float at = align_corners ? scale * static_cast<float>(i)
                                           : std::max(scale * (static_cast<float>(i) + 0.5f) - 0.5f, 0.0f);
            const auto last = static_cast<int>(x.dims[2 + d] - 1);
            const int low = std::min(static_cast<int>(at), last);
            index.push_back(low);
            index.push_back(std::min(low + 1, last));
            weight.push_back(std::min(std::max(at - static_cast<float>(low), 0.0f), 1.0f));
        }
    return launch(device, "qf_bilinear", range_of(device, image), x.place, y.place,
                  device.constant(index.data(), index.size() * sizeof(int)),
                  device.constant(weight.data(), weight.size() * sizeof(float)), image, value_of(x), value_of(y));
}

StepPtr make_direct_conv(Device& device, const Weights& w, const ConvGeometry& g, const Tensor& x,
                         const Tensor* residual, const Epilogue& e, const Tensor& y) {
    ConvArg arg{};
    arg.image = make_image(x, y);
    arg.image.lane_is_channel = 1;
    spread(spatial_dims(x), 1, arg.in);
    spread(Dims(w.dims.begin() + 2, w.dims.end()), 1, arg.kernel);
    spread(g.stride, 1, arg.stride);
    spread(g.padding, 0, arg.padding);
    spread(g.dilation, 1, arg.dilation);
    arg.in_per_group = static_cast<int>(w.dims[1]);
    arg.out = static_cast<int>(w.dims[0]);
    arg.out_per_group = static_cast<int>(w.dims[0] / g.groups);
    arg.zero_point = x.q->zero_point;
    arg.y = value_of(y);
    arg.epilogue = epilogue_of(e);
    if (residual != nullptr) {
        spread_strides(*residual, arg.residual_stride);
        arg.residual = value_of(*residual);
    }
    const std::size_t out = static_cast<std::size_t>(arg.out), in = static_cast<std::size_t>(arg.in_per_group);
    const std::size_t taps = static_cast<std::size_t>(arg.kernel[0]) * arg.kernel[1] * arg.kernel[2];
    std::vector<std::int8_t> codes(out * in * taps);
    for (std::size_t o = 0; o < out; ++o)
        for (std::size_t i = 0; i < in; ++i)
            for (std::size_t t = 0; t < taps; ++t) codes[(t * in + i) * out + o] = w.codes[(o * in + i) * taps + t];
    std::vector<float> scale(out), bias(out, 0.0f);
    for (std::size_t o = 0; o < out; ++o) {
        scale[o] = w.scale[w.scales == 1 ? 0 : o] * x.q->scale;
        if (w.bias != nullptr) bias[o] = w.bias[o];
    }
    return launch(device, "qf_direct_conv", range_of(device, arg.image), x.place,
                  device.constant(codes.data(), codes.size()), device.constant(scale.data(), out * sizeof(float)),
                  device.constant(bias.data(), out * sizeof(float)), residual == nullptr ? Place{} : residual->place,
                  y.place, arg, static_cast<int>(x.dtype));
}

StepPtr make_direct_matmul(Device& device, const Tensor& a, const Tensor& b, float scale, const Tensor& y) {
    const std::size_t row = y.dims.size() - 2, column = row + 1;
    Dims of_a = a.strides, of_b = b.strides;
    of_a[column] = 0;
    of_b[row] = 0;
    const Space space = make_space(y.dims, {&of_a, &of_b, &y.strides}, 2);
    return launch(device, "qf_direct_matmul", range_of(device, space), a.place, b.place, y.place, space,
                  a.dims[column], a.strides[column], b.strides[row], scale, value_of(a), value_of(b), value_of(y));
}

}  // namespace quantflow::xpu
