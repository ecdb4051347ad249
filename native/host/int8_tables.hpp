// What vectors find in tables of one register, for the activations of the int8 kernels. Included by int8_gemm_isa.cpp.
#pragma once

#include "int8_vector.hpp"

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

// kPowers: entries of a table of 2^(i / kPowers); 1: there is none. power(x): of the integer
// n in the last bits of x, 2^(n / kPowers).
// half_erf(x) = erf(|x| / sqrt(2)) / 2 within 1.3e-7, NaN of NaN.
// kMerges: whether there are `merged` and `store` for blocks that are half empty or more.
template <class V>
struct Tables {
    static constexpr int kPowers = 1;
    static constexpr bool kHasErf = false, kMerges = false;
};

#if defined(__AVX2__)
template <>
struct Tables<Vector256> {
    static constexpr int kPowers = 8;
    static constexpr bool kHasErf = false, kMerges = false;

    QF_INLINE __m256 power(__m256 place) {
        const __m256i n = _mm256_castps_si256(place);
        // Less what the low bits of n add beside the exponent.
        const __m256i table = _mm256_setr_epi32(
            0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
        const __m256i within = _mm256_permutevar8x32_epi32(table, n);
        return _mm256_castsi256_ps(_mm256_add_epi32(within, _mm256_slli_epi32(n, 20)));
    }
};
#if defined(__AVXVNNI__)
template <>
struct Tables<AvxVnniVector> : Tables<Vector256> {};
#endif
template <>
struct Tables<Avx2Vector> : Tables<Vector256> {};
#endif

#if defined(__AVX512VNNI__)
template <>
struct Tables<Avx512Vector> {
    static constexpr int kPowers = 16;
    static constexpr bool kHasErf = true, kMerges = true;

    QF_INLINE __m512 power(__m512 place) {
        const __m512i n = _mm512_castps_si512(place);
        const __m512i table = _mm512_setr_epi32(
            0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
            0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
        const __m512i within = _mm512_permutexvar_epi32(n, table);
        return _mm512_castsi512_ps(_mm512_add_epi32(within, _mm512_slli_epi32(n, 19)));
    }
    // Polynomials around 16 points; at the last one and beyond it is 1/2.
    QF_INLINE __m512 half_erf(__m512 size) {
        alignas(64) static constexpr float c[5][16] = {
            {0.0f, 0.134482846f, 0.254116148f, 0.348788202f, 0.415434271f, 0.457170039f, 0.480419934f,
             0.491941392f, 0.497020245f, 0.499011785f, 0.499706447f, 0.499921978f, 0.499981463f,
             0.499996066f, 0.499999255f, 0.5f},
            {0.39893958f, 0.376052767f, 0.314973265f, 0.234412774f, 0.155013934f, 0.091083765f,
             0.04755437f, 0.022060601f, 0.00909325853f, 0.00333038485f, 0.00108377507f, 0.000313365017f,
             8.05053496e-05f, 1.83762913e-05f, 3.72687964e-06f, 6.71556165e-07f},
            {0.0f, -0.0646331981f, -0.108270608f, -0.120867565f, -0.106570981f, -0.0782746598f,
             -0.0490405783f, -0.0265421048f, -0.0125037078f, -0.00515204808f, -0.00186295016f,
             -0.000592558412f, -0.000166084137f, -4.10740504e-05f, -8.97213249e-06f, -1.73246974e-06f},
            {-0.0661234483f, -0.0550038777f, -0.0276454519f, 0.00231855782f, 0.0227829535f,
             0.0294962414f, 0.0257243328f, 0.0176237226f, 0.00998733751f, 0.0047960626f, 0.00197802042f,
             0.000706473773f, 0.000219728463f, 5.97439976e-05f, 1.42416584e-05f, 2.98280111e-06f},
            {0.0f, 0.0154125541f, 0.0226640124f, 0.0194237623f, 0.00985641032f, 0.000355124124f,
             -0.00506743323f, -0.00614040252f, -0.00474863173f, -0.00282819406f, -0.00137711922f,
             -0.000563522277f, -0.000196770896f, -5.91893076e-05f, -1.54356258e-05f, -3.50561913e-06f}};
        const __m512 apart = _mm512_set1_ps(0.34375f), magic = _mm512_set1_ps(12582912.0f);
        const __m512 x = _mm512_min_ps(_mm512_set1_ps(15 * 0.34375f), size);
        const __m512 point = _mm512_fmadd_ps(x, _mm512_set1_ps(1 / 0.34375f), magic);
        const __m512 d = _mm512_fnmadd_ps(_mm512_sub_ps(point, magic), apart, x);
        const auto at = [&](int i) __attribute__((always_inline)) {
            return _mm512_permutexvar_ps(_mm512_castps_si512(point), _mm512_load_ps(c[i]));
        };
        __m512 h = _mm512_fmadd_ps(at(4), d, at(3));
        h = _mm512_fmadd_ps(h, d, at(2));
        h = _mm512_fmadd_ps(h, d, at(1));
        return _mm512_fmadd_ps(h, d, at(0));
    }

    // A block of at most 32 channels (kVectors 2) or 16 (1) uses the first lanes of its four vectors, which lie at p:
    // those of two or four together, vector i of kVectors.
    template <int kVectors>
    QF_INLINE __m512 merged(const float* p, int i) {
        if constexpr (kVectors == 2)
            return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p + 32 * i)),
                                      _mm256_loadu_ps(p + 32 * i + 16), 1);
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
        v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 16), 1);
        v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 32), 2);
        return _mm512_insertf32x4(v, _mm_loadu_ps(p + 48), 3);
    }
    template <int kVectors>
    QF_INLINE __m512i merged(const std::int32_t* p, int i) {
        return _mm512_castps_si512(merged<kVectors>(reinterpret_cast<const float*>(p), i));
    }
    // The first n of the block's bytes.
    template <int kVectors>
    QF_INLINE void store(std::uint8_t* p, const __m512i (&v)[kVectors], std::int64_t n) {
        const __m128i first = _mm512_cvtepi32_epi8(v[0]);
        if constexpr (kVectors == 1) {
            _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << n) - 1), first);
        } else {
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm512_cvtepi32_epi8(v[1]), 1);
            const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
            _mm256_mask_storeu_epi8(p, static_cast<__mmask32>((std::uint64_t{1} << n) - 1),
                                    _mm256_permutevar8x32_epi32(both, order));
        }
    }
};
#endif

}  // namespace
}  // namespace quantflow::host::QF_ISA_NAMESPACE
