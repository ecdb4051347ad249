// Elementwise kernels, compiled once per instruction set.
#include "elementwise_isa.hpp"

#include <math.h>

#include "elementwise_vector.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

// --- binary

static void combine(Binary op, const float* a, const float* b, std::int64_t n, float* r) {
    const auto each = [&](auto f) QF_ALWAYS_INLINE {
        write_floats(r, n,
                     [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return f(load(a + i, tag), load(b + i, tag)); });
    };
    switch (op) {
        case Binary::add: return each([](F x, F y) QF_ALWAYS_INLINE { return x + y; });
        case Binary::sub: return each([](F x, F y) QF_ALWAYS_INLINE { return x - y; });
        case Binary::mul: return each([](F x, F y) QF_ALWAYS_INLINE { return x * y; });
        case Binary::div: return each([](F x, F y) QF_ALWAYS_INLINE { return x / y; });
        // NaN in either operand gives NaN; Vec's give the second operand then.
        case Binary::maximum:
            return each([](F x, F y) QF_ALWAYS_INLINE { return Vec::select(Vec::equal(x, x), Vec::max(x, y), x); });
        case Binary::minimum:
            return each([](F x, F y) QF_ALWAYS_INLINE { return Vec::select(Vec::equal(x, x), Vec::min(x, y), x); });
        default: return;
    }
}

static void compare(Binary op, const float* a, const float* b, std::int64_t n, std::uint8_t* y) {
    const auto each = [&](auto f) QF_ALWAYS_INLINE {
        for (std::int64_t i = 0; i < n; ++i) y[i] = f(a[i], b[i]) ? 1 : 0;
    };
    switch (op) {
        case Binary::eq: return each([](float x, float y) QF_ALWAYS_INLINE { return x == y; });
        case Binary::ne: return each([](float x, float y) QF_ALWAYS_INLINE { return x != y; });
        case Binary::lt: return each([](float x, float y) QF_ALWAYS_INLINE { return x < y; });
        case Binary::le: return each([](float x, float y) QF_ALWAYS_INLINE { return x <= y; });
        case Binary::gt: return each([](float x, float y) QF_ALWAYS_INLINE { return x > y; });
        case Binary::ge: return each([](float x, float y) QF_ALWAYS_INLINE { return x >= y; });
        case Binary::logical_and: return each([](float x, float y) QF_ALWAYS_INLINE { return x != 0 && y != 0; });
        case Binary::logical_or: return each([](float x, float y) QF_ALWAYS_INLINE { return x != 0 || y != 0; });
        default: return;
    }
}

// Rows of codes with one row of codes (b.row is 0), which is made real, or steps, only once; n <= kBlock.
template <bool is_mul, bool is_folded>
static void binary_codes_by_row(const BinaryJob& job, RowsIn a, RowsIn b, RowsOut y, std::int64_t rows,
                                std::int64_t n) {
    const CodeSource<> codes_a(job.a.zero_point), codes_b(job.b.zero_point);
    const float factor = !is_folded ? job.b.scale : is_mul ? job.a_factor : job.b_factor;
    const F fa = Vec::set(is_folded ? job.a_factor : job.a.scale), fb = Vec::set(factor);
    const auto* pb = static_cast<const std::uint8_t*>(b.data);
    float row[kBlock];
    if (b.column == 0)
        fill_floats(row, n, (static_cast<float>(*pb) - job.b.zero_point) * factor);
    else
        write_floats(row, n, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE { return codes_b(pb + i, tag) * fb; });
    const CodeWriter<is_folded ? Gives::small_steps : Gives::reals> writer(job.y);
    for (std::int64_t r = 0; r < rows; ++r) {
        const auto* pa = static_cast<const std::uint8_t*>(a.data) + r * a.row;
        writer.write(static_cast<std::uint8_t*>(y.data) + r * y.row, n, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
            const F ta = codes_a(pa + i, tag), rb = load(row + i, tag);
            if (is_folded) return is_mul ? ta * rb : Vec::fma(ta, fa, rb);
            return is_mul ? ta * fa * rb : ta * fa + rb;
        });
    }
}

// Rows of codes and codes, both dense.
template <bool is_mul, bool is_folded>
static void binary_codes(const BinaryJob& job, RowsIn a, RowsIn b, RowsOut y, std::int64_t rows, std::int64_t n) {
    const CodeSource<> codes_a(job.a.zero_point), codes_b(job.b.zero_point);
    const F fa = Vec::set(is_folded ? job.a_factor : job.a.scale),
            fb = Vec::set(is_folded ? job.b_factor : job.b.scale);
    const CodeWriter<is_folded ? Gives::small_steps : Gives::reals> writer(job.y);
    for (std::int64_t r = 0; r < rows; ++r) {
        const auto* pa = static_cast<const std::uint8_t*>(a.data) + r * a.row;
        const auto* pb = static_cast<const std::uint8_t*>(b.data) + r * b.row;
        writer.write(static_cast<std::uint8_t*>(y.data) + r * y.row, n, [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
            const F ta = codes_a(pa + i, tag), tb = codes_b(pb + i, tag);
            if (is_folded) return is_mul ? ta * tb * fa : Vec::fma(ta, fa, tb * fb);
            return is_mul ? ta * fa * (tb * fb) : ta * fa + tb * fb;
        });
    }
}

static void binary(const BinaryJob& job, RowsIn a, RowsIn b, RowsOut y, std::int64_t rows, std::int64_t n) {
    const bool is_mul = job.op == Binary::mul;
    if (job.a.dtype == DType::u8 && job.b.dtype == DType::u8 && job.y.is_codes() && a.column == 1 && y.column == 1 &&
        (b.column == 1 || b.column == 0) && (is_mul || job.op == Binary::add) &&
        job.epilogue.kind == Activation::none) {
        if (b.column == 1 && (b.row != 0 || rows == 1)) {
            const auto kernel = is_mul ? (job.is_folded ? binary_codes<true, true> : binary_codes<true, false>)
                                       : (job.is_folded ? binary_codes<false, true> : binary_codes<false, false>);
            return kernel(job, a, b, y, rows, n);
        }
        const auto kernel =
            is_mul ? (job.is_folded ? binary_codes_by_row<true, true> : binary_codes_by_row<true, false>)
                   : (job.is_folded ? binary_codes_by_row<false, true> : binary_codes_by_row<false, false>);
        const std::int64_t together = b.row == 0 ? rows : 1;
        for (std::int64_t r = 0; r < rows; r += together) {
            for (std::int64_t i = 0; i < n; i += kBlock) {
                const RowsIn from_a{static_cast<const std::uint8_t*>(a.data) + r * a.row + i, a.row, 1};
                const RowsIn from_b{static_cast<const std::uint8_t*>(b.data) + r * b.row + i * b.column, b.row,
                                    b.column};
                const RowsOut to{static_cast<std::uint8_t*>(y.data) + r * y.row + i, y.row, 1};
                kernel(job, from_a, from_b, to, together, n - i < kBlock ? n - i : kBlock);
            }
        }
        return;
    }
    float buffer_a[kBlock], buffer_b[kBlock], buffer_r[kBlock];
    std::uint8_t truths[kBlock];
    const bool is_direct = !job.is_comparison && !job.y.is_codes() && y.column == 1;
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t i = 0; i < n; i += kBlock) {
            const std::int64_t count = n - i < kBlock ? n - i : kBlock;
            const float* fa = floats_of(job.a, at(a, job.a, r, i), a.column, count, buffer_a);
            const float* fb = floats_of(job.b, at(b, job.b, r, i), b.column, count, buffer_b);
            if (job.is_comparison) {
                compare(job.op, fa, fb, count, truths);
                std::uint8_t* to = static_cast<std::uint8_t*>(y.data) + r * y.row + i * y.column;
                for (std::int64_t k = 0; k < count; ++k) to[k * y.column] = truths[k];
                continue;
            }
            void* to = at(y, job.y, r, i);
            float* result = is_direct ? static_cast<float*>(to) : buffer_r;
            combine(job.op, fa, fb, count, result);
            activate(job.epilogue, result, count, result);
            if (!is_direct) store_reals(job.y, result, count, to, y.column);
        }
    }
}

// --- affine along an axis

struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

// Dense rows; scale and shift dense too, or one number per row.
template <bool of_codes, bool to_codes, bool is_scalar>
static void affine_rows(const AffineJob& job, RowsIn x, RowsIn scale, RowsIn shift, RowsOut y, std::int64_t rows,
                        std::int64_t n) {
    const CodeSource<> codes(job.x.zero_point);
    const CodeWriter<Gives::steps> writer(job.y);
    for (std::int64_t r = 0; r < rows; ++r) {
        const void* from = at(x, job.x, r, 0);
        void* to = at(y, job.y, r, 0);
        const float* a = static_cast<const float*>(scale.data) + r * scale.row;
        const float* b = static_cast<const float*>(shift.data) + r * shift.row;
        const F one_a = Vec::set(is_scalar ? *a : 0), one_b = Vec::set(is_scalar ? *b : 0);
        const auto value = [&](std::int64_t i, auto tag) QF_ALWAYS_INLINE {
            F v;
            if constexpr (of_codes)
                v = codes(static_cast<const std::uint8_t*>(from) + i, tag);
            else
                v = load(static_cast<const float*>(from) + i, tag);
            if constexpr (is_scalar)
                return Vec::fma(v, one_a, one_b);
            else
                return Vec::fma(v, load(a + i, tag), load(b + i, tag));
        };
        if constexpr (to_codes)
            writer.write(static_cast<std::uint8_t*>(to), n, value);
        else
            write_floats(static_cast<float*>(to), n, value);
    }
}

static void affine(const AffineJob& job, RowsIn x, RowsIn scale, RowsIn shift, RowsOut y, std::int64_t rows,
                   std::int64_t n) {
    const bool is_vector = scale.column == 1 && shift.column == 1, is_scalar = scale.column == 0 && shift.column == 0;
    if (x.column == 1 && y.column == 1 && (is_vector || is_scalar) && job.x.dtype != DType::s8 &&
        job.epilogue.kind == Activation::none && job.is_in_steps == job.y.is_codes()) {
        const auto choose = [&](auto of_codes, auto to_codes) {
            return is_scalar ? affine_rows<of_codes.value, to_codes.value, true>
                             : affine_rows<of_codes.value, to_codes.value, false>;
        };
        const auto kernel = job.x.is_codes() ? (job.y.is_codes() ? choose(Yes{}, Yes{}) : choose(Yes{}, No{}))
                                             : (job.y.is_codes() ? choose(No{}, Yes{}) : choose(No{}, No{}));
        return kernel(job, x, scale, shift, y, rows, n);
    }
    // Codes are read as steps, because `scale` holds x's scale too; written in steps where `shift` does so.
    Form from = job.x, to = job.y;
    from.scale = 1;
    if (job.is_in_steps) to.scale = 1;
    const Form plain;
    float buffer_x[kBlock], buffer_a[kBlock], buffer_b[kBlock], buffer_r[kBlock];
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t i = 0; i < n; i += kBlock) {
            const std::int64_t count = n - i < kBlock ? n - i : kBlock;
            const float* t = floats_of(from, at(x, from, r, i), x.column, count, buffer_x);
            const float* a = floats_of(plain, at(scale, plain, r, i), scale.column, count, buffer_a);
            const float* b = floats_of(plain, at(shift, plain, r, i), shift.column, count, buffer_b);
            write_floats(buffer_r, count, [&](std::int64_t k, auto tag) QF_ALWAYS_INLINE {
                return Vec::fma(load(t + k, tag), load(a + k, tag), load(b + k, tag));
            });
            activate(job.epilogue, buffer_r, count, buffer_r);
            store_reals(to, buffer_r, count, at(y, to, r, i), y.column);
        }
    }
}

// --- unary

static void apply(const UnaryJob& job, const float* x, std::int64_t n, float* r) {
    const F a = Vec::set(job.a), b = Vec::set(job.b), one = Vec::set(1.0f);
    const auto each = [&](float (*f)(float)) {
        for (std::int64_t i = 0; i < n; ++i) r[i] = f(x[i]);
    };
    // Square roots by the compiler's own instruction: Vec has none.
    const auto roots = [&](auto f) QF_ALWAYS_INLINE {
        for (std::int64_t i = 0; i < n; ++i) r[i] = f(__builtin_sqrtf(x[i]));
    };
    switch (job.op) {
        case Unary::activation: return activate(job.epilogue, x, n, r);
        case Unary::affine: return map(x, n, r, [&](F v) QF_ALWAYS_INLINE { return v * a + b; });
        case Unary::exp: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return exp<Vec>(v); });
        case Unary::erf: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return erf<Vec>(v); });
        case Unary::neg: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return -v; });
        case Unary::abs: return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return Vec::abs(v); });
        case Unary::reciprocal: return map(x, n, r, [&](F v) QF_ALWAYS_INLINE { return one / v; });
        case Unary::sqrt: return roots([](float v) QF_ALWAYS_INLINE { return v; });
        case Unary::rsqrt: return roots([](float v) QF_ALWAYS_INLINE { return 1.0f / v; });
        case Unary::log: return each(::logf);
        case Unary::sin: return each(::sinf);
        case Unary::cos: return each(::cosf);
        case Unary::floor: return each(::floorf);
        case Unary::power:
            if (job.a == 2) return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return v * v; });
            if (job.a == 3) return map(x, n, r, [](F v) QF_ALWAYS_INLINE { return v * v * v; });
            if (job.a == 0.5f) return roots([](float v) QF_ALWAYS_INLINE { return v; });
            for (std::int64_t i = 0; i < n; ++i) r[i] = ::powf(x[i], job.a);
            return;
        case Unary::logical_not: return;
    }
}

static void unary(const UnaryJob& job, RowsIn x, RowsOut y, std::int64_t rows, std::int64_t n) {
    const bool is_move = job.op == Unary::activation && job.epilogue.kind == Activation::none;
    const bool is_direct = !job.y.is_codes() && y.column == 1;
    float buffer_x[kBlock], buffer_r[kBlock];
    for (std::int64_t r = 0; r < rows; ++r) {
        if (is_move && job.x.dtype == DType::f32 && x.column == 1) {
            store_reals(job.y, static_cast<const float*>(at(x, job.x, r, 0)), n, at(y, job.y, r, 0), y.column);
            continue;
        }
        if (is_move && is_direct) {
            load_reals(job.x, at(x, job.x, r, 0), x.column, n, static_cast<float*>(at(y, job.y, r, 0)));
            continue;
        }
        for (std::int64_t i = 0; i < n; i += kBlock) {
            const std::int64_t count = n - i < kBlock ? n - i : kBlock;
            const float* from = floats_of(job.x, at(x, job.x, r, i), x.column, count, buffer_x);
            void* to = at(y, job.y, r, i);
            float* result = is_direct ? static_cast<float*>(to) : buffer_r;
            apply(job, from, count, result);
            if (job.op != Unary::activation) activate(job.epilogue, result, count, result);
            if (!is_direct) store_reals(job.y, result, count, to, y.column);
        }
    }
}

// --- tables of 256

#if defined(__AVX512F__)
constexpr std::int64_t kLookups = 64;
struct Table {
    __m512i parts[16];
    explicit Table(const std::uint8_t* table) {
        for (int h = 0; h < 16; ++h)
            parts[h] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * h)));
    }
    // By the low nibble in all 16 parts, then chosen bit by bit by the high one.
    QF_ALWAYS_INLINE void look_up(const std::uint8_t* x, std::uint8_t* y) const {
        const __m512i q = _mm512_loadu_si512(x);
        const __m512i low = _mm512_and_si512(q, _mm512_set1_epi8(15));
        const __mmask64 bit4 = _mm512_movepi8_mask(_mm512_slli_epi16(q, 3));
        const __mmask64 bit5 = _mm512_movepi8_mask(_mm512_slli_epi16(q, 2));
        const __mmask64 bit6 = _mm512_movepi8_mask(_mm512_slli_epi16(q, 1));
        const __mmask64 bit7 = _mm512_movepi8_mask(q);
        __m512i found[8];
        for (int h = 0; h < 8; ++h)
            found[h] = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(parts[2 * h], low), bit4, parts[2 * h + 1], low);
        for (int h = 0; h < 4; ++h) found[h] = _mm512_mask_blend_epi8(bit5, found[2 * h], found[2 * h + 1]);
        for (int h = 0; h < 2; ++h) found[h] = _mm512_mask_blend_epi8(bit6, found[2 * h], found[2 * h + 1]);
        _mm512_storeu_si512(y, _mm512_mask_blend_epi8(bit7, found[0], found[1]));
    }
};
#elif defined(__AVX2__)
constexpr std::int64_t kLookups = 32;
struct Table {
    const std::uint8_t* table;
    explicit Table(const std::uint8_t* t) : table(t) {}
    QF_ALWAYS_INLINE __m256i part(int h, __m256i low) const {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * h));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), low);
    }
    // By the low nibble in all 16 parts, then chosen bit by bit by the high one.
    QF_ALWAYS_INLINE void look_up(const std::uint8_t* x, std::uint8_t* y) const {
        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        const __m256i low = _mm256_and_si256(q, _mm256_set1_epi8(15));
        // A blend looks at each byte's highest bit only.
        const __m256i bit4 = _mm256_slli_epi16(q, 3), bit5 = _mm256_slli_epi16(q, 2), bit6 = _mm256_slli_epi16(q, 1);
        const auto four = [&](int h) QF_ALWAYS_INLINE {
            const __m256i even = _mm256_blendv_epi8(part(h, low), part(h + 1, low), bit4);
            const __m256i odd = _mm256_blendv_epi8(part(h + 2, low), part(h + 3, low), bit4);
            return _mm256_blendv_epi8(even, odd, bit5);
        };
        const __m256i first = _mm256_blendv_epi8(four(0), four(4), bit6);
        const __m256i second = _mm256_blendv_epi8(four(8), four(12), bit6);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_blendv_epi8(first, second, q));
    }
};
#else
constexpr std::int64_t kLookups = 8;
struct Table {
    const std::uint8_t* table;
    explicit Table(const std::uint8_t* t) : table(t) {}
    QF_ALWAYS_INLINE void look_up(const std::uint8_t* x, std::uint8_t* y) const {
        for (int i = 0; i < kLookups; ++i) y[i] = table[x[i]];
    }
};
#endif

static void table_to_codes(const std::uint8_t* table, RowsIn x, RowsOut y, std::int64_t rows, std::int64_t n) {
    const Table vectors(table);
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::uint8_t* from = static_cast<const std::uint8_t*>(x.data) + r * x.row;
        std::uint8_t* to = static_cast<std::uint8_t*>(y.data) + r * y.row;
        std::int64_t i = 0;
        if (x.column == 1 && y.column == 1) {
            for (; i + kLookups <= n; i += kLookups) vectors.look_up(from + i, to + i);
            for (; i < n; ++i) to[i] = table[from[i]];
        } else {
            for (; i < n; ++i) to[i * y.column] = table[from[i * x.column]];
        }
    }
}

static void table_to_floats(const float* table, RowsIn x, RowsOut y, std::int64_t rows, std::int64_t n) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::uint8_t* from = static_cast<const std::uint8_t*>(x.data) + r * x.row;
        float* to = static_cast<float*>(y.data) + r * y.row;
        if (x.column == 1 && y.column == 1)
            for (std::int64_t i = 0; i < n; ++i) to[i] = table[from[i]];
        else
            for (std::int64_t i = 0; i < n; ++i) to[i * y.column] = table[from[i * x.column]];
    }
}

// --- moves

template <class T>
static inline void move(const std::uint8_t* x, std::uint8_t* y, std::int64_t at) {
    T v;
    __builtin_memcpy(&v, x + at, sizeof v);
    __builtin_memcpy(y + at, &v, sizeof v);
}

typedef std::uint64_t Half __attribute__((vector_size(16)));  // 16 bytes
typedef std::uint64_t Whole __attribute__((vector_size(32)));

// Blocks of T, the last one overlapping the one before it; bytes >= sizeof(T).
template <class T>
static inline void move_blocks(const std::uint8_t* x, std::uint8_t* y, std::int64_t bytes) {
    constexpr std::int64_t size = sizeof(T);
    for (std::int64_t i = 0; i + size < bytes; i += size) move<T>(x, y, i);
    move<T>(x, y, bytes - size);
}

static void copy_rows(const void* x, std::int64_t x_row, void* y, std::int64_t y_row, std::int64_t rows,
                      std::int64_t bytes) {
    const auto each = [&](auto copy) QF_ALWAYS_INLINE {
        const std::uint8_t* from = static_cast<const std::uint8_t*>(x);
        std::uint8_t* to = static_cast<std::uint8_t*>(y);
        for (std::int64_t r = 0; r < rows; ++r, from += x_row, to += y_row) copy(from, to);
    };
    using In = const std::uint8_t*;
    using Out = std::uint8_t*;
    if (bytes <= 0) return;
    // A call of memcpy costs more than the bytes of a short row.
    if (bytes > 512) return each([&](In from, Out to) { __builtin_memcpy(to, from, static_cast<std::size_t>(bytes)); });
    if (bytes >= 32) return each([&](In from, Out to) QF_ALWAYS_INLINE { move_blocks<Whole>(from, to, bytes); });
    if (bytes >= 16) return each([&](In from, Out to) QF_ALWAYS_INLINE { move_blocks<Half>(from, to, bytes); });
    if (bytes >= 8) return each([&](In from, Out to) QF_ALWAYS_INLINE { move_blocks<std::uint64_t>(from, to, bytes); });
    if (bytes >= 4) return each([&](In from, Out to) QF_ALWAYS_INLINE { move_blocks<std::uint32_t>(from, to, bytes); });
    each([&](In from, Out to) QF_ALWAYS_INLINE {
        for (std::int64_t i = 0; i < bytes; ++i) to[i] = from[i];
    });
}

// y[r * size .. (r + 1) * size) = x[r], x[r + x_column], ...: a few planes to pixels.
template <int size, class T>
static inline void interleave(const T* __restrict x, std::int64_t x_column, T* __restrict y, std::int64_t rows) {
    const T* __restrict planes[size];
    for (int i = 0; i < size; ++i) planes[i] = x + i * x_column;
    std::int64_t r = 0;
#if defined(__AVX2__)
    if (size == 3 && sizeof(T) == 1) {
        // 16 pixels of three bytes: byte k of the result comes from plane k % 3, place k / 3.
        const char no = -1;
        const __m128i pick[3][3] = {
            {_mm_setr_epi8(0, no, no, 1, no, no, 2, no, no, 3, no, no, 4, no, no, 5),
             _mm_setr_epi8(no, 0, no, no, 1, no, no, 2, no, no, 3, no, no, 4, no, no),
             _mm_setr_epi8(no, no, 0, no, no, 1, no, no, 2, no, no, 3, no, no, 4, no)},
            {_mm_setr_epi8(no, no, 6, no, no, 7, no, no, 8, no, no, 9, no, no, 10, no),
             _mm_setr_epi8(5, no, no, 6, no, no, 7, no, no, 8, no, no, 9, no, no, 10),
             _mm_setr_epi8(no, 5, no, no, 6, no, no, 7, no, no, 8, no, no, 9, no, no)},
            {_mm_setr_epi8(no, 11, no, no, 12, no, no, 13, no, no, 14, no, no, 15, no, no),
             _mm_setr_epi8(no, no, 11, no, no, 12, no, no, 13, no, no, 14, no, no, 15, no),
             _mm_setr_epi8(10, no, no, 11, no, no, 12, no, no, 13, no, no, 14, no, no, 15)},
        };
        for (; r + 16 <= rows; r += 16) {
            __m128i in[3];
            for (int i = 0; i < 3; ++i) in[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[i] + r));
            for (int k = 0; k < 3; ++k) {
                const __m128i out = _mm_or_si128(
                    _mm_or_si128(_mm_shuffle_epi8(in[0], pick[k][0]), _mm_shuffle_epi8(in[1], pick[k][1])),
                    _mm_shuffle_epi8(in[2], pick[k][2]));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 3 * r) + k, out);
            }
        }
    }
#endif
    for (; r < rows; ++r)
        for (int i = 0; i < size; ++i) y[r * size + i] = planes[i][r];
}

// A block of y from a block of x, both dense along their own fast dimension.
static inline void transpose_block(const std::uint8_t* x, std::int64_t x_column, std::uint8_t* y, std::int64_t y_row) {
    // Each round moves the highest bit of the 8-bit place (column, row) to the lowest; four swap column and row.
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i * x_column));
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        for (int i = 0; i < 8; ++i) {
            a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
            a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
        }
    }
    for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i * y_row), a[i]);
}
static inline void transpose_block(const std::uint32_t* x, std::int64_t x_column, std::uint32_t* y,
                                   std::int64_t y_row) {
    constexpr int size = Vec::transposed;
    Vec::transpose(reinterpret_cast<const float*>(x), x_column, size, size, reinterpret_cast<float*>(y), y_row);
}

template <int size, class T>
static void transpose(const T* x, std::int64_t x_column, T* y, std::int64_t y_row, std::int64_t rows,
                      std::int64_t n) {
    if (n == y_row) {
        if (n == 2) return interleave<2>(x, x_column, y, rows);
        if (n == 3) return interleave<3>(x, x_column, y, rows);
        if (n == 4) return interleave<4>(x, x_column, y, rows);
    }
    if (rows < size || n < size) {
        for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t i = 0; i < n; ++i) y[r * y_row + i] = x[r + i * x_column];
        return;
    }
    // Tiles keep the lines of x in L1 while y's rows are written in whole lines.
    constexpr std::int64_t tile = 64;
    for (std::int64_t r0 = 0; r0 < rows; r0 += tile) {
        const std::int64_t r1 = r0 + tile < rows ? r0 + tile : rows;
        for (std::int64_t i0 = 0; i0 < n; i0 += tile) {
            const std::int64_t i1 = i0 + tile < n ? i0 + tile : n;
            for (std::int64_t r = r0; r < r1; r += size) {
                // The last block overlaps the one before it.
                const std::int64_t row = r + size <= rows ? r : rows - size;
                for (std::int64_t i = i0; i < i1; i += size) {
                    const std::int64_t column = i + size <= n ? i : n - size;
                    transpose_block(x + row + column * x_column, x_column, y + row * y_row + column, y_row);
                }
            }
        }
    }
}

static void transpose_bytes(const std::uint8_t* x, std::int64_t x_column, std::uint8_t* y, std::int64_t y_row,
                            std::int64_t rows, std::int64_t n) {
    transpose<16>(x, x_column, y, y_row, rows, n);
}
static void transpose_words(const std::uint32_t* x, std::int64_t x_column, std::uint32_t* y, std::int64_t y_row,
                            std::int64_t rows, std::int64_t n) {
    transpose<Vec::transposed>(x, x_column, y, y_row, rows, n);
}

}  // namespace

const ElementwiseKernels& elementwise_kernels() {
    static const ElementwiseKernels kernels = {
        load_reals,     store_reals,     binary,    affine,          unary,
        table_to_codes, table_to_floats, copy_rows, transpose_bytes, transpose_words,
    };
    return kernels;
}

}  // namespace quantflow::host::QF_ISA_NAMESPACE
