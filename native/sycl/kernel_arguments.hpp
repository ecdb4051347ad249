// What the host passes to the custom kernels. One definition serves both sides: the host compiles it, and its text
// stands at the head of the source that is compiled at run time.
#pragma once

#include <cstdint>

#include "../src/activations.hpp"

// Macros inside are expanded before they become text.
#define QF_TEXT(...) #__VA_ARGS__
#define QF_SHARED_WITH_KERNELS(...) \
    __VA_ARGS__                     \
    inline constexpr char kSharedSource[] = QF_TEXT(__VA_ARGS__);
#define QF_ACTIVATION_CODE(name, Name, ...) k##Name,

namespace quantflow::xpu {

QF_SHARED_WITH_KERNELS(
    // As in tensor.hpp and backend.hpp; steps.cpp asserts that they agree.
    enum TypeCode : int { kF32, kU8, kS8, kS32, kS64, kB8 };
    enum ActivationCode : int { kNone, QF_ACTIVATIONS(QF_ACTIVATION_CODE) };
    enum BinaryCode : int {
        kAdd, kSub, kMul, kDiv, kMaximum, kMinimum, kEq, kNe, kLt, kLe, kGt, kGe, kLogicalAnd, kLogicalOr
    };
    enum UnaryCode : int {
        kActivation, kAffine, kExp, kLog, kSqrt, kRsqrt, kNeg, kAbs, kErf, kReciprocal, kSin, kCos, kFloor,
        kLogicalNot, kPower
    };
    enum ReductionCode : int { kSum, kMean, kMax, kMin };

    // How one element is read or written. Not coded: scale 1, zero_point 0.
    struct Value { int type; int coded; float scale; int zero_point; int qmin; int qmax; };

    struct EpilogueArg { int kind; float a; float b; };

    // An iteration space of up to 6 dimensions, fastest first, and the strides (in elements) of up to 4 operands.
    // extent[0] lies along the third dimension of the launch, extent[1] along its second, the product of the
    // others along its first. `unit`: extent[0] has stride 1 in every operand.
    struct Space { unsigned extent[6]; int rank; int unit; std::int64_t stride[4][6]; };

    // One sub-group per row: `space` runs over rows (extent[0] along the launch's second dimension, the others along
    // its first); `stride` is the step from one element of the row to the next, per operand.
    struct Rows { Space space; std::int64_t n; std::int64_t stride[4]; };

    // 0: (batch, channels, depth, height, width) of the result; `lane`: 1 if channels run along the third dimension
    // of the launch and width along the second, 0 for the reverse.
    struct Image { unsigned extent[5]; int lane_is_channel; std::int64_t x_stride[5]; std::int64_t y_stride[5]; };

    struct PoolArg {
        Image image; int in[3]; int kernel[3]; int stride[3]; int padding[3]; int dilation[3];
        int is_max; int count_include_pad; int divisor_override; int is_adaptive; Value x; Value y;
    };

    struct ReduceArg { Space space; unsigned extent[4]; std::int64_t stride[4]; std::int64_t n; int op; Value x; Value y; };

    // Direct convolution (and linear: spatial 1): weights are (kernel taps, in / groups, out).
    struct ConvArg {
        Image image; int in[3]; int kernel[3]; int stride[3]; int padding[3]; int dilation[3];
        int in_per_group; int out_per_group; int out; std::int64_t residual_stride[5]; int zero_point;
        Value residual; Value y; EpilogueArg epilogue;
    };
)

}  // namespace quantflow::xpu
