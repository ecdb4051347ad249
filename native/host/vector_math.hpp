// Vectors of float32 and elementary functions on them, for files that are compiled once per instruction set.
//
// Everything here has internal linkage: a function compiled for AVX512 must never stand in for the generic one.
// `Vec` is the widest vector of this instruction set; the functions take such a traits struct as V.
// Errors are relative to the exact result, measured over all float32 inputs' range (test_elementwise.cpp).
#pragma once

#include <cstdint>

#if defined(__AVX2__)
// GCC 12's own header starts "undefined" vectors from themselves.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef QF_ISA_NAMESPACE
#error "vector_math.hpp is for files that are compiled once per instruction set"
#endif

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

// Adding and subtracting this rounds |x| < 2**22 to an integer, half to even; the sum's low bits are that integer.
constexpr float kRounder = 12582912.0f;

#if defined(__AVX2__)
// out[c][0..8) = in[0..rows)[c] for c < columns <= 8; missing rows become 0.
static inline void transpose_8(const float* in, std::int64_t in_stride, int rows, int columns, float* out,
                               std::int64_t out_stride) {
    __m256 r[8];
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(columns), lanes);
    for (int i = 0; i < 8; ++i) {
        if (i >= rows)
            r[i] = _mm256_setzero_ps();
        else
            r[i] = columns == 8 ? _mm256_loadu_ps(in + i * in_stride) : _mm256_maskload_ps(in + i * in_stride, mask);
    }
    __m256 t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i)
        if (i < columns) _mm256_storeu_ps(out + i * out_stride, t[i]);
}
#endif

#if defined(__AVX512F__)
struct Vec {
    using F = __m512;
    using M = __mmask16;
    static constexpr int width = 16;
    static constexpr int registers = 32;
    static constexpr int transposed = 8;  // `transpose` moves blocks of this many rows and columns

    static F set(float x) { return _mm512_set1_ps(x); }
    static M first(int n) { return static_cast<M>((1u << n) - 1u); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load(const float* p, int n, F fill) { return _mm512_mask_loadu_ps(fill, first(n), p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static void store(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
    static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
    // b where either is NaN.
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    static M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
    static F abs(F x) { return _mm512_abs_ps(x); }
    static F copy_sign(F x, F sign) {
        const __m512i bit = _mm512_set1_epi32(INT32_MIN);
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(_mm512_abs_ps(x)),
                                                   _mm512_and_si512(_mm512_castps_si512(sign), bit)));
    }
    static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F low_bits_to_exponent(F x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
    }
    static float sum(F v) { return _mm512_reduce_add_ps(v); }
    static float highest(F v) { return _mm512_reduce_max_ps(v); }
    template <bool is_signed>
    static F load_bytes(const void* p) {
        const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
        return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
    }
    // The low byte of each lane, which holds an integer.
    static void store_bytes(void* p, F v) {
        _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    static void transpose(const float* in, std::int64_t in_stride, int rows, int columns, float* out,
                          std::int64_t out_stride) {
        transpose_8(in, in_stride, rows, columns, out, out_stride);
    }
};
#elif defined(__AVX2__) && defined(__FMA__)
struct Vec {
    using F = __m256;
    using M = __m256;
    static constexpr int width = 8;
    static constexpr int registers = 16;
    static constexpr int transposed = 8;  // `transpose` moves blocks of this many rows and columns

    static F set(float x) { return _mm256_set1_ps(x); }
    static __m256i first(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load(const float* p, int n, F fill) {
        const __m256i m = first(n);
        return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
    }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static void store(float* p, F v, int n) { _mm256_maskstore_ps(p, first(n), v); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
    static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
    // b where either is NaN.
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
    static M equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
    static F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
    static F abs(F x) { return _mm256_andnot_ps(set(-0.0f), x); }
    static F copy_sign(F x, F sign) { return _mm256_or_ps(abs(x), _mm256_and_ps(set(-0.0f), sign)); }
    static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F low_bits_to_exponent(F x) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
    }
    static float sum(F v) {
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
    }
    static float highest(F v) {
        __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        h = _mm_max_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
    }
    template <bool is_signed>
    static F load_bytes(const void* p) {
        const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
        return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
    }
    // The low byte of each lane, which holds an integer.
    static void store_bytes(void* p, F v) {
        const __m256i low = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_set1_epi32(255));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
        _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(words, words));
    }
    static void transpose(const float* in, std::int64_t in_stride, int rows, int columns, float* out,
                          std::int64_t out_stride) {
        transpose_8(in, in_stride, rows, columns, out, out_stride);
    }
};
#else
struct Vec {
    typedef float F __attribute__((vector_size(16)));
    typedef std::int32_t M __attribute__((vector_size(16)));
    static constexpr int width = 4;
    static constexpr int registers = 16;
    static constexpr int transposed = 4;  // `transpose` moves blocks of this many rows and columns

    static F set(float x) { return F{x, x, x, x}; }
    static F load(const float* p) {
        F v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    static F load(const float* p, int n, F fill) {
        for (int i = 0; i < width; ++i)
            if (i < n) fill[i] = p[i];
        return fill;
    }
    static void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
    static void store(float* p, F v, int n) {
        for (int i = 0; i < width; ++i)
            if (i < n) p[i] = v[i];
    }
    static F fma(F a, F b, F c) { return a * b + c; }   // rounds twice here
    static F fnma(F a, F b, F c) { return c - a * b; }  // likewise
    // b where either is NaN.
    static F min(F a, F b) { return a < b ? a : b; }
    static F max(F a, F b) { return a > b ? a : b; }
    static M less(F a, F b) { return a < b; }
    static M equal(F a, F b) { return a == b; }
    static F select(M m, F yes, F no) { return m ? yes : no; }
    static F abs(F x) { return (F)((M)x & INT32_MAX); }
    static F copy_sign(F x, F sign) { return (F)(((M)x & INT32_MAX) | ((M)sign & INT32_MIN)); }
    // |x| < 2**22
    static F round(F x) { return (x + kRounder) - kRounder; }
    static F low_bits_to_exponent(F x) {
        typedef std::uint32_t U __attribute__((vector_size(16)));
        return (F)((U)x << 23);
    }
    static float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
    static float highest(F v) {
        const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
        return a > b ? a : b;
    }
    template <bool is_signed>
    static F load_bytes(const void* p) {
        F v;
        for (int i = 0; i < width; ++i)
            v[i] = is_signed ? static_cast<float>(static_cast<const std::int8_t*>(p)[i])
                             : static_cast<float>(static_cast<const std::uint8_t*>(p)[i]);
        return v;
    }
    // The low byte of each lane, which holds an integer.
    static void store_bytes(void* p, F v) {
        for (int i = 0; i < width; ++i)
            static_cast<std::uint8_t*>(p)[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(v[i]));
    }
    static void transpose(const float* in, std::int64_t in_stride, int rows, int columns, float* out,
                          std::int64_t out_stride) {
        for (int c = 0; c < columns; ++c)
            for (int r = 0; r < transposed; ++r) out[c * out_stride + r] = r < rows ? in[r * in_stride + c] : 0.0f;
    }
};
#endif

// c[0] + c[1] * x + c[2] * x**2 + ...
template <class V, int n>
static inline typename V::F polynomial(typename V::F x, const float (&c)[n]) {
    typename V::F p = V::set(c[n - 1]);
    for (int i = n - 2; i >= 0; --i) p = V::fma(p, x, V::set(c[i]));
    return p;
}

// 2**n for integers n in [-127, 127] held in floats; 2**-127 becomes 0.
template <class V>
static inline typename V::F power_of_two(typename V::F n) {
    return V::low_bits_to_exponent(n + V::set(kRounder + 127.0f));
}

// 2**x for x <= 0; 0 below 2**-126.5. Error 2e-7. NaN stays NaN.
template <class V>
static inline typename V::F exp2_nonpositive(typename V::F x) {
    static constexpr float c[] = {1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f};
    const typename V::F bias = V::set(kRounder + 127.0f);
    x = V::max(V::set(-127.0f), x);
    const typename V::F n = x + bias;
    return polynomial<V>(x - (n - bias), c) * V::low_bits_to_exponent(n);
}

// e**r for |r| <= ln(2) / 2.
template <class V>
static inline typename V::F exp_reduced(typename V::F x, typename V::F n) {
    static constexpr float c[] = {1.0f,           1.0f,           0.49999994f,   0.166665211f,
                                  0.041668389f, 0.00836871658f, 0.00138145988f};
    // ln(2) in two parts, the first short enough that n times it is exact.
    typename V::F r = V::fnma(n, V::set(0.693359375f), x);
    r = V::fnma(n, V::set(-2.12194440e-4f), r);
    return polynomial<V>(r, c);
}

// e**x for x <= 0; 0 below 2**-126.5. Error 1.5e-7. NaN stays NaN.
template <class V>
static inline typename V::F exp_nonpositive(typename V::F x) {
    const typename V::F bias = V::set(kRounder + 127.0f);
    x = V::max(V::set(-88.0f), x);
    const typename V::F n = V::fma(x, V::set(1.44269504f), bias);
    return exp_reduced<V>(x, n - bias) * V::low_bits_to_exponent(n);
}

// Error 1.5e-7 where the result is normal, half a unit of the last place more where it is subnormal.
template <class V>
static inline typename V::F exp(typename V::F x) {
    x = V::max(V::set(-104.0f), V::min(V::set(89.0f), x));
    const typename V::F n = V::round(x * V::set(1.44269504f));
    // Two factors, because 2**n itself may be too large or too small for a float.
    const typename V::F half = V::round(n * V::set(0.5f));
    return exp_reduced<V>(x, n) * power_of_two<V>(half) * power_of_two<V>(n - half);
}

// Error 2e-7.
template <class V>
static inline typename V::F erf(typename V::F x) {
    static constexpr float near[] = {1.12837911f,    -0.376124859f, 0.112817243f,
                                     -0.0267632455f, 0.00498818327f, -0.000596516882f};
    // log(1 - erf(t)) for t in [0.9275, 4]
    static constexpr float far[] = {-0.000218786634f, -1.12757909f,    -0.637346566f,  -0.103785932f,
                                    0.022156043f,     -0.00302528264f, 0.000194094508f};
    const typename V::F t = V::min(V::set(4.0f), V::abs(x));
    const typename V::F large = V::set(1.0f) - exp_nonpositive<V>(polynomial<V>(t, far));
    const typename V::F small = x * polynomial<V>(x * x, near);
    return V::select(V::less(t, V::set(0.9275f)), small, V::copy_sign(large, x));
}

// Error 2e-7.
template <class V>
static inline typename V::F tanh(typename V::F x) {
    static constexpr float near[] = {-0.333332807f, 0.133314416f, -0.0537397154f, 0.020639088f, -0.00570498733f};
    const typename V::F t = V::abs(x), square = x * x;
    // e**-2t can't overflow.
    const typename V::F e = exp_nonpositive<V>(t * V::set(-2.0f));
    const typename V::F large = (V::set(1.0f) - e) / (V::set(1.0f) + e);
    const typename V::F small = V::fma(x * square, polynomial<V>(square, near), x);
    return V::select(V::less(t, V::set(0.625f)), small, V::copy_sign(large, x));
}

// Error 3e-7.
template <class V>
static inline typename V::F sigmoid(typename V::F x) {
    return V::set(1.0f) / (V::set(1.0f) + exp<V>(V::set(0.0f) - x));
}

// x * sigmoid(x)
template <class V>
static inline typename V::F silu(typename V::F x) {
    return x / (V::set(1.0f) + exp<V>(V::set(0.0f) - x));
}

// x / 2 * (1 + erf(x / sqrt(2)))
template <class V>
static inline typename V::F gelu(typename V::F x) {
    return x * V::set(0.5f) * (V::set(1.0f) + erf<V>(x * V::set(0.707106781f)));
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
template <class V>
static inline typename V::F gelu_tanh(typename V::F x) {
    const typename V::F inner = V::fma(x * x * x, V::set(0.044715f), x) * V::set(0.797884561f);
    return x * V::set(0.5f) * (V::set(1.0f) + tanh<V>(inner));
}

}  // namespace
}  // namespace quantflow::host::QF_ISA_NAMESPACE
