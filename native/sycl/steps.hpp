// The makers of steps, one per kernel of `Backend` with the same contract, and what they share.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "device.hpp"
#include "kernel_arguments.hpp"

namespace quantflow::xpu {

using StepPtr = std::unique_ptr<Step>;
using Dims = std::vector<std::int64_t>;

// onednn_steps.cpp
StepPtr make_linear(Device&, const Weights&, const Tensor& x, const Tensor* residual, const Epilogue&,
                    const Tensor& y);
StepPtr make_conv(Device&, const Weights&, const ConvGeometry&, const Tensor& x, const Tensor* residual,
                  const Epilogue&, const Tensor& y);
StepPtr make_matmul(Device&, const Tensor& a, const Tensor& b, float alpha, const Tensor& y);
StepPtr make_float_linear(Device&, const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor& y);
StepPtr make_attention(Device&, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask, bool causal,
                       float scale, const Tensor& y);

// Null unless x and y are codes in channels_last and oneDNN has fast code for them.
StepPtr try_max_pool(Device&, const PoolGeometry&, const Tensor& x, const Tensor& y);
// Null unless x and y are f32, row-major, and oneDNN has fast code for them. Over the last dimension.
StepPtr try_softmax(Device&, const Tensor& x, const Tensor& y);

// elementwise.cpp
StepPtr make_copy(Device&, const Tensor& x, const Tensor& y);
StepPtr make_fill(Device&, double value, const Tensor& y);
StepPtr make_binary(Device&, Binary, const Tensor& a, const Tensor& b, const Epilogue&, const Tensor& y);
StepPtr make_unary(Device&, Unary, float a, float b, const Epilogue&, const Tensor& x, const Tensor& y);
StepPtr make_where(Device&, const Tensor& cond, const Tensor& a, const Tensor& b, const Tensor& y);
StepPtr make_channel_affine(Device&, const Tensor& x, int axis, const Tensor& scale, const Tensor& shift,
                            const Epilogue&, const Tensor& y);
StepPtr make_gather(Device&, const Tensor& table, const Tensor& index, const Tensor& y);

// rows_and_windows.cpp
StepPtr make_pool(Device&, const PoolGeometry&, const Tensor& x, const Tensor& y);
StepPtr make_reduce(Device&, Reduction, const Tensor& x, const std::vector<int>& axes, const Tensor& y);
StepPtr make_softmax(Device&, const Tensor& x, int axis, const Tensor& y);
// Dense f32 scores (..., L, S), in place; mask null or f32 or b8, broadcast by stride 0 to the scores' dims.
StepPtr make_masked_softmax(Device&, const Tensor& scores, const Tensor* mask, bool causal);
StepPtr make_layer_norm(Device&, const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps, bool is_rms,
                        const Tensor& y);
StepPtr make_upsample(Device&, Interpolation, bool align_corners, const std::vector<double>& scales, const Tensor& x,
                      const Tensor& y);
// Integer sums without oneDNN: any geometry, x channels_last. `w` as for conv; linear: spatial dims of size 1.
StepPtr make_direct_conv(Device&, const Weights&, const ConvGeometry&, const Tensor& x, const Tensor* residual,
                         const Epilogue&, const Tensor& y);
StepPtr make_direct_matmul(Device&, const Tensor& a, const Tensor& b, float scale, const Tensor& y);

// ---------------------------------------------------------------------------------------------- shared parts

// For what has a dimension of size 0.
class NoStep final : public Step {
public:
    void run() override {}
    std::string kernel() const override { return "none"; }
};

class StepList final : public Step {
public:
    StepList(std::string name, std::vector<StepPtr> steps) : name_(std::move(name)), steps_(std::move(steps)) {
        std::string parts;
        for (const auto& step : steps_) parts += (parts.empty() ? "" : " + ") + step->kernel();
        name_ += "(" + parts + ")";
    }
    void run() override {
        for (const auto& step : steps_) step->run();
    }
    std::string kernel() const override { return name_; }

private:
    std::string name_;
    std::vector<StepPtr> steps_;
};

inline StepPtr in_order(std::string name, std::vector<StepPtr> steps) {
    if (steps.size() == 1) return std::move(steps.front());
    return std::make_unique<StepList>(std::move(name), std::move(steps));
}

inline Value value_of(const Tensor& t) {
    const QParams q = t.q.value_or(QParams{1.0f, 0, 0, 0});
    return {static_cast<int>(t.dtype), t.q.has_value(), q.scale, q.zero_point, q.qmin, q.qmax};
}

inline EpilogueArg epilogue_of(const Epilogue& e) { return {static_cast<int>(e.kind), e.a, e.b}; }

// f32 or codes.
inline bool is_real(const Tensor& t) { return t.q.has_value() || t.dtype == DType::f32; }

inline bool are_coded_alike(const Tensor& a, const Tensor& b) { return a.dtype == b.dtype && a.q == b.q; }

inline bool is_same_place(const Tensor& a, const Tensor& b) {
    return a.place.base == b.place.base && a.place.offset == b.place.offset;
}

inline std::string text_of(const Dims& dims) {
    std::string text = "(";
    for (std::size_t i = 0; i < dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
    return text + ")";
}

// Collapses `dims` as far as the operands' strides allow and orders them by the strides of operand `first`; throws
// Unsupported for more than 6 dimensions that remain, or for 2**31 elements.
Space make_space(const Dims& dims, const std::vector<const Dims*>& strides, std::size_t first);
// What is launched for a Space, for its rows (one sub-group each), for an Image.
sycl::nd_range<3> range_of(const Device&, const Space&);
sycl::nd_range<3> row_range_of(const Device&, const Space& rows);
sycl::nd_range<3> range_of(const Device&, const Image&);

// Arguments of a kernel as they are at a run.
inline std::byte* resolved(const Place& place) { return place.base == nullptr ? nullptr : place.get(); }
inline std::byte* resolved(const Constant& constant) { return constant.get(); }
template <typename T>
const T& resolved(const T& value) {
    return value;
}

// Sets the kernel's argument of this number. One type for all kernels: SYCL's templates are compiled once per kind of
// argument instead of once per kernel.
using SetArgument = std::function<void(sycl::handler&, int)>;
template <typename T>
SetArgument argument(T value) {
    return [value = std::move(value)](sycl::handler& handler, int number) { handler.set_arg(number, resolved(value)); };
}

// launch.cpp; kernel: "qf_...".
StepPtr make_launch(Device&, const std::string& kernel, const sycl::nd_range<3>&, std::vector<SetArgument>);
template <typename... Args>
StepPtr launch(Device& device, const std::string& kernel, const sycl::nd_range<3>& range, Args... args) {
    std::vector<SetArgument> all;
    all.reserve(sizeof...(args));
    (all.push_back(argument(std::move(args))), ...);
    return make_launch(device, kernel, range, std::move(all));
}

}  // namespace quantflow::xpu
