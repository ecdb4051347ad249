// Vectors of 32-bit lanes for the int8 kernels, one struct per instruction set with the same members. Included by
// *_isa.cpp files only; everything is local to the file that includes it.
//
// "Quad": four bytes of the reduction in one lane. dot(acc, x, w): acc[lane] += sum of 4 products u8 * s8.
// "Block": 4 * kLanes bytes of adjacent channels, widened to four vectors. Widening works within 128 bits, so vector
// i, lane 4 * L + e holds channel 16 * L + 4 * i + e of the block. interleave(): the same for kTapGroup blocks, whose
// codes lie side by side in a lane; dot_taps(acc, x, w): acc[lane] += sum of kTapGroup products of such lanes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
// GCC 12's own header warns about its deliberately undefined operands (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define QF_INLINE_MEMBER inline __attribute__((always_inline))
#define QF_INLINE static QF_INLINE_MEMBER

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

template <typename T, typename P>
QF_INLINE T load_as(const P* p) {
    T v;
    std::memcpy(&v, p, sizeof(T));
    return v;
}

// GCC drops a vector_size that depends on a template parameter, so every length is spelled out.
template <int Lanes>
struct PortableTypes;
template <>
struct PortableTypes<4> {
    typedef std::int32_t Int __attribute__((vector_size(16)));
    typedef std::uint32_t UInt __attribute__((vector_size(16)));
    typedef float Float __attribute__((vector_size(16)));
    typedef std::uint8_t Bytes __attribute__((vector_size(4)));
};
template <>
struct PortableTypes<16> {
    typedef std::int32_t Int __attribute__((vector_size(64)));
    typedef std::uint32_t UInt __attribute__((vector_size(64)));
    typedef float Float __attribute__((vector_size(64)));
    typedef std::uint8_t Bytes __attribute__((vector_size(16)));
};

// Plain C++ on compiler vectors. Also stands in for wider instruction sets in tests.
template <int Lanes>
struct PortableVector {
    static constexpr int kLanes = Lanes;
    static constexpr bool kIsExact = true;
    static constexpr int kJointWeights = 0;
    static constexpr int kTapGroup = 4;
    using Int = typename PortableTypes<Lanes>::Int;
    using UInt = typename PortableTypes<Lanes>::UInt;
    using Float = typename PortableTypes<Lanes>::Float;
    using Bytes = typename PortableTypes<Lanes>::Bytes;

    QF_INLINE Int load(const std::int32_t* p) { return load_as<Int>(p); }
    QF_INLINE void store(std::int32_t* p, Int v) { std::memcpy(p, &v, sizeof v); }
    QF_INLINE Float load(const float* p) { return load_as<Float>(p); }
    QF_INLINE void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
    QF_INLINE Int set(std::int32_t v) { return v - Int{}; }
    QF_INLINE Float set(float v) { return v - Float{}; }
    QF_INLINE Int load_bytes(const std::uint8_t* p) { return __builtin_convertvector(load_as<Bytes>(p), Int); }
    QF_INLINE void store_bytes(std::uint8_t* p, Int v) {
        const Bytes b = __builtin_convertvector(v, Bytes);
        std::memcpy(p, &b, sizeof b);
    }
    QF_INLINE void store_bytes(std::uint8_t* p, Int a, Int b) {
        store_bytes(p, a);
        store_bytes(p + Lanes, b);
    }
    // The first n lanes only; the others are 0 where they are read.
    QF_INLINE Float load(const float* p, std::int64_t n) {
        Float v = set(0.0f);
        std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof *p);
        return v;
    }
    QF_INLINE void store(float* p, Float v, std::int64_t n) {
        std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof *p);
    }
    QF_INLINE Int load_bytes(const std::uint8_t* p, std::int64_t n) {
        std::uint8_t bytes[Lanes] = {};
        std::memcpy(bytes, p, static_cast<std::size_t>(n));
        return load_bytes(bytes);
    }
    QF_INLINE void store_bytes(std::uint8_t* p, Int v, std::int64_t n) {
        std::uint8_t bytes[Lanes];
        store_bytes(bytes, v);
        std::memcpy(p, bytes, static_cast<std::size_t>(n));
    }

    QF_INLINE Int add(Int a, Int b) { return (Int)((UInt)a + (UInt)b); }
    QF_INLINE Int sub(Int a, Int b) { return (Int)((UInt)a - (UInt)b); }
    QF_INLINE Float add(Float a, Float b) { return a + b; }
    QF_INLINE Float sub(Float a, Float b) { return a - b; }
    QF_INLINE Float mul(Float a, Float b) { return a * b; }
    QF_INLINE Float div(Float a, Float b) { return a / b; }
    QF_INLINE Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
    // The second operand if either is NaN, like the instructions.
    QF_INLINE Float min(Float a, Float b) { return a < b ? a : b; }
    QF_INLINE Float max(Float a, Float b) { return a > b ? a : b; }
    QF_INLINE Float where_less(Float a, Float b, Float yes, Float no) { return a < b ? yes : no; }
    QF_INLINE Float abs(Float a) { return (Float)((Int)a & 0x7fffffff); }
    QF_INLINE Float copy_sign(Float a, Float sign) {
        return (Float)(((Int)a & 0x7fffffff) | ((Int)sign & (std::int32_t)0x80000000));
    }
    QF_INLINE Float to_float(Int v) { return __builtin_convertvector(v, Float); }
    QF_INLINE Int round(Float v) {  // half to even; |v| < 2^22
        return sub((Int)(v + 12582912.0f), (Int)set(12582912.0f));
    }
    QF_INLINE Float power_of_two(Int n) { return (Float)((n + 127) << 23); }

    // v + zero within [low, high] as bytes; |v| < 2^30.
    struct Codes {
        Int zero, low, high;
        Codes(std::int32_t z, std::uint8_t l, std::uint8_t h) : zero(set(z)), low(set(l)), high(set(h)) {}
        QF_INLINE_MEMBER Int of(Int v) const {
            v = add(v, zero);
            v = v > high ? high : v;
            return v < low ? low : v;
        }
        // The first n bytes of four rows of a vector, or of two rows of two.
        template <int kRows>
        QF_INLINE_MEMBER void store(std::uint8_t* const (&p)[kRows], const Int (&v)[4], std::int64_t n) const {
            std::uint8_t bytes[4 * Lanes];
            for (int i = 0; i < 4; ++i) store_bytes(bytes + i * Lanes, of(v[i]));
            for (int i = 0; i < kRows; ++i)
                std::memcpy(p[i], bytes + i * (4 / kRows) * Lanes, static_cast<std::size_t>(n));
        }
        // Two whole rows.
        template <bool kIsPlain = false>
        QF_INLINE_MEMBER void store(std::uint8_t* p, std::uint8_t* q, Int a, Int b, Int c, Int d) const {
            store_bytes(p, of(a), of(b));
            store_bytes(q, of(c), of(d));
        }
        QF_INLINE_MEMBER void store_block(std::uint8_t* p, const Int (&v)[4]) const {
            const Int all[4] = {of(v[0]), of(v[1]), of(v[2]), of(v[3])};
            PortableVector::store_block(p, all);
        }
        // The first n bytes.
        QF_INLINE_MEMBER void store_block(std::uint8_t* p, const Int (&v)[4], std::int64_t n) const {
            std::uint8_t bytes[4 * Lanes];
            store_block(bytes, v);
            std::memcpy(p, bytes, static_cast<std::size_t>(n));
        }
    };
    // The first n bytes, the rest anything.
    QF_INLINE void load_bytes(const std::uint8_t* p, std::int64_t n, Int& a, Int& b) {
        std::uint8_t bytes[2 * Lanes] = {};
        std::memcpy(bytes, p, static_cast<std::size_t>(n));
        a = load_bytes(bytes);
        b = load_bytes(bytes + Lanes);
    }

    QF_INLINE Int quad(const std::uint8_t* p) { return set(load_as<std::int32_t>(p)); }
    QF_INLINE void dot(Int& acc, Int x, Int w) {
        const Int x0 = x & 0x00ff00ff, x1 = ((Int)((UInt)x >> 8)) & 0x00ff00ff;
#if defined(__SSE2__)
        if constexpr (Lanes == 4) {
            const __m128i w0 = _mm_srai_epi16(_mm_slli_epi16((__m128i)w, 8), 8), w1 = _mm_srai_epi16((__m128i)w, 8);
            acc = add(acc, add((Int)_mm_madd_epi16((__m128i)x0, w0), (Int)_mm_madd_epi16((__m128i)x1, w1)));
            return;
        }
#endif
        const Int w0 = ((Int)((UInt)w << 24)) >> 24, w1 = ((Int)((UInt)w << 16)) >> 24;
        const Int w2 = ((Int)((UInt)w << 8)) >> 24, w3 = w >> 24;
        acc = add(acc, (x0 & 0xffff) * w0 + (x1 & 0xffff) * w1 + (x0 >> 16) * w2 + (x1 >> 16) * w3);
    }

    QF_INLINE void settle(Int&) {}

    // Rows of bytes for `dot`.
    static constexpr int kCopy = 16;
    QF_INLINE void copy(std::uint8_t* to, const std::uint8_t* from) { std::memcpy(to, from, kCopy); }

    QF_INLINE void load_block(const std::uint8_t* p, Int (&v)[4]) {
        std::int32_t wide[4][Lanes];
        for (int i = 0; i < 4; ++i)
            for (int l = 0; l < Lanes; ++l) wide[i][l] = p[16 * (l / 4) + 4 * i + l % 4];
        for (int i = 0; i < 4; ++i) v[i] = load(wide[i]);
    }
    QF_INLINE void store_block(std::uint8_t* p, const Int (&v)[4]) {
        for (int i = 0; i < 4; ++i)
            for (int l = 0; l < Lanes; ++l) p[16 * (l / 4) + 4 * i + l % 4] = static_cast<std::uint8_t>(v[i][l]);
    }
    QF_INLINE void store_block(float* p, const Float (&v)[4]) {
        for (int i = 0; i < 4; ++i)
            for (int l = 0; l < Lanes; ++l) p[16 * (l / 4) + 4 * i + l % 4] = v[i][l];
    }
    QF_INLINE void load_block(const float* p, Float (&v)[4]) {
        for (int i = 0; i < 4; ++i)
            for (int l = 0; l < Lanes; ++l) v[i][l] = p[16 * (l / 4) + 4 * i + l % 4];
    }
    QF_INLINE void interleave(const std::uint8_t* const (&p)[kTapGroup], Int (&to)[4]) {
        std::uint8_t bytes[4][4 * Lanes];
        for (int i = 0; i < 4; ++i)
            for (int l = 0; l < Lanes; ++l)
                for (int t = 0; t < kTapGroup; ++t) bytes[i][4 * l + t] = p[t][16 * (l / 4) + 4 * i + l % 4];
        for (int i = 0; i < 4; ++i) to[i] = load_as<Int>(bytes[i]);
    }
    QF_INLINE void dot_taps(Int& acc, Int taps, Int w) { dot(acc, taps, w); }
};

#if defined(__AVX2__)
// Everything of 256-bit vectors but the products.
struct Vector256 {
    static constexpr int kLanes = 8;
    using Int = __m256i;
    using Float = __m256;

    QF_INLINE Int load(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(p)); }
    QF_INLINE void store(std::int32_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<Int*>(p), v); }
    QF_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
    QF_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
    QF_INLINE Int set(std::int32_t v) { return _mm256_set1_epi32(v); }
    QF_INLINE Float set(float v) { return _mm256_set1_ps(v); }
    QF_INLINE Int load_bytes(const std::uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    QF_INLINE void store_bytes(std::uint8_t* p, Int v) {
        const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(w, w));
    }
    QF_INLINE void store_bytes(std::uint8_t* p, Int a, Int b) {
        const Int w = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
    }
    // The first n lanes only; the others are 0 where they are read.
    QF_INLINE Int first_lanes(std::int64_t n) {
        return _mm256_cmpgt_epi32(set(static_cast<std::int32_t>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    QF_INLINE Float load(const float* p, std::int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
    QF_INLINE void store(float* p, Float v, std::int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
    QF_INLINE Int load_bytes(const std::uint8_t* p, std::int64_t n) {
        if (n == 8) return load_bytes(p);
        std::uint8_t bytes[8] = {};
        std::memcpy(bytes, p, static_cast<std::size_t>(n));
        return load_bytes(bytes);
    }
    QF_INLINE void store_bytes(std::uint8_t* p, Int v, std::int64_t n) {
        std::uint8_t bytes[8];
        store_bytes(bytes, v);
        std::memcpy(p, bytes, static_cast<std::size_t>(n));
    }

    QF_INLINE Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    QF_INLINE Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
    QF_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    QF_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
    QF_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    QF_INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
    QF_INLINE Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    QF_INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
    QF_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
    QF_INLINE Float where_less(Float a, Float b, Float yes, Float no) {
        return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
    }
    QF_INLINE Float abs(Float a) { return _mm256_andnot_ps(set(-0.0f), a); }
    QF_INLINE Float copy_sign(Float a, Float sign) {
        return _mm256_or_ps(abs(a), _mm256_and_ps(set(-0.0f), sign));
    }
    QF_INLINE Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
    QF_INLINE Int round(Float v) { return _mm256_cvtps_epi32(v); }
    QF_INLINE Float power_of_two(Int n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, set(127)), 23));
    }

    struct Codes {
        Int zero, low, high;
        Codes(std::int32_t z, std::uint8_t l, std::uint8_t h)
            : zero(_mm256_set1_epi16(static_cast<short>(z))),
              low(_mm256_set1_epi8(static_cast<char>(l))),
              high(_mm256_set1_epi8(static_cast<char>(h))) {}
        // Of four vectors, as packing leaves them: within 128 bits a, b, c, d.
        QF_INLINE_MEMBER Int of(Int a, Int b, Int c, Int d) const {
            const Int ab = _mm256_adds_epi16(_mm256_packs_epi32(a, b), zero);
            const Int cd = _mm256_adds_epi16(_mm256_packs_epi32(c, d), zero);
            return _mm256_max_epu8(_mm256_min_epu8(_mm256_packus_epi16(ab, cd), high), low);
        }
        QF_INLINE_MEMBER void store(std::uint8_t* p, std::uint8_t* q, Int a, Int b, Int c, Int d) const {
            const Int order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            const Int v = _mm256_permutevar8x32_epi32(of(a, b, c, d), order);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(v));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm256_extracti128_si256(v, 1));
        }
        template <int kRows>
        QF_INLINE_MEMBER void store(std::uint8_t* const (&p)[kRows], const Int (&v)[4], std::int64_t n) const {
            std::uint8_t bytes[32];
            store(bytes, bytes + 16, v[0], v[1], v[2], v[3]);
            for (int i = 0; i < kRows; ++i)
                if (kRows == 4 && n == 8)
                    std::memcpy(p[i], bytes + i * 8, 8);
                else
                    std::memcpy(p[i], bytes + i * (32 / kRows), static_cast<std::size_t>(n));
        }
        QF_INLINE_MEMBER void store_block(std::uint8_t* p, const Int (&v)[4]) const {
            _mm256_storeu_si256(reinterpret_cast<Int*>(p), of(v[0], v[1], v[2], v[3]));
        }
        QF_INLINE_MEMBER void store_block(std::uint8_t* p, const Int (&v)[4], std::int64_t n) const {
            std::uint8_t bytes[32];
            store_block(bytes, v);
            std::memcpy(p, bytes, static_cast<std::size_t>(n));
        }
    };
    QF_INLINE void load_bytes(const std::uint8_t* p, std::int64_t n, Int& a, Int& b) {
        std::uint8_t bytes[16] = {};
        std::memcpy(bytes, p, static_cast<std::size_t>(n));
        a = load_bytes(bytes);
        b = load_bytes(bytes + 8);
    }

    QF_INLINE Int quad(const std::uint8_t* p) { return set(load_as<std::int32_t>(p)); }

    static constexpr int kCopy = 32;

    QF_INLINE Int load_block(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(p)); }
    QF_INLINE void load_block(const std::uint8_t* p, Int (&v)[4]) {
        const Int zero = _mm256_setzero_si256(), b = load_block(p);
        const Int low = _mm256_unpacklo_epi8(b, zero), high = _mm256_unpackhi_epi8(b, zero);
        v[0] = _mm256_unpacklo_epi16(low, zero);
        v[1] = _mm256_unpackhi_epi16(low, zero);
        v[2] = _mm256_unpacklo_epi16(high, zero);
        v[3] = _mm256_unpackhi_epi16(high, zero);
    }
    QF_INLINE void store_block(std::uint8_t* p, const Int (&v)[4]) {
        const Int b = _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        _mm256_storeu_si256(reinterpret_cast<Int*>(p), b);
    }
    QF_INLINE void store_block(float* p, const Float (&v)[4]) {
        for (int i = 0; i < 4; ++i) {
            _mm_storeu_ps(p + 4 * i, _mm256_castps256_ps128(v[i]));
            _mm_storeu_ps(p + 16 + 4 * i, _mm256_extractf128_ps(v[i], 1));
        }
    }
    QF_INLINE void load_block(const float* p, Float (&v)[4]) {
        for (int i = 0; i < 4; ++i) v[i] = _mm256_set_m128(_mm_loadu_ps(p + 16 + 4 * i), _mm_loadu_ps(p + 4 * i));
    }
};

// Without VNNI an exact product of full codes takes 16-bit operands. Codes that lie within 128 steps above the zero
// point (any symmetric tensor after ReLU) make pairs of 8-bit products fit 16 bits: 2 * 127 * 128 < 32768.
struct Avx2Vector : Vector256 {
    static constexpr bool kIsExact = false;
    static constexpr int kTapGroup = 2;

    // Written out, so that the compiler keeps a tile's accumulators in registers. x in [0, 127].
    QF_INLINE void dot(Int& acc, Int x, Int w) {
        Int t;
        asm volatile(
            "vpmaddubsw %[w], %[x], %[t]\n\t"
            "vpmaddwd %[one], %[t], %[t]\n\t"
            "vpaddd %[t], %[acc], %[acc]"
            : [acc] "+x"(acc), [t] "=&x"(t)
            : [x] "x"(x), [w] "x"(w), [one] "xm"(_mm256_set1_epi16(1)));
    }
    // The quad at base + kTimes * row + kBytes, by one instruction: GCC would keep an address of each row for two quads.
    template <int kTimes, int kBytes>
    QF_INLINE Int quad_at(const std::uint8_t* base, std::int64_t row) {
        Int x;
        if constexpr (kTimes == 0)
            asm volatile("vpbroadcastd %c[bytes](%[base]), %[x]" : [x] "=x"(x) : [base] "r"(base), [bytes] "i"(kBytes));
        else
            asm volatile("vpbroadcastd %c[bytes](%[base], %[row], %c[times]), %[x]"
                         : [x] "=x"(x)
                         : [base] "r"(base), [row] "r"(row), [times] "i"(kTimes), [bytes] "i"(kBytes));
        return x;
    }
    // Two quads at once, for weights of which no lane's four of one sign add up to more than kJointWeights: three
    // multiplications where `dot` takes four.
    static constexpr int kJointWeights = 32767 / 127;
    QF_INLINE Int joint_products(Int x0, Int x1, Int w0, Int w1) {
        Int t, other;
        asm volatile(
            "vpmaddubsw %[w0], %[x0], %[t]\n\t"
            "vpmaddubsw %[w1], %[x1], %[other]\n\t"
            "vpaddw %[other], %[t], %[t]\n\t"
            "vpmaddwd %[one], %[t], %[t]"
            : [t] "=&x"(t), [other] "=&x"(other)
            : [x0] "x"(x0), [x1] "x"(x1), [w0] "x"(w0), [w1] "x"(w1), [one] "x"(_mm256_set1_epi16(1)));
        return t;
    }
    QF_INLINE void dot_pairs(Int& acc, Int x, Int w) {
        Int t;
        asm volatile(
            "vpmaddwd %[w], %[x], %[t]\n\t"
            "vpaddd %[t], %[acc], %[acc]"
            : [acc] "+x"(acc), [t] "=&x"(t)
            : [x] "x"(x), [w] "x"(w));
    }
    QF_INLINE Int set_bytes(std::uint8_t v) { return _mm256_set1_epi8(static_cast<char>(v)); }
    QF_INLINE Int set_words(short v) { return _mm256_set1_epi16(v); }
    QF_INLINE Int even_bytes(Int w) { return _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8); }
    QF_INLINE Int odd_bytes(Int w) { return _mm256_srai_epi16(w, 8); }

    // Copies x - zero and collects the high bits: none set means that `dot` is exact.
    QF_INLINE void copy(std::uint8_t* to, const std::uint8_t* from, Int zero, Int& high) {
        const Int v = _mm256_sub_epi8(load_block(from), zero);
        high = _mm256_or_si256(high, v);
        _mm256_storeu_si256(reinterpret_cast<Int*>(to), v);
    }
    QF_INLINE Int either(Int a, Int b) { return _mm256_or_si256(a, b); }
    QF_INLINE bool any_high(Int high) { return _mm256_movemask_epi8(high) != 0; }
    // 32 bytes of x - zero (mod 256) to 16-bit x - zero: of each quad, bytes 0 and 2, then bytes 1 and 3.
    QF_INLINE void widen(std::uint8_t* to, const std::uint8_t* from, Int zero8, Int zero16) {
        const Int raw = _mm256_add_epi8(load_block(from), zero8);
        const Int even = _mm256_sub_epi16(_mm256_and_si256(raw, _mm256_set1_epi16(255)), zero16);
        const Int odd = _mm256_sub_epi16(_mm256_srli_epi16(raw, 8), zero16);
        const Int low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
        _mm256_storeu_si256(reinterpret_cast<Int*>(to), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256(reinterpret_cast<Int*>(to + 32), _mm256_permute2x128_si256(low, high, 0x31));
    }

    QF_INLINE void interleave(const std::uint8_t* const (&p)[kTapGroup], Int (&to)[4]) {
        const Int zero = _mm256_setzero_si256(), a = load_block(p[0]), b = load_block(p[1]);
        const Int low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        to[0] = _mm256_unpacklo_epi8(low, zero);
        to[1] = _mm256_unpackhi_epi8(low, zero);
        to[2] = _mm256_unpacklo_epi8(high, zero);
        to[3] = _mm256_unpackhi_epi8(high, zero);
    }
    QF_INLINE void dot_taps(Int& acc, Int taps, Int w) { acc = _mm256_add_epi32(acc, _mm256_madd_epi16(taps, w)); }
};
#endif

#if defined(__AVXVNNI__) || defined(__AVX512VNNI__)
struct TapVector256 : Vector256 {
    static constexpr int kTapGroup = 4;

    QF_INLINE void interleave(const std::uint8_t* const (&p)[kTapGroup], Int (&to)[4]) {
        const Int a = load_block(p[0]), b = load_block(p[1]), c = load_block(p[2]), d = load_block(p[3]);
        const Int ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
        const Int cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
        to[0] = _mm256_unpacklo_epi16(ab0, cd0);
        to[1] = _mm256_unpackhi_epi16(ab0, cd0);
        to[2] = _mm256_unpacklo_epi16(ab1, cd1);
        to[3] = _mm256_unpackhi_epi16(ab1, cd1);
    }
};
#endif

#if defined(__AVXVNNI__)
struct AvxVnniVector : TapVector256 {
    static constexpr bool kIsExact = true;
    static constexpr int kJointWeights = 0;

    QF_INLINE void dot(Int& acc, Int x, Int w) { acc = _mm256_dpbusd_avx_epi32(acc, x, w); }
    QF_INLINE void dot_pairs(Int& acc, Int x, Int w) { acc = _mm256_dpwssd_avx_epi32(acc, x, w); }
    QF_INLINE void copy(std::uint8_t* to, const std::uint8_t* from) {
        _mm256_storeu_si256(reinterpret_cast<Int*>(to), load_block(from));
    }
    QF_INLINE void dot_taps(Int& acc, Int taps, Int w) { dot(acc, taps, w); }
};
#endif

#if defined(__AVX512VNNI__)
struct Avx512Vector {
    static constexpr int kLanes = 16;
    static constexpr bool kIsExact = true;
    static constexpr int kJointWeights = 0;
    static constexpr int kTapGroup = 4;
    using Int = __m512i;
    using Float = __m512;

    QF_INLINE Int load(const std::int32_t* p) { return _mm512_loadu_si512(p); }
    QF_INLINE void store(std::int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
    QF_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
    QF_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
    QF_INLINE Int set(std::int32_t v) { return _mm512_set1_epi32(v); }
    QF_INLINE Float set(float v) { return _mm512_set1_ps(v); }
    QF_INLINE Int load_bytes(const std::uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    QF_INLINE void store_bytes(std::uint8_t* p, Int v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
    }
    QF_INLINE void store_bytes(std::uint8_t* p, Int a, Int b) {
        store_bytes(p, a);
        store_bytes(p + 16, b);
    }
    // The first n lanes only; the others are 0 where they are read.
    QF_INLINE __mmask16 first_lanes(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
    QF_INLINE Float load(const float* p, std::int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
    QF_INLINE void store(float* p, Float v, std::int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
    QF_INLINE Int load_bytes(const std::uint8_t* p, std::int64_t n) {
        return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p));
    }
    QF_INLINE void store_bytes(std::uint8_t* p, Int v, std::int64_t n) {
        _mm_mask_storeu_epi8(p, first_lanes(n), _mm512_cvtepi32_epi8(v));
    }

    QF_INLINE Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    QF_INLINE Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    QF_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    QF_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    QF_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    // Within two units in the last place, for |b| < 2^126: an estimate of 1 / b and one step of Newton's method.
    QF_INLINE Float div(Float a, Float b) {
        const Float estimate = _mm512_rcp14_ps(b), one = set(1.0f);
        const Float inverse = _mm512_fmadd_ps(estimate, _mm512_fnmadd_ps(b, estimate, one), estimate);
        return _mm512_mul_ps(a, inverse);
    }
    QF_INLINE Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    QF_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
    QF_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
    QF_INLINE Float where_less(Float a, Float b, Float yes, Float no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
    }
    QF_INLINE Float abs(Float a) { return _mm512_abs_ps(a); }
    QF_INLINE Float copy_sign(Float a, Float sign) {
        return _mm512_or_ps(abs(a), _mm512_and_ps(set(-0.0f), sign));
    }
    QF_INLINE Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
    QF_INLINE Int round(Float v) { return _mm512_cvtps_epi32(v); }
    QF_INLINE Float power_of_two(Int n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, set(127)), 23));
    }

    struct Codes {
        Int zero, low, high, order;
        Codes(std::int32_t z, std::uint8_t l, std::uint8_t h)
            : zero(_mm512_set1_epi16(static_cast<short>(z))),
              low(_mm512_set1_epi8(static_cast<char>(l))),
              high(_mm512_set1_epi8(static_cast<char>(h))),
              order(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)) {}
        // Of four vectors, as packing leaves them: within 128 bits a, b, c, d. kIsPlain: zero is 0, and all codes are
        // legal.
        template <bool kIsPlain = false>
        QF_INLINE_MEMBER Int of(Int a, Int b, Int c, Int d) const {
            Int ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
            if constexpr (kIsPlain) return _mm512_packus_epi16(ab, cd);
            ab = _mm512_adds_epi16(ab, zero);
            cd = _mm512_adds_epi16(cd, zero);
            return _mm512_max_epu8(_mm512_min_epu8(_mm512_packus_epi16(ab, cd), high), low);
        }
        // A whole row of four vectors.
        template <bool kIsPlain = false>
        QF_INLINE_MEMBER void store_row(std::uint8_t* p, const Int (&v)[4]) const {
            _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, of<kIsPlain>(v[0], v[1], v[2], v[3])));
        }
        template <bool kIsPlain = false>
        QF_INLINE_MEMBER void store(std::uint8_t* p, std::uint8_t* q, Int a, Int b, Int c, Int d) const {
            const Int v = _mm512_permutexvar_epi32(order, of<kIsPlain>(a, b, c, d));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(v));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_extracti64x4_epi64(v, 1));
        }
        QF_INLINE_MEMBER void store(std::uint8_t* const (&p)[2], const Int (&v)[4], std::int64_t n) const {
            const __mmask32 first = static_cast<__mmask32>((std::uint64_t{1} << n) - 1);
            const Int all = _mm512_permutexvar_epi32(order, of(v[0], v[1], v[2], v[3]));
            _mm256_mask_storeu_epi8(p[0], first, _mm512_castsi512_si256(all));
            _mm256_mask_storeu_epi8(p[1], first, _mm512_extracti64x4_epi64(all, 1));
        }
        QF_INLINE_MEMBER void store(std::uint8_t* const (&p)[4], const Int (&v)[4], std::int64_t n) const {
            const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
            const Int all = _mm512_permutexvar_epi32(order, of(v[0], v[1], v[2], v[3]));
            _mm_mask_storeu_epi8(p[0], first, _mm512_castsi512_si128(all));
            _mm_mask_storeu_epi8(p[1], first, _mm512_extracti32x4_epi32(all, 1));
            _mm_mask_storeu_epi8(p[2], first, _mm512_extracti32x4_epi32(all, 2));
            _mm_mask_storeu_epi8(p[3], first, _mm512_extracti32x4_epi32(all, 3));
        }
        QF_INLINE_MEMBER void store_block(std::uint8_t* p, const Int (&v)[4]) const {
            _mm512_storeu_si512(p, of(v[0], v[1], v[2], v[3]));
        }
        QF_INLINE_MEMBER void store_block(std::uint8_t* p, const Int (&v)[4], std::int64_t n) const {
            const __mmask64 first = (std::uint64_t{1} << n) - 1;
            _mm512_mask_storeu_epi8(p, first, of(v[0], v[1], v[2], v[3]));
        }
    };
    QF_INLINE void load_bytes(const std::uint8_t* p, std::int64_t n, Int& a, Int& b) {
        const __mmask32 first = static_cast<__mmask32>((std::uint64_t{1} << n) - 1);
        const __m256i bytes = _mm256_maskz_loadu_epi8(first, p);
        a = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes));
        b = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1));
    }

    QF_INLINE Int quad(const std::uint8_t* p) { return set(load_as<std::int32_t>(p)); }
    QF_INLINE void dot(Int& acc, Int x, Int w) { acc = _mm512_dpbusd_epi32(acc, x, w); }
    // A register at this place, whatever is done with v before and behind.
    QF_INLINE void settle(Int& v) { asm("" : "+v"(v)); }
    QF_INLINE void dot_pairs(Int& acc, Int x, Int w) { acc = _mm512_dpwssd_epi32(acc, x, w); }

    static constexpr int kCopy = 64;
    QF_INLINE void copy(std::uint8_t* to, const std::uint8_t* from) { _mm512_storeu_si512(to, load_block(from)); }

    QF_INLINE Int load_block(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
    QF_INLINE void load_block(const std::uint8_t* p, Int (&v)[4]) {
        const Int zero = _mm512_setzero_si512(), b = load_block(p);
        const Int low = _mm512_unpacklo_epi8(b, zero), high = _mm512_unpackhi_epi8(b, zero);
        v[0] = _mm512_unpacklo_epi16(low, zero);
        v[1] = _mm512_unpackhi_epi16(low, zero);
        v[2] = _mm512_unpacklo_epi16(high, zero);
        v[3] = _mm512_unpackhi_epi16(high, zero);
    }
    QF_INLINE void store_block(std::uint8_t* p, const Int (&v)[4]) {
        _mm512_storeu_si512(p, _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3])));
    }
    QF_INLINE void store_block(float* p, const Float (&v)[4]) {
        for (int i = 0; i < 4; ++i) {
            _mm_storeu_ps(p + 4 * i, _mm512_extractf32x4_ps(v[i], 0));
            _mm_storeu_ps(p + 16 + 4 * i, _mm512_extractf32x4_ps(v[i], 1));
            _mm_storeu_ps(p + 32 + 4 * i, _mm512_extractf32x4_ps(v[i], 2));
            _mm_storeu_ps(p + 48 + 4 * i, _mm512_extractf32x4_ps(v[i], 3));
        }
    }
    QF_INLINE void load_block(const float* p, Float (&v)[4]) {
        for (int i = 0; i < 4; ++i) {
            Float all = _mm512_castps128_ps512(_mm_loadu_ps(p + 4 * i));
            all = _mm512_insertf32x4(all, _mm_loadu_ps(p + 16 + 4 * i), 1);
            all = _mm512_insertf32x4(all, _mm_loadu_ps(p + 32 + 4 * i), 2);
            v[i] = _mm512_insertf32x4(all, _mm_loadu_ps(p + 48 + 4 * i), 3);
        }
    }
    QF_INLINE void interleave(const std::uint8_t* const (&p)[kTapGroup], Int (&to)[4]) {
        const Int a = load_block(p[0]), b = load_block(p[1]), c = load_block(p[2]), d = load_block(p[3]);
        const Int ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
        const Int cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
        to[0] = _mm512_unpacklo_epi16(ab0, cd0);
        to[1] = _mm512_unpackhi_epi16(ab0, cd0);
        to[2] = _mm512_unpacklo_epi16(ab1, cd1);
        to[3] = _mm512_unpackhi_epi16(ab1, cd1);
    }
    QF_INLINE void dot_taps(Int& acc, Int taps, Int w) { dot(acc, taps, w); }
};

// The lower halves of vectors: of a block, its first 32 channels.
struct Avx512Half : TapVector256 {
    struct Codes : Vector256::Codes {
        using Vector256::Codes::Codes;
        using Vector256::Codes::store_block;
        QF_INLINE_MEMBER void store_block(std::uint8_t* p, const Int (&v)[4], std::int64_t n) const {
            const __mmask32 first = static_cast<__mmask32>((std::uint64_t{1} << n) - 1);
            _mm256_mask_storeu_epi8(p, first, of(v[0], v[1], v[2], v[3]));
        }
    };
    QF_INLINE void dot_taps(Int& acc, Int taps, Int w) { acc = _mm256_dpbusd_epi32(acc, taps, w); }
    // The upper lanes are 0.
    QF_INLINE __m512i whole(Int v) { return _mm512_zextsi256_si512(v); }
};
#endif

}  // namespace
}  // namespace quantflow::host::QF_ISA_NAMESPACE
