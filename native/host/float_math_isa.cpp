// Float kernels, compiled once per instruction set: see float_math_isa.hpp.
#include "float_math_isa.hpp"

#include "vector_math.hpp"

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

using V = Vec;
using F = V::F;
using Int = std::int64_t;

constexpr int W = V::width;
// A register tile of C: rows by two vectors. 6 x 2 (or 12 x 2) accumulators, 2 vectors of B and one of A fill the
// 16 (or 32) registers.
constexpr int kRows = V::registers == 32 ? 12 : 6;
constexpr int kColumns = 2 * W;
// A panel of B with this many rows stays in the first level cache beside the rows of A.
constexpr Int kDepth = 512;

// Sums are taken over stretches of this length first, so that their roundings don't pile up.
constexpr Int kStretch = 64 * W;

constexpr float kInfinity = __builtin_inff();

template <typename T>
static inline T smaller(T a, T b) {
    return a < b ? a : b;
}
template <typename T>
static inline T larger(T a, T b) {
    return a > b ? a : b;
}
static inline Int round_up(Int n, Int step) { return (n + step - 1) / step * step; }
static inline F zero() { return V::set(0.0f); }

// Loads and stores of reals ------------------------------------------------------------------------------------

template <bool is_signed>
static inline F dequantized(const void* p, const Real& real) {
    return (V::load_bytes<is_signed>(p) - V::set(real.zero_point)) * V::set(real.scale);
}

// clamp(round(x / scale), qmin - zp, qmax - zp) + zp; the clamp comes first, which is the same for integer bounds.
static inline F quantized(F x, const Real& real) {
    F q = V::min(x * V::set(real.inverse), V::set(real.highest));  // NaN becomes the highest
    q = V::max(q, V::set(real.lowest));
    return V::round(q) + V::set(real.zero_point);
}

template <bool is_signed>
static void load_codes(const std::uint8_t* p, Int stride, const Real& real, Int n, float* to) {
    alignas(64) std::uint8_t bytes[W] = {};
    Int i = 0;
    if (stride == 1)
        for (; i + W <= n; i += W) V::store(to + i, dequantized<is_signed>(p + i, real));
    for (; i < n; i += W) {
        const int count = static_cast<int>(smaller<Int>(W, n - i));
        for (int j = 0; j < count; ++j) bytes[j] = p[(i + j) * stride];
        V::store(to + i, dequantized<is_signed>(bytes, real), count);
    }
}

static void load_floats(const float* p, Int stride, Int n, float* to) {
    if (stride != 1) {
        for (Int i = 0; i < n; ++i) to[i] = p[i * stride];
        return;
    }
    Int i = 0;
    for (; i + W <= n; i += W) V::store(to + i, V::load(p + i));
    for (; i < n; ++i) to[i] = p[i];
}

static void load_row(const RealMatrix& x, Int row, Int column, Int n, float* to) {
    const Int at = row * x.row_stride + column * x.column_stride;
    if (x.real.coding == Coding::f32)
        load_floats(static_cast<const float*>(x.data) + at, x.column_stride, n, to);
    else if (x.real.coding == Coding::u8)
        load_codes<false>(static_cast<const std::uint8_t*>(x.data) + at, x.column_stride, x.real, n, to);
    else
        load_codes<true>(static_cast<const std::uint8_t*>(x.data) + at, x.column_stride, x.real, n, to);
}

static void load(const RealMatrix& x, Int rows, Int columns, float* to, Int to_stride) {
    for (Int r = 0; r < rows; ++r) load_row(x, r, 0, columns, to + r * to_stride);
}

static void store_row(const float* from, Int n, const RealMatrix& y, Int row) {
    if (y.real.coding == Coding::f32) {
        float* to = static_cast<float*>(y.data) + row * y.row_stride;
        if (y.column_stride == 1)
            load_floats(from, 1, n, to);
        else
            for (Int i = 0; i < n; ++i) to[i * y.column_stride] = from[i];
        return;
    }
    std::uint8_t* to = static_cast<std::uint8_t*>(y.data) + row * y.row_stride;
    alignas(64) std::uint8_t bytes[W];
    Int i = 0;
    if (y.column_stride == 1)
        for (; i + W <= n; i += W) V::store_bytes(to + i, quantized(V::load(from + i), y.real));
    for (; i < n; i += W) {
        const int count = static_cast<int>(smaller<Int>(W, n - i));
        V::store_bytes(bytes, quantized(V::load(from + i, count, zero()), y.real));
        for (int j = 0; j < count; ++j) to[(i + j) * y.column_stride] = bytes[j];
    }
}

static void store(const float* from, Int from_stride, Int rows, Int columns, const RealMatrix& y) {
    for (Int r = 0; r < rows; ++r) store_row(from + r * from_stride, columns, y, r);
}

// Matrix products ----------------------------------------------------------------------------------------------

// Rows [0, k) of columns [begin, begin + columns) of B into one panel.
static void pack_panel(const RealMatrix& b, Int k, Int begin, int columns, float* panel) {
    if (b.column_stride == 1) {
        if (b.real.coding == Coding::f32 && columns == kColumns) {
            const float* from = static_cast<const float*>(b.data) + begin;
            for (Int i = 0; i < k; ++i) {
                V::store(panel + i * kColumns, V::load(from + i * b.row_stride));
                V::store(panel + i * kColumns + W, V::load(from + i * b.row_stride + W));
            }
            return;
        }
        for (Int i = 0; i < k; ++i) {
            load_row(b, i, begin, columns, panel + i * kColumns);
            for (int j = columns; j < kColumns; ++j) panel[i * kColumns + j] = 0;
        }
        return;
    }
    // Columns of B are read along k and transposed, through `lines` unless they are dense floats.
    constexpr Int kLine = 128;
    constexpr int kBlock = V::transposed;
    float lines[kColumns * kLine];
    const bool is_dense = b.real.coding == Coding::f32 && b.row_stride == 1;
    RealMatrix turned = b;
    turned.row_stride = b.column_stride;
    turned.column_stride = b.row_stride;
    for (Int i = 0; i < k; i += kLine) {
        const Int depth = smaller(kLine, k - i);
        const float* from = lines;
        Int stride = kLine;
        if (is_dense) {
            from = static_cast<const float*>(b.data) + begin * b.column_stride + i;
            stride = b.column_stride;
        } else {
            for (int j = 0; j < columns; ++j) load_row(turned, begin + j, i, depth, lines + j * kLine);
        }
        for (int j = 0; j < kColumns; j += kBlock) {
            const int rows = smaller(larger(columns - j, 0), kBlock);
            for (Int d = 0; d < depth; d += kBlock)
                V::transpose(from + (rows > 0 ? j * stride + d : 0), stride, rows,
                             static_cast<int>(smaller<Int>(kBlock, depth - d)), panel + (i + d) * kColumns + j,
                             kColumns);
        }
    }
}

static void pack(const RealMatrix& b, Int k, Int n, float* panels) {
    for (Int j = 0; j < n; j += kColumns)
        pack_panel(b, k, j, static_cast<int>(smaller<Int>(kColumns, n - j)), panels + j * k);
}

// sum over k of A (R, k) times B (k, kColumns); finish(row, half, sum) takes the R x 2 results.
// Few rows alone can't keep the multipliers busy: they take several steps of k at once.
template <int R, class Finish>
__attribute__((always_inline)) static inline void multiply_tile(Int k, const float* a, Int a_stride, const float* b,
                                                                Int b_stride, const Finish& finish) {
    constexpr int steps = R == 1 ? 4 : R <= 3 ? 2 : 1;
    F sum[steps][R][2];
#pragma GCC unroll 4
    for (int u = 0; u < steps; ++u)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[u][r][0] = sum[u][r][1] = zero();
    // Every third row has a pointer; the two after it are reached by scaled indices.
    const float* rows[(R + 2) / 3];
#pragma GCC unroll 4
    for (int r = 0; r < (R + 2) / 3; ++r) rows[r] = a + 3 * r * a_stride;
    Int i = 0;
    for (; i + steps <= k; i += steps) {
#pragma GCC unroll 4
        for (int u = 0; u < steps; ++u) {
            const F b0 = V::load(b), b1 = V::load(b + W);
            b += b_stride;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const F x = V::set(rows[r / 3][(r % 3) * a_stride + u]);
                sum[u][r][0] = V::fma(x, b0, sum[u][r][0]);
                sum[u][r][1] = V::fma(x, b1, sum[u][r][1]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < (R + 2) / 3; ++r) rows[r] += steps;
    }
    for (; i < k; ++i) {
        const F b0 = V::load(b), b1 = V::load(b + W);
        b += b_stride;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const F x = V::set(a[r * a_stride + i]);
            sum[0][r][0] = V::fma(x, b0, sum[0][r][0]);
            sum[0][r][1] = V::fma(x, b1, sum[0][r][1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            F total = sum[0][r][half];
#pragma GCC unroll 4
            for (int u = 1; u < steps; ++u) total = total + sum[u][r][half];
            finish(r, half, total);
        }
}

template <int R, class Finish>
static __attribute__((noinline)) void multiply_few_rows(int count, Int k, const float* a, Int a_stride,
                                                        const float* b, Int b_stride, const Finish& finish) {
    if constexpr (R >= 1) {
        if (count == R)
            multiply_tile<R>(k, a, a_stride, b, b_stride, finish);
        else
            multiply_few_rows<R - 1>(count, k, a, a_stride, b, b_stride, finish);
    }
}

template <class Finish>
static inline void multiply_rows(Int count, Int k, const float* a, Int a_stride, const float* b, Int b_stride,
                                 const Finish& finish) {
    if (count >= kRows)
        multiply_tile<kRows>(k, a, a_stride, b, b_stride, finish);
    else
        multiply_few_rows<kRows - 1>(static_cast<int>(count), k, a, a_stride, b, b_stride, finish);
}

static void gemm(const GemmBlock& g) {
    const Int cuts = larger<Int>(1, (g.k + kDepth - 1) / kDepth);
    const Int depth = (g.k + cuts - 1) / cuts;
    for (Int cut = 0; cut < cuts; ++cut) {
        const Int k0 = cut * depth, k = smaller(depth, g.k - k0);
        const bool is_first = cut == 0, is_last = cut + 1 == cuts;
        for (Int j = 0; j < g.n; j += kColumns) {
            const float* b = g.b + j / kColumns * g.panel_stride + k0 * g.b_stride;
            const int columns = static_cast<int>(smaller<Int>(kColumns, g.n - j));
            for (Int i = 0; i < g.m; i += kRows) {
                float* c = g.c + i * g.c_stride + j;
                const auto finish = [&](int r, int half, F sum) __attribute__((always_inline)) {
                    const int count = columns - half * W;
                    if (count <= 0) return;
                    float* to = c + r * g.c_stride + half * W;
                    const bool is_whole = count >= W;
                    if (!is_first) sum = sum + (is_whole ? V::load(to) : V::load(to, count, zero()));
                    if (is_last && g.bias != nullptr) {
                        const float* bias = g.bias + j + half * W;
                        sum = sum + (is_whole ? V::load(bias) : V::load(bias, count, zero()));
                    }
                    if (is_whole)
                        V::store(to, sum);
                    else
                        V::store(to, sum, count);
                };
                multiply_rows(g.m - i, k, g.a + i * g.a_stride + k0, g.a_stride, b, g.b_stride, finish);
            }
        }
    }
}

// Depthwise convolutions ---------------------------------------------------------------------------------------

constexpr Int kHeldTaps = 25;  // of a 5 x 5 window: in registers or the first level cache

// `n`: channels of this vector, W or fewer; known at compile time where it is W.
template <bool is_full>
static inline void depthwise_channels(const DepthwiseRun& r, Int c, int n) {
    const auto load = [n](const float* p) { return is_full ? V::load(p) : V::load(p, n, zero()); };
    const F start = r.bias != nullptr ? load(r.bias + c) : zero();
    for (Int first = 0; first == 0 || first < r.taps; first += kHeldTaps) {
        const Int taps = smaller<Int>(kHeldTaps, r.taps - first);
        F w[kHeldTaps];
        for (Int t = 0; t < taps; ++t) w[t] = load(r.w + r.w_offsets[first + t] + c);
        for (Int p = 0; p < r.pixels; ++p) {
            float* const y = r.y + p * r.y_step + c;
            const float* const x = r.x + p * r.x_step + c;
            F sum = first == 0 ? start : load(y);
            for (Int t = 0; t < taps; ++t) sum = V::fma(w[t], load(x + r.x_offsets[first + t]), sum);
            if (is_full)
                V::store(y, sum);
            else
                V::store(y, sum, n);
        }
    }
}

static void depthwise(const DepthwiseRun& r) {
    Int c = 0;
    for (; c + W <= r.channels; c += W) depthwise_channels<true>(r, c, W);
    if (c < r.channels) depthwise_channels<false>(r, c, static_cast<int>(r.channels - c));
}

// Attention ----------------------------------------------------------------------------------------------------

// Keys are taken in blocks, so that their panels, their values and the scores of some rows stay in the second level
// cache; between blocks, each row keeps its running maximum and sum (Milakov and Gimelshein 2018, "Online
// normalizer calculation for softmax").
constexpr Int kKeyBlock = 512;
constexpr Int kScoreFloats = 6144;  // of one block of rows: most of the first level cache

constexpr float kLog2E = 1.44269504f;

static bool mask_is_neutral(const AttentionHead& h, Int begin, Int end) {
    if (h.mask_kind == Mask::none) return true;
    if (h.mask_column_stride != 1) return false;
    const Int keys = h.is_causal ? smaller(h.s, end) : h.s;
    const auto is_neutral = [&](Int row, Int n) {
        std::uint32_t changes = 0;
        if (h.mask_kind == Mask::b8) {
            const std::uint8_t* from = static_cast<const std::uint8_t*>(h.mask) + row * h.mask_row_stride;
            for (Int j = 0; j < n; ++j) changes |= from[j] == 0;
        } else {
            const float* from = static_cast<const float*>(h.mask) + row * h.mask_row_stride;
            for (Int j = 0; j < n; ++j) {
                std::uint32_t bits;
                __builtin_memcpy(&bits, from + j, sizeof bits);
                changes |= bits << 1;  // 0 has either sign
            }
        }
        return changes == 0;
    };
    // Most masks that hide something do so in the first row.
    if (!is_neutral(begin, keys)) return false;
    if (h.mask_row_stride == 0) return true;
    if (h.mask_row_stride == keys) return is_neutral(begin, (end - begin) * keys);
    for (Int row = begin + 1; row < end; ++row)
        if (!is_neutral(row, keys)) return false;
    return true;
}

// Scores are kept times log2(e), for 2**x is cheaper than e**x. A finite mask stays finite: the lowest float is a
// common way to hide a key, and a row where every key is hidden so attends to all of them alike.
static void load_mask(const AttentionHead& h, Int row, Int begin, Int n, float* to) {
    const Int at = row * h.mask_row_stride + begin * h.mask_column_stride, step = h.mask_column_stride;
    if (h.mask_kind == Mask::b8) {
        const std::uint8_t* from = static_cast<const std::uint8_t*>(h.mask) + at;
        const F seen = zero(), hidden = V::set(-kInfinity);
        Int j = 0;
        if (step == 1)
            for (; j + W <= n; j += W)
                V::store(to + j, V::select(V::equal(V::load_bytes<false>(from + j), zero()), hidden, seen));
        for (; j < n; ++j) to[j] = from[j * step] != 0 ? 0.0f : -kInfinity;
        return;
    }
    const float* from = static_cast<const float*>(h.mask) + at;
    if (step != 1) {
        load_floats(from, step, n, to);
        from = to;
    }
    const F largest = V::set(3.40282347e38f);
    const auto scaled = [&](F x) __attribute__((always_inline)) {
        const F finite = V::max(zero() - largest, V::min(largest, x * V::set(kLog2E)));
        return V::select(V::equal(V::abs(x), V::set(kInfinity)), x, finite);
    };
    Int j = 0;
    for (; j + W <= n; j += W) V::store(to + j, scaled(V::load(from + j)));
    const int count = static_cast<int>(n - j);
    if (count > 0) V::store(to + j, scaled(V::load(from + j, count, zero())), count);
}

// The largest of n > 0 scores, n a multiple of W; the mask is added first.
template <bool is_masked>
static inline float highest_score(float* scores, const float* mask, Int n) {
    F a = V::set(-kInfinity), b = a;
    Int j = 0;
    const auto take = [&](Int at, F so_far) __attribute__((always_inline)) {
        F s = V::load(scores + at);
        if (is_masked) {
            s = s + V::load(mask + at);
            V::store(scores + at, s);
        }
        return V::max(so_far, s);
    };
    for (; j + 2 * W <= n; j += 2 * W) {
        a = take(j, a);
        b = take(j + W, b);
    }
    if (j < n) a = take(j, a);
    return V::highest(V::max(a, b));
}

// scores = 2**(scores - highest); returns their sum. n is a multiple of W.
static inline float exponentials(float* scores, float highest, Int n) {
    const F h = V::set(highest);
    F a = zero(), b = zero();
    Int j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
        const F p = exp2_nonpositive<V>(V::load(scores + j) - h);
        const F r = exp2_nonpositive<V>(V::load(scores + j + W) - h);
        V::store(scores + j, p);
        V::store(scores + j + W, r);
        a = a + p;
        b = b + r;
    }
    if (j < n) {
        const F p = exp2_nonpositive<V>(V::load(scores + j) - h);
        V::store(scores + j, p);
        a = a + p;
    }
    return V::sum(a + b);
}

// Products of attention's rows by vectors; where a head's keys and values lie packed for them.
class VectorProducts {
public:
    static constexpr Int kRowUnit = kRows, kKeyUnit = kColumns, kScoreUnit = W;
    static constexpr Int kWeighed = 16;  // rows together, so that none waits for the sum before it
    static Int key_floats(const AttentionHead& h) { return round_up(h.s, kColumns) * h.e; }
    static Int value_floats(const AttentionHead& h) { return h.s * round_up(h.f, kColumns); }
    static Int row_floats(const AttentionHead& h, Int rows) { return rows * h.e; }  // of its own for `rows` rows
    static Int score_stride(Int keys) { return keys; }

    VectorProducts(const AttentionHead& h, float* keys, float* values, float* rows)
        : h_(h), keys_(keys), values_(values), rows_(rows) {}

    // Keys and values up to `reach`; false where these products don't suit them.
    bool pack(Int reach) {
        RealMatrix turned = h_.k;
        turned.row_stride = h_.k.column_stride;
        turned.column_stride = h_.k.row_stride;
        QF_ISA_NAMESPACE::pack(turned, h_.e, reach, keys_);
        for (Int j = 0; j < h_.f; j += kColumns)
            pack_panel(h_.v, reach, j, static_cast<int>(smaller<Int>(kColumns, h_.f - j)), values_ + j * h_.s);
        return true;
    }

    // Takes rows of q times `scale`; false likewise.
    bool queries(Int row, Int rows, float scale) {
        const bool is_dense = h_.q.real.coding == Coding::f32 && h_.q.column_stride == 1;
        for (Int r = 0; r < rows; ++r) {
            float* to = rows_ + r * h_.e;
            const float* from = static_cast<const float*>(h_.q.data) + (row + r) * h_.q.row_stride;
            if (!is_dense) {
                load_row(h_.q, row + r, 0, h_.e, to);
                from = to;
            }
            Int c = 0;
            for (; c + W <= h_.e; c += W) V::store(to + c, V::load(from + c) * V::set(scale));
            for (; c < h_.e; ++c) to[c] = from[c] * scale;
        }
        return true;
    }

    // to (rows, keys) = q @ keys.T, of `keys` keys from `key` on; whole units of them are written.
    void scores(Int rows, Int key, Int keys, float* to, Int stride) {
        for (Int j = 0; j < keys; j += kColumns)
            for (Int r = 0; r < rows; r += kRows)
                multiply_rows(rows - r, h_.e, rows_ + r * h_.e, h_.e, keys_ + (key + j) * h_.e, kColumns,
                              [&](int i, int half, F sum) __attribute__((always_inline)) {
                                  V::store(to + (r + i) * stride + j + half * W, sum);
                              });
    }

    // The weights of a row: 2**(scores - highest) of n scores (whole units), 0 for those up to `keys`. Returns the sum.
    float weigh(float* scores, float highest, Int n, Int keys) {
        const float sum = exponentials(scores, highest, n);
        for (Int j = n; j < keys; ++j) scores[j] = 0;
        return sum;
    }

    // to (rows, f) = weights @ values, plus what is there if key > 0; `scores`: those that were weighed.
    void values(const float* scores, Int stride, Int rows, Int key, Int keys, float* to, Int to_stride) {
        for (Int j = 0; j < h_.f; j += kColumns)
            for (Int r = 0; r < rows; r += kRows)
                multiply_rows(rows - r, keys, scores + r * stride, stride, values_ + j * h_.s + key * kColumns,
                              kColumns, [&](int i, int half, F sum) __attribute__((always_inline)) {
                                  float* at = to + (r + i) * to_stride + j + half * W;
                                  V::store(at, key > 0 ? V::load(at) + sum : sum);
                              });
    }

private:
    const AttentionHead& h_;
    float *const keys_, *const values_, *const rows_;
};

#if defined(__AVX512F__) || defined(QF_EMULATED_TILES)
#define QF_FLOAT_TILES
#include "float_tiles.inc"
#endif

// How one call to `attention` lays out its scratch memory.
template <class Products>
struct AttentionPlan {
    Int key_block, row_block, score_stride, padded_f;
    bool keeps_outputs;  // of all rows, from one block of keys to the next
    Int keys, values, rows, scores, outputs, highest, sums, mask, total;  // offsets in floats

    AttentionPlan(const AttentionHead& h, Int all_rows) {
        constexpr Int unit = Products::kKeyUnit;
        const Int blocks = larger<Int>(1, (h.s + kKeyBlock - 1) / kKeyBlock);
        key_block = larger<Int>(unit, round_up((h.s + blocks - 1) / blocks, unit));
        row_block = smaller<Int>(larger<Int>(1, kScoreFloats / key_block / Products::kRowUnit), 8) * Products::kRowUnit;
        score_stride = Products::score_stride(key_block);
        padded_f = round_up(h.f, larger<Int>(unit, kColumns));
        keeps_outputs = blocks > 1;
        Int at = 0;
        const auto take = [&at](Int floats) {
            const Int begin = at;
            at += round_up(floats, 16);
            return begin;
        };
        keys = take(Products::key_floats(h));
        values = take(Products::value_floats(h));
        rows = take(Products::row_floats(h, row_block));
        scores = take(row_block * score_stride);
        outputs = take((keeps_outputs ? round_up(all_rows, Products::kRowUnit) : row_block) * padded_f);
        highest = take(all_rows);
        sums = take(all_rows);
        mask = take(key_block);
        total = at;
    }
};

static Int attention_scratch(const AttentionHead& h, Int rows) { return AttentionPlan<VectorProducts>(h, rows).total; }

// False, and y may be anything, where Products don't suit the numbers.
template <class Products>
static bool attention_by(const AttentionHead& h, Int begin, Int end, float* scratch) {
    const AttentionPlan<Products> plan(h, end - begin);
    Products products(h, scratch + plan.keys, scratch + plan.values, scratch + plan.rows);
    float* const mask = scratch + plan.mask;
    const Int stride = plan.score_stride;
    const Int reach = h.is_causal ? smaller(h.s, end) : h.s;  // keys that some row sees
    // One row of it for all, which see the same keys.
    const bool is_mask_shared = h.mask_kind != Mask::none && h.mask_row_stride == 0 && !h.is_causal;
    if (!products.pack(reach)) return false;

    for (Int r = 0; r < end - begin; ++r) {
        scratch[plan.highest + r] = -kInfinity;
        scratch[plan.sums + r] = 0;
    }
    const auto outputs_of = [&](Int row) {
        return scratch + plan.outputs + (plan.keeps_outputs ? (row - begin) * plan.padded_f : 0);
    };
    // Rows whose outputs are complete but for the sum that they are divided by.
    const auto finish = [&](Int row, Int rows) {
        const bool is_dense = h.y.real.coding == Coding::f32 && h.y.column_stride == 1;
        float* out = outputs_of(row);
        for (Int r = 0; r < rows; ++r, out += plan.padded_f) {
            const float sum = scratch[plan.sums + row - begin + r];
            // A row that sees no key: 0, as PyTorch has it.
            const F factor = V::set(sum == 0.0f ? 0.0f : 1.0f / sum);
            if (is_dense) {
                float* to = static_cast<float*>(h.y.data) + (row + r) * h.y.row_stride;
                Int c = 0;
                for (; c + W <= h.f; c += W) V::store(to + c, V::load(out + c) * factor);
                if (c < h.f) V::store(to + c, V::load(out + c) * factor, static_cast<int>(h.f - c));
                continue;
            }
            for (Int c = 0; c < plan.padded_f; c += W) V::store(out + c, V::load(out + c) * factor);
            store_row(out, h.f, h.y, row + r);
        }
    };
    if (reach == 0) {
        for (Int i = 0; i < plan.padded_f; ++i) outputs_of(begin)[i] = 0;
        for (Int row = begin; row < end; ++row) store_row(outputs_of(begin), h.f, h.y, row);
        return true;
    }

    for (Int key = 0; key < reach; key += plan.key_block) {
        if (is_mask_shared)
            load_mask(h, 0, key, smaller(plan.key_block, h.s - key), mask);
        const auto last_key = [&](Int row, Int rows) { return h.is_causal ? smaller(reach, row + rows) : reach; };
        const auto seen_by = [&](Int row, Int keys_here) {
            return h.is_causal ? smaller(keys_here, larger<Int>(0, row + 1 - key)) : keys_here;
        };
        // Adds the mask to the scores of one row, and them to what they are weighed from; returns what that was.
        const auto raise = [&](Int row, float* s, Int keys_here) {
            const Int n = seen_by(row, keys_here), whole = round_up(n, Products::kScoreUnit);
            for (Int j = n; j < whole; ++j) s[j] = -kInfinity;
            float& highest = scratch[plan.highest + row - begin];
            const float before = highest;
            float here;
            if (h.mask_kind == Mask::none) {
                here = highest_score<false>(s, nullptr, whole);
            } else {
                if (!is_mask_shared) load_mask(h, row, key, n, mask);
                for (Int j = n; j < whole; ++j) mask[j] = 0;
                here = highest_score<true>(s, mask, whole);
            }
            highest = here < before ? before : here;  // NaN stays
            return before;
        };
        // Scores of one row to weights; `before`: what its outputs so far were weighed from.
        const auto weigh = [&](Int row, float* s, Int keys_here, float before) {
            const Int whole = round_up(seen_by(row, keys_here), Products::kScoreUnit);
            const float highest = scratch[plan.highest + row - begin];
            // Where every key is hidden so far, any finite maximum gives only zeros.
            const float shift = highest == -kInfinity ? 0.0f : highest;
            float& sum = scratch[plan.sums + row - begin];
            const float here_sum = products.weigh(s, shift, whole, keys_here);
            if (key > 0 && !(before == shift)) {
                const F factor = exp2_nonpositive<V>(V::set(before - shift));
                alignas(64) float first[W];
                V::store(first, factor);
                sum *= first[0];
                float* out = outputs_of(row);
                for (Int c = 0; c < plan.padded_f; c += W) V::store(out + c, V::load(out + c) * factor);
            }
            sum += here_sum;
        };

        for (Int row = begin; row < end; row += plan.row_block) {
            const Int rows = smaller(plan.row_block, end - row);
            const Int keys_here = smaller(plan.key_block, last_key(row, rows) - key);
            if (keys_here <= 0) continue;
            float* const scores = scratch + plan.scores;
            if (!products.queries(row, rows, h.scale * kLog2E)) return false;
            products.scores(rows, key, keys_here, scores, stride);
            for (Int r = 0; r < rows;) {
                const Int first = r, last = smaller(rows, first + Products::kWeighed);
                float before[Products::kWeighed];
                for (; r < last; ++r) before[r - first] = raise(row + r, scores + r * stride, keys_here);
                for (r = first; r < last; ++r) weigh(row + r, scores + r * stride, keys_here, before[r - first]);
            }
            products.values(scores, stride, rows, key, keys_here, outputs_of(row), plan.padded_f);
            if (key + plan.key_block >= last_key(row, rows)) finish(row, rows);
        }
    }
    return true;
}

static void attention(const AttentionHead& h, Int begin, Int end, float* scratch) {
    attention_by<VectorProducts>(h, begin, end, scratch);
}

#if defined(QF_FLOAT_TILES)
static Int tile_attention_scratch(const AttentionHead& h, Int rows) {
    return larger(attention_scratch(h, rows), AttentionPlan<TileProducts>(h, rows).total);
}
static void tile_attention(const AttentionHead& h, Int begin, Int end, float* scratch) {
    if (!suits_tiles(h, end - begin) || !attention_by<TileProducts>(h, begin, end, scratch))
        attention_by<VectorProducts>(h, begin, end, scratch);
}
#endif

// Softmax ------------------------------------------------------------------------------------------------------

static void softmax_row(const float* x, Int n, float* y) {
    const int tail = static_cast<int>(n % W);
    const Int whole = n - tail;
    const F hidden = V::set(-kInfinity);
    F a = hidden, b = hidden;
    Int j = 0;
    for (; j + 2 * W <= whole; j += 2 * W) {
        a = V::max(a, V::load(x + j));
        b = V::max(b, V::load(x + j + W));
    }
    if (j < whole) a = V::max(a, V::load(x + j));
    if (tail > 0) b = V::max(b, V::load(x + whole, tail, hidden));
    // x - highest is NaN for NaN and where the highest is infinite; one NaN in the sum makes the whole row NaN.
    const F highest = V::set(V::highest(V::max(a, b)));
    F sum = zero();
    for (j = 0; j < whole;) {
        const Int end = smaller(whole, j + kStretch);
        a = b = zero();
        for (; j + 2 * W <= end; j += 2 * W) {
            const F p = exp_nonpositive<V>(V::load(x + j) - highest);
            const F q = exp_nonpositive<V>(V::load(x + j + W) - highest);
            V::store(y + j, p);
            V::store(y + j + W, q);
            a = a + p;
            b = b + q;
        }
        for (; j < end; j += W) {
            const F p = exp_nonpositive<V>(V::load(x + j) - highest);
            V::store(y + j, p);
            a = a + p;
        }
        sum = sum + (a + b);
    }
    if (tail > 0) {
        // Lanes beyond the row hold -Inf - highest: 0, or NaN where the row is NaN anyway.
        const F p = exp_nonpositive<V>(V::load(x + whole, tail, hidden) - highest);
        V::store(y + whole, p, tail);
        sum = sum + p;
    }
    const F factor = V::set(1.0f / V::sum(sum));
    for (j = 0; j < whole; j += W) V::store(y + j, V::load(y + j) * factor);
    if (tail > 0) V::store(y + whole, V::load(y + whole, tail, zero()) * factor, tail);
}

static void softmax_columns(float* x, Int n) {
    for (int c = 0; c < 16; c += W) {
        F highest = V::set(-kInfinity), sum = zero();
        for (Int i = 0; i < n; ++i) highest = V::max(highest, V::load(x + i * 16 + c));
        for (Int i = 0; i < n;) {
            F part = zero();
            for (const Int end = smaller(n, i + kStretch / W); i < end; ++i) {
                const F p = exp_nonpositive<V>(V::load(x + i * 16 + c) - highest);
                V::store(x + i * 16 + c, p);
                part = part + p;
            }
            sum = sum + part;
        }
        const F factor = V::set(1.0f) / sum;
        for (Int i = 0; i < n; ++i) V::store(x + i * 16 + c, V::load(x + i * 16 + c) * factor);
    }
}

// Normalization ------------------------------------------------------------------------------------------------

struct Moments {
    double sum = 0, squares = 0;
};

// Sums of d = x[i] - shift and of d * d: of stretches in float, of their sums in double.
template <bool with_squares>
static inline Moments moments(const float* x, Int n, float shift) {
    const F s = V::set(shift);
    Moments total;
    for (Int begin = 0; begin < n; begin += kStretch) {
        const Int end = smaller(n, begin + kStretch);
        F sums[2] = {zero(), zero()}, squares[2] = {zero(), zero()};
        const auto add = [&](int u, F d) __attribute__((always_inline)) {
            sums[u] = sums[u] + d;
            if (with_squares) squares[u] = V::fma(d, d, squares[u]);
        };
        Int i = begin;
        for (; i + 2 * W <= end; i += 2 * W) {
            add(0, V::load(x + i) - s);
            add(1, V::load(x + i + W) - s);
        }
        if (i + W <= end) {
            add(0, V::load(x + i) - s);
            i += W;
        }
        if (i < end) add(1, V::load(x + i, static_cast<int>(end - i), s) - s);
        total.sum += V::sum(sums[0] + sums[1]);
        if (with_squares) total.squares += V::sum(squares[0] + squares[1]);
    }
    return total;
}

static void layer_norm_row(const float* x, Int n, const float* gamma, const float* beta, float eps, bool is_rms,
                           float* y) {
    const double count = static_cast<double>(n);
    const float mean = is_rms ? 0.0f : static_cast<float>(moments<false>(x, n, 0.0f).sum / count);
    // What the float mean misses shows in the deviations from it: the mean is mean + rest (Chan, Golub and LeVeque
    // 1983, "Algorithms for computing the sample variance", the corrected two-pass algorithm).
    const Moments from_mean = moments<true>(x, n, mean);
    const double rest = is_rms ? 0.0 : from_mean.sum / count;
    const double square = from_mean.squares / count - rest * rest;
    const float inverse = static_cast<float>(1.0 / __builtin_sqrt(square + eps));
    const F m = V::set(mean), scale = V::set(inverse), offset = V::set(static_cast<float>(-rest * inverse));
    for (Int i = 0; i < n; i += W) {
        const int count = static_cast<int>(smaller<Int>(W, n - i));
        const bool is_whole = count == W;
        const auto at = [&](const float* p) __attribute__((always_inline)) {
            return is_whole ? V::load(p + i) : V::load(p + i, count, zero());
        };
        F r = V::fma(at(x) - m, scale, offset);
        if (gamma != nullptr) r = r * at(gamma);
        if (beta != nullptr) r = r + at(beta);
        if (is_whole)
            V::store(y + i, r);
        else
            V::store(y + i, r, count);
    }
}

static void row_moments(const float* x, Int n, double* mean, double* square) {
    const double count = static_cast<double>(n);
    const float near = static_cast<float>(moments<false>(x, n, 0.0f).sum / count);
    const Moments from_near = moments<true>(x, n, near);
    const double rest = from_near.sum / count;
    *mean = near + rest;
    *square = larger(from_near.squares - rest * from_near.sum, 0.0);
}

// `vectors` times W columns, of which the last vector may have fewer. Deviations are from the mean of the first rows,
// so that one pass does; what is lost in float32 grows with the square of how far the mean of all rows lies from it,
// and those rows are among them.
template <int vectors>
static inline void moments_down(const float* x, Int rows, Int row, int last, double* mean, double* square) {
    constexpr Int kFirst = 8, kStretchRows = 64;
    const auto at = [&](Int r, int v) __attribute__((always_inline)) {
        const float* p = x + r * row + v * W;
        return v + 1 < vectors || last == W ? V::load(p) : V::load(p, last, zero());
    };
    F near[vectors];
    const Int first = smaller(rows, kFirst);
    for (int v = 0; v < vectors; ++v) {
        near[v] = zero();
        for (Int r = 0; r < first; ++r) near[v] = near[v] + at(r, v);
        near[v] = near[v] * V::set(1.0f / static_cast<float>(first));
    }
    double sums[vectors * W] = {}, squares[vectors * W] = {};
    for (Int begin = 0; begin < rows; begin += kStretchRows) {
        const Int end = smaller(rows, begin + kStretchRows);
        F s[vectors], q[vectors];
        for (int v = 0; v < vectors; ++v) s[v] = q[v] = zero();
        for (Int r = begin; r < end; ++r)
            for (int v = 0; v < vectors; ++v) {
                const F d = at(r, v) - near[v];
                s[v] = s[v] + d;
                q[v] = V::fma(d, d, q[v]);
            }
        float part[2][vectors * W];
        for (int v = 0; v < vectors; ++v) {
            V::store(part[0] + v * W, s[v]);
            V::store(part[1] + v * W, q[v]);
        }
        for (int i = 0; i < vectors * W; ++i) {
            sums[i] += part[0][i];
            squares[i] += part[1][i];
        }
    }
    float shift[vectors * W];
    for (int v = 0; v < vectors; ++v) V::store(shift + v * W, near[v]);
    const double inverse = 1.0 / static_cast<double>(rows);
    for (int i = 0; i < (vectors - 1) * W + last; ++i) {
        mean[i] = shift[i] + sums[i] * inverse;
        square[i] = larger(squares[i] - sums[i] * sums[i] * inverse, 0.0);
    }
}

static void column_moments(const float* x, Int rows, Int columns, double* mean, double* square) {
    Int c = 0;
    for (; c + 4 * W <= columns; c += 4 * W) moments_down<4>(x + c, rows, columns, W, mean + c, square + c);
    for (; c < columns; c += W)
        moments_down<1>(x + c, rows, columns, static_cast<int>(smaller<Int>(W, columns - c)), mean + c, square + c);
}

}  // namespace

const FloatKernels& float_kernels() {
    static constexpr FloatKernels kernels = {
        kRows,     kColumns,    kRows,           load,           store,       pack,           gemm, depthwise, mask_is_neutral,
        attention_scratch, attention, softmax_row, softmax_columns, layer_norm_row, row_moments, column_moments,
    };
    return kernels;
}

#if defined(QF_FLOAT_TILES)
const FloatKernels& float_kernels_by_tiles() {
    static const FloatKernels kernels = [] {
        FloatKernels own = float_kernels();
        own.attention_rows = kTile;
        own.attention_scratch = tile_attention_scratch;
        own.attention = tile_attention;
        return own;
    }();
    return kernels;
}
#endif

}  // namespace quantflow::host::QF_ISA_NAMESPACE
