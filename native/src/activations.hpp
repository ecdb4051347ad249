// Every activation that a kernel can apply to its result. Beside its row here, one needs its vector formulas: in
// host/elementwise_vector.hpp and host/int8_gemm_isa.cpp.
#pragma once

#include <cstdint>

// X(name, Name, aten, numbers, exact, real, onednn)
//   name, Name: in program.json and C++, and after the k of kernels' constants
//   aten: the op's name in PyTorch; lowering/ops/activations.cpp reads the arguments of those that take any
//   numbers: how many of `a` and `b` it has
//   exact: f(x) in double, for tables of the host and as what tests compare with
//   real: f(r) in float32, for the SYCL backend: on the host and, as text, in the kernels
//   onednn: oneDNN's algorithm, alpha and beta
#define QF_ACTIVATIONS(X)                                                                                            \
    X(relu, Relu, "relu", 0, x < 0 ? 0 : x, r < 0 ? 0.0f : r, (eltwise_relu, 0, 0))                                  \
    X(hardtanh, Hardtanh, "hardtanh", 2, clamped(x, a, b), clamped(r, a, b), (eltwise_clip, a, b))                   \
    X(hardswish, Hardswish, "hardswish", 0, x * (clamped(x + 3, 0, 6) / 6),                                          \
      r * clamped(r + 3.0f, 0.0f, 6.0f) / 6.0f, (eltwise_hardswish, 1.0f / 6, 0.5f))                                 \
    X(hardsigmoid, Hardsigmoid, "hardsigmoid", 0, clamped(x + 3, 0, 6) / 6, clamped(r + 3.0f, 0.0f, 6.0f) / 6.0f,    \
      (eltwise_hardsigmoid, 1.0f / 6, 0.5f))                                                                         \
    X(silu, Silu, "silu", 0, x / (1 + exp(-x)), r / (1.0f + exp(-r)), (eltwise_swish, 1, 0))                         \
    X(sigmoid, Sigmoid, "sigmoid", 0, 1 / (1 + exp(-x)), 1.0f / (1.0f + exp(-r)), (eltwise_logistic, 0, 0))          \
    X(gelu, Gelu, "gelu", 0, x / 2 * erfc(-x * sqrt(0.5)), r * 0.5f * (1.0f + erf(r * 0.70710678118654752440f)),     \
      (eltwise_gelu_erf, 0, 0))                                                                                      \
    X(gelu_tanh, GeluTanh, "gelu", 0,                                                                                \
      x / 2 * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x))),                             \
      0.5f * r * (1.0f + tanh(0.79788456080286535588f * (r + 0.044715f * r * r * r))), (eltwise_gelu_tanh, 0, 0))    \
    X(leaky_relu, LeakyRelu, "leaky_relu", 1, x > 0 ? x : x * a, r > 0 ? r : r * a, (eltwise_relu, a, 0))            \
    X(tanh, Tanh, "tanh", 0, tanh(x), tanh(r), (eltwise_tanh, 0, 0))

namespace quantflow {

#define QF_ENUMERATOR(name, ...) name,
enum class Activation : std::uint8_t { none, QF_ACTIVATIONS(QF_ENUMERATOR) };
#undef QF_ENUMERATOR

#define QF_ONE(...) +1
constexpr int kActivations = 1 QF_ACTIVATIONS(QF_ONE);  // with none
#undef QF_ONE

// f(r) applied in float32 before the result is quantized. hardtanh: [a, b]; leaky_relu: slope a.
struct Epilogue {
    Activation kind = Activation::none;
    float a = 0, b = 0;
};

}  // namespace quantflow
