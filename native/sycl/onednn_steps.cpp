// Steps by oneDNN: integer and float sums. Whatever oneDNN does not take, or only by its reference code, goes to the
// direct kernels.
#include <cmath>
#include <optional>
#include <unordered_map>

#include "steps.hpp"

namespace quantflow::xpu {
namespace {

using dnnl::algorithm;
using dnnl::memory;
using dnnl::primitive_attr;
using DataType = memory::data_type;

DataType type_of(const Tensor& t) {
    switch (t.dtype) {
        case DType::f32: return DataType::f32;
        case DType::u8: return DataType::u8;
        case DType::s8: return DataType::s8;
        case DType::s32: return DataType::s32;
        default: throw Unsupported("oneDNN has no data type for this tensor");
    }
}

// A dimension of size 1 may have any stride in a Tensor; oneDNN wants one that overlaps nothing.
memory::desc describe(const Tensor& t) {
    Dims strides = t.strides;
    for (std::size_t i = 0; i < strides.size(); ++i)
        if (t.dims[i] == 1) {
            strides[i] = 1;
            for (std::size_t j = 0; j < strides.size(); ++j)
                if (t.dims[j] != 1) strides[i] = std::max(strides[i], t.strides[j] * t.dims[j]);
        }
    return {t.dims, type_of(t), strides};
}

memory::desc plain(const Dims& dims, DataType type) { return {dims, type, row_major(dims)}; }

// ------------------------------------------------------------------------------------------------ the step

class OneDnnStep final : public Step {
public:
    OneDnnStep(Device& device, const dnnl::primitive_desc_base& desc, const dnnl::primitive& primitive)
        : device_(device), primitive_(primitive), name_(std::string("onednn.") + desc.impl_info_str()) {
        const auto scratchpad = desc.scratchpad_desc();
        if (scratchpad.get_size() > 0) {
            Device::Reservation scratch(device);
            takes_scratch_ = true;
            add(DNNL_ARG_SCRATCHPAD, scratchpad, scratch.take(scratchpad.get_size()));
        }
    }

    // Memory that may move between runs.
    void add(int index, const memory::desc& desc, const Place& place) {
        moving_.push_back({make(index, desc, nullptr), place, nullptr});
    }
    // Memory that stays.
    void add(int index, const memory::desc& desc, Constant constant) {
        make(index, desc, constant.get());
        constants_.push_back(std::move(constant));
    }
    template <typename T>
    void add_values(int index, const std::vector<T>& values, DataType type, const Dims& dims) {
        add(index, plain(dims, type), device_.constant(values.data(), values.size() * sizeof(T)));
    }
    void add_scale(int argument, float scale) {
        add_values(DNNL_ARG_ATTR_SCALES | argument, std::vector<float>{scale}, DataType::f32, {1});
    }
    void add_zero_point(int argument, std::int32_t zero_point) {
        add_values(DNNL_ARG_ATTR_ZERO_POINTS | argument, std::vector<std::int32_t>{zero_point}, DataType::s32, {1});
    }
    // f32 weights of unchanging content, given row-major as `from`; packed at the first run.
    void add_packed_at_first_run(int index, const memory::desc& from, const Place& place, const memory::desc& to) {
        Constant packed = device_.buffer(to.get_size());
        to_pack_ = ToPack{from, place, make(index, to, packed.get())};
        constants_.push_back(std::move(packed));
    }
    void takes_scratch() { takes_scratch_ = true; }

    void run() override {
        device_.begin(name_);
        try {
            if (takes_scratch_) device_.ensure_scratch();
            for (auto& argument : moving_) {
                std::byte* at = argument.place.get();
                if (at == argument.last) continue;
                argument.object.set_data_handle(at);
                argument.last = at;
            }
            if (to_pack_) {
                memory from = dnnl::sycl_interop::make_memory(
                    to_pack_->from, device_.engine, dnnl::sycl_interop::memory_kind::usm, to_pack_->place.get());
                dnnl::reorder(from, to_pack_->to).execute(device_.stream, from, to_pack_->to);
                device_.queue.wait();
                to_pack_.reset();
            }
            primitive_.execute(device_.stream, arguments_);
        } catch (const dnnl::error& e) {
            throw Error(name_ + " on " + device_.description() + ": " + e.what());
        } catch (const sycl::exception& e) {
            throw Error(name_ + " on " + device_.description() + ": " + e.what());
        }
    }
    std::string kernel() const override { return name_; }

private:
    struct Moving {
        memory object;
        Place place;
        std::byte* last;
    };
    struct ToPack {
        memory::desc from;
        Place place;
        memory to;
    };

    memory make(int index, const memory::desc& desc, std::byte* at) {
        memory object =
            dnnl::sycl_interop::make_memory(desc, device_.engine, dnnl::sycl_interop::memory_kind::usm, at);
        arguments_.insert_or_assign(index, object);
        return object;
    }

    Device& device_;
    dnnl::primitive primitive_;
    std::string name_;
    std::unordered_map<int, memory> arguments_;
    std::vector<Moving> moving_;
    std::vector<Constant> constants_;
    std::optional<ToPack> to_pack_;
    bool takes_scratch_ = false;
};

// oneDNN's reference code is slower than a naive kernel; its name holds "ref".
bool is_fast(const dnnl::primitive_desc_base& desc) {
    return std::string(desc.impl_info_str()).find("ref") == std::string::npos;
}

// The primitive descriptor, or nothing if oneDNN has no fast implementation of it.
template <typename Make>
auto fast(const Make& make) -> std::optional<decltype(make())> {
    try {
        auto desc = make();
        if (is_fast(desc)) return desc;
    } catch (const dnnl::error& e) {
        if (e.status != dnnl_unimplemented && e.status != dnnl_invalid_arguments) throw Error(e.what());
    }
    return std::nullopt;
}

// ------------------------------------------------------------------------------------------------ attributes

// The epilogue in float32, on the real result.
void append(dnnl::post_ops& ops, const Epilogue& e) {
    const float a = e.a, b = e.b;
    switch (e.kind) {
        case Activation::none: break;
#define QF_LIST(...) __VA_ARGS__
#define QF_CASE(name, Name, aten, numbers, exact, real, onednn) \
    case Activation::name: ops.append_eltwise(algorithm::QF_LIST onednn); break;
        QF_ACTIVATIONS(QF_CASE)
#undef QF_CASE
#undef QF_LIST
    }
}

// Codes that use less than their type: clamped in real units, since oneDNN saturates to the type only.
void append_range(dnnl::post_ops& ops, const Tensor& y) {
    if (!y.q) return;
    const int lowest = y.dtype == DType::s8 ? -128 : 0, highest = y.dtype == DType::s8 ? 127 : 255;
    if (y.q->qmin <= lowest && y.q->qmax >= highest) return;
    ops.append_eltwise(algorithm::eltwise_clip, static_cast<float>(y.q->qmin - y.q->zero_point) * y.q->scale,
                       static_cast<float>(y.q->qmax - y.q->zero_point) * y.q->scale);
}

void set_result(primitive_attr& attr, const Tensor& y) {
    if (!y.q) return;
    attr.set_scales_mask(DNNL_ARG_DST, 0);
    if (y.q->zero_point != 0) attr.set_zero_points_mask(DNNL_ARG_DST, 0);
}

void add_result(OneDnnStep& step, const Tensor& y) {
    if (!y.q) return;
    step.add_scale(DNNL_ARG_DST, y.q->scale);
    if (y.q->zero_point != 0) step.add_zero_point(DNNL_ARG_DST, y.q->zero_point);
}

// How a residual reaches the sum.
enum class Residual {
    none,
    in_place,   // it lies where y will: a sum post-op
    binary,     // a binary post-op in the residual's code units
    copied,     // to y's place first, then as in_place
};

// Order of oneDNN: acc * scale_src * scale_wei + bias, post-ops in real units, then / scale_dst + zero_point_dst.
primitive_attr integer_attributes(const Tensor& x, int weight_mask, const Tensor* residual, Residual how,
                                  const Epilogue& e, const Tensor& y) {
    primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    attr.set_scales_mask(DNNL_ARG_WEIGHTS, weight_mask);
    if (x.q->zero_point != 0) attr.set_zero_points_mask(DNNL_ARG_SRC, 0);
    dnnl::post_ops ops;
    if (how == Residual::in_place || (how == Residual::copied && y.q)) {
        ops.append_sum(residual->q->scale, residual->q->zero_point, type_of(*residual));
    } else if (how == Residual::copied) {
        ops.append_sum(1.0f, 0, DataType::f32);
    } else if (how == Residual::binary) {
        // r -> r / s - zp + q -> r + (q - zp) * s
        const QParams& q = *residual->q;
        ops.append_eltwise(algorithm::eltwise_linear, 1.0f / q.scale, static_cast<float>(-q.zero_point));
        ops.append_binary(algorithm::binary_add, describe(*residual));
        ops.append_eltwise(algorithm::eltwise_linear, q.scale, 0);
    }
    append(ops, e);
    append_range(ops, y);
    attr.set_post_ops(ops);
    set_result(attr, y);
    return attr;
}

// Packed as `to` wants them, once for all steps that use the same codes in the same layout.
Constant packed_weights(Device& device, const Weights& w, const memory::desc& from, memory::desc to) {
    auto& known = device.packed[{w.codes, to.get_blob()}];
    if (Constant packed = known.lock()) return packed;
    const Constant codes = device.constant(w.codes, from.get_size());
    Constant packed = device.buffer(to.get_size());
    const auto usm = dnnl::sycl_interop::memory_kind::usm;
    memory source = dnnl::sycl_interop::make_memory(from, device.engine, usm, codes.get());
    memory target = dnnl::sycl_interop::make_memory(to, device.engine, usm, packed.get());
    dnnl::reorder(source, target).execute(device.stream, source, target);
    device.queue.wait();
    known = packed;
    return packed;
}

// The arguments that linear and conv share.
template <typename Desc>
void add_integer_arguments(Device& device, OneDnnStep& step, const Desc& desc, const Weights& w,
                           const memory::desc& codes, const Tensor& x, const memory::desc& bias,
                           const Tensor* residual, Residual how, const Tensor& y) {
    step.add(DNNL_ARG_SRC, desc.src_desc(), x.place);
    step.add(DNNL_ARG_DST, desc.dst_desc(), y.place);
    step.add(DNNL_ARG_WEIGHTS, desc.weights_desc(), packed_weights(device, w, codes, desc.weights_desc()));
    // scale_x * scale_w in float32, as the reference runtime multiplies them.
    std::vector<float> scale(w.scale, w.scale + w.scales);
    for (float& s : scale) s *= x.q->scale;
    step.add_values(DNNL_ARG_ATTR_SCALES | DNNL_ARG_WEIGHTS, scale, DataType::f32, {w.scales});
    if (x.q->zero_point != 0) step.add_zero_point(DNNL_ARG_SRC, x.q->zero_point);
    if (w.bias != nullptr)
        step.add(DNNL_ARG_BIAS, bias,
                 device.constant(w.bias, static_cast<std::size_t>(w.dims[0]) * sizeof(float)));
    if (how == Residual::binary)
        step.add(DNNL_ARG_ATTR_MULTIPLE_POST_OP(1) | DNNL_ARG_SRC_1, describe(*residual), residual->place);
    add_result(step, y);
}

// The residual as it lies in y's memory before the sum: its own codes, or reals.
Tensor landing_of(const Tensor& residual, const Tensor& y) {
    Tensor to = y;
    if (y.q) {
        to.dtype = residual.dtype;
        to.q = residual.q;
    }
    return to;
}

std::vector<Residual> ways_for(const Tensor* residual, const Tensor& y) {
    if (residual == nullptr) return {Residual::none};
    if (is_same_place(*residual, y)) return {Residual::in_place};
    return {Residual::binary, Residual::copied};
}

// A dense copy in scratch memory, appended to `steps`; dtype f32 (dequantized) or as it is.
Tensor dense_copy(Device& device, Device::Reservation& scratch, const Tensor& t, const Dims& strides, bool as_f32,
                  std::vector<StepPtr>& steps);

// Runs ensure_scratch before the steps that use scratch memory.
class ScratchStep final : public Step {
public:
    ScratchStep(Device& device, StepPtr step) : device_(device), step_(std::move(step)) {}
    void run() override {
        device_.ensure_scratch();
        step_->run();
    }
    std::string kernel() const override { return step_->kernel(); }

private:
    Device& device_;
    StepPtr step_;
};

Tensor dense_copy(Device& device, Device::Reservation& scratch, const Tensor& t, const Dims& strides, bool as_f32,
                  std::vector<StepPtr>& steps) {
    Tensor to = t;
    to.strides = strides;
    if (as_f32) {
        to.dtype = DType::f32;
        to.q.reset();
    }
    to.place = scratch.take(static_cast<std::size_t>(to.count() * size_of(to.dtype)));
    steps.push_back(std::make_unique<ScratchStep>(device, make_copy(device, t, to)));
    return to;
}

// ------------------------------------------------------------------------------------------------ convolutions

// Zeros behind x's end in each dimension, as far as the last window reaches.
Dims padding_after(const Weights& w, const ConvGeometry& g, const Tensor& x, const Tensor& y) {
    Dims after;
    for (std::size_t d = 0; d < g.stride.size(); ++d) {
        const std::int64_t extent = g.dilation[d] * (w.dims[2 + d] - 1) + 1;
        after.push_back(std::max<std::int64_t>(
            0, (y.dims[2 + d] - 1) * g.stride[d] + extent - x.dims[2 + d] - g.padding[d]));
    }
    return after;
}

// Where oneDNN's AVX512 code was seen to crash or to sum wrongly (3.12). Its AVX2 and SSE4.1 code of 3.13.2 passed 500
// random geometries each; a step that is needed this rarely is not worth telling them apart.
bool is_unsafe_on_cpu(const Weights& w, const ConvGeometry& g, const Tensor& x, const Tensor& y) {
    const std::size_t n = g.stride.size();
    for (std::size_t d = 0; d < n; ++d) {
        const std::int64_t extent = g.dilation[d] * (w.dims[2 + d] - 1) + 1;
        if (g.padding[d] >= extent || padding_after(w, g, x, y)[d] >= extent) return true;
    }
    if (y.dims.back() == 1 && (g.stride.back() > 1 || g.dilation.back() > 1)) return true;
    return n == 3 && x.dims[2] == 1 && g.padding[0] > 0;
}

}  // namespace

StepPtr make_conv(Device& device, const Weights& w, const ConvGeometry& g, const Tensor& x_any,
                  const Tensor* residual, const Epilogue& e, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    if (!x_any.q) throw Unsupported("conv: x holds codes");
    if (!is_channels_last(y) || (residual != nullptr && !is_channels_last(*residual)))
        throw Unsupported("conv: y and residual are channels_last");
    Device::Reservation scratch(device);
    std::vector<StepPtr> steps;
    Tensor x = x_any;
    if (!is_channels_last(x)) x = dense_copy(device, scratch, x_any, channels_last(x_any.dims), false, steps);
    x.strides = channels_last(x.dims);
    Tensor out = y;
    out.strides = channels_last(y.dims);
    Tensor added;
    if (residual != nullptr) {
        added = *residual;
        added.strides = out.strides;
    }
    const Tensor* const extra = residual == nullptr ? nullptr : &added;

    const bool by_hand = x.count() == 0 || (device.is_cpu && is_unsafe_on_cpu(w, g, x, y));
    Dims weight_dims = w.dims, dilation = g.dilation;
    for (auto& d : dilation) --d;  // oneDNN counts the holes
    int mask = 1;
    if (g.groups > 1) {
        weight_dims[0] /= g.groups;
        weight_dims.insert(weight_dims.begin(), g.groups);
        mask = 3;
    }
    if (w.scales == 1) mask = 0;
    const auto codes = plain(weight_dims, DataType::s8);
    const memory::desc any(weight_dims, DataType::s8, memory::format_tag::any);
    const memory::desc bias = w.bias == nullptr ? memory::desc() : plain({w.dims[0]}, DataType::f32);
    for (const Residual how : by_hand ? std::vector<Residual>{} : ways_for(extra, out)) {
        const auto desc = fast([&] {
            return dnnl::convolution_forward::primitive_desc(
                device.engine, dnnl::prop_kind::forward_inference, algorithm::convolution_direct, describe(x), any,
                bias, describe(out), g.stride, dilation, g.padding, padding_after(w, g, x, y),
                integer_attributes(x, mask, extra, how, e, out));
        });
        if (!desc) continue;
        auto step = std::make_unique<OneDnnStep>(device, *desc, dnnl::convolution_forward(*desc));
        add_integer_arguments(device, *step, *desc, w, codes, x, bias, extra, how, out);
        if (how == Residual::copied) steps.push_back(make_copy(device, added, landing_of(added, out)));
        steps.push_back(std::move(step));
        return in_order("conv", std::move(steps));
    }
    steps.push_back(make_direct_conv(device, w, g, x, extra, e, out));
    return in_order("conv", std::move(steps));
}

StepPtr make_linear(Device& device, const Weights& w, const Tensor& x_any, const Tensor* residual, const Epilogue& e,
                    const Tensor& y_any) {
    if (y_any.count() == 0) return std::make_unique<NoStep>();
    if (!x_any.q) throw Unsupported("linear: x holds codes");
    if (!is_row_major(x_any) || !is_row_major(y_any) || (residual != nullptr && !is_row_major(*residual)))
        throw Unsupported("linear: x, y and residual are row-major");
    const std::int64_t n = w.dims[0], k = w.dims[1], m = y_any.count() / n;
    const auto as_matrix = [](Tensor t, std::int64_t rows, std::int64_t columns) {
        t.dims = {rows, columns};
        t.strides = row_major(t.dims);
        return t;
    };
    const Tensor x = as_matrix(x_any, m, k), y = as_matrix(y_any, m, n);
    Tensor added;
    if (residual != nullptr) added = as_matrix(*residual, m, n);
    const Tensor* const extra = residual == nullptr ? nullptr : &added;
    const memory::desc codes({k, n}, DataType::s8, Dims{1, k});
    const memory::desc any({k, n}, DataType::s8, memory::format_tag::any);
    const memory::desc bias = w.bias == nullptr ? memory::desc() : plain({1, n}, DataType::f32);
    for (const Residual how : k == 0 ? std::vector<Residual>{} : ways_for(extra, y)) {
        const auto desc = fast([&] {
            return dnnl::matmul::primitive_desc(device.engine, describe(x), any, bias, describe(y),
                                                integer_attributes(x, w.scales == 1 ? 0 : 2, extra, how, e, y));
        });
        if (!desc) continue;
        auto step = std::make_unique<OneDnnStep>(device, *desc, dnnl::matmul(*desc));
        add_integer_arguments(device, *step, *desc, w, codes, x, bias, extra, how, y);
        std::vector<StepPtr> steps;
        if (how == Residual::copied) steps.push_back(make_copy(device, added, landing_of(added, y)));
        steps.push_back(std::move(step));
        return in_order("linear", std::move(steps));
    }
    // As a convolution over an image of one pixel per row.
    const auto as_image = [](Tensor t) {
        t.dims.push_back(1);
        t.strides.push_back(1);
        return t;
    };
    Weights image = w;
    image.dims.push_back(1);
    const Tensor xi = as_image(x), yi = as_image(y);
    if (extra != nullptr) added = as_image(added);
    return make_direct_conv(device, image, {{1}, {0}, {1}, 1}, xi, extra, e, yi);
}

StepPtr make_float_linear(Device& device, const Tensor& x_any, const Tensor& w, const Tensor* bias,
                          const Tensor& y_any) {
    if (y_any.count() == 0) return std::make_unique<NoStep>();
    const std::int64_t n = w.dims.at(0), k = w.dims.at(1), m = y_any.count() / n;
    if (!is_row_major(x_any) || !is_row_major(y_any) || !is_row_major(w))
        throw Unsupported("float_linear: x, w and y are row-major");
    Tensor x = x_any, y = y_any;
    x.dims = {m, k};
    y.dims = {m, n};
    x.strides = row_major(x.dims);
    y.strides = row_major(y.dims);
    if (k == 0) {
        if (bias == nullptr) return make_fill(device, 0, y);
        Tensor row = *bias;
        row.dims = {m, n};
        row.strides = {0, 1};
        return make_copy(device, row, y);
    }
    const memory::desc any({k, n}, DataType::f32, memory::format_tag::any);
    const memory::desc added = bias == nullptr ? memory::desc() : plain({1, n}, DataType::f32);
    primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const dnnl::matmul::primitive_desc desc(device.engine, describe(x), any, added, describe(y), attr);
    auto step = std::make_unique<OneDnnStep>(device, desc, dnnl::matmul(desc));
    step->add(DNNL_ARG_SRC, desc.src_desc(), x.place);
    step->add(DNNL_ARG_DST, desc.dst_desc(), y.place);
    step->add_packed_at_first_run(DNNL_ARG_WEIGHTS, memory::desc({k, n}, DataType::f32, Dims{1, k}), w.place,
                                  desc.weights_desc());
    if (bias != nullptr) step->add(DNNL_ARG_BIAS, added, bias->place);
    return step;
}

StepPtr try_max_pool(Device& device, const PoolGeometry& g, const Tensor& x_any, const Tensor& y_any) {
    // Of f32 too, but oneDNN's maximum drops a NaN.
    if (!g.is_max || !x_any.q || !is_channels_last(x_any) || !is_channels_last(y_any)) return nullptr;
    Tensor x = x_any, y = y_any;
    x.strides = channels_last(x.dims);
    y.strides = channels_last(y.dims);
    Dims dilation = g.dilation, after;
    if (dilation.empty()) dilation.assign(g.kernel.size(), 1);
    for (std::size_t d = 0; d < g.kernel.size(); ++d) {
        const std::int64_t extent = dilation[d] * (g.kernel[d] - 1) + 1;
        if (g.padding[d] >= extent) return nullptr;
        --dilation[d];
        // With ceil_mode the last window may reach further than `padding`.
        after.push_back(std::max<std::int64_t>(
            0, (y.dims[2 + d] - 1) * g.stride[d] + extent - x.dims[2 + d] - g.padding[d]));
    }
    primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const auto desc = fast([&] {
        return dnnl::pooling_forward::primitive_desc(device.engine, dnnl::prop_kind::forward_inference,
                                                     algorithm::pooling_max, describe(x), describe(y), g.stride,
                                                     g.kernel, dilation, g.padding, after, attr);
    });
    if (!desc) return nullptr;
    auto step = std::make_unique<OneDnnStep>(device, *desc, dnnl::pooling_forward(*desc));
    step->add(DNNL_ARG_SRC, desc->src_desc(), x.place);
    step->add(DNNL_ARG_DST, desc->dst_desc(), y.place);
    return step;
}

StepPtr try_softmax(Device& device, const Tensor& x_any, const Tensor& y_any) {
    const auto is_plain = [](const Tensor& t) { return t.dtype == DType::f32 && !t.q && is_row_major(t); };
    if (!is_plain(x_any) || !is_plain(y_any)) return nullptr;
    Tensor x = x_any, y = y_any;
    x.dims = y.dims = {x_any.count() / x_any.dims.back(), x_any.dims.back()};
    x.strides = y.strides = row_major(x.dims);
    primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const auto desc = fast([&] {
        return dnnl::softmax_forward::primitive_desc(device.engine, dnnl::prop_kind::forward_inference,
                                                     algorithm::softmax_accurate, describe(x), describe(y), 1, attr);
    });
    if (!desc) return nullptr;
    auto step = std::make_unique<OneDnnStep>(device, *desc, dnnl::softmax_forward(*desc));
    step->add(DNNL_ARG_SRC, desc->src_desc(), x.place);
    step->add(DNNL_ARG_DST, desc->dst_desc(), y.place);
    return step;
}

// ------------------------------------------------------------------------------------------------ matmul

namespace {

// What oneDNN's matmul reads as it lies: one of the last two dimensions dense, no element twice.
bool is_readable(const Tensor& t) {
    const std::size_t n = t.dims.size();
    for (std::size_t i = 0; i < n; ++i)
        if (t.dims[i] != 1 && t.strides[i] == 0) return false;
    const auto dense = [&](std::size_t i) { return t.dims[i] == 1 || t.strides[i] == 1; };
    return dense(n - 1) || dense(n - 2);
}

// y = factor * a @ b by one primitive, if oneDNN has a fast one.
StepPtr try_matmul(Device& device, const Tensor& a, const Tensor& b, float alpha, const Tensor& y) {
    primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    dnnl::post_ops ops;
    const bool is_integer = a.q.has_value();
    if (is_integer) {
        attr.set_scales_mask(DNNL_ARG_SRC, 0);
        if (a.q->zero_point != 0) attr.set_zero_points_mask(DNNL_ARG_SRC, 0);
        if (b.q->zero_point != 0) attr.set_zero_points_mask(DNNL_ARG_WEIGHTS, 0);
    } else if (alpha != 1.0f) {
        ops.append_eltwise(algorithm::eltwise_linear, alpha, 0);
    }
    append_range(ops, y);
    attr.set_post_ops(ops);
    set_result(attr, y);
    const auto desc =
        fast([&] { return dnnl::matmul::primitive_desc(device.engine, describe(a), describe(b), describe(y), attr); });
    if (!desc) return nullptr;
    auto step = std::make_unique<OneDnnStep>(device, *desc, dnnl::matmul(*desc));
    step->add(DNNL_ARG_SRC, desc->src_desc(), a.place);
    step->add(DNNL_ARG_WEIGHTS, desc->weights_desc(), b.place);
    step->add(DNNL_ARG_DST, desc->dst_desc(), y.place);
    if (is_integer) {
        step->add_scale(DNNL_ARG_SRC, a.q->scale * b.q->scale * alpha);
        if (a.q->zero_point != 0) step->add_zero_point(DNNL_ARG_SRC, a.q->zero_point);
        if (b.q->zero_point != 0) step->add_zero_point(DNNL_ARG_WEIGHTS, b.q->zero_point);
    }
    add_result(*step, y);
    return step;
}

}  // namespace

StepPtr make_matmul(Device& device, const Tensor& a_any, const Tensor& b_any, float alpha, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    if (a_any.q.has_value() != b_any.q.has_value()) throw Unsupported("matmul: both operands are codes, or both f32");
    if (a_any.count() == 0) return make_fill(device, 0, y);
    Device::Reservation scratch(device);
    std::vector<StepPtr> steps;
    Tensor a = a_any, b = b_any;
    if (!is_readable(a)) a = dense_copy(device, scratch, a_any, row_major(a_any.dims), false, steps);
    if (!is_readable(b)) b = dense_copy(device, scratch, b_any, row_major(b_any.dims), false, steps);
    // NaN has a code of its own rule, which oneDNN's conversion does not know: float sums are quantized by our kernel.
    if (a.q || !y.q)
        if (StepPtr step = try_matmul(device, a, b, alpha, y)) {
            steps.push_back(std::move(step));
            return in_order("matmul", std::move(steps));
        }
    Tensor real = y;
    if (y.q || !is_row_major(y)) {
        real.dtype = DType::f32;
        real.q.reset();
        real.strides = row_major(y.dims);
        real.place = scratch.take(static_cast<std::size_t>(real.count()) * sizeof(float));
    }
    StepPtr step = try_matmul(device, a, b, alpha, real);
    if (step == nullptr) {
        const float scale = a.q ? a.q->scale * b.q->scale * alpha : alpha;
        steps.push_back(make_direct_matmul(device, a, b, scale, y));
        return std::make_unique<ScratchStep>(device, in_order("matmul", std::move(steps)));
    }
    steps.push_back(std::make_unique<ScratchStep>(device, std::move(step)));
    if (real.place.base != y.place.base || real.place.offset != y.place.offset)
        steps.push_back(make_copy(device, real, y));
    return in_order("matmul", std::move(steps));
}

StepPtr make_attention(Device& device, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                       const Tensor* mask, bool causal, float scale, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    Device::Reservation scratch(device);
    std::vector<StepPtr> steps;
    Tensor q = q_any, k = k_any, v = v_any;
    if (q.q.has_value() != k.q.has_value()) {
        if (q.q) q = dense_copy(device, scratch, q_any, row_major(q_any.dims), true, steps);
        if (k.q) k = dense_copy(device, scratch, k_any, row_major(k_any.dims), true, steps);
    }
    if (v.q) v = dense_copy(device, scratch, v_any, row_major(v_any.dims), true, steps);
    const std::size_t last = k.dims.size() - 1;
    std::swap(k.dims[last], k.dims[last - 1]);
    std::swap(k.strides[last], k.strides[last - 1]);
    Tensor scores = q;
    scores.dtype = DType::f32;
    scores.q.reset();
    scores.dims.back() = k.dims.back();
    scores.strides = row_major(scores.dims);
    scores.place = scratch.take(static_cast<std::size_t>(scores.count()) * sizeof(float));
    steps.push_back(make_matmul(device, q, k, scale, scores));
    steps.push_back(mask != nullptr || causal
                        ? make_masked_softmax(device, scores, mask, causal)
                        : make_softmax(device, scores, static_cast<int>(last), scores));
    steps.push_back(make_matmul(device, scores, v, 1.0f, y));
    return std::make_unique<ScratchStep>(device, in_order("attention", std::move(steps)));
}

}  // namespace quantflow::xpu
