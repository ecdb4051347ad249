// Loops over vectors of reals and codes, for files that are compiled once per instruction set.
//
// A kernel is a function value(i, tag) of the values at elements i, i + 1, ...; `write_floats` and `write_codes` call
// it with Full for whole vectors and with Part for the last few elements, so nothing outside [0, n) is touched.
#pragma once

#include "elementwise_isa.hpp"
#include "vector_math.hpp"

#define QF_ALWAYS_INLINE __attribute__((always_inline))

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

using F = Vec::F;
constexpr int kWidth = Vec::width;

struct Full {};
struct Part {
    int n;
};

static inline F load(const float* p, Full) { return Vec::load(p); }
static inline F load(const float* p, Part t) { return Vec::load(p, t.n, Vec::set(0.0f)); }
static inline void store(float* p, F v, Full) { Vec::store(p, v); }
static inline void store(float* p, F v, Part t) { Vec::store(p, v, t.n); }

template <class T>
static inline T read_as(const void* p) {
    T v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
static inline void write_as(void* p, T v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// Codes minus their zero point, as floats. A byte in the low bits of the float 2**23 is 2**23 plus its value, so that
// one subtraction both converts and centers, exactly.
template <bool is_signed = false>
class CodeSource {
public:
    explicit CodeSource(float zero_point) : shift_(Vec::set(8388608.0f + zero_point + (is_signed ? 128.0f : 0.0f))) {}

    QF_ALWAYS_INLINE F operator()(const std::uint8_t* p, Full) const { return widened(p) - shift_; }
    QF_ALWAYS_INLINE F operator()(const std::uint8_t* p, Part t) const {
#if defined(__AVX512F__)
        const __m128i bytes = _mm_maskz_loadu_epi8(Vec::first(t.n), p);
        return widened(reinterpret_cast<const std::uint8_t*>(&bytes)) - shift_;
#else
        // Fewer than 8 bytes by overlapping reads.
        std::uint64_t bytes;
        if (t.n >= 4)
            bytes = read_as<std::uint32_t>(p) |
                    static_cast<std::uint64_t>(read_as<std::uint32_t>(p + t.n - 4)) << (8 * (t.n - 4));
        else
            bytes = static_cast<std::uint64_t>(p[0]) | static_cast<std::uint64_t>(p[t.n / 2]) << (8 * (t.n / 2)) |
                    static_cast<std::uint64_t>(p[t.n - 1]) << (8 * (t.n - 1));
        return widened(reinterpret_cast<const std::uint8_t*>(&bytes)) - shift_;
#endif
    }

private:
    // 2**23 + code; signed codes with their highest bit turned around, which adds 128.
    static QF_ALWAYS_INLINE inline F widened(const std::uint8_t* p) {
#if defined(__AVX512F__)
        __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if (is_signed) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(0x4B000000)));
#elif defined(__AVX2__) && defined(__FMA__)
        __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        if (is_signed) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
        return _mm256_castsi256_ps(_mm256_or_si256(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(0x4B000000)));
#else
        return Vec::load_bytes<is_signed>(p) + Vec::set(is_signed ? 8388736.0f : 8388608.0f);
#endif
    }

    F shift_;
};

// Rounds steps to codes and writes them. Vectors saturate while they are packed, so that only steps beyond 2**31, Inf
// and NaN need care before, by `Vec::min(v, high)`.
class CodeSink {
public:
    explicit CodeSink(const Form& form) {
        // s8 is u8 with 128 more and its highest bit turned around.
        const int shift = form.dtype == DType::s8 ? 128 : 0;
        flip_ = form.dtype == DType::s8 ? 0x80 : 0;
        zero_point_ = static_cast<int>(form.zero_point) + shift;
        low_ = rounded(form.low) + zero_point_;
        high_ = rounded(form.high) + zero_point_;
#if !defined(__AVX2__)
        low_steps_ = Vec::set(form.low);
        high_steps_ = Vec::set(form.high);
#endif
    }

#if defined(__AVX512F__)
    QF_ALWAYS_INLINE void put(std::uint8_t* p, F v, Full) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes(v));
    }
    QF_ALWAYS_INLINE void put(std::uint8_t* p, F v, Part t) const {
        _mm_mask_storeu_epi8(p, Vec::first(t.n), codes(v));
    }
    QF_ALWAYS_INLINE void put4(std::uint8_t* p, F a, F b, F c, F d) const {
        const __m512i zero = _mm512_set1_epi16(static_cast<short>(zero_point_));
        const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b)), zero);
        const __m512i cd = _mm512_adds_epi16(_mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d)), zero);
        // Packing works inside 128-bit lanes: lane k holds a[4k..], b[4k..], c[4k..], d[4k..].
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        __m512i q = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
        q = _mm512_min_epu8(_mm512_max_epu8(q, _mm512_set1_epi8(static_cast<char>(low_))),
                            _mm512_set1_epi8(static_cast<char>(high_)));
        _mm512_storeu_si512(p, _mm512_xor_si512(q, _mm512_set1_epi8(static_cast<char>(flip_))));
    }
#elif defined(__AVX2__) && defined(__FMA__)
    QF_ALWAYS_INLINE void put(std::uint8_t* p, F v, Full) const {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), codes(v));
    }
    QF_ALWAYS_INLINE void put(std::uint8_t* p, F v, Part t) const { put_part(p, _mm_cvtsi128_si64(codes(v)), t); }
    QF_ALWAYS_INLINE void put4(std::uint8_t* p, F a, F b, F c, F d) const {
        const __m256i zero = _mm256_set1_epi16(static_cast<short>(zero_point_));
        const __m256i ab = _mm256_adds_epi16(_mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)), zero);
        const __m256i cd = _mm256_adds_epi16(_mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d)), zero);
        // Packing works inside 128-bit lanes: lane k holds a[4k..], b[4k..], c[4k..], d[4k..].
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256i q = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), order);
        q = _mm256_min_epu8(_mm256_max_epu8(q, _mm256_set1_epi8(static_cast<char>(low_))),
                            _mm256_set1_epi8(static_cast<char>(high_)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm256_xor_si256(q, _mm256_set1_epi8(static_cast<char>(flip_))));
    }
#else
    void put(std::uint8_t* p, F v, Full) const {
        v = Vec::round(Vec::max(Vec::min(v, high_steps_), low_steps_));
        for (int i = 0; i < kWidth; ++i)
            p[i] = static_cast<std::uint8_t>(static_cast<std::uint8_t>(static_cast<int>(v[i]) + zero_point_) ^ flip_);
    }
    void put(std::uint8_t* p, F v, Part t) const {
        std::uint64_t bytes = 0;
        put(reinterpret_cast<std::uint8_t*>(&bytes), v, Full{});
        put_part(p, static_cast<std::int64_t>(bytes), t);
    }
    void put4(std::uint8_t* p, F a, F b, F c, F d) const {
        put(p, a, Full{});
        put(p + kWidth, b, Full{});
        put(p + 2 * kWidth, c, Full{});
        put(p + 3 * kWidth, d, Full{});
    }
#endif

private:
    static int rounded(float x) {
        const float r = (x + kRounder) - kRounder;
        return static_cast<int>(r);
    }

#if defined(__AVX512F__)
    QF_ALWAYS_INLINE __m128i codes(F v) const {
        __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(zero_point_));
        q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_set1_epi32(low_)), _mm512_set1_epi32(high_));
        return _mm_xor_si128(_mm512_cvtepi32_epi8(q), _mm_set1_epi8(static_cast<char>(flip_)));
    }
#elif defined(__AVX2__) && defined(__FMA__)
    QF_ALWAYS_INLINE __m128i codes(F v) const {
        const __m256i q = _mm256_cvtps_epi32(v);
        const __m128i words = _mm_adds_epi16(_mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)),
                                             _mm_set1_epi16(static_cast<short>(zero_point_)));
        const __m128i bytes =
            _mm_min_epu8(_mm_max_epu8(_mm_packus_epi16(words, words), _mm_set1_epi8(static_cast<char>(low_))),
                         _mm_set1_epi8(static_cast<char>(high_)));
        return _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(flip_)));
    }
#endif
#if !defined(__AVX512F__)
    // Fewer than 8 bytes by overlapping writes.
    static QF_ALWAYS_INLINE inline void put_part(std::uint8_t* p, std::int64_t signed_bytes, Part t) {
        const auto bytes = static_cast<std::uint64_t>(signed_bytes);
        if (t.n >= 4) {
            write_as(p, static_cast<std::uint32_t>(bytes));
            write_as(p + t.n - 4, static_cast<std::uint32_t>(bytes >> (8 * (t.n - 4))));
        } else {
            p[0] = static_cast<std::uint8_t>(bytes);
            p[t.n / 2] = static_cast<std::uint8_t>(bytes >> (8 * (t.n / 2)));
            p[t.n - 1] = static_cast<std::uint8_t>(bytes >> (8 * (t.n - 1)));
        }
    }
#endif

    int zero_point_, low_, high_;  // of the unsigned code
    std::uint8_t flip_;
#if !defined(__AVX2__)
    F low_steps_, high_steps_;
#endif
};

template <class Value>
static inline void write_floats(float* y, std::int64_t n, Value value) {
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(y + i, value(i, Full{}), Full{});
    if (i < n) {
        const Part rest{static_cast<int>(n - i)};
        store(y + i, value(i, rest), rest);
    }
}

// What `value` gives: reals; steps of y's codes; or steps that are no NaN and surely smaller than 2**30.
enum class Gives { reals, steps, small_steps };

// Made once for many rows.
template <Gives gives>
class CodeWriter {
public:
    explicit CodeWriter(const Form& form) : sink_(form), scale_(Vec::set(form.scale)), high_(Vec::set(form.high)) {}

    template <class Value>
    QF_ALWAYS_INLINE void write(std::uint8_t* y, std::int64_t n, Value value) const {
        const auto steps = [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
            F v = value(i, tag);
            if (gives == Gives::reals) v = v / scale_;
            if (gives != Gives::small_steps) v = Vec::min(v, high_);  // NaN becomes high
            return v;
        };
        std::int64_t i = 0;
        for (; i + 4 * kWidth <= n; i += 4 * kWidth)
            sink_.put4(y + i, steps(i, Full{}), steps(i + kWidth, Full{}), steps(i + 2 * kWidth, Full{}),
                       steps(i + 3 * kWidth, Full{}));
        for (; i + kWidth <= n; i += kWidth) sink_.put(y + i, steps(i, Full{}), Full{});
        if (i < n) {
            const Part rest{static_cast<int>(n - i)};
            sink_.put(y + i, steps(i, rest), rest);
        }
    }

private:
    CodeSink sink_;
    F scale_, high_;
};

template <Gives gives, class Value>
static inline void write_codes(const Form& form, std::uint8_t* y, std::int64_t n, Value value) {
    const CodeWriter<gives> writer(form);
    writer.write(y, n, value);
}

template <class Value>
static inline void write_reals(const Form& form, void* y, std::int64_t n, Value value) {
    if (form.is_codes())
        write_codes<Gives::reals>(form, static_cast<std::uint8_t*>(y), n, value);
    else
        write_floats(static_cast<float*>(y), n, value);
}

static inline const void* at(RowsIn x, const Form& form, std::int64_t row, std::int64_t i) {
    const std::int64_t element = row * x.row + i * x.column;
    return form.is_codes() ? static_cast<const void*>(static_cast<const std::uint8_t*>(x.data) + element)
                           : static_cast<const void*>(static_cast<const float*>(x.data) + element);
}
static inline void* at(RowsOut y, const Form& form, std::int64_t row, std::int64_t i) {
    return const_cast<void*>(at(RowsIn{y.data, y.row, y.column}, form, row, i));
}

// Floats that a kernel works on between reading and writing.
constexpr std::int64_t kBlock = 512;

static inline void fill_floats(float* r, std::int64_t n, float value) {
    const F v = Vec::set(value);
    write_floats(r, n, [&](std::int64_t, auto) QF_ALWAYS_INLINE { return v; });
}

template <bool is_signed>
static inline void dequantize(const Form& form, const std::uint8_t* x, std::int64_t n, float* r) {
    const CodeSource<is_signed> codes(form.zero_point);
    const F scale = Vec::set(form.scale);
    write_floats(r, n, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return codes(x + i, tag) * scale; });
}

static void load_reals(const Form& form, const void* x, std::int64_t stride, std::int64_t n, float* r) {
    const bool is_signed = form.dtype == DType::s8;
    const auto one = [&](std::int64_t i) {
        if (!form.is_codes()) return static_cast<const float*>(x)[i];
        const float q = is_signed ? static_cast<float>(static_cast<const std::int8_t*>(x)[i])
                                  : static_cast<float>(static_cast<const std::uint8_t*>(x)[i]);
        return (q - form.zero_point) * form.scale;
    };
    if (stride == 0) {
        if (n > 0) fill_floats(r, n, one(0));
    } else if (stride != 1) {
        for (std::int64_t i = 0; i < n; ++i) r[i] = one(i * stride);
    } else if (!form.is_codes()) {
        const float* p = static_cast<const float*>(x);
        write_floats(r, n, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return load(p + i, tag); });
    } else if (is_signed) {
        dequantize<true>(form, static_cast<const std::uint8_t*>(x), n, r);
    } else {
        dequantize<false>(form, static_cast<const std::uint8_t*>(x), n, r);
    }
}

static void store_reals(const Form& form, const float* r, std::int64_t n, void* y, std::int64_t stride) {
    const auto value = [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return load(r + i, tag); };
    if (stride == 1) {
        write_reals(form, y, n, value);
    } else if (!form.is_codes()) {
        for (std::int64_t i = 0; i < n; ++i) static_cast<float*>(y)[i * stride] = r[i];
    } else {
        std::uint8_t codes[kBlock];
        for (std::int64_t from = 0; from < n; from += kBlock) {
            const std::int64_t count = n - from < kBlock ? n - from : kBlock;
            write_codes<Gives::reals>(form, codes, count, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
                return load(r + from + i, tag);
            });
            for (std::int64_t i = 0; i < count; ++i) static_cast<std::uint8_t*>(y)[(from + i) * stride] = codes[i];
        }
    }
}

// n <= kBlock reals as floats: in place where they already lie so, else in `buffer`.
static inline const float* floats_of(const Form& form, const void* x, std::int64_t stride, std::int64_t n,
                                     float* buffer) {
    if (!form.is_codes() && stride == 1) return static_cast<const float*>(x);
    load_reals(form, x, stride, n, buffer);
    return buffer;
}

// r = activation(x); r may be x.
template <class Function>
static inline void map(const float* x, std::int64_t n, float* r, Function f) {
    write_floats(r, n, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return f(load(x + i, tag)); });
}

// Bounds of NaN stay NaN: min and max give their second operand then.
static inline F hard_gate(F x) {
    const F three = Vec::set(3.0f), six = Vec::set(6.0f);
    return Vec::min(six, Vec::max(Vec::set(0.0f), x + three));
}

static void activate(const Epilogue& e, const float* x, std::int64_t n, float* r) {
    const F zero = Vec::set(0.0f), a = Vec::set(e.a), b = Vec::set(e.b), six = Vec::set(6.0f);
    switch (e.kind) {
        case Activation::none:
            if (x != r) map(x, n, r, [](F v) QF_ALWAYS_INLINE { return v; });
            return;
        case Activation::relu: return map(x, n, r, [&](F v) QF_ALWAYS_INLINE { return Vec::max(zero, v); });
        case Activation::hardtanh:
            return map(x, n, r, [&](F v) QF_ALWAYS_INLINE { return Vec::min(b, Vec::max(a, v)); });
        case Activation::hardswish: return map(x, n, r, [&](F v) QF_ALWAYS_INLINE { return v * hard_gate(v) / six; });
        case Activation::hardsigmoid: return map(x, n, r, [&](F v) QF_ALWAYS_INLINE { return hard_gate(v) / six; });
        case Activation::silu: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return silu<Vec>(v); });
        case Activation::sigmoid: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return sigmoid<Vec>(v); });
        case Activation::gelu: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return gelu<Vec>(v); });
        case Activation::gelu_tanh: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return gelu_tanh<Vec>(v); });
        case Activation::leaky_relu:
            return map(x, n, r, [&](F v) QF_ALWAYS_INLINE { return Vec::select(Vec::less(zero, v), v, v * a); });
        case Activation::tanh: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return tanh<Vec>(v); });
    }
}

}  // namespace
}  // namespace quantflow::host::QF_ISA_NAMESPACE
