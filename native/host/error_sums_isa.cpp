#include "error_sums_isa.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

constexpr std::size_t kLanes = 8;

// kLanes doubles, and kLanes floats to widen into them.
#if defined(__AVX512F__)
using Floats = __m256;
using Doubles = __m512d;
Doubles widened(Floats v) { return _mm512_cvtps_pd(v); }
Doubles none() { return _mm512_setzero_pd(); }
Doubles minus(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
Doubles plus_square(Doubles sum, Doubles v) { return _mm512_add_pd(sum, _mm512_mul_pd(v, v)); }
Doubles larger(Doubles most, Doubles v) { return _mm512_max_pd(_mm512_abs_pd(v), most); }
void store(double* p, Doubles v) { _mm512_storeu_pd(p, v); }
#elif defined(__AVX2__)
using Floats = __m256;
struct Doubles {
    __m256d low, high;
};
Doubles widened(Floats v) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
}
Doubles none() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
Doubles minus(Doubles a, Doubles b) { return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)}; }
Doubles plus_square(Doubles sum, Doubles v) {
    return {_mm256_add_pd(sum.low, _mm256_mul_pd(v.low, v.low)),
            _mm256_add_pd(sum.high, _mm256_mul_pd(v.high, v.high))};
}
Doubles larger(Doubles most, Doubles v) {
    const __m256d sign = _mm256_set1_pd(-0.0);
    return {_mm256_max_pd(_mm256_andnot_pd(sign, v.low), most.low),
            _mm256_max_pd(_mm256_andnot_pd(sign, v.high), most.high)};
}
void store(double* p, Doubles v) {
    _mm256_storeu_pd(p, v.low);
    _mm256_storeu_pd(p + 4, v.high);
}
#else
struct Floats {
    float v[kLanes];
};
struct Doubles {
    double v[kLanes];
};
template <typename Of>
Doubles each(Of of) {
    Doubles r;
    for (std::size_t i = 0; i < kLanes; ++i) r.v[i] = of(i);
    return r;
}
Doubles widened(const Floats& a) { return each([&](std::size_t i) { return static_cast<double>(a.v[i]); }); }
Doubles none() { return {}; }
Doubles minus(const Doubles& a, const Doubles& b) { return each([&](std::size_t i) { return a.v[i] - b.v[i]; }); }
Doubles plus_square(const Doubles& sum, const Doubles& a) {
    return each([&](std::size_t i) { return sum.v[i] + a.v[i] * a.v[i]; });
}
Doubles larger(const Doubles& most, const Doubles& a) {
    return each([&](std::size_t i) { return std::max(most.v[i], std::fabs(a.v[i])); });
}
void store(double* p, const Doubles& a) { std::memcpy(p, a.v, sizeof(a.v)); }
#endif

Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <typename Code>
struct Decoded {
    ErrorCoding coding;
    Floats operator()(const Code* p) const {
#if defined(__AVX2__)
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        const __m256i q = std::is_signed_v<Code> ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
        const __m256i centered = _mm256_sub_epi32(q, _mm256_set1_epi32(coding.zero_point));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(centered), _mm256_set1_ps(coding.scale));
#else
        Floats r;
        for (std::size_t i = 0; i < kLanes; ++i)
            r.v[i] = static_cast<float>(std::int32_t{p[i]} - coding.zero_point) * coding.scale;
        return r;
#endif
    }
};

struct AsTheyAre {
    Floats operator()(const float* p) const { return load(p); }
};

template <typename Actual, typename Values>
ErrorSums added(const float* x, const Actual* actual, std::size_t n, Values values) {
    Doubles signal = none(), noise = none(), largest = none(), largest_error = none();
    const auto add = [&](const Floats& expected, const Floats& found) {
        const Doubles real = widened(expected), error = minus(real, widened(found));
        signal = plus_square(signal, real);
        noise = plus_square(noise, error);
        largest = larger(largest, real);
        largest_error = larger(largest_error, error);
    };
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add(load(x + i), values(actual + i));
    if (i < n) {
        float last_x[kLanes] = {}, last[kLanes] = {};
        Actual given[kLanes] = {};
        std::copy(x + i, x + n, last_x);
        std::copy(actual + i, actual + n, given);
        const Floats found = values(given);
        std::memcpy(last, &found, (n - i) * sizeof(float));  // a code of 0 may stand for another number
        add(load(last_x), load(last));
    }
    double lanes[4][kLanes];
    store(lanes[0], signal);
    store(lanes[1], noise);
    store(lanes[2], largest);
    store(lanes[3], largest_error);
    ErrorSums sums;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
        sums.signal += lanes[0][lane];
        sums.noise += lanes[1][lane];
        sums.largest = std::max(sums.largest, lanes[2][lane]);
        sums.largest_error = std::max(sums.largest_error, lanes[3][lane]);
    }
    return sums;
}

ErrorSums of_floats(const float* x, const float* actual, std::size_t n) { return added(x, actual, n, AsTheyAre{}); }

ErrorSums of_u8(const float* x, const std::uint8_t* codes, ErrorCoding coding, std::size_t n) {
    return added(x, codes, n, Decoded<std::uint8_t>{coding});
}

ErrorSums of_s8(const float* x, const std::int8_t* codes, ErrorCoding coding, std::size_t n) {
    return added(x, codes, n, Decoded<std::int8_t>{coding});
}

}  // namespace

const ErrorKernels& error_kernels() {
    static const ErrorKernels kernels = {of_floats, of_u8, of_s8};
    return kernels;
}

}  // namespace quantflow::host::QF_ISA_NAMESPACE
