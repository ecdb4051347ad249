// The host backend's kernels, one maker per kernel of `Backend`, with the same contracts. One file per group.
#pragma once

#include "../src/backend.hpp"
#include "../src/thread_pool.hpp"

namespace quantflow::host {

using StepPtr = std::unique_ptr<Step>;

// int8_gemm.cpp, int8_matmul_step.cpp
StepPtr make_linear(ThreadPool&, const Weights&, const Tensor& x, const Tensor* residual, const Epilogue&,
                    const Tensor& y, const Terms& = {});
StepPtr make_conv(ThreadPool&, const Weights&, const ConvGeometry&, const Tensor& x, const Tensor* residual,
                  const Epilogue&, const Tensor& y, const Terms& = {});
StepPtr make_int8_matmul(ThreadPool&, const Tensor& a, const Tensor& b, const Tensor& y);

// float_matmul.cpp, float_conv.cpp, float_attention.cpp, float_rows.cpp
StepPtr make_float_matmul(ThreadPool&, const Tensor& a, const Tensor& b, const Tensor& y);
StepPtr make_float_linear(ThreadPool&, const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor& y);
StepPtr make_float_conv(ThreadPool&, const ConvGeometry&, const Tensor& x, const Tensor& w, const Tensor* bias,
                        const Tensor& y);
StepPtr make_attention(ThreadPool&, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask, bool causal,
                       float scale, const Tensor& y);
StepPtr make_softmax(ThreadPool&, const Tensor& x, int axis, const Tensor& y);
StepPtr make_layer_norm(ThreadPool&, const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps, bool is_rms,
                        const Tensor& y, const Tensor* codes = nullptr);

// recurrence_step.cpp
StepPtr make_recurrence(ThreadPool&, const Recurrence&, const RecurrenceTensors&);

// copies.cpp
StepPtr make_copy(ThreadPool&, const Tensor& x, const Tensor& y);
StepPtr make_fill(ThreadPool&, double value, const Tensor& y);
StepPtr make_where(ThreadPool&, const Tensor& cond, const Tensor& a, const Tensor& b, const Tensor& y);

// elementwise.cpp
StepPtr make_binary(ThreadPool&, Binary, const Tensor& a, const Tensor& b, const Epilogue&, const Tensor& y);
StepPtr make_unary(ThreadPool&, Unary, float a, float b, const Epilogue&, const Tensor& x, const Tensor& y);
StepPtr make_channel_affine(ThreadPool&, const Tensor& x, int axis, const Tensor& scale, const Tensor& shift,
                            const Epilogue&, const Tensor& y);

// group_norm.cpp
StepPtr make_group_norm(ThreadPool&, const Tensor& x, std::int64_t groups, const Tensor* gamma, const Tensor* beta,
                        float eps, const Epilogue&, const Tensor& y);

// pool.cpp, reduce.cpp, gather.cpp, upsample.cpp
StepPtr make_pool(ThreadPool&, const PoolGeometry&, const Tensor& x, const Tensor& y);
StepPtr make_reduce(ThreadPool&, Reduction, const Tensor& x, const std::vector<int>& axes, const Tensor& y);
StepPtr make_gather(ThreadPool&, const Tensor& table, const Tensor& index, const Tensor& y);
StepPtr make_upsample(ThreadPool&, Interpolation, bool align_corners, const std::vector<double>& scales,
                      const Tensor& x, const Tensor& y);

// lookups.cpp
StepPtr make_index(ThreadPool&, const Tensor& x, const std::vector<std::optional<Tensor>>& indices, const Tensor& y);
StepPtr make_running_sum(ThreadPool&, const Tensor& x, int axis, const Tensor& y);

}  // namespace quantflow::host
