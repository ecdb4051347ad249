// Source of the custom kernels: SYCL C++, compiled at run time for the device at hand (kernel_bundle.cpp).
//
// No kernel uses double: Arc GPUs have none. Compiled with -ffp-contract=off: r = acc * scale, then + bias, rounds twice,
// as the reference runtime does.
#pragma once

#include "../src/activations.hpp"

namespace quantflow::xpu {

#define QF_ACTIVATION_CASE(name, Name, aten, numbers, exact, real, ...) "        case k" #Name ": return " #real ";\n"

inline constexpr char kKernelSource[] = R"SYCL(
namespace this_item = sycl::ext::oneapi::this_work_item;
namespace syclexp = sycl::ext::oneapi::experimental;
using std::int64_t;

// A required sub-group size on all of them keeps them in one device image; every Intel GPU and CPU has 16.
constexpr int kLanes = 16;
#define KERNEL                                                              \
    extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclexp::nd_range_kernel<3>)) \
    SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclexp::sub_group_size<16>)) void

// ------------------------------------------------------------------------------------------------ values

inline float load_real(const void* p, const Value& v, int64_t i) {
    switch (v.type) {
        case kF32: return static_cast<const float*>(p)[i];
        case kU8: return (static_cast<const unsigned char*>(p)[i] - v.zero_point) * v.scale;
        case kS8: return (static_cast<const signed char*>(p)[i] - v.zero_point) * v.scale;
        case kS32: return static_cast<const int*>(p)[i];
        case kS64: return static_cast<const int64_t*>(p)[i];
        default: return static_cast<const unsigned char*>(p)[i] != 0;
    }
}

inline int64_t load_integer(const void* p, int type, int64_t i) {
    switch (type) {
        case kU8: return static_cast<const unsigned char*>(p)[i];
        case kS8: return static_cast<const signed char*>(p)[i];
        case kS32: return static_cast<const int*>(p)[i];
        case kS64: return static_cast<const int64_t*>(p)[i];
        default: return static_cast<const unsigned char*>(p)[i] != 0;
    }
}

inline int load_code(const void* p, int type, int64_t i) {
    return type == kU8 ? static_cast<const unsigned char*>(p)[i] : static_cast<const signed char*>(p)[i];
}

inline void store_integer(void* p, int type, int64_t i, int64_t value) {
    switch (type) {
        case kF32: static_cast<float*>(p)[i] = value; break;
        case kS32: static_cast<int*>(p)[i] = value; break;
        case kS64: static_cast<int64_t*>(p)[i] = value; break;
        case kB8: static_cast<unsigned char*>(p)[i] = value != 0; break;
        default: static_cast<unsigned char*>(p)[i] = value; break;
    }
}

// NaN and +Inf give qmax, -Inf gives qmin.
inline int quantize(float r, const Value& v) {
    const float q = sycl::rint(r / v.scale) + v.zero_point;
    return !(q < v.qmax) ? v.qmax : q > v.qmin ? static_cast<int>(q) : v.qmin;
}

inline void store_real(void* p, const Value& v, int64_t i, float r) {
    if (v.coded)
        static_cast<unsigned char*>(p)[i] = quantize(r, v);
    else if (v.type == kF32)
        static_cast<float*>(p)[i] = r;
    else if (v.type == kB8)
        static_cast<unsigned char*>(p)[i] = r != 0;
    else
        store_integer(p, v.type, i, static_cast<int64_t>(r));
}

inline float clamped(float r, float low, float high) { return r < low ? low : r > high ? high : r; }  // keeps NaN

inline float activate(const EpilogueArg& e, float r) {
    using sycl::erf;
    using sycl::exp;
    using sycl::tanh;
    const float a = e.a, b = e.b;
    switch (e.kind) {
)SYCL" QF_ACTIVATIONS(QF_ACTIVATION_CASE) R"SYCL(
        default: return r;
    }
}

// sum / n to float32 without double or an integer division: correctly rounded below 2**24, else to 2 ulp.
template <typename Integer>
inline float divided(Integer sum, Integer n) {
    const Integer size = sum < 0 ? -sum : sum;
    const float by = n;
    const float v = static_cast<float>(size >> 24) / by * 16777216.0f + static_cast<float>(size & 0xffffff) / by;
    return sum < 0 ? -v : v;
}

// A float32 sum whose error does not grow with its length (Kahan, Neumaier).
struct Sum {
    float total = 0, lost = 0;
    void add(float v) {
        const float t = total + v;
        lost += sycl::fabs(total) >= sycl::fabs(v) ? (total - t) + v : (v - t) + total;
        total = t;
    }
    // An overflow makes `lost` NaN.
    float get() const { return sycl::isfinite(total) ? total + lost : total; }
};

// ------------------------------------------------------------------------------------------------ elementwise

// Calls f(offset of this item in every operand). The unit case is told apart so that a CPU loads whole vectors.
template <int N, typename F>
inline void each(const Space& s, const F& f) {
    const auto item = this_item::get_nd_item<3>();
    const unsigned lane = item.get_global_id(2), row = item.get_global_id(1);
    unsigned rest = item.get_group(0);
    if (lane >= s.extent[0] || row >= s.extent[1]) return;
    int64_t at[N];
    for (int n = 0; n < N; ++n) at[n] = row * s.stride[n][1];
    if (s.rank <= 3) {
        for (int n = 0; n < N; ++n) at[n] += rest * s.stride[n][2];
    } else {
#pragma unroll
        for (int d = 2; d < 6; ++d) {
            const unsigned i = rest % s.extent[d];
            rest /= s.extent[d];
            for (int n = 0; n < N; ++n) at[n] += i * s.stride[n][d];
        }
    }
    if (s.unit) {
        for (int n = 0; n < N; ++n) at[n] += lane;
        f(at);
    } else {
        for (int n = 0; n < N; ++n) at[n] += lane * s.stride[n][0];
        f(at);
    }
}

// Elements of 1, 4 or 8 bytes.
KERNEL qf_move(const void* x, void* y, Space s, int bytes) {
    each<2>(s, [&](const int64_t* at) {
        if (bytes == 1)
            static_cast<unsigned char*>(y)[at[1]] = static_cast<const unsigned char*>(x)[at[0]];
        else if (bytes == 4)
            static_cast<unsigned*>(y)[at[1]] = static_cast<const unsigned*>(x)[at[0]];
        else
            static_cast<int64_t*>(y)[at[1]] = static_cast<const int64_t*>(x)[at[0]];
    });
}

KERNEL qf_convert(const void* x, void* y, Space s, Value vx, Value vy) {
    each<2>(s, [&](const int64_t* at) {
        if (vx.coded || vx.type == kF32 || vy.coded)
            store_real(y, vy, at[1], load_real(x, vx, at[0]));
        else
            store_integer(y, vy.type, at[1], load_integer(x, vx.type, at[0]));
    });
}

KERNEL qf_fill(void* y, Space s, int bytes, int64_t bits) {
    each<1>(s, [&](const int64_t* at) {
        if (bytes == 1)
            static_cast<unsigned char*>(y)[at[0]] = bits;
        else if (bytes == 4)
            static_cast<unsigned*>(y)[at[0]] = bits;
        else
            static_cast<int64_t*>(y)[at[0]] = bits;
    });
}

inline float compute(int op, float a, float b) {
    switch (op) {
        case kAdd: return a + b;
        case kSub: return a - b;
        case kMul: return a * b;
        case kDiv: return a / b;
        case kMaximum: return a != a || a > b ? a : b;
        case kMinimum: return a != a || a < b ? a : b;
        case kEq: return a == b;
        case kNe: return a != b;
        case kLt: return a < b;
        case kLe: return a <= b;
        case kGt: return a > b;
        case kGe: return a >= b;
        case kLogicalAnd: return a != 0 && b != 0;
        default: return a != 0 || b != 0;
    }
}

KERNEL qf_binary(const void* a, const void* b, void* y, Space s, int op, EpilogueArg e, Value va, Value vb, Value vy) {
    each<3>(s, [&](const int64_t* at) {
        store_real(y, vy, at[2], activate(e, compute(op, load_real(a, va, at[0]), load_real(b, vb, at[1]))));
    });
}

inline int64_t compute_integer(int op, int64_t a, int64_t b) {
    switch (op) {
        case kAdd: return static_cast<unsigned long long>(a) + b;
        case kSub: return static_cast<unsigned long long>(a) - b;
        case kMul: return static_cast<unsigned long long>(a) * b;
        case kMaximum: return a > b ? a : b;
        case kMinimum: return a < b ? a : b;
        case kEq: return a == b;
        case kNe: return a != b;
        case kLt: return a < b;
        case kLe: return a <= b;
        case kGt: return a > b;
        case kGe: return a >= b;
        case kLogicalAnd: return a != 0 && b != 0;
        default: return a != 0 || b != 0;
    }
}

KERNEL qf_binary_integer(const void* a, const void* b, void* y, Space s, int op, int type_ab, int type_y) {
    each<3>(s, [&](const int64_t* at) {
        store_integer(y, type_y, at[2],
                      compute_integer(op, load_integer(a, type_ab, at[0]), load_integer(b, type_ab, at[1])));
    });
}

KERNEL qf_unary(const void* x, void* y, Space s, int op, float a, float b, EpilogueArg e, Value vx, Value vy) {
    each<2>(s, [&](const int64_t* at) {
        float r = load_real(x, vx, at[0]);
        switch (op) {
            case kAffine: r = a * r + b; break;
            case kExp: r = sycl::exp(r); break;
            case kLog: r = sycl::log(r); break;
            case kSqrt: r = sycl::sqrt(r); break;
            case kRsqrt: r = 1.0f / sycl::sqrt(r); break;
            case kNeg: r = -r; break;
            case kAbs: r = sycl::fabs(r); break;
            case kErf: r = sycl::erf(r); break;
            case kReciprocal: r = 1.0f / r; break;
            case kFloor: r = sycl::floor(r); break;
            case kPower: r = sycl::pow(r, a); break;
            default: break;
        }
        store_real(y, vy, at[1], activate(e, r));
    });
}

// Apart from qf_unary: reducing a large argument takes many registers.
KERNEL qf_sincos(const void* x, void* y, Space s, int is_cos, EpilogueArg e, Value vx, Value vy) {
    each<2>(s, [&](const int64_t* at) {
        const float r = load_real(x, vx, at[0]);
        store_real(y, vy, at[1], activate(e, is_cos ? sycl::cos(r) : sycl::sin(r)));
    });
}

// y[i] = table[x[i]] for one-byte x: results of 1 or 4 bytes. Signed codes are looked up by their bits.
KERNEL qf_lookup(const unsigned char* x, void* y, const void* table, Space s, int bytes) {
    each<2>(s, [&](const int64_t* at) {
        if (bytes == 1)
            static_cast<unsigned char*>(y)[at[1]] = static_cast<const unsigned char*>(table)[x[at[0]]];
        else
            static_cast<float*>(y)[at[1]] = static_cast<const float*>(table)[x[at[0]]];
    });
}

KERNEL qf_where(const unsigned char* c, const void* a, const void* b, void* y, Space s, int bytes) {
    each<4>(s, [&](const int64_t* at) {
        const bool first = c[at[0]] != 0;
        const void* from = first ? a : b;
        const int64_t i = first ? at[1] : at[2];
        if (bytes == 1)
            static_cast<unsigned char*>(y)[at[3]] = static_cast<const unsigned char*>(from)[i];
        else if (bytes == 4)
            static_cast<unsigned*>(y)[at[3]] = static_cast<const unsigned*>(from)[i];
        else
            static_cast<int64_t*>(y)[at[3]] = static_cast<const int64_t*>(from)[i];
    });
}

KERNEL qf_channel_affine(const void* x, const float* scale, const float* shift, void* y, Space s, EpilogueArg e,
                         Value vx, Value vy) {
    each<4>(s, [&](const int64_t* at) {
        store_real(y, vy, at[3], activate(e, load_real(x, vx, at[0]) * scale[at[1]] + shift[at[2]]));
    });
}

// Operands: index, column of the table, y. A bad index is reported through `bad` and reads row 0.
KERNEL qf_gather(const int64_t* index, const void* table, void* y, Space s, int64_t rows, int64_t row_stride,
                 Value vt, Value vy, int64_t* bad) {
    each<3>(s, [&](const int64_t* at) {
        int64_t row = index[at[0]];
        if (row < 0 || row >= rows) {
            bad[0] = 1;
            bad[1] = row;
            bad[2] = rows;
            row = 0;
            if (rows == 0) return;
        }
        const int64_t i = at[1] + row * row_stride;
        if (vy.coded && vt.coded && vy.scale == vt.scale && vy.zero_point == vt.zero_point && vy.type == vt.type)
            static_cast<unsigned char*>(y)[at[2]] = static_cast<const unsigned char*>(table)[i];
        else
            store_real(y, vy, at[2], load_real(table, vt, i));
    });
}

// ------------------------------------------------------------------------------------------------ rows

// f(j) for this lane's elements of a row of n. The lanes stay together up to the tail: a CPU then needs no masks.
template <typename F>
inline void along(int n, const F& f) {
    int j = this_item::get_nd_item<3>().get_local_id(2);
    for (int end = kLanes; end <= n; end += kLanes, j += kLanes) f(j);
    if (j < n) f(j);
}

template <int N>
inline bool locate_row(const Space& s, int64_t (&at)[N]) {
    const auto item = this_item::get_nd_item<3>();
    const unsigned row = item.get_global_id(1);
    unsigned rest = item.get_group(0);
    if (row >= s.extent[0]) return false;
    for (int n = 0; n < N; ++n) at[n] = row * s.stride[n][0];
#pragma unroll
    for (int d = 1; d < 6; ++d) {
        const unsigned i = rest % s.extent[d];
        rest /= s.extent[d];
        for (int n = 0; n < N; ++n) at[n] += i * s.stride[n][d];
    }
    return true;
}

// softmax(x + mask) over a row. Operands: x, y, mask. A row that is hidden from end to end gives zeros where
// there is a mask, NaN elsewhere, as PyTorch has it.
template <bool kUnit, bool kMasked>
inline void softmax_row(const void* x, void* y, const void* mask, const Rows& r, const int64_t* at, int causal,
                        const Value& vx, const Value& vy, int mask_type) {
    const auto group = this_item::get_sub_group();
    const int hidden_from = causal ? this_item::get_nd_item<3>().get_global_id(1) + 1 : r.n;
    const auto value = [&](int j) {
        if (kMasked && j >= hidden_from) return -INFINITY;
        float v = load_real(x, vx, at[0] + (kUnit ? j : j * r.stride[0]));
        if (kMasked && mask != nullptr) {
            const int64_t m = at[2] + j * r.stride[2];
            if (mask_type == kF32)
                v += static_cast<const float*>(mask)[m];
            else if (static_cast<const unsigned char*>(mask)[m] == 0)
                v = -INFINITY;
        }
        return v;
    };
    float high = -INFINITY;
    along(r.n, [&](int j) { high = sycl::fmax(high, value(j)); });
    high = sycl::reduce_over_group(group, high, sycl::maximum<float>());
    // A float result holds the exponentials until their sum is known.
    const bool keeps = !vy.coded;
    float* const kept = static_cast<float*>(y) + at[1];
    const bool is_hidden = kMasked && high == -INFINITY;
    float sum = 0;
    along(r.n, [&](int j) {
        const float e = is_hidden ? 0.0f : sycl::exp(value(j) - high);
        if (keeps) kept[kUnit ? j : j * r.stride[1]] = e;
        sum += e;
    });
    sum = is_hidden ? 1.0f : sycl::reduce_over_group(group, sum, sycl::plus<float>());
    if (keeps)
        along(r.n, [&](int j) { kept[kUnit ? j : j * r.stride[1]] /= sum; });
    else
        along(r.n, [&](int j) {
            store_real(y, vy, at[1] + (kUnit ? j : j * r.stride[1]), sycl::exp(value(j) - high) / sum);
        });
}

KERNEL qf_softmax(const void* x, void* y, Rows r, Value vx, Value vy) {
    int64_t at[2];
    if (!locate_row(r.space, at)) return;
    if (r.stride[0] == 1 && r.stride[1] == 1)
        softmax_row<true, false>(x, y, nullptr, r, at, 0, vx, vy, 0);
    else
        softmax_row<false, false>(x, y, nullptr, r, at, 0, vx, vy, 0);
}

// Scores are dense f32 and are overwritten.
KERNEL qf_masked_softmax(float* scores, const void* mask, Rows r, int causal, int mask_type) {
    int64_t at[3];
    if (!locate_row(r.space, at)) return;
    const Value f32 = {kF32, 0, 1.0f, 0, 0, 0};
    softmax_row<true, true>(scores, scores, mask, r, at, causal, f32, f32, mask_type);
}

template <bool kUnit>
inline void layer_norm_row(const void* x, const float* gamma, const float* beta, void* y, const Rows& r,
                           const int64_t* at, float eps, int is_rms, const Value& vx, const Value& vy) {
    const auto group = this_item::get_sub_group();
    const auto value = [&](int j) { return load_real(x, vx, at[0] + (kUnit ? j : j * r.stride[0])); };
    float mean = 0;
    if (!is_rms) {
        along(r.n, [&](int j) { mean += value(j); });
        mean = sycl::reduce_over_group(group, mean, sycl::plus<float>()) / r.n;
    }
    float square = 0;
    along(r.n, [&](int j) {
        const float d = value(j) - mean;
        square += d * d;
    });
    square = sycl::reduce_over_group(group, square, sycl::plus<float>()) / r.n;
    const float factor = 1.0f / sycl::sqrt(square + eps);
    along(r.n, [&](int j) {
        float v = (value(j) - mean) * factor;
        if (gamma != nullptr) v = v * gamma[j];
        if (beta != nullptr) v = v + beta[j];
        store_real(y, vy, at[1] + (kUnit ? j : j * r.stride[1]), v);
    });
}

KERNEL qf_layer_norm(const void* x, const float* gamma, const float* beta, void* y, Rows r, float eps, int is_rms,
                     Value vx, Value vy) {
    int64_t at[2];
    if (!locate_row(r.space, at)) return;
    if (r.stride[0] == 1 && r.stride[1] == 1)
        layer_norm_row<true>(x, gamma, beta, y, r, at, eps, is_rms, vx, vy);
    else
        layer_norm_row<false>(x, gamma, beta, y, r, at, eps, is_rms, vx, vy);
}

// ------------------------------------------------------------------------------------------------ reductions

struct IntegerTotal {
    int64_t sum = 0;
    int low = 1 << 30, high = -(1 << 30);
};

struct RealTotal {
    Sum sum;
    float low = INFINITY, high = -INFINITY;
    int has_nan = 0;
};

inline void finish(void* y, int64_t i, const ReduceArg& r, const IntegerTotal& t) {
    const int64_t sum = t.sum - r.n * r.x.zero_point;
    const float v = r.op == kSum   ? static_cast<float>(sum)
                    : r.op == kMean ? divided(sum, r.n)
                                    : static_cast<float>((r.op == kMax ? t.high : t.low) - r.x.zero_point);
    store_real(y, r.y, i, v * r.x.scale);
}

inline void finish(void* y, int64_t i, const ReduceArg& r, const RealTotal& t) {
    float v = r.op == kSum ? t.sum.get() : r.op == kMean ? t.sum.get() / r.n : r.op == kMax ? t.high : t.low;
    if (r.op >= kMax && t.has_nan) v = NAN;
    store_real(y, r.y, i, v);
}

// Adds elements first, first + step, ... of the reduced dimensions' fastest one, all of the others.
template <typename Total>
inline void accumulate(const void* x, int64_t at, const ReduceArg& r, int64_t first, int64_t step, Total& total) {
    for (unsigned i3 = 0; i3 < r.extent[3]; ++i3)
        for (unsigned i2 = 0; i2 < r.extent[2]; ++i2)
            for (unsigned i1 = 0; i1 < r.extent[1]; ++i1) {
                const int64_t base = at + i3 * r.stride[3] + i2 * r.stride[2] + i1 * r.stride[1];
                if constexpr (std::is_same_v<Total, IntegerTotal>) {
                    // 2**22 codes fit into 32 bits.
                    for (int64_t from = first; from < r.extent[0]; from += step << 22) {
                        const int64_t to = sycl::min<int64_t>(from + (step << 22), static_cast<int64_t>(r.extent[0]));
                        int part = 0;
                        for (int64_t i = from; i < to; i += step) {
                            const int q = load_code(x, r.x.type, base + i * r.stride[0]);
                            part += q;
                            total.low = sycl::min(total.low, q);
                            total.high = sycl::max(total.high, q);
                        }
                        total.sum += part;
                    }
                } else {
                    for (int64_t i = first; i < r.extent[0]; i += step) {
                        const float v = static_cast<const float*>(x)[base + i * r.stride[0]];
                        total.sum.add(v);
                        total.low = sycl::fmin(total.low, v);
                        total.high = sycl::fmax(total.high, v);
                        total.has_nan |= v != v;
                    }
                }
            }
}

// One item per result: where neighbouring results lie beside each other in x.
KERNEL qf_reduce_columns(const void* x, void* y, ReduceArg r) {
    each<2>(r.space, [&](const int64_t* at) {
        if (r.x.coded) {
            IntegerTotal total;
            accumulate(x, at[0], r, 0, 1, total);
            finish(y, at[1], r, total);
        } else {
            RealTotal total;
            accumulate(x, at[0], r, 0, 1, total);
            finish(y, at[1], r, total);
        }
    });
}

// One sub-group per result: where the elements of one sum lie beside each other.
KERNEL qf_reduce_rows(const void* x, void* y, ReduceArg r) {
    int64_t at[2];
    if (!locate_row(r.space, at)) return;
    const auto group = this_item::get_sub_group();
    const int lane = this_item::get_nd_item<3>().get_local_id(2);
    if (r.x.coded) {
        IntegerTotal t;
        accumulate(x, at[0], r, lane, kLanes, t);
        t.sum = sycl::reduce_over_group(group, t.sum, sycl::plus<int64_t>());
        t.low = sycl::reduce_over_group(group, t.low, sycl::minimum<int>());
        t.high = sycl::reduce_over_group(group, t.high, sycl::maximum<int>());
        if (lane == 0) finish(y, at[1], r, t);
    } else {
        RealTotal t;
        accumulate(x, at[0], r, lane, kLanes, t);
        t.sum.total = sycl::reduce_over_group(group, t.sum.get(), sycl::plus<float>());
        t.sum.lost = 0;
        t.low = sycl::reduce_over_group(group, t.low, sycl::minimum<float>());
        t.high = sycl::reduce_over_group(group, t.high, sycl::maximum<float>());
        t.has_nan = sycl::reduce_over_group(group, t.has_nan, sycl::maximum<int>());
        if (lane == 0) finish(y, at[1], r, t);
    }
}

// ------------------------------------------------------------------------------------------------ images

struct Pixel {
    int at[5];     // batch, channel, depth, height, width
    int64_t x, y;  // offsets: of (batch, channel) in x, of the pixel in y
    bool is_inside;
};

// Items outside compute the last pixel again and must not store: without an early return the loads need no masks.
template <bool kChannelsLast>
inline Pixel locate_pixel(const Image& m) {
    const auto item = this_item::get_nd_item<3>();
    const int lanes = m.extent[kChannelsLast ? 1 : 4], rows = m.extent[kChannelsLast ? 4 : 1];
    int lane = item.get_global_id(2), row = item.get_global_id(1);
    unsigned rest = item.get_group(0);
    Pixel p;
    p.is_inside = lane < lanes && row < rows;
    lane = sycl::min(lane, lanes - 1);
    row = sycl::min(row, rows - 1);
    p.at[1] = kChannelsLast ? lane : row;
    p.at[4] = kChannelsLast ? row : lane;
    p.at[3] = rest % m.extent[3];
    rest /= m.extent[3];
    p.at[2] = rest % m.extent[2];
    p.at[0] = rest / m.extent[2];
    // Channels of a channels_last tensor lie side by side: said here, so that a CPU loads whole vectors.
    p.x = p.at[0] * m.x_stride[0] + (kChannelsLast ? p.at[1] : p.at[1] * m.x_stride[1]);
    p.y = p.at[0] * m.y_stride[0] + (kChannelsLast ? p.at[1] : p.at[1] * m.y_stride[1]);
    for (int d = 2; d < 5; ++d) p.y += p.at[d] * m.y_stride[d];
    return p;
}

struct Window {
    int start[3], end[3], step[3];
    int size, count;  // of an average: elements with the padding that counts, and without any
};

inline Window locate_window(const PoolArg& a, const Pixel& p) {
    Window w;
    w.size = w.count = 1;
    for (int d = 0; d < 3; ++d) {
        const int o = p.at[2 + d];
        w.step[d] = a.dilation[d];
        if (a.is_adaptive) {
            const int out = a.image.extent[2 + d];
            w.start[d] = static_cast<int64_t>(o) * a.in[d] / out;
            w.end[d] = (static_cast<int64_t>(o + 1) * a.in[d] + out - 1) / out;
            w.size *= w.end[d] - w.start[d];
        } else {
            int first = o * a.stride[d] - a.padding[d];
            const int end = sycl::min(first + (a.kernel[d] - 1) * a.dilation[d] + 1, a.in[d] + a.padding[d]);
            w.size *= end - first;
            while (first < 0) first += a.dilation[d];
            w.start[d] = first;
            w.end[d] = sycl::min(end, a.in[d]);
        }
        w.count *= sycl::max(w.end[d] - w.start[d], 0);
    }
    return w;
}

// f(offset in x) over the window.
template <typename F>
inline void over(const Window& w, const Image& m, const F& f) {
    for (int i = w.start[0]; i < w.end[0]; i += w.step[0])
        for (int j = w.start[1]; j < w.end[1]; j += w.step[1]) {
            const int64_t row = i * m.x_stride[2] + j * m.x_stride[3];
            for (int k = w.start[2]; k < w.end[2]; k += w.step[2]) f(row + k * m.x_stride[4]);
        }
}

template <bool kChannelsLast, typename Code>
inline void pool_codes(const Code* x, void* y, const PoolArg& a) {
    const Pixel p = locate_pixel<kChannelsLast>(a.image);
    const Window w = locate_window(a, p);
    const Code* from = x + p.x;
    if (a.is_max) {
        int high = -1000;
        over(w, a.image, [&](int64_t i) { high = sycl::max(high, static_cast<int>(from[i])); });
        if (p.is_inside) static_cast<Code*>(y)[p.y] = high;
        return;
    }
    int sum = 0;
    over(w, a.image, [&](int64_t i) { sum += from[i]; });
    sum -= w.count * a.x.zero_point;
    const int divisor = a.divisor_override != 0 ? a.divisor_override : a.count_include_pad ? w.size : w.count;
    // A window without elements: 0, as PyTorch has it.
    const float v = w.count == 0 ? 0.0f : divided(sum, divisor) * a.x.scale;
    if (p.is_inside) store_real(y, a.y, p.y, v);
}

template <bool kChannelsLast>
inline void pool_reals(const float* x, void* y, const PoolArg& a) {
    const Pixel p = locate_pixel<kChannelsLast>(a.image);
    const Window w = locate_window(a, p);
    const float* from = x + p.x;
    float v = a.is_max ? -INFINITY : 0.0f;
    if (a.is_max) {
        over(w, a.image, [&](int64_t i) { v = v != v || v > from[i] ? v : from[i]; });
    } else {
        over(w, a.image, [&](int64_t i) { v += from[i]; });
        const int divisor = a.divisor_override != 0 ? a.divisor_override : a.count_include_pad ? w.size : w.count;
        v = w.count == 0 ? 0.0f : v / divisor;
    }
    if (p.is_inside) store_real(y, a.y, p.y, v);
}

template <bool kChannelsLast>
inline void pool_any(const void* x, void* y, const PoolArg& a) {
    if (a.x.type == kU8)
        pool_codes<kChannelsLast>(static_cast<const unsigned char*>(x), y, a);
    else if (a.x.type == kS8)
        pool_codes<kChannelsLast>(static_cast<const signed char*>(x), y, a);
    else
        pool_reals<kChannelsLast>(static_cast<const float*>(x), y, a);
}

KERNEL qf_pool(const void* x, void* y, PoolArg a) {
    if (a.image.lane_is_channel)
        pool_any<true>(x, y, a);
    else
        pool_any<false>(x, y, a);
}

// `index`: source depth of every depth of y, then heights, then widths.
template <bool kChannelsLast>
inline void nearest_pixel(const void* x, void* y, const int* index, const Image& m, int bytes) {
    const Pixel p = locate_pixel<kChannelsLast>(m);
    if (!p.is_inside) return;
    int64_t i = p.x + index[p.at[2]] * m.x_stride[2];
    i += index[m.extent[2] + p.at[3]] * m.x_stride[3];
    i += index[m.extent[2] + m.extent[3] + p.at[4]] * m.x_stride[4];
    if (bytes == 1)
        static_cast<unsigned char*>(y)[p.y] = static_cast<const unsigned char*>(x)[i];
    else
        static_cast<unsigned*>(y)[p.y] = static_cast<const unsigned*>(x)[i];
}

KERNEL qf_nearest(const void* x, void* y, const int* index, Image m, int bytes) {
    if (m.lane_is_channel)
        nearest_pixel<true>(x, y, index, m, bytes);
    else
        nearest_pixel<false>(x, y, index, m, bytes);
}

// `index`: low and high source row of every height of y, then of every width; `weight` of the high one.
template <bool kChannelsLast>
inline void bilinear_pixel(const void* x, void* y, const int* index, const float* weight, const Image& m,
                           const Value& vx, const Value& vy) {
    const Pixel p = locate_pixel<kChannelsLast>(m);
    if (!p.is_inside) return;
    const int column = m.extent[3] + p.at[4];
    const int64_t h0 = index[2 * p.at[3]] * m.x_stride[3], h1 = index[2 * p.at[3] + 1] * m.x_stride[3];
    const int64_t w0 = index[2 * column] * m.x_stride[4], w1 = index[2 * column + 1] * m.x_stride[4];
    const float fh = weight[p.at[3]], fw = weight[column];
    const float top = (1.0f - fw) * load_real(x, vx, p.x + h0 + w0) + fw * load_real(x, vx, p.x + h0 + w1);
    const float bottom = (1.0f - fw) * load_real(x, vx, p.x + h1 + w0) + fw * load_real(x, vx, p.x + h1 + w1);
    store_real(y, vy, p.y, (1.0f - fh) * top + fh * bottom);
}

KERNEL qf_bilinear(const void* x, void* y, const int* index, const float* weight, Image m, Value vx, Value vy) {
    if (m.lane_is_channel)
        bilinear_pixel<true>(x, y, index, weight, m, vx, vy);
    else
        bilinear_pixel<false>(x, y, index, weight, m, vx, vy);
}

// ------------------------------------------------------------------------------------------------ integer sums

// One item per result, for the geometries that oneDNN does not take (or gets wrong). Channels lie side by side.
KERNEL qf_direct_conv(const void* x, const signed char* w, const float* scale, const float* bias, const void* residual,
                      void* y, ConvArg a, int type_x) {
    const Pixel p = locate_pixel<true>(a.image);
    const int c = p.at[1];
    const int64_t channel = c / a.out_per_group * a.in_per_group;
    const int64_t image = p.at[0] * a.image.x_stride[0] + channel;
    int acc = 0, tap = 0;
    for (int kd = 0; kd < a.kernel[0]; ++kd)
        for (int kh = 0; kh < a.kernel[1]; ++kh)
            for (int kw = 0; kw < a.kernel[2]; ++kw, ++tap) {
                const int d = p.at[2] * a.stride[0] - a.padding[0] + kd * a.dilation[0];
                const int h = p.at[3] * a.stride[1] - a.padding[1] + kh * a.dilation[1];
                const int v = p.at[4] * a.stride[2] - a.padding[2] + kw * a.dilation[2];
                if (d < 0 || d >= a.in[0] || h < 0 || h >= a.in[1] || v < 0 || v >= a.in[2]) continue;
                const int64_t from =
                    image + d * a.image.x_stride[2] + h * a.image.x_stride[3] + v * a.image.x_stride[4];
                const signed char* column = w + static_cast<int64_t>(tap) * a.in_per_group * a.out + c;
                for (int i = 0; i < a.in_per_group; ++i)
                    acc += (load_code(x, type_x, from + i) - a.zero_point) * column[static_cast<int64_t>(i) * a.out];
            }
    if (!p.is_inside) return;
    float r = acc * scale[c] + bias[c];
    if (residual != nullptr) {
        int64_t i = p.at[0] * a.residual_stride[0] + c;
        for (int d = 2; d < 5; ++d) i += p.at[d] * a.residual_stride[d];
        r += load_real(residual, a.residual, i);
    }
    store_real(y, a.y, p.y, activate(a.epilogue, r));
}

// y = scale * sum_k (a - zp_a) * (b - zp_b). Operands: a, b, y; row strides: a's and b's step along k.
KERNEL qf_direct_matmul(const void* a, const void* b, void* y, Space s, int64_t k, int64_t a_step, int64_t b_step,
                        float scale, Value va, Value vb, Value vy) {
    each<3>(s, [&](const int64_t* at) {
        if (va.coded) {
            int acc = 0;
            for (int64_t i = 0; i < k; ++i)
                acc += (load_code(a, va.type, at[0] + i * a_step) - va.zero_point) *
                       (load_code(b, vb.type, at[1] + i * b_step) - vb.zero_point);
            store_real(y, vy, at[2], acc * scale);
        } else {
            float acc = 0;
            for (int64_t i = 0; i < k; ++i)
                acc += static_cast<const float*>(a)[at[0] + i * a_step] *
                       static_cast<const float*>(b)[at[1] + i * b_step];
            store_real(y, vy, at[2], acc * scale);
        }
    });
}
)SYCL";

}  // namespace quantflow::xpu
