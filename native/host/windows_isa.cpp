// Kernels over windows of pixels, compiled once per instruction set.
#include "windows_isa.hpp"

#include <immintrin.h>

#include "elementwise_vector.hpp"

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

// --- maximum

// `size` bytes in a register.
template <int size>
struct ByteVector;
template <>
struct ByteVector<8> {
    using Bytes = __m128i;
    static Bytes load(const std::uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
    static void store(std::uint8_t* p, Bytes v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v); }
    static Bytes max(Bytes a, Bytes b) { return _mm_max_epu8(a, b); }
};
template <>
struct ByteVector<16> {
    using Bytes = __m128i;
    static Bytes load(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static void store(std::uint8_t* p, Bytes v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
    static Bytes max(Bytes a, Bytes b) { return _mm_max_epu8(a, b); }
};
#if defined(__AVX2__)
template <>
struct ByteVector<32> {
    using Bytes = __m256i;
    static Bytes load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store(std::uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static Bytes max(Bytes a, Bytes b) { return _mm256_max_epu8(a, b); }
};
#endif
#if defined(__AVX512F__)
template <>
struct ByteVector<64> {
    using Bytes = __m512i;
    static Bytes load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store(std::uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
    static Bytes max(Bytes a, Bytes b) { return _mm512_max_epu8(a, b); }
};
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <int size, int vectors>
static inline void max_block(const Window& w, const std::uint8_t* x, std::uint8_t* y) {
    using V = ByteVector<size>;
    typename V::Bytes best[vectors];
    for (int v = 0; v < vectors; ++v) best[v] = V::load(x + w.offsets[0] + v * size);
    for (std::int64_t k = 1; k < w.count; ++k) {
        const std::uint8_t* from = x + w.offsets[k];
        for (int v = 0; v < vectors; ++v) best[v] = V::max(best[v], V::load(from + v * size));
    }
    for (int v = 0; v < vectors; ++v) V::store(y + v * size, best[v]);
}

template <int size>
static inline void max_pixel(const Window& w, const std::uint8_t* x, std::uint8_t* y, std::int64_t n) {
    if (n < size) {
        if constexpr (size > 8) {
            max_pixel<size / 2>(w, x, y, n);
        } else {
            for (std::int64_t c = 0; c < n; ++c) {
                std::uint8_t best = x[w.offsets[0] + c];
                for (std::int64_t k = 1; k < w.count; ++k)
                    best = best > x[w.offsets[k] + c] ? best : x[w.offsets[k] + c];
                y[c] = best;
            }
        }
        return;
    }
    std::int64_t c = 0;
    for (; c + 4 * size <= n; c += 4 * size) max_block<size, 4>(w, x + c, y + c);
    for (; c + 2 * size <= n; c += 2 * size) max_block<size, 2>(w, x + c, y + c);
    for (; c + size <= n; c += size) max_block<size, 1>(w, x + c, y + c);
    if (c < n) max_block<size, 1>(w, x + n - size, y + n - size);  // overlaps the block before
}

static void max_codes(const Window& w, const PixelRun& run) {
    const std::uint8_t* x = static_cast<const std::uint8_t*>(run.x);
    std::uint8_t* y = static_cast<std::uint8_t*>(run.y);
    for (std::int64_t p = 0; p < run.pixels; ++p)
        max_pixel<kBytes>(w, x + p * run.x_step, y + p * run.y_step, run.channels);
}

// The better one; NaN wins.
template <bool is_max>
static inline F better(F best, F next) {
    const F found = is_max ? Vec::max(best, next) : Vec::min(best, next);  // `next` where either is NaN
    return Vec::select(Vec::equal(best, best), found, best);
}

template <bool is_max, class Read>
static inline void best_of_window(const Window& w, std::int64_t n, float* y, Read read) {
    write_floats(y, n, [&](std::int64_t c, auto tag) QF_ALWAYS_INLINE {
        F best = read(w.offsets[0] + c, tag);
        for (std::int64_t k = 1; k < w.count; ++k) best = better<is_max>(best, read(w.offsets[k] + c, tag));
        return best;
    });
}

static void max_floats(const Window& w, const PixelRun& run) {
    for (std::int64_t p = 0; p < run.pixels; ++p) {
        const float* x = static_cast<const float*>(run.x) + p * run.x_step;
        best_of_window<true>(w, run.channels, static_cast<float*>(run.y) + p * run.y_step,
                             [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return load(x + i, tag); });
    }
}

static void best(const Form& form, bool is_max, const Window& w, const void* x, std::int64_t n, float* bests) {
    const auto with = [&](auto read) QF_ALWAYS_INLINE {
        if (is_max)
            best_of_window<true>(w, n, bests, read);
        else
            best_of_window<false>(w, n, bests, read);
    };
    if (form.is_codes()) {
        const std::uint8_t* p = static_cast<const std::uint8_t*>(x);
        const CodeSource<> codes(form.zero_point);
        const F scale = Vec::set(form.scale);
        with([&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return codes(p + i, tag) * scale; });
    } else {
        const float* floats = static_cast<const float*>(x);
        with([&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return load(floats + i, tag); });
    }
}

// --- sums

// Codes are summed as 16-bit integers, exact for 256 of them.
constexpr std::int64_t kMaxSummed = 256;
#if defined(__AVX512F__)
using Words = __m512i;
static inline Words load_words(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline Words sum_of(Words a, Words b) { return _mm512_add_epi16(a, b); }
#elif defined(__AVX2__)
using Words = __m256i;
static inline Words load_words(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Words sum_of(Words a, Words b) { return _mm256_add_epi16(a, b); }
#else
using Words = __m128i;
static inline Words load_words(const std::uint8_t* p) {
    return _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
}
static inline Words sum_of(Words a, Words b) { return _mm_add_epi16(a, b); }
#endif
constexpr int kCodes = sizeof(Words) / 2;

template <int vectors>
static inline void sum_block(const Window& w, const std::uint8_t* x, std::int32_t* sums) {
    Words sum[vectors];
    for (int v = 0; v < vectors; ++v) sum[v] = Words{};
    for (std::int64_t k = 0; k < w.count; ++k) {
        const std::uint8_t* from = x + w.offsets[k];
        for (int v = 0; v < vectors; ++v) sum[v] = sum_of(sum[v], load_words(from + v * kCodes));
    }
    std::uint16_t words[kCodes * vectors];
    __builtin_memcpy(words, sum, sizeof words);
    for (int i = 0; i < kCodes * vectors; ++i) sums[i] = words[i];
}

static void sum_codes(const Window& w, const std::uint8_t* x, std::int64_t n, std::int32_t* sums) {
    std::int64_t c = 0;
    for (; c + 4 * kCodes <= n; c += 4 * kCodes) sum_block<4>(w, x + c, sums + c);
    for (; c + kCodes <= n; c += kCodes) sum_block<1>(w, x + c, sums + c);
    if (c < n && n >= kCodes) {  // overlaps the block before
        sum_block<1>(w, x + n - kCodes, sums + n - kCodes);
        return;
    }
    for (; c < n; ++c) {
        std::int32_t sum = 0;
        for (std::int64_t k = 0; k < w.count; ++k) sum += x[w.offsets[k] + c];
        sums[c] = sum;
    }
}

static void sum_floats(const Window& w, const float* x, std::int64_t n, float* sums) {
    std::int64_t c = 0;
    for (; c + 4 * kWidth <= n; c += 4 * kWidth) {
        F sum[4];
        for (F& s : sum) s = Vec::set(0.0f);
        for (std::int64_t k = 0; k < w.count; ++k) {
            const float* from = x + w.offsets[k] + c;
            for (int v = 0; v < 4; ++v) sum[v] = sum[v] + Vec::load(from + v * kWidth);
        }
        for (int v = 0; v < 4; ++v) Vec::store(sums + c + v * kWidth, sum[v]);
    }
    write_floats(sums + c, n - c, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
        F sum = Vec::set(0.0f);
        for (std::int64_t k = 0; k < w.count; ++k) sum = sum + load(x + w.offsets[k] + c + i, tag);
        return sum;
    });
}

// --- mean

// A block of sums and what lies behind them, so that whole vectors can be read.
constexpr std::int64_t kSums = 256;
struct Sums {
    std::int32_t values[kSums + kWidth];
};

static QF_ALWAYS_INLINE inline F load_sums(const Sums& sums, std::int64_t i) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_loadu_si512(sums.values + i));
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums.values + i)));
#else
    F v;
    for (int k = 0; k < kWidth; ++k) v[k] = static_cast<float>(sums.values[i + k]);
    return v;
#endif
}

// Of any number of codes.
static void sum_window(const Window& w, const std::uint8_t* x, std::int64_t n, Sums& sums) {
    sum_codes({w.offsets, w.count < kMaxSummed ? w.count : kMaxSummed}, x, n, sums.values);
    for (std::int64_t k = kMaxSummed; k < w.count; k += kMaxSummed) {
        std::int32_t more[kSums];
        sum_codes({w.offsets + k, w.count - k < kMaxSummed ? w.count - k : kMaxSummed}, x, n, more);
        for (std::int64_t i = 0; i < n; ++i) sums.values[i] += more[i];
    }
}

static void mean_of_codes(const MeanJob& job, const Window& w, const PixelRun& run) {
    Sums sums = {};
    float reals[kSums];
    const std::int32_t zeros = static_cast<std::int32_t>(w.count) * static_cast<std::int32_t>(job.x.zero_point);
    const double divisor = static_cast<double>(job.divisor);
    // Integers below 2**24 are floats, and their quotient is rounded alike by float and by double and then float.
    const bool fits_float = w.count * 255 < (1 << 24) && job.divisor < (1 << 24);
    const F zero = Vec::set(static_cast<float>(zeros)), whole = Vec::set(static_cast<float>(job.divisor));
    const F scale = Vec::set(job.x.scale);
    const F factor =
        Vec::set(static_cast<float>(static_cast<double>(job.x.scale) / (divisor * static_cast<double>(job.y.scale))));
    const CodeWriter<Gives::steps> writer(job.y);
    for (std::int64_t p = 0; p < run.pixels; ++p) {
        for (std::int64_t c = 0; c < run.channels; c += kSums) {
            const std::int64_t n = run.channels - c < kSums ? run.channels - c : kSums;
            const std::int64_t to = p * run.y_step + c;
            sum_window(w, static_cast<const std::uint8_t*>(run.x) + p * run.x_step + c, n, sums);
            if (!fits_float) {
                for (std::int64_t i = 0; i < n; ++i)
                    reals[i] = static_cast<float>(static_cast<double>(sums.values[i] - zeros) / divisor) * job.x.scale;
                store_reals(job.y, reals, n,
                            job.y.is_codes() ? static_cast<void*>(static_cast<std::uint8_t*>(run.y) + to)
                                             : static_cast<void*>(static_cast<float*>(run.y) + to), 1);
            } else if (job.y.is_codes()) {
                writer.write(static_cast<std::uint8_t*>(run.y) + to, n, [&](std::int64_t i, auto) QF_ALWAYS_INLINE {
                    return (load_sums(sums, i) - zero) * factor;
                });
            } else {
                write_floats(static_cast<float*>(run.y) + to, n, [&](std::int64_t i, auto) QF_ALWAYS_INLINE {
                    return (load_sums(sums, i) - zero) / whole * scale;
                });
            }
        }
    }
}

static void mean(const MeanJob& job, const Window& w, const PixelRun& run) {
    if (job.x.is_codes()) return mean_of_codes(job, w, run);
    float sums[kSums];
    const F divisor = Vec::set(static_cast<float>(job.divisor));
    for (std::int64_t p = 0; p < run.pixels; ++p) {
        for (std::int64_t c = 0; c < run.channels; c += kSums) {
            const std::int64_t n = run.channels - c < kSums ? run.channels - c : kSums;
            const std::int64_t to = p * run.y_step + c;
            sum_floats(w, static_cast<const float*>(run.x) + p * run.x_step + c, n, sums);
            write_reals(job.y, job.y.is_codes() ? static_cast<void*>(static_cast<std::uint8_t*>(run.y) + to)
                                                : static_cast<void*>(static_cast<float*>(run.y) + to), n,
                        [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return load(sums + i, tag) / divisor; });
        }
    }
}

// --- rows

static double sum_row(const Form& form, const void* x, std::int64_t stride, std::int64_t n) {
    double total = 0;
    if (form.is_codes()) {
        const std::uint8_t* p = static_cast<const std::uint8_t*>(x);
        constexpr std::int64_t block = 1 << 22;  // sums below 2**32
        for (std::int64_t from = 0; from < n; from += block) {
            const std::int64_t to = n - from < block ? n : from + block;
            std::uint32_t sum = 0;
            if (stride == 1)
                for (std::int64_t i = from; i < to; ++i) sum += p[i];
            else
                for (std::int64_t i = from; i < to; ++i) sum += p[i * stride];
            total += sum;
        }
        return total;
    }
    const float* p = static_cast<const float*>(x);
    std::int64_t i = 0;
    if (stride == 1) {
        // A few thousand sums in float, these in double.
        while (i + 4 * kWidth <= n) {
            const std::int64_t end = n - i < 4096 ? n : i + 4096;
            F sum[4];
            for (F& s : sum) s = Vec::set(0.0f);
            for (; i + 4 * kWidth <= end; i += 4 * kWidth)
                for (int v = 0; v < 4; ++v) sum[v] = sum[v] + Vec::load(p + i + v * kWidth);
            total += static_cast<double>(Vec::sum((sum[0] + sum[1]) + (sum[2] + sum[3])));
        }
    }
    for (; i < n; ++i) total += static_cast<double>(p[i * stride]);
    return total;
}

static float best_row(const Form& form, bool is_max, const void* x, std::int64_t stride, std::int64_t n) {
    float reals[kBlock];
    float best = 0;
    for (std::int64_t from = 0; from < n; from += kBlock) {
        const std::int64_t count = n - from < kBlock ? n - from : kBlock;
        const void* start = form.is_codes()
                                ? static_cast<const void*>(static_cast<const std::uint8_t*>(x) + from * stride)
                                : static_cast<const void*>(static_cast<const float*>(x) + from * stride);
        const float* r = floats_of(form, start, stride, count, reals);
        if (from == 0) best = r[0];
        std::int64_t i = 0;
        if (count >= kWidth) {
            F found = Vec::load(r);
            for (; i + kWidth <= count; i += kWidth)
                found = is_max ? better<true>(found, Vec::load(r + i)) : better<false>(found, Vec::load(r + i));
            float lanes[kWidth];
            Vec::store(lanes, found);
            for (float lane : lanes)
                if (best == best && (lane != lane || (is_max ? lane > best : lane < best))) best = lane;
        }
        for (; i < count; ++i)
            if (best == best && (r[i] != r[i] || (is_max ? r[i] > best : r[i] < best))) best = r[i];
    }
    return best;
}

// --- interpolation

// r = (1 - weight) * above + weight * below
static void blend_rows(const Form& form, const void* above, const void* below, float weight, std::int64_t n, float* r) {
    const F upper = Vec::set(1 - weight), lower = Vec::set(weight);
    if (form.is_codes()) {
        const auto* a = static_cast<const std::uint8_t*>(above);
        const auto* b = static_cast<const std::uint8_t*>(below);
        const CodeSource<> codes(form.zero_point);
        const F scale = Vec::set(form.scale);
        write_floats(r, n, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
            return Vec::fma(codes(b + i, tag) * scale, lower, codes(a + i, tag) * scale * upper);
        });
    } else {
        const auto* a = static_cast<const float*>(above);
        const auto* b = static_cast<const float*>(below);
        write_floats(r, n, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
            return Vec::fma(load(b + i, tag), lower, load(a + i, tag) * upper);
        });
    }
}

static void blend_pixels(const float* row, const Blends& blends, std::int64_t channels, const Form& form, void* y,
                         std::int64_t y_step) {
    if (channels == 1 && y_step == 1) {
        float buffer[kBlock];
        for (std::int64_t from = 0; from < blends.pixels; from += kBlock) {
            const std::int64_t n = blends.pixels - from < kBlock ? blends.pixels - from : kBlock;
            float* r = form.is_codes() ? buffer : static_cast<float*>(y) + from;
            for (std::int64_t i = 0; i < n; ++i) {
                const float left = row[blends.low[from + i]], right = row[blends.high[from + i]];
                r[i] = (1 - blends.weight[from + i]) * left + blends.weight[from + i] * right;
            }
            if (form.is_codes()) store_reals(form, r, n, static_cast<std::uint8_t*>(y) + from, 1);
        }
        return;
    }
    const CodeWriter<Gives::reals> writer(form);
    for (std::int64_t p = 0; p < blends.pixels; ++p) {
        const float* left = row + blends.low[p] * channels;
        const float* right = row + blends.high[p] * channels;
        const F lower = Vec::set(1 - blends.weight[p]), higher = Vec::set(blends.weight[p]);
        const auto value = [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
            return Vec::fma(load(right + i, tag), higher, load(left + i, tag) * lower);
        };
        if (form.is_codes())
            writer.write(static_cast<std::uint8_t*>(y) + p * y_step, channels, value);
        else
            write_floats(static_cast<float*>(y) + p * y_step, channels, value);
    }
}

}  // namespace

const WindowKernels& window_kernels() {
    static const WindowKernels kernels = {
        max_codes, max_floats, mean, sum_codes, sum_floats, best, sum_row, best_row, blend_rows, blend_pixels,
    };
    return kernels;
}

}  // namespace quantflow::host::QF_ISA_NAMESPACE
