// int8 convolution kernels of one instruction set: register tiles, packing of rows (im2col), depthwise, epilogues.
#include "int8_gemm_isa.hpp"

#include <utility>

#include "int8_tables.hpp"

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

// QF_INT8_LANES: tests compile the plain C++ code with another vector length in place of an instruction set.
// QF_INT8_EMULATED_AMX: they define the tile instructions themselves.
// QF_INT8_FINISHING: what writes sums, compiled for vectors of the same length.
#if defined(QF_INT8_LANES)
using Vector = PortableVector<QF_INT8_LANES>;
constexpr char kName[] = "portable";
#elif defined(__AMX_INT8__) || defined(QF_INT8_EMULATED_AMX)
using Vector = Avx512Vector;
constexpr char kName[] = "amx_int8";
#define QF_INT8_AMX
#define QF_INT8_FINISHING isa_avx512_vnni::Finishing
#elif defined(__AVX512VNNI__)
using Vector = Avx512Vector;
constexpr char kName[] = "avx512_vnni";
#elif defined(__AVXVNNI__)
using Vector = AvxVnniVector;
constexpr char kName[] = "avx_vnni";
#define QF_INT8_FINISHING isa_avx2::Finishing
#elif defined(__AVX2__)
using Vector = Avx2Vector;
constexpr char kName[] = "avx2";
#else
using Vector = PortableVector<4>;
constexpr char kName[] = "generic";
#endif
using Int = Vector::Int;
using Float = Vector::Float;
using i64 = std::int64_t;
using u8 = std::uint8_t;

constexpr int kLanes = Vector::kLanes;
constexpr int kColumns = 2 * kLanes;
#if defined(QF_INT8_AMX)
// Four of the eight tile registers hold sums: 2 x 2 tiles of 16 rows by 16 columns, by 16 quads.
constexpr int kRows = 32, kDepth = 16;
#else
// Two vectors of weights, one of activations and 2 * kRows sums fit the 16 (AVX512: 32) registers.
constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4, kDepth = 1;
#endif
constexpr int kBlock = 4 * kLanes;  // channels of a depthwise block

#if defined(__AVX2__) || defined(QF_INT8_LANES)
#define QF_INT8_ROLLING  // its sums take 20 registers, or 10 where there are 16
#endif
#if defined(__AVX2__) && !defined(QF_INT8_AMX) && !defined(QF_INT8_LANES)
#define QF_INT8_WINOGRAD
#endif
#if defined(__AVX512VNNI__) && !defined(QF_INT8_LANES)
#define QF_INT8_HALVES  // blocks that are half empty are computed in halves of vectors
#endif
#if (defined(__AVX512VNNI__) && !defined(QF_INT8_AMX)) || defined(QF_INT8_LANES)
#define QF_INT8_TILE_CODES  // registers are left beside a tile's sums
#endif

constexpr i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
constexpr i64 round_up(i64 n, i64 step) { return (n + step - 1) / step * step; }

// ---- activations -----------------------------------------------------------------------------------------------

// Relative error below 2e-7; by table 4e-7, below 2e-7 for |x| < 40. NaN stays NaN. Else Cephes' expf.
template <class T = Tables<Vector>>
QF_INLINE Float exponential(Float x) {
    x = Vector::max(Vector::set(-87.0f), Vector::min(Vector::set(88.0f), x));
    if constexpr (T::kPowers > 1) {
        // x = n * ln(2) + r, n in steps of 1 / kPowers, which are the last bits of a float of this size.
        constexpr float kSteps = 12582912.0f / T::kPowers;
        const Float place = Vector::multiply_add(x, Vector::set(1.44269504f), Vector::set(kSteps));
        const Float n = Vector::sub(place, Vector::set(kSteps));
        const Float r = Vector::multiply_add(n, Vector::set(-0.69314718f), x), one = Vector::set(1.0f);
        Float e = Vector::multiply_add(Vector::set(0.166686222f), r, Vector::set(0.500078201f));
        e = Vector::multiply_add(Vector::multiply_add(e, r, one), r, one);
        return Vector::mul(e, T::power(place));
    }
    const Float magic = Vector::set(12582912.0f);
    const Float n = Vector::sub(Vector::add(Vector::mul(x, Vector::set(1.44269504f)), magic), magic);
    Float r = Vector::multiply_add(n, Vector::set(-0.693359375f), x);
    r = Vector::multiply_add(n, Vector::set(2.12194440e-4f), r);
    Float p = Vector::set(1.9875691500e-4f);
    p = Vector::multiply_add(p, r, Vector::set(1.3981999507e-3f));
    p = Vector::multiply_add(p, r, Vector::set(8.3334519073e-3f));
    p = Vector::multiply_add(p, r, Vector::set(4.1665795894e-2f));
    p = Vector::multiply_add(p, r, Vector::set(1.6666665459e-1f));
    p = Vector::multiply_add(p, r, Vector::set(5.0000001201e-1f));
    p = Vector::add(Vector::multiply_add(Vector::mul(r, r), p, r), Vector::set(1.0f));
    return Vector::mul(p, Vector::power_of_two(Vector::round(n)));
}

QF_INLINE Float logistic(Float x) {
    const Float one = Vector::set(1.0f);
    return Vector::div(one, Vector::add(one, exponential(Vector::sub(Vector::set(0.0f), x))));
}

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
QF_INLINE Float hyperbolic_tangent(Float x) {
    const Float one = Vector::set(1.0f), two = Vector::set(2.0f), size = Vector::abs(x), z = Vector::mul(x, x);
    Float p = Vector::set(-5.70498872745e-3f);
    p = Vector::multiply_add(p, z, Vector::set(2.06390887954e-2f));
    p = Vector::multiply_add(p, z, Vector::set(-5.37397155531e-2f));
    p = Vector::multiply_add(p, z, Vector::set(1.33314422036e-1f));
    p = Vector::multiply_add(p, z, Vector::set(-3.33332819422e-1f));
    const Float near = Vector::multiply_add(Vector::mul(p, z), x, x);
    const Float e = exponential(Vector::mul(two, size));
    const Float far = Vector::copy_sign(Vector::sub(one, Vector::div(two, Vector::add(e, one))), x);
    return Vector::where_less(size, Vector::set(0.625f), near, far);
}

// Rational approximation on [-4, 4], a few units in the last place (as in Eigen).
QF_INLINE Float error_function(Float x) {
    x = Vector::max(Vector::set(-4.0f), Vector::min(Vector::set(4.0f), x));
    const Float z = Vector::mul(x, x);
    Float p = Vector::set(-2.72614225801306e-10f);
    p = Vector::multiply_add(p, z, Vector::set(2.77068142495902e-08f));
    p = Vector::multiply_add(p, z, Vector::set(-2.10102402082508e-06f));
    p = Vector::multiply_add(p, z, Vector::set(-5.69250639462346e-05f));
    p = Vector::multiply_add(p, z, Vector::set(-7.34990630326855e-04f));
    p = Vector::multiply_add(p, z, Vector::set(-2.95459980854025e-03f));
    p = Vector::multiply_add(p, z, Vector::set(-1.60960333262415e-02f));
    Float q = Vector::set(-1.45660718464996e-05f);
    q = Vector::multiply_add(q, z, Vector::set(-2.13374055278905e-04f));
    q = Vector::multiply_add(q, z, Vector::set(-1.68282697438203e-03f));
    q = Vector::multiply_add(q, z, Vector::set(-7.37332916720468e-03f));
    q = Vector::multiply_add(q, z, Vector::set(-1.42647390514189e-02f));
    return Vector::div(Vector::mul(x, p), q);
}

template <class T = Tables<Vector>>
QF_INLINE Float gelu(Float r) {
    const Float half = Vector::mul(Vector::set(0.5f), r);
    if constexpr (T::kHasErf) {
        const Float size = Vector::abs(r);
        return Vector::multiply_add(size, T::half_erf(size), half);
    } else {
        const Float erf = error_function(Vector::mul(r, Vector::set(0.70710678f)));
        return Vector::mul(half, Vector::add(Vector::set(1.0f), erf));
    }
}

// Of t = r / scale, likewise divided.
template <class T = Tables<Vector>>
QF_INLINE Float gelu_of_steps(Float t, Float scale) {
    const Float size = Vector::abs(t);
    return Vector::multiply_add(size, T::half_erf(Vector::mul(size, scale)), Vector::mul(Vector::set(0.5f), t));
}

// NaN is passed on: min and max return their second operand then.
template <int kActivation>
QF_INLINE Float activate(Float r, Float a, Float b) {
    const Float zero = Vector::set(0.0f), half = Vector::set(0.5f), one = Vector::set(1.0f);
    if constexpr (kActivation == kInt8Relu) return Vector::max(zero, r);
    if constexpr (kActivation == kInt8Hardtanh) return Vector::min(b, Vector::max(a, r));
    if constexpr (kActivation == kInt8Hardswish || kActivation == kInt8Hardsigmoid) {
        const Float t = Vector::min(Vector::set(6.0f), Vector::max(zero, Vector::add(r, Vector::set(3.0f))));
        const Float sixth = Vector::set(1.0f / 6.0f);
        return kActivation == kInt8Hardswish ? Vector::mul(Vector::mul(r, t), sixth) : Vector::mul(t, sixth);
    }
    if constexpr (kActivation == kInt8Silu) return Vector::mul(r, logistic(r));
    if constexpr (kActivation == kInt8Sigmoid) return logistic(r);
    if constexpr (kActivation == kInt8Gelu) return gelu(r);
    if constexpr (kActivation == kInt8GeluTanh) {
        const Float cube = Vector::mul(Vector::mul(r, r), r);
        const Float inner = Vector::mul(Vector::set(0.79788456f),
                                        Vector::multiply_add(Vector::set(0.044715f), cube, r));
        return Vector::mul(Vector::mul(half, r), Vector::add(one, hyperbolic_tangent(inner)));
    }
    if constexpr (kActivation == kInt8LeakyRelu) return Vector::where_less(zero, r, r, Vector::mul(r, a));
    if constexpr (kActivation == kInt8Tanh) return hyperbolic_tangent(r);
    return r;
}

// ---- epilogue ----------------------------------------------------------------------------------------------------

// What the loops below keep in registers of an Int8Output.
struct OutputConstants {
    Float inverse_scale, low, high, a, b, residual_scale, step, rest_inverse_scale, rest_low, rest_high;
    Int zero, residual_zero, rest_zero;
    Vector::Codes codes;
};

QF_INLINE OutputConstants constants_of(const Int8Output& o) {
    return {Vector::set(o.inverse_scale),  Vector::set(o.low),  Vector::set(o.high),
            Vector::set(o.a),              Vector::set(o.b),    Vector::set(o.residual_scale),
            Vector::set(o.step),           Vector::set(o.rest_inverse_scale),
            Vector::set(o.rest_low),       Vector::set(o.rest_high),
            Vector::set(o.zero),           Vector::set(o.residual_zero),
            Vector::set(o.rest_zero),      Vector::Codes(o.zero, o.low_code, o.high_code)};
}

// sum * scale, + bias: two roundings, like the reference.
QF_INLINE Float real_of(Int sum, Float scale, Float bias) {
    return Vector::add(Vector::mul(Vector::to_float(sum), scale), bias);
}
QF_INLINE Float add_residual(Float r, Int codes, const OutputConstants& k) {
    return Vector::add(r, Vector::mul(Vector::to_float(Vector::sub(codes, k.residual_zero)), k.residual_scale));
}
// Clamped before it is rounded: the bounds are whole numbers, or lie inside them.
QF_INLINE Int steps_of(Float r, const OutputConstants& k) {
    return Vector::round(Vector::max(Vector::min(Vector::mul(r, k.inverse_scale), k.high), k.low));
}
QF_INLINE Int code_of(Float r, const OutputConstants& k) { return Vector::add(steps_of(r, k), k.zero); }

// sum * scale + bias of product `i` that comes before: its sums at `place`, its constants at `channel`.
QF_INLINE Float real_before(const Int8Output& o, int i, i64 place, i64 channel) {
    const Int8Before& b = o.before[i];
    return real_of(Vector::load(b.sums + place), Vector::load(b.scale + channel), Vector::load(b.bias + channel));
}
// r, which the first of them began, plus the others and the step's own.
QF_INLINE Float add_products(const Int8Output& o, Float r, Float own, i64 place, i64 channel) {
    for (int i = 1; i < o.befores; ++i) r = Vector::add(real_before(o, i, place, channel), r);
    return Vector::add(own, r);
}
// What the code leaves over of r, as a code.
QF_INLINE Int rest_of(Float r, Int code, const OutputConstants& k) {
    const Float left = Vector::sub(r, Vector::mul(Vector::to_float(Vector::sub(code, k.zero)), k.step));
    const Float t = Vector::max(Vector::min(Vector::mul(left, k.rest_inverse_scale), k.rest_high), k.rest_low);
    return Vector::add(Vector::round(t), k.rest_zero);
}

// A tile of sums, `count` <= kColumns channels wide, into rows [row, row + rows) of y.
// padded: where the tile's channels begin in `scale` and `bias`; channel: where they begin in y.
template <int kActivation>
void finish_tile(const Int8Output& o, const std::int32_t* sums, i64 stride, i64 row, i64 rows, i64 padded,
                 i64 channel, i64 count) {
    const OutputConstants k = constants_of(o);
    const i64 first = row * o.row + channel;
    if (count == kColumns) {
        const Float scale0 = Vector::load(o.scale + padded), scale1 = Vector::load(o.scale + padded + kLanes);
        const Float bias0 = Vector::load(o.bias + padded), bias1 = Vector::load(o.bias + padded + kLanes);
        u8* codes = static_cast<u8*>(o.y) + first;
        float* reals = static_cast<float*>(o.y) + first;
        u8* rest = o.rest;
        const u8* residual = o.residual;
        const float* real_residual = o.real_residual;
        if (rest != nullptr) rest += first;
        if (residual != nullptr) residual += first;
        if (real_residual != nullptr) real_residual += first;
        i64 place = row * o.sums_row + padded;
        for (i64 m = 0; m < rows; ++m, sums += stride, codes += o.row, reals += o.row, place += o.sums_row) {
            const Float own0 = real_of(Vector::load(sums), scale0, bias0);
            const Float own1 = real_of(Vector::load(sums + kLanes), scale1, bias1);
            Float r0 = o.befores > 0 ? real_before(o, 0, place, padded) : own0;
            Float r1 = o.befores > 0 ? real_before(o, 0, place + kLanes, padded + kLanes) : own1;
            if (residual != nullptr) {
                r0 = add_residual(r0, Vector::load_bytes(residual), k);
                r1 = add_residual(r1, Vector::load_bytes(residual + kLanes), k);
                residual += o.row;
            }
            if (real_residual != nullptr) {
                r0 = Vector::add(r0, Vector::load(real_residual));
                r1 = Vector::add(r1, Vector::load(real_residual + kLanes));
                real_residual += o.row;
            }
            if (o.befores > 0) {
                r0 = add_products(o, r0, own0, place, padded);
                r1 = add_products(o, r1, own1, place + kLanes, padded + kLanes);
            }
            r0 = activate<kActivation>(r0, k.a, k.b);
            r1 = activate<kActivation>(r1, k.a, k.b);
            if (o.is_float) {
                Vector::store(reals, r0);
                Vector::store(reals + kLanes, r1);
                continue;
            }
            const Int q0 = code_of(r0, k), q1 = code_of(r1, k);
            Vector::store_bytes(codes, q0, q1);
            if (rest == nullptr) continue;
            Vector::store_bytes(rest, rest_of(r0, q0, k), rest_of(r1, q1, k));
            rest += o.row;
        }
        return;
    }
    for (i64 c = 0; c < count; c += kLanes) {
        const Float scale = Vector::load(o.scale + padded + c), bias = Vector::load(o.bias + padded + c);
        const i64 n = smaller(kLanes, count - c);
        for (i64 m = 0; m < rows; ++m) {
            const i64 at = first + m * o.row + c, place = (row + m) * o.sums_row + padded + c;
            const Float own = real_of(Vector::load(sums + m * stride + c), scale, bias);
            Float r = o.befores > 0 ? real_before(o, 0, place, padded + c) : own;
            if (o.residual != nullptr) r = add_residual(r, Vector::load_bytes(o.residual + at, n), k);
            if (o.real_residual != nullptr) r = Vector::add(r, Vector::load(o.real_residual + at, n));
            if (o.befores > 0) r = add_products(o, r, own, place, padded + c);
            r = activate<kActivation>(r, k.a, k.b);
            if (o.is_float) {
                Vector::store(static_cast<float*>(o.y) + at, r, n);
                continue;
            }
            const Int q = code_of(r, k);
            Vector::store_bytes(static_cast<u8*>(o.y) + at, q, n);
            if (o.rest != nullptr) Vector::store_bytes(o.rest + at, rest_of(r, q, k), n);
        }
    }
}

// A depthwise block of `count` <= kBlock channels of one pixel, at y's element `at`; `place`: of its sums, where they are
// kept.
template <int kActivation>
QF_INLINE void finish_block(const Int8Output& o, const OutputConstants& k, const Int (&sums)[4], i64 block, i64 at,
                            i64 place, i64 count) {
    if (o.raw_sums != nullptr) {
        for (int i = 0; i < 4; ++i) Vector::store(o.raw_sums + place + i * kLanes, sums[i]);
        return;
    }
    Float r[4];
    Int residual[4];
    if (o.residual != nullptr) {
        if (count == kBlock) {
            Vector::load_block(o.residual + at, residual);
        } else {
            u8 part[kBlock] = {};
            std::memcpy(part, o.residual + at, count);
            Vector::load_block(part, residual);
        }
    }
    if constexpr (kActivation == kInt8Linear) {
        for (int i = 0; i < 4; ++i)
            r[i] = Vector::multiply_add(Vector::to_float(sums[i]),
                                        Vector::load(o.code_scale + block * kBlock + i * kLanes),
                                        Vector::load(o.code_bias + block * kBlock + i * kLanes));
        for (int b = 0; b < o.befores; ++b)
            for (int i = 0; i < 4; ++i)
                r[i] = Vector::multiply_add(Vector::to_float(Vector::load(o.before[b].sums + place + i * kLanes)),
                                            Vector::load(o.before[b].code_scale + block * kBlock + i * kLanes), r[i]);
        if (o.residual != nullptr)
            for (int i = 0; i < 4; ++i)
                r[i] = Vector::multiply_add(Vector::to_float(Vector::sub(residual[i], k.residual_zero)),
                                            Vector::set(o.residual_step), r[i]);
        const Int rounded[4] = {Vector::round(r[0]), Vector::round(r[1]), Vector::round(r[2]), Vector::round(r[3])};
        u8* y = static_cast<u8*>(o.y) + at;
        if (count == kBlock) return k.codes.store_block(y, rounded);
        return k.codes.store_block(y, rounded, count);
    }
    Float own[4];
    for (int i = 0; i < 4; ++i) {
        const i64 channel = block * kBlock + i * kLanes;
        own[i] = real_of(sums[i], Vector::load(o.scale + channel), Vector::load(o.bias + channel));
        r[i] = o.befores > 0 ? real_before(o, 0, place + i * kLanes, channel) : own[i];
    }
    if (o.residual != nullptr)
        for (int i = 0; i < 4; ++i) r[i] = add_residual(r[i], residual[i], k);
    if (o.real_residual != nullptr) {
        float part[kBlock] = {};
        const float* reals = o.real_residual + at;
        if (count != kBlock) reals = static_cast<const float*>(std::memcpy(part, reals, count * sizeof(float)));
        Float added[4];
        Vector::load_block(reals, added);
        for (int i = 0; i < 4; ++i) r[i] = Vector::add(r[i], added[i]);
    }
    if (o.befores > 0)
        for (int i = 0; i < 4; ++i)
            r[i] = add_products(o, r[i], own[i], place + i * kLanes, block * kBlock + i * kLanes);
    for (int i = 0; i < 4; ++i) r[i] = activate<kActivation>(r[i], k.a, k.b);
    if (o.is_float) {
        float* y = static_cast<float*>(o.y) + at;
        float part[kBlock];
        Vector::store_block(count == kBlock ? y : part, r);
        if (count != kBlock) std::memcpy(y, part, count * sizeof(float));
        return;
    }
    const auto store = [&](u8* y, const Int(&codes)[4]) __attribute__((always_inline)) {
        u8 part[kBlock];
        Vector::store_block(count == kBlock ? y : part, codes);
        if (count != kBlock) std::memcpy(y, part, count);
    };
    const Int codes[4] = {code_of(r[0], k), code_of(r[1], k), code_of(r[2], k), code_of(r[3], k)};
    store(static_cast<u8*>(o.y) + at, codes);
    if (o.rest == nullptr) return;
    const Int rest[4] = {rest_of(r[0], codes[0], k), rest_of(r[1], codes[1], k), rest_of(r[2], codes[2], k),
                         rest_of(r[3], codes[3], k)};
    store(o.rest + at, rest);
}

// The sums as they are.
void finish_raw(const Int8Output& o, const std::int32_t* sums, i64 stride, i64 row, i64 rows, i64 padded, i64, i64) {
    std::int32_t* to = o.raw_sums + row * o.sums_row + padded;
    for (i64 m = 0; m < rows; ++m, sums += stride, to += o.sums_row) {
        Vector::store(to, Vector::load(sums));
        Vector::store(to + kLanes, Vector::load(sums + kLanes));
    }
}

// Of codes: none, those of any zero point, and those of zero point 0, as a ReLU's are.
enum Residual { kNoResidual, kCodes, kCodesFromZero };
Residual residual_of(const Int8Output& o) {
    if (o.residual == nullptr) return kNoResidual;
    return o.residual_zero == 0 ? kCodesFromZero : kCodes;
}
// r + (codes - zero) * step
template <Residual kResidual>
QF_INLINE Float add_steps(Float r, Int codes, Int zero, Float step) {
    if constexpr (kResidual == kNoResidual) return r;
    if constexpr (kResidual == kCodes) codes = Vector::sub(codes, zero);
    return Vector::multiply_add(Vector::to_float(codes), step, r);
}

// The same as `finish_tile` where `is_linear`, or `is_gelu_in_steps`.
template <Residual kResidual, int kBefores, bool kIsGelu = false>
void finish_codes(const Int8Output& o, const std::int32_t* sums, i64 stride, i64 row, i64 rows, i64 padded, i64 channel,
                  i64 count) {
    constexpr bool kHasResidual = kResidual != kNoResidual;
    const Vector::Codes codes(o.zero, o.low_code, o.high_code);
    const Float residual_step = Vector::set(o.residual_step), step = Vector::set(o.step);
    const Int residual_zero = Vector::set(o.residual_zero);
    const Float scale0 = Vector::load(o.code_scale + padded), scale1 = Vector::load(o.code_scale + padded + kLanes);
    const Float bias0 = Vector::load(o.code_bias + padded), bias1 = Vector::load(o.code_bias + padded + kLanes);
    u8* y = static_cast<u8*>(o.y) + row * o.row + channel;
    const u8* residual = kHasResidual ? o.residual + row * o.row + channel : nullptr;
    const std::int32_t* before[kBefores + 1];
    Float before0[kBefores + 1], before1[kBefores + 1];
    for (int i = 0; i < kBefores; ++i) {
        before[i] = o.before[i].sums + row * o.sums_row + padded;
        before0[i] = Vector::load(o.before[i].code_scale + padded);
        before1[i] = Vector::load(o.before[i].code_scale + padded + kLanes);
    }
    // Of channels from `v` * kLanes on; `codes`: of the residual.
    const auto rounded = [&](i64 m, int v, Int codes) __attribute__((always_inline)) {
        const i64 at = v * kLanes;
        Float r = Vector::multiply_add(Vector::to_float(Vector::load(sums + m * stride + at)), v ? scale1 : scale0,
                                       v ? bias1 : bias0);
        for (int i = 0; i < kBefores; ++i)
            r = Vector::multiply_add(Vector::to_float(Vector::load(before[i] + m * o.sums_row + at)),
                                     v ? before1[i] : before0[i], r);
        r = add_steps<kResidual>(r, codes, residual_zero, residual_step);
        if constexpr (kIsGelu) r = gelu_of_steps(r, step);
        return Vector::round(r);
    };
    if (count == kColumns) {
        const auto whole = [&](i64 m, Int& a, Int& b) __attribute__((always_inline)) {
            Int q0{}, q1{};
            if constexpr (kHasResidual) Vector::load_bytes(residual + m * o.row, kColumns, q0, q1);
            a = rounded(m, 0, q0);
            b = rounded(m, 1, q1);
        };
        Int a, b, c, d;
        for (i64 m = 0; m < rows; m += 2) {
            const i64 next = smaller(m + 1, rows - 1);
            whole(m, a, b);
            whole(next, c, d);
            codes.store(y + m * o.row, y + next * o.row, a, b, c, d);
        }
        return;
    }
    // Four vectors at a time, of four rows or two; beyond the last row, that row again. The residual is read one step
    // ahead: a masked store holds up loads from where it does not write.
    const auto edge = [&](auto narrow) __attribute__((always_inline)) {
        constexpr bool kIsNarrow = decltype(narrow)::value;
        constexpr int kTogether = kIsNarrow ? 4 : 2;
        const auto read = [&](i64 m, Int(&q)[4]) __attribute__((always_inline)) {
            if constexpr (kHasResidual)
                for (int i = 0; i < kTogether; ++i) {
                    const u8* from = residual + smaller(m + i, rows - 1) * o.row;
                    if constexpr (kIsNarrow)
                        q[i] = Vector::load_bytes(from, count);
                    else
                        Vector::load_bytes(from, count, q[2 * i], q[2 * i + 1]);
                }
        };
        Int ahead[4] = {};
        read(0, ahead);
        for (i64 m = 0; m < rows; m += kTogether) {
            Int v[4];
            u8* to[kTogether];
            for (int i = 0; i < 4; ++i) {
                const i64 row = smaller(m + (kIsNarrow ? i : i / 2), rows - 1);
                v[i] = rounded(row, kIsNarrow ? 0 : i % 2, ahead[i]);
                to[kIsNarrow ? i : i / 2] = y + row * o.row;
            }
            read(m + kTogether, ahead);
            codes.store(to, v, count);
        }
    };
    count <= kLanes ? edge(std::true_type{}) : edge(std::false_type{});
}

#if defined(QF_INT8_FINISHING)
constexpr auto finisher = QF_INT8_FINISHING::tile;
#else
template <int... kActivations>
FinishTile finisher(int activation, std::integer_sequence<int, kActivations...>) {
    static constexpr FinishTile all[] = {finish_tile<kActivations>...};
    return all[activation];
}
FinishTile finisher(const Int8Output& o) {
    if (o.raw_sums != nullptr) return finish_raw;
    if constexpr (Tables<Vector>::kHasErf)
        if (o.is_gelu_in_steps) return finish_codes<kNoResidual, 0, true>;
    if (o.is_linear) {
        static constexpr FinishTile all[][3] = {
            {finish_codes<kNoResidual, 0>, finish_codes<kCodes, 0>, finish_codes<kCodesFromZero, 0>},
            {finish_codes<kNoResidual, 1>, finish_codes<kCodes, 1>, finish_codes<kCodesFromZero, 1>},
            {finish_codes<kNoResidual, 2>, finish_codes<kCodes, 2>, finish_codes<kCodesFromZero, 2>}};
        static_assert(kMostBefore == 2);
        return all[o.befores][residual_of(o)];
    }
    return finisher(o.activation, std::make_integer_sequence<int, kInt8Activations>{});
}
#endif

// ---- register tile -----------------------------------------------------------------------------------------------

// How a tile multiplies: `bytes`, u8 quads by s8 quads (`dot`); `widened`, 16-bit quads by s8 quads; `words`, 16-bit
// pairs by 16-bit pairs.
enum class Product { bytes, widened, words };

template <class V, Product kProduct, bool kIsOdd>
QF_INLINE Int tile_weights(const u8* w) {
    const Int quads = V::load(reinterpret_cast<const std::int32_t*>(w));
    if constexpr (kProduct == Product::widened) return kIsOdd ? V::odd_bytes(quads) : V::even_bytes(quads);
    return quads;
}

// Rows `row` bytes apart, by one address per four rows: an address for each would not fit the general registers beside
// the rest of a tile's loop.
template <int kCount>
struct TileRows {
    static constexpr int kBases = (kCount + 3) / 4;
    const u8* base[kBases];
    i64 row, triple;

    QF_INLINE_MEMBER TileRows(const u8* first, i64 bytes) : row(bytes), triple(3 * bytes) {
        asm("" : "+r"(triple));
        place(first);
    }
    QF_INLINE_MEMBER void place(const u8* first) {
        base[0] = first;
        for (int i = 1; i < kBases; ++i) base[i] = base[i - 1] + 4 * row;
        advance(0);
    }
    QF_INLINE_MEMBER void advance(i64 bytes) {
        for (int i = 0; i < kBases; ++i) {
            base[i] += bytes;
            // Unrelated as far as the compiler knows, which would make an address of each row of them.
            asm("" : "+r"(base[i]));
        }
    }
    template <int kRow>
    QF_INLINE_MEMBER const u8* at() const {
        constexpr int within = kRow % 4;
        return base[kRow / 4] + (within == 3 ? triple : within * row);
    }
};

// Accumulators are named by constants only, so that they live in registers: the compiler turns an array into
// registers before it unrolls loops.
template <class V, int kVectors, Product kProduct, bool kIsOdd, class Rows, int... kIndex>
QF_INLINE void tile_step(Int* __restrict sums, const Rows& x, const u8* w, std::integer_sequence<int, kIndex...>) {
    Int weights[kVectors], codes;
    const auto one = [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value, row = i / kVectors, v = i % kVectors;
        if constexpr (v == 0) codes = V::quad(x.template at<row>() + (kIsOdd ? 4 : 0));
        if constexpr (row == 0) weights[v] = tile_weights<V, kProduct, kIsOdd>(w + v * 4 * kLanes);
        if constexpr (kProduct == Product::bytes)
            V::dot(sums[i], codes, weights[v]);
        else
            V::dot_pairs(sums[i], codes, weights[v]);
    };
    (one(std::integral_constant<int, kIndex>{}), ...);
}

// The step and the one behind it at once, of bytes.
template <class V, int kVectors, class Rows, int... kIndex>
QF_INLINE void joint_step(Int* __restrict sums, const Rows& x, const u8* w, std::integer_sequence<int, kIndex...>) {
    Int weights[2][kVectors], codes[2];
    const auto one = [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value, row = i / kVectors, v = i % kVectors;
        if constexpr (row == 0)
            for (int q = 0; q < 2; ++q)
                weights[q][v] = tile_weights<V, Product::bytes, false>(w + (q * kColumns + v * kLanes) * 4);
        if constexpr (v == 0) {
            constexpr int within = row % 4, times = within == 3 ? 1 : within;
            const i64 bytes = within == 3 ? x.triple : x.row;
            codes[0] = V::template quad_at<times, 0>(x.base[row / 4], bytes);
            codes[1] = V::template quad_at<times, 4>(x.base[row / 4], bytes);
        }
        sums[i] = V::add(sums[i], V::joint_products(codes[0], codes[1], weights[0][v], weights[1][v]));
    };
    (one(std::integral_constant<int, kIndex>{}), ...);
}

// What a register tile computes: sums = start + x * weights, where a row of x is `runs` runs of `steps` vectors of
// weights (quads, or pairs of words), at `offsets` bytes from the row's address; rows are `x_row` bytes apart. Tile
// registers take their rows above `low_rows` from x_high.
struct TileJob {
    const u8 *x = nullptr, *x_high = nullptr;
    i64 x_row = 0;
    const i64* offsets = nullptr;
    i64 runs = 1, steps = 0;
    const u8 *w = nullptr, *joint = nullptr;  // joint: see Int8Gemm
    const std::int32_t* start = nullptr;
    i64 start_row = 0;
    std::int32_t* sums = nullptr;
    i64 sums_row = 0, low_rows = 0;
    // What is fetched into the L2 cache meanwhile, `ahead_step` bytes a step: the next weights come from far away, and
    // the processor's own prefetching stops at the end of a page.
    const u8* ahead = nullptr;
    i64 ahead_step = 0;
};
constexpr i64 kNoOffset[1] = {0};

using Tile = void (*)(const TileJob&);

// kJoins: `joint` is there.
template <int kVectors, Product kProduct, bool kJoins, int... kIndex>
QF_INLINE void add_products(Int* __restrict acc, const TileJob& job, std::integer_sequence<int, kIndex...> indices) {
    constexpr int kTileRows = static_cast<int>(sizeof...(kIndex)) / kVectors;
    constexpr i64 kStep = 4 * kColumns;  // bytes of weights
    const u8 *w = job.w, *ahead = job.ahead, *joint = job.joint;
    TileRows<kTileRows> x(job.x, job.x_row);
    for (i64 run = 0; run < job.runs; ++run) {
        x.place(job.x + job.offsets[run]);
        const i64 ahead_step = job.ahead_step;
#pragma GCC unroll 1
        for (const u8* end = w + job.steps * kStep; w != end;) {
            __builtin_prefetch(ahead, 0, 2);
            if constexpr (kJoins) {
                if (*joint != 0) {
                    joint_step<Vector, kVectors>(acc, x, w, indices);
                    __builtin_prefetch(ahead + ahead_step, 0, 2);
                    ahead += 2 * ahead_step;
                    x.advance(8);
                    joint += 2;
                    w += 2 * kStep;
                    asm("" : "+r"(ahead), "+r"(w), "+r"(joint));
                    continue;
                }
                ++joint;
            }
            tile_step<Vector, kVectors, kProduct, false>(acc, x, w, indices);
            if constexpr (kProduct == Product::widened)
                tile_step<Vector, kVectors, kProduct, true>(acc, x, w, indices);
            x.advance(kProduct == Product::widened ? 8 : 4);
            ahead += ahead_step;
            w += kStep;
            asm("" : "+r"(ahead), "+r"(w));
        }
        // What is needed between runs is read again, instead of kept in vector registers: getting it back from there
        // would wait behind all products.
        asm volatile("" : : : "memory");
    }
}

template <int kVectors, Product kProduct, bool kJoins, int... kIndex>
QF_INLINE void tile_of(const TileJob& job, std::integer_sequence<int, kIndex...> indices) {
    constexpr int kTileRows = static_cast<int>(sizeof...(kIndex)) / kVectors;
    Int acc[sizeof...(kIndex)];
    {
        TileRows<kTileRows> start(reinterpret_cast<const u8*>(job.start), 4 * job.start_row);
        ((acc[kIndex] = Vector::load(reinterpret_cast<const std::int32_t*>(start.template at<kIndex / kVectors>()) +
                                     kIndex % kVectors * kLanes)),
         ...);
    }
    add_products<kVectors, kProduct, kJoins>(acc, job, indices);
    TileRows<kTileRows> sums(reinterpret_cast<const u8*>(job.sums), 4 * job.sums_row);
    (Vector::store(reinterpret_cast<std::int32_t*>(const_cast<u8*>(sums.template at<kIndex / kVectors>())) +
                       kIndex % kVectors * kLanes,
                   acc[kIndex]),
     ...);
}

#if defined(QF_INT8_AMX)
#include "int8_amx.inc"
#else
template <int kTileRows, int kVectors>
__attribute__((noinline)) void joint_part(const TileJob& job) {
    tile_of<kVectors, Product::bytes, true>(job, std::make_integer_sequence<int, kTileRows * kVectors>{});
}
// Beside the weights of two steps and what they are multiplied by, registers hold the sums of half a tile.
template <int kTileRows, int kVectors>
void joint_tile(TileJob job) {
    constexpr int kFirst = kTileRows * kVectors <= kRows ? kTileRows : (kTileRows + 1) / 2;
    joint_part<kFirst, kVectors>(job);
    if constexpr (kFirst < kTileRows) {
        job.x += kFirst * job.x_row;
        job.start += kFirst * job.start_row;
        job.sums += kFirst * job.sums_row;
        joint_part<kTileRows - kFirst, kVectors>(job);
    }
}

template <int kTileRows, int kVectors, Product kProduct>
void tile(const TileJob& job) {
    if constexpr (kProduct == Product::bytes && Vector::kJointWeights > 0)
        if (job.joint != nullptr) return joint_tile<kTileRows, kVectors>(job);
    tile_of<kVectors, kProduct, false>(job, std::make_integer_sequence<int, kTileRows * kVectors>{});
}

template <int kVectors, Product kProduct, int... kTileRows>
Tile tile_for(i64 rows, std::integer_sequence<int, kTileRows...>) {
    static constexpr Tile all[] = {tile<kTileRows + 1, kVectors, kProduct>...};
    return all[rows - 1];
}
template <Product kProduct>
Tile tile_for(i64 rows, i64 channels) {
    constexpr auto heights = std::make_integer_sequence<int, kRows>{};
    return channels > kLanes ? tile_for<2, kProduct>(rows, heights) : tile_for<1, kProduct>(rows, heights);
}

// `rows` rows as tiles of about equal heights: a last tile of one row would cost as much as a full one.
struct Tiling {
    static constexpr i64 kPieces = 1;  // of rows, in a tile
    i64 rows, count;
    explicit Tiling(i64 all) : rows(all), count((all + kRows - 1) / kRows) {}
    i64 first(i64 t) const { return rows * t / count; }
    i64 height(i64 t) const { return first(t + 1) - first(t); }
    i64 slot(i64 t) const { return first(t); }  // where the tile's sums are kept, in rows
    i64 low_rows(i64 t) const { return height(t); }
};
using PieceTiling = Tiling;  // of the rows of a line

#if defined(QF_INT8_TILE_CODES)
#include "int8_tile_codes.inc"
#endif

constexpr Product kWideProduct = Vector::kIsExact ? Product::bytes : Product::widened;
Tile piece_tile(i64 rows, i64, i64 channels, bool is_wide) {
    return is_wide ? tile_for<kWideProduct>(rows, channels) : tile_for<Product::bytes>(rows, channels);
}
#endif

// ---- packing of rows ---------------------------------------------------------------------------------------------

// Copies codes; writes up to a vector beyond `n`, reads nothing at or beyond `end`. Without exact products of full
// codes the copy holds x - zero, and `is_low` tells whether all of it lies in [0, 127].
template <class V>
class CopierFor {
public:
    explicit CopierFor(const Int8Gemm& g) : end_(g.x_end), zero_(static_cast<u8>(g.zero)) {
        if constexpr (!V::kIsExact) {
            zeros_ = V::set_bytes(zero_);
            // Above 128, x - zero wraps around into [0, 127] for small x.
            high_ = V::set_bytes(g.zero > 128 ? 0x80 : 0);
        }
    }
    QF_INLINE_MEMBER void copy(u8* to, const u8* from, i64 n) {
        if (from + round_up(n, V::kCopy) <= end_) {
            for (i64 i = 0; i < n; i += V::kCopy) vector(to + i, from + i);
            return;
        }
        i64 i = 0;
        for (; i + V::kCopy <= n; i += V::kCopy) vector(to + i, from + i);
        if (i < n) {
            u8 part[V::kCopy];
            std::memset(part, zero_, sizeof part);
            std::memcpy(part, from + i, n - i);
            vector(to + i, part);
        }
    }
    // n codes of the real 0.
    QF_INLINE_MEMBER void fill(u8* to, i64 n) { std::memset(to, V::kIsExact ? zero_ : 0, n); }
    void add(const CopierFor& other) {
        if constexpr (!V::kIsExact) high_ = V::either(high_, other.high_);
    }
    bool is_low() const {
        if constexpr (V::kIsExact)
            return true;
        else
            return !V::any_high(high_);
    }

private:
    QF_INLINE_MEMBER void vector(u8* to, const u8* from) {
        if constexpr (V::kIsExact)
            V::copy(to, from);
        else
            V::copy(to, from, zeros_, high_);
    }
    const u8* end_;
    u8 zero_;
    Int zeros_, high_;
};
using Copier = CopierFor<Vector>;

// Steps [begin, end) of the reduction for rows [row, row + rows), `to_row` bytes apart.
void pack_pixels(Copier& copier, const Int8Gemm& g, i64 group, i64 row, i64 rows, i64 begin, i64 end, u8* to,
                 i64 to_row) {
    const u8* from = g.x + row * g.pixel + group * g.in_channels + begin;
    Copier local = copier;  // in registers
    for (i64 m = 0; m < rows; ++m, from += g.pixel, to += to_row) local.copy(to, from, end - begin);
    copier.add(local);
}

// Part [a, b) of run `run` at input pixel (z, y, x) of an image; some of it may lie outside.
void pack_edge_run(Copier& copier, const Int8Gemm& g, i64 group, i64 image, i64 z, i64 y, i64 x, i64 a, i64 b, u8* to) {
    if (z < 0 || z >= g.in[0] || y < 0 || y >= g.in[1]) return copier.fill(to, b - a);
    const i64 line = g.in[2] * g.pixel;
    const u8* pixels = g.x + ((image * g.in[0] + z) * g.in[1] + y) * line;
    if (!g.is_row_run) {
        if (x < 0 || x >= g.in[2]) return copier.fill(to, b - a);
        return copier.copy(to, pixels + x * g.pixel + group * g.in_channels + a, b - a);
    }
    // Bytes [begin, end) of the line are inside.
    const i64 from = x * g.pixel + a, until = x * g.pixel + b;
    const i64 begin = from < 0 ? smaller(0, until) : smaller(from, line);
    const i64 end = until < begin ? begin : until > line ? line : until;
    const i64 first = smaller(begin - from, b - a);
    if (first > 0) copier.fill(to, first);
    if (end > begin) copier.copy(to + (begin - from), pixels + begin, end - begin);
    const i64 done = first > 0 ? first + end - begin : end - begin;
    if (done < b - a) copier.fill(to + done, b - a - done);
}

void pack_windows(Copier& copier, const Int8Gemm& g, i64 group, i64 row, i64 rows, i64 begin, i64 end, u8* to,
                  i64 to_row) {
    i64 ox = row % g.out[2], rest = row / g.out[2];
    i64 oy = rest % g.out[1];
    rest /= g.out[1];
    i64 oz = rest % g.out[0], image = rest / g.out[0];
    const i64 first = begin / g.run_length, last = (end - 1) / g.run_length;
    // Of the first run, and of the last; runs between are whole.
    const i64 skip = begin - first * g.run_length, keep = end - last * g.run_length;
    Copier local = copier;  // in registers
    for (i64 m = 0; m < rows; ++m, to += to_row) {
        const i64 z = oz * g.stride[0], y = oy * g.stride[1], x = ox * g.stride[2];
        const bool is_inside = z >= g.inside_from[0] && z < g.inside_to[0] && y >= g.inside_from[1] &&
                               y < g.inside_to[1] && x >= g.inside_from[2] && x < g.inside_to[2];
        const u8* window = g.x + (((image * g.in[0] + z) * g.in[1] + y) * g.in[2] + x) * g.pixel +
                           group * g.in_channels;
        u8* p = to;
        for (i64 run = first; run <= last; ++run) {
            const i64 a = run == first ? skip : 0, b = run == last ? keep : g.run_length;
            if (is_inside)
                local.copy(p, window + g.run_offset[run] + a, b - a);
            else
                pack_edge_run(copier, g, group, image, z + g.run_z[run], y + g.run_y[run], x + g.run_x[run], a, b, p);
            p += b - a;
        }
        if (++ox < g.out[2]) continue;
        ox = 0;
        if (++oy < g.out[1]) continue;
        oy = 0;
        if (++oz < g.out[0]) continue;
        oz = 0;
        ++image;
    }
    copier.add(local);
}

template <class V>
void widen_rows(const u8* from, i64 from_row, u8* to, i64 to_row, i64 rows, i64 bytes, std::int32_t zero) {
    if constexpr (!V::kIsExact) {
        const Int zero8 = V::set_bytes(static_cast<u8>(zero)), zero16 = V::set_words(static_cast<short>(zero));
        for (i64 m = 0; m < rows; ++m)
            for (i64 i = 0; i < bytes; i += V::kCopy)
                V::widen(to + m * to_row + 2 * i, from + m * from_row + i, zero8, zero16);
    }
}

// ---- gemm --------------------------------------------------------------------------------------------------------

#if !defined(QF_INT8_AMX)
// Scratch: packed rows, their widened form, one tile's sums, and all sums if the reduction is cut into chunks.
struct Scratch {
    i64 packed_row, wide_row, sums_row;
    i64 wide, tile, sums, bytes;
};

Scratch scratch_of(const Int8Gemm& g, i64 rows, i64 panels) {
    Scratch s{};
    // 64 bytes more than a multiple of 64: rows a power of two apart would share a cache set.
    s.packed_row = round_up(4 * g.chunk, 64) + 64;
    s.wide_row = round_up(8 * g.chunk, 64) + 64;
    s.sums_row = panels * kColumns;
    s.wide = g.is_direct ? 0 : round_up(rows * s.packed_row + 64, 64);
    s.tile = s.wide + (Vector::kIsExact ? 0 : round_up(rows * s.wide_row + 64, 64));
    s.sums = s.tile + kRows * kColumns * 4;
    s.bytes = s.sums + (g.chunk < g.quads || g.row_start != nullptr ? (rows + kRows) * s.sums_row * 4 : 0);
    return s;
}

void gemm_packed(const Int8Gemm& g, i64 group, i64 row, i64 rows, i64 panel, i64 panels, u8* scratch) {
    const Scratch s = scratch_of(g, rows, panels);
    const FinishTile finish = finisher(g.output);
    const i64 steps = g.runs * g.run_length;
    const Tiling tiling(rows);
    std::int32_t* tile_sums = reinterpret_cast<std::int32_t*>(scratch + s.tile);
    std::int32_t* all_sums = reinterpret_cast<std::int32_t*>(scratch + s.sums);
    const bool keeps_sums = g.chunk < g.quads || g.row_start != nullptr;
    if (g.row_start != nullptr)
        for (i64 t = 0; t < tiling.count; ++t)
            for (i64 m = 0; m < tiling.height(t); ++m)
                for (i64 c = 0; c < panels * kColumns; ++c)
                    all_sums[(tiling.slot(t) + m) * s.sums_row + c] =
                        g.start[(group * g.panels + panel) * kColumns + c] + g.row_start[row + tiling.first(t) + m];

    for (i64 first = 0; first == 0 || first < g.quads; first += g.chunk) {
        const i64 quads = smaller(g.chunk, g.quads - first);
        const bool is_last = first + quads >= g.quads;
        const u8* x = nullptr;
        i64 x_row = 0;
        bool is_wide = false;
        if (g.is_direct) {
            x = g.x + row * g.pixel + group * g.in_channels + 4 * first;
            x_row = g.pixel;
        } else if (quads > 0) {
            Copier copier(g);
            const i64 end = smaller(4 * (first + quads), steps);
            (g.is_pointwise ? pack_pixels : pack_windows)(copier, g, group, row, rows, 4 * first, end, scratch,
                                                          s.packed_row);
            x = scratch;
            x_row = s.packed_row;
            is_wide = !copier.is_low();
            if (is_wide) {
                widen_rows<Vector>(scratch, s.packed_row, scratch + s.wide, s.wide_row, rows, 4 * quads, g.zero);
                x = scratch + s.wide;
                x_row = s.wide_row;
            }
        }
        for (i64 p = 0; p < panels; ++p) {
            const i64 padded = (group * g.panels + panel + p) * kColumns;
            const i64 count = smaller(kColumns, g.channels - (panel + p) * kColumns);
            const u8* w = reinterpret_cast<const u8*>(g.weights) +
                          ((group * g.panels + panel + p) * g.quads + first) * 4 * kColumns;
            const u8* joint =
                g.joint == nullptr ? nullptr : g.joint + (group * g.panels + panel + p) * g.quads + first;
            for (i64 t = 0; t < tiling.count; ++t) {
                const i64 m = tiling.first(t), height = tiling.height(t), skip = tiling.slot(t) - m;
                std::int32_t* sums = keeps_sums ? all_sums + tiling.slot(t) * s.sums_row + p * kColumns : tile_sums;
                const i64 sums_row = keeps_sums ? s.sums_row : kColumns;
                const bool starts = first == 0 && g.row_start == nullptr;
                const Tile run = piece_tile(height, 1, count, is_wide);
                const i64 low = tiling.low_rows(t);
                const i64 next = g.quads * 4 * kColumns, chunk = quads * 4 * kColumns;
                run({x + m * x_row, x + (m + low) * x_row, x_row, kNoOffset, 1, quads, w, joint,
                     starts ? g.start + padded : sums, starts ? 0 : sums_row, sums, sums_row, low,
                     w + next + chunk * t / tiling.count, (4 * kColumns + tiling.count - 1) / tiling.count});
                if (is_last)
                    finish(g.output, sums + skip * sums_row, sums_row, row + m + skip, height - skip, padded,
                           group * g.channels + (panel + p) * kColumns, count);
            }
        }
    }
}
#endif

// ---- gemm on lines of pixels ---------------------------------------------------------------------------------------

// Rows are read where they lie, or in a copy of the input's lines with their padding, which is smaller than the rows
// of windows by the number of taps; by tile registers, also in a copy of the rows. A piece is a tile's rows within one
// line of output pixels, or where it spans lines, of positions in the copy of several lines: those in the padding between
// them are multiplied in vain.
struct Piece {
    const u8* x;
    i64 row, height;
    i64 skip, end;  // rows before `skip` the piece before has as well, at `end` and beyond there are none
    i64 first;      // position of its first row, counted from the one of output row `row`
};
constexpr i64 kSpan = 16;  // positions of a piece that spans lines
constexpr i64 kSumsRow = kDepth > 1 ? 2 * kColumns : kColumns;  // of the sums of tiles, in elements

// Positions from one line to the next where pieces span lines.
i64 line_pitch(const Int8Gemm& g) { return g.out[2] + g.reach[2]; }
i64 positions(const Int8Gemm& g, i64 lines) { return (lines - 1) * line_pitch(g) + g.out[2]; }

// A tile register's time does not depend on its rows: lines of 7 pixels one by one would use less than half of it.
bool spans_lines(const Int8Gemm& g) {
    if (kDepth == 1 || !g.is_windowed || g.reads_in_place || g.column_bytes > 0) return false;
    if (g.stride[1] != 1 || g.stride[2] != 1) return false;
    return g.out[2] >= 4 && g.reach[2] <= g.out[2] &&  // there is room for no more pieces than rows
           (positions(g, g.out[1]) + kSpan - 1) / kSpan < g.out[1] * ((g.out[2] + 15) / 16);
}

// Input lines that `lines` lines of output read.
i64 input_lines(const Int8Gemm& g, i64 lines) { return (lines - 1) * g.stride[1] + g.reach[1] + 1; }

i64 line_bytes(const Int8Gemm& g) {
    if (g.reads_in_place) return g.in[2] * g.pixel;
    if (g.column_bytes > 0) return g.column_bytes;
    if (spans_lines(g)) return line_pitch(g) * g.pixel;
    // The last row's run may be padded beyond the line.
    return round_up(((g.out[2] - 1) * g.stride[2] + g.reach[2] + 1) * g.pixel, 64) + 64;
}

// Of the columns of up to `lines` lines of y, see `column_bytes`: the last part is read, and written, by whole vectors.
i64 column_pitch(const Int8Gemm& g, i64 lines) {
    return round_up(input_lines(g, smaller(lines, g.out[1])) * g.column_bytes, 64) + 64;
}
constexpr i64 kPaddedLines = 16;  // that are copied at a time before they become columns
i64 padded_line_bytes(const Int8Gemm& g) { return ((g.out[2] - 1) * g.stride[2] + g.reach[2] + 1) * g.pixel; }

// Parts are copied in whole pieces: beyond the last one, too.
i64 padded_lines_bytes(const Int8Gemm& g) { return kPaddedLines * round_up(padded_line_bytes(g), 64) + 128; }

struct LineScratch {
    i64 packed_row, pieces, sums, wide, offsets, bytes;  // wide: the lines in 16 bits; offsets: of runs there
};

LineScratch line_scratch_of(const Int8Gemm& g, i64 rows) {
    LineScratch s{};
    if (g.is_windowed && !g.reads_in_place) {
        const i64 lines = rows / g.out[2], images = (lines + g.out[1] - 2) / g.out[1] + 1;
        s.pieces = (lines * g.stride[1] + images * (g.reach[1] + 1)) * line_bytes(g) + 64;  // copies are of whole vectors
        if (spans_lines(g)) s.pieces += kSpan * g.pixel;  // the last piece may read beyond
        if (g.column_bytes > 0) s.pieces = images * g.out[2] * column_pitch(g, lines) + padded_lines_bytes(g);
        s.pieces = round_up(s.pieces, 64);
    } else if (!g.is_windowed && !g.is_direct) {
        // 64 bytes more than a multiple of 64: rows a power of two apart would share a cache set.
        s.packed_row = round_up(4 * g.quads, 64) + 64;
        s.pieces = rows * s.packed_row + 64;
    }
    s.sums = s.pieces + round_up(rows * static_cast<i64>(sizeof(Piece)), 64);
    s.wide = s.sums + 2 * kRows * kSumsRow * 4;
    s.offsets = s.wide + (Vector::kIsExact ? 0 : 2 * s.pieces);
    s.bytes = s.offsets + (Vector::kIsExact ? 0 : g.runs * static_cast<i64>(sizeof(i64)));
    return s;
}

// Copies `lines` input lines from `line` (both of padded coordinates) of an image, `bytes` apart.
void pad_lines(Copier& copier, const Int8Gemm& g, i64 image, i64 line, i64 lines, u8* to, i64 bytes) {
    const i64 columns = (g.out[2] - 1) * g.stride[2] + g.reach[2] + 1, left = g.padding[2];
    const i64 begin = smaller(left, columns), end = smaller(columns, left + g.in[2]);
    for (i64 l = 0; l < lines; ++l, to += bytes) {
        const i64 y = line + l - g.padding[1];
        if (y < 0 || y >= g.in[1]) {
            copier.fill(to, bytes);
            continue;
        }
        const u8* from = g.x + (image * g.in[1] + y) * g.in[2] * g.pixel;
        copier.copy(to + begin * g.pixel, from, (end - begin) * g.pixel);
        copier.fill(to, begin * g.pixel);
        copier.fill(to + end * g.pixel, bytes - end * g.pixel);
    }
}

#if defined(QF_INT8_AMX)
#include "int8_amx_pieces.inc"

// Input lines as `pad_lines` copies them, by columns, `pitch` bytes apart; a few lines at a time, so that a column's parts
// are written one behind the other. What lies behind a part is overwritten, or multiplied by weights of 0.
void copy_columns(Copier& copier, const Int8Gemm& g, i64 image, i64 line, i64 lines, u8* to, i64 pitch, u8* padded) {
    constexpr i64 kPart = 32;  // bytes copied at once
    const i64 line_pitch = round_up(padded_line_bytes(g), 64);
    for (i64 first = 0; first < lines; first += kPaddedLines) {
        const i64 count = smaller(kPaddedLines, lines - first);
        pad_lines(copier, g, image, line + first, count, padded, line_pitch);
        for (i64 column = 0; column < g.out[2]; ++column) {
            const u8* from = padded + column * g.stride[2] * g.pixel;
            u8* part = to + column * pitch + first * g.column_bytes;
            for (i64 l = 0; l < count; ++l, from += line_pitch, part += g.column_bytes)
                for (i64 i = 0; i < g.column_bytes; i += kPart) std::memcpy(part + i, from + i, kPart);
        }
    }
}
#endif

void gemm_lines(const Int8Gemm& g, i64 group, i64 row, i64 rows, i64 panel, i64 panels, u8* scratch) {
    const LineScratch s = line_scratch_of(g, rows);
    const i64 width = g.is_windowed ? g.out[2] : rows, lines = rows / width;
    const bool spans = kDepth > 1 && spans_lines(g);
    const PieceTiling tiling(spans ? kSpan : width);
    Piece* pieces = reinterpret_cast<Piece*>(scratch + s.pieces);
    i64 count = 0;
    i64 x_row = g.stride[2] * g.pixel;
    u8* padded_lines = scratch;
    const u8* x = g.x + row * g.pixel + group * g.in_channels;
    Copier copier(g);
    if (s.packed_row > 0) {
        if (g.quads > 0)
            (g.is_pointwise ? pack_pixels : pack_windows)(copier, g, group, row, rows, 0, g.runs * g.run_length, scratch,
                                                          s.packed_row);
        x = scratch;
        x_row = s.packed_row;
    }
    if (g.column_bytes > 0) x_row = column_pitch(g, lines);
    i64 left_in_image = 0;  // output lines
    for (i64 line = 0; line < lines; ++line) {
        if (g.is_windowed) {
            if (left_in_image == 0) {
                const i64 first = row / width + line, image = first / g.out[1], y = first % g.out[1];
                left_in_image = smaller(g.out[1] - y, lines - line);
                if (g.reads_in_place) {
                    x = g.x + (image * g.in[1] + y * g.stride[1]) * line_bytes(g);
                } else {
                    x = padded_lines;
                    const i64 from = y * g.stride[1], read = input_lines(g, left_in_image);
#if defined(QF_INT8_AMX)
                    if (g.column_bytes > 0) {
                        u8* padded = scratch + s.pieces - padded_lines_bytes(g);
                        copy_columns(copier, g, image, from, read, padded_lines, x_row, padded);
                        padded_lines += g.out[2] * x_row;
                    } else
#endif
                    {
                        pad_lines(copier, g, image, from, read, padded_lines, line_bytes(g));
                        padded_lines += read * line_bytes(g);
                    }
                }
                if (spans) {
                    const i64 all = positions(g, left_in_image);
                    for (i64 at = 0; at < all; at += kSpan) {
                        const i64 first = all < kSpan ? 0 : smaller(at, all - kSpan);
                        pieces[count++] = {x + first * x_row, row + line * width, kSpan, at - first,
                                           smaller(kSpan, all - first), first};
                    }
                }
            } else {
                x += g.stride[1] * line_bytes(g);
            }
            --left_in_image;
        }
        for (i64 t = 0; !spans && t < tiling.count; ++t)
            pieces[count++] = {x + tiling.first(t) * x_row, row + line * width + tiling.first(t), tiling.height(t),
                               tiling.slot(t) - tiling.first(t), tiling.height(t), 0};
    }

    const i64* offsets = g.is_windowed ? g.window_offset : kNoOffset;
    const bool is_wide = !Vector::kIsExact && !copier.is_low();
    if (is_wide) {
        u8* wide = scratch + s.wide;
        widen_rows<Vector>(scratch, 0, wide, 0, 1, padded_lines - scratch, g.zero);
        for (i64 i = 0; i < count; ++i) pieces[i].x = wide + 2 * (pieces[i].x - scratch);
        x_row *= 2;
        i64* doubled = reinterpret_cast<i64*>(scratch + s.offsets);
        for (i64 run = 0; run < g.runs; ++run) doubled[run] = 2 * g.window_offset[run];
        offsets = doubled;
    }
    TileJob job;
    job.x_row = x_row;
    job.offsets = offsets;
    job.runs = g.is_windowed ? g.runs : 1;
    job.sums_row = kSumsRow;
    job.steps = g.quads / job.runs;
    std::int32_t* sums = reinterpret_cast<std::int32_t*>(scratch + s.sums);
#if defined(QF_INT8_AMX)
    multiply_pieces(g, group, panel, panels, pieces, count, Ahead(g, group, panel, panels, row, rows), job, sums);
#else
    // The tiles of one panel together fetch the next one.
    job.ahead_step = (4 * kColumns + count - 1) / count;
    // One panel after the other: its weights stay in the L1 cache. Tiles of a short reduction take some 100 cycles, so that
    // little may be done for each.
    const FinishTile finish = finisher(g.output);
    const i64 panel_bytes = g.quads * 4 * kColumns, ahead = panel_bytes / count;
    std::int32_t* other_sums = sums + kRows * kColumns;
    struct {
        const std::int32_t* sums;
        i64 row, rows, padded, channel, channels;
    } pending{};
    const auto finish_pending = [&] {
        if (pending.rows > 0)
            finish(g.output, pending.sums, kColumns, pending.row, pending.rows, pending.padded, pending.channel,
                   pending.channels);
    };
    for (i64 p = 0; p < panels; ++p) {
        const i64 all = group * g.panels + panel + p;
        const i64 own_group = g.task_panels > g.panels ? all / g.panels : group, within = all - own_group * g.panels;
        const i64 own_x = (own_group - group) * g.in_channels * (is_wide ? 2 : 1);  // where its group begins in a pixel
        const i64 padded = all * kColumns, channel = own_group * g.channels + within * kColumns;
        const i64 channels = smaller(kColumns, g.channels - within * kColumns);
        job.w = reinterpret_cast<const u8*>(g.weights) + all * panel_bytes;
        job.start = g.start + padded;
        job.ahead = job.w + panel_bytes;
        if (g.joint != nullptr) job.joint = g.joint + all * g.quads;
        for (i64 i = 0; i < count; ++i) {
            job.x = pieces[i].x + own_x;
#if defined(QF_INT8_TILE_CODES)
            if (const TileOfCodes at_once = tile_of_codes_for(g.output, pieces[i].height, channels)) {
                at_once(job, g.output, pieces[i].row, padded, channel);
                job.ahead += ahead;
                continue;
            }
#endif
            job.sums = sums;
            std::swap(sums, other_sums);
            piece_tile(pieces[i].height, 1, channels, is_wide)(job);
            finish_pending();
            pending = {job.sums, pieces[i].row, pieces[i].height, padded, channel, channels};
            job.ahead += ahead;
        }
    }
    finish_pending();
#endif
}

#if defined(QF_INT8_AMX)
void gemm(const Int8Gemm& g, i64 group, i64 row, i64 rows, i64 panel, i64 panels, u8* scratch) {
    gemm_lines(g, group, row, rows, panel, panels, scratch);
}

i64 gemm_scratch(const Int8Gemm& g, i64 rows, i64) { return line_scratch_of(g, rows).bytes; }
#else
bool goes_by_lines(const Int8Gemm& g) { return g.is_windowed || (g.is_direct && g.row_start == nullptr); }

void gemm(const Int8Gemm& g, i64 group, i64 row, i64 rows, i64 panel, i64 panels, u8* scratch) {
    (goes_by_lines(g) ? gemm_lines : gemm_packed)(g, group, row, rows, panel, panels, scratch);
}

i64 gemm_scratch(const Int8Gemm& g, i64 rows, i64 panels) {
    return goes_by_lines(g) ? line_scratch_of(g, rows).bytes : scratch_of(g, rows, panels).bytes;
}
#endif

#if defined(QF_INT8_AMX)
// Tile registers multiply no taps: what vectors of this length do is compiled once.
constexpr decltype(Int8Kernels::depthwise) depthwise = isa_avx512_vnni::Depthwise::lines;
constexpr decltype(Int8Kernels::depthwise_scratch) depthwise_scratch = isa_avx512_vnni::Depthwise::scratch;
constexpr decltype(Int8Kernels::rolling) rolling = isa_avx512_vnni::Depthwise::rolling_lines;
constexpr decltype(Int8Kernels::rolling_scratch) rolling_scratch = isa_avx512_vnni::Depthwise::rolling_scratch;
#else
// ---- depthwise ---------------------------------------------------------------------------------------------------

// Addresses of the taps, and a copy of the tensor's last bytes: whole blocks are read, also where channels end.
i64 taps_bytes(const Int8Depthwise& d) { return round_up(d.taps * static_cast<i64>(sizeof(u8*)), 64); }
i64 depthwise_scratch(const Int8Depthwise& d) { return taps_bytes(d) + 3 * d.blocks * kBlock; }

constexpr i64 kTapBytes = 4 * kBlock;  // weights of a block's channels for one group of taps
template <class V = Vector>
QF_INLINE typename V::Int tap_weights(const u8* w, int i) {
    return V::load(reinterpret_cast<const std::int32_t*>(w) + i * kLanes);
}

// What becomes of the sums of a block of `outputs` pixels, which lie one after the other: those of the first at y's element
// `at`, and, where sums are kept, at `place`; `places` from one to the next. Compiled once for all loops of taps.
using FinishBlocks = void (*)(const Int8Output&, const OutputConstants&, const std::int32_t* sums, i64 outputs, i64 block,
                              i64 at, i64 place, i64 places, i64 count);

// Codes of a block that is half empty or more, without the empty lanes.
template <int kActivation, int kVectors, class Merge = Tables<Vector>>
void finish_merged(const Int8Output& o, const OutputConstants& constants, const std::int32_t* sums, i64 outputs, i64 block,
                   i64 at, i64 count) {
    const float *scale = o.scale + block * kBlock, *bias = o.bias + block * kBlock;
    for (; outputs > 0; --outputs, sums += kBlock, at += o.row) {
        Int codes[kVectors];
        for (int i = 0; i < kVectors; ++i) {
            const Float r = real_of(Merge::template merged<kVectors>(sums, i), Merge::template merged<kVectors>(scale, i),
                                    Merge::template merged<kVectors>(bias, i));
            codes[i] = code_of(activate<kActivation>(r, constants.a, constants.b), constants);
        }
        Merge::template store<kVectors>(static_cast<u8*>(o.y) + at, codes, count);
    }
}

template <int kActivation>
void finish_blocks(const Int8Output& o, const OutputConstants& constants, const std::int32_t* sums, i64 outputs, i64 block,
                   i64 at, i64 place, i64 places, i64 count) {
    if constexpr (Tables<Vector>::kMerges && kActivation != kInt8Linear) {
        const bool is_alone = o.residual == nullptr && o.real_residual == nullptr && o.befores == 0;
        if (is_alone && !o.is_float && o.rest == nullptr) {
            if (count <= kBlock / 4) return finish_merged<kActivation, 1>(o, constants, sums, outputs, block, at, count);
            if (count <= kBlock / 2) return finish_merged<kActivation, 2>(o, constants, sums, outputs, block, at, count);
        }
    }
    for (; outputs > 0; --outputs, sums += kBlock, at += o.row, place += places) {
        const Int all[4] = {Vector::load(sums), Vector::load(sums + kLanes), Vector::load(sums + 2 * kLanes),
                            Vector::load(sums + 3 * kLanes)};
        finish_block<kActivation>(o, constants, all, block, at, place, count);
    }
}
template <int... kActivations>
FinishBlocks block_finisher(int activation, std::integer_sequence<int, kActivations...>) {
    static constexpr FinishBlocks all[] = {finish_blocks<kActivations>...};
    return all[activation];
}
FinishBlocks block_finisher(const Int8Output& o) {
    return block_finisher(o.is_linear || o.raw_sums != nullptr ? kInt8Linear : o.activation,
                          std::make_integer_sequence<int, kInt8Linear + 1>{});
}

// The sums of block b; taps lie `offset` bytes beyond their addresses.
QF_INLINE void depthwise_sums(const Int8Depthwise& d, const u8* const* taps, i64 offset, i64 b, std::int32_t* to) {
    const i64 groups = d.taps / Vector::kTapGroup;
    Int sums[4], codes[4];
    for (int i = 0; i < 4; ++i) sums[i] = Vector::load(d.start + b * kBlock + i * kLanes);
    const u8* w = d.weights + b * groups * kTapBytes;
    for (i64 t = 0; t < groups; ++t, w += kTapBytes) {
        const u8* group[Vector::kTapGroup];
        for (int i = 0; i < Vector::kTapGroup; ++i) group[i] = taps[t * Vector::kTapGroup + i] + offset + b * kBlock;
        Vector::interleave(group, codes);
        for (int i = 0; i < 4; ++i) Vector::dot_taps(sums[i], codes[i], tap_weights(w, i));
    }
    for (int i = 0; i < 4; ++i) Vector::store(to + i * kLanes, sums[i]);
}

// `count` pixels of blocks [block, block + blocks), from `pixel` on, whose taps lie `step` bytes apart. Compiled once for
// edges, which call it per pixel, and what lies between them.
__attribute__((noinline)) void depthwise_pixels(const Int8Depthwise& d, const OutputConstants& constants,
                                                const u8* const* taps, i64 step, i64 block, i64 blocks, i64 pixel,
                                                i64 count) {
    constexpr i64 kTogether = 8;
    alignas(64) std::int32_t sums[kTogether * kBlock];
    const FinishBlocks finish = block_finisher(d.output);
    for (i64 b = block; b < block + blocks; ++b)
        for (i64 i = 0; i < count; i += kTogether) {
            const i64 n = smaller(kTogether, count - i), first = pixel + i;
            for (i64 j = 0; j < n; ++j) depthwise_sums(d, taps, (i + j) * step, b, sums + j * kBlock);
            finish(d.output, constants, sums, n, b, first * d.output.row + b * kBlock, (first * d.blocks + b) * kBlock,
                   d.blocks * kBlock, smaller(kBlock, d.channels - b * kBlock));
        }
}

void depthwise(const Int8Depthwise& d, i64 line, i64 lines, i64 block, i64 blocks, u8* scratch) {
    const OutputConstants constants = constants_of(d.output);
    const u8** taps = reinterpret_cast<const u8**>(scratch);
    const i64 padded = d.blocks * kBlock, step = d.stride[2] * d.channels;
    u8* tail = scratch + taps_bytes(d);
    const i64 tail_bytes = smaller(d.x_end - d.x, 2 * padded);
    const u8* tail_begin = d.x_end - tail_bytes;
    if (padded != d.channels) std::memcpy(tail, tail_begin, tail_bytes);
    for (i64 t = d.real_taps; t < d.taps; ++t) taps[t] = d.outside;  // weight 0

    for (i64 l = line; l < line + lines; ++l) {
        const i64 oy = l % d.out[1], oz = l / d.out[1] % d.out[0], image = l / d.out[1] / d.out[0];
        const auto row_of = [&](i64 t) -> const u8* {
            const i64 z = oz * d.stride[0] + d.tap_z[t], y = oy * d.stride[1] + d.tap_y[t];
            if (z < 0 || z >= d.in[0] || y < 0 || y >= d.in[1]) return nullptr;
            return d.x + ((image * d.in[0] + z) * d.in[1] + y) * d.in[2] * d.channels;
        };
        const auto edge = [&](i64 begin, i64 end) {
            for (i64 ox = begin; ox < end; ++ox) {
                for (i64 t = 0; t < d.real_taps; ++t) {
                    const u8* row = row_of(t);
                    const i64 x = ox * d.stride[2] + d.tap_x[t];
                    taps[t] = d.outside;
                    if (row == nullptr || x < 0 || x >= d.in[2]) continue;
                    taps[t] = row + x * d.channels;
                    if (d.x_end - taps[t] < padded) taps[t] = tail + (taps[t] - tail_begin);
                }
                depthwise_pixels(d, constants, taps, 0, block, blocks, l * d.out[2] + ox, 1);
            }
        };
        // Between the edges every tap moves on by the same step.
        const i64 begin = d.inner_begin;
        i64 end = d.inner_end;
        for (i64 t = 0; t < d.real_taps && end > begin; ++t) {
            const u8* row = row_of(t);
            const i64 x = begin * d.stride[2] + d.tap_x[t];
            taps[t] = row == nullptr ? d.outside : row + x * d.channels;
            const i64 room = (row == nullptr ? d.outside + d.outside_bytes : d.x_end) - taps[t] - padded;
            end = smaller(end, room < 0 ? begin : begin + room / step + 1);
        }
        depthwise_pixels(d, constants, taps, step, block, blocks, l * d.out[2] + begin, end - begin);
        edge(0, begin);
        edge(end > begin ? end : begin, d.out[2]);
    }
}

#if defined(QF_INT8_ROLLING)
#include "int8_rolling.inc"
#else
constexpr decltype(Int8Kernels::rolling) rolling = nullptr;
constexpr decltype(Int8Kernels::rolling_scratch) rolling_scratch = nullptr;
#endif
#endif

#if defined(QF_INT8_WINOGRAD)
#include "int8_winograd.inc"
#else
constexpr decltype(Int8Kernels::winograd) winograd = nullptr;
constexpr decltype(Int8Kernels::winograd_scratch) winograd_scratch = nullptr;
#endif

}  // namespace

#if defined(__AVX2__) && !defined(QF_INT8_FINISHING) && !defined(QF_INT8_LANES)
FinishTile Finishing::tile(const Int8Output& o) { return finisher(o); }
#endif
#if defined(__AVX512VNNI__) && !defined(QF_INT8_AMX) && !defined(QF_INT8_LANES)
void Depthwise::lines(const Int8Depthwise& d, i64 line, i64 lines, i64 block, i64 blocks, u8* scratch) {
    depthwise(d, line, lines, block, blocks, scratch);
}
i64 Depthwise::scratch(const Int8Depthwise& d) { return depthwise_scratch(d); }
void Depthwise::rolling_lines(const Int8Depthwise& d, i64 line, i64 lines, i64 block, i64 blocks, u8* scratch) {
    rolling(d, line, lines, block, blocks, scratch);
}
i64 Depthwise::rolling_scratch(const Int8Depthwise& d) { return QF_ISA_NAMESPACE::rolling_scratch(d); }
#endif

extern const Int8Kernels int8_kernels;
const Int8Kernels int8_kernels = {
    kName, kLanes, kRows, kColumns, kDepth, Vector::kIsExact, Vector::kTapGroup, Vector::kJointWeights, gemm, gemm_scratch,
    line_bytes, depthwise, depthwise_scratch, rolling, rolling_scratch, winograd, winograd_scratch};

}  // namespace quantflow::host::QF_ISA_NAMESPACE
