// What vectors find in tables of one register, for the activations of the int8 kernels. Included by int8_gemm_isa.cpp.
#pragma once

#include "int8_vector.hpp"

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

// kPowers: entries of a table of 2^(i / kPowers); 1: there is none. power(x): of the integer
// n in the last bits of x, 2^(n / kPowers).
// half_erf(x) = erf(|x| / sqrt(2)) / 2 within 1.6e-7, NaN of NaN.
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
    // Polynomials around 32 points; at the last one and beyond it is 1/2.
    QF_INLINE __m512 half_erf(__m512 size) {
        alignas(64) static constexpr float c[4][32] = {
            {0.0f, 0.066696018f, 0.131540909f, 0.19283624f, 0.249168217f, 0.299501866f, 0.343227625f, 0.380158752f,
             0.410485297f, 0.434697241f, 0.453490913f, 0.467673957f, 0.478080422f, 0.485503972f, 0.490652651f,
             0.494124472f, 0.496400565f, 0.497851372f, 0.498750418f, 0.499292105f, 0.499609411f, 0.499790132f,
             0.499890208f, 0.499944061f, 0.499972254f, 0.499986619f, 0.499993712f, 0.499997109f, 0.499998719f,
             0.499999434f, 0.499999762f, 0.5f},
            {0.398942143f, 0.39335379f, 0.377054334f, 0.35137558f, 0.318336397f, 0.280380636f, 0.240080476f,
             0.199853912f, 0.161739275f, 0.127252221f, 0.0973334685f, 0.0723779127f, 0.0523235053f, 0.0367734656f,
             0.0251257587f, 0.0166897848f, 0.0107777752f, 0.00676634861f, 0.00412977533f, 0.00245044683f,
             0.00141354895f, 0.000792726118f, 0.000432197412f, 0.000229080339f, 0.000118042946f, 5.91342177e-05f,
             2.87994499e-05f, 1.36356539e-05f, 6.27645204e-06f, 2.80865765e-06f, 1.22188339e-06f, 0.0f},
            {0.0f, -0.0329779834f, -0.0632260293f, -0.0883874595f, -0.106781103f, -0.117579289f, -0.120836996f,
             -0.117380507f, -0.108592205f, -0.0961442515f, -0.0817362219f, -0.0668808445f, -0.0527650975f,
             -0.0401907973f, -0.0295862891f, -0.0210665911f, -0.0145186065f, -0.0096898526f, -0.00626564026f,
             -0.00392674422f, -0.00238592317f, -0.00140590034f, -0.000803578063f, -0.000445620011f, -0.000239795423f,
             -0.000125234452f, -6.34852113e-05f, -3.12420671e-05f, -1.49269836e-05f, -6.92486583e-06f,
             -3.11957342e-06f, 0.0f},
            {-0.0664074048f, -0.0636112913f, -0.0556728318f, -0.0436446033f, -0.0290917978f, -0.0137877166f,
             0.000584064808f, 0.0126798544f, 0.0216527525f, 0.0271978546f, 0.0294953547f, 0.029080851f, 0.0266864151f,
             0.0230848845f, 0.0189701673f, 0.0148839243f, 0.011188983f, 0.00807969458f, 0.00561511423f,
             0.00376114622f, 0.00243099267f, 0.0015175892f, 0.00091572135f, 0.000534423802f, 0.000301822874f,
             0.000165028221f, 8.7391978e-05f, 4.48370411e-05f, 2.22936069e-05f, 1.07451406e-05f, 5.02145485e-06f,
             0.0f}};
        const __m512 apart = _mm512_set1_ps(0.16796875f), magic = _mm512_set1_ps(12582912.0f);
        const __m512 x = _mm512_min_ps(_mm512_set1_ps(31 * 0.16796875f), size);
        const __m512 point = _mm512_fmadd_ps(x, _mm512_set1_ps(1 / 0.16796875f), magic);
        const __m512 d = _mm512_fnmadd_ps(_mm512_sub_ps(point, magic), apart, x);
        const auto at = [&](int i) __attribute__((always_inline)) {
            return _mm512_permutex2var_ps(_mm512_load_ps(c[i]), _mm512_castps_si512(point), _mm512_load_ps(c[i] + 16));
        };
        __m512 h = _mm512_fmadd_ps(at(3), d, at(2));
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
