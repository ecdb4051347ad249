// The float kernels of one instruction set, as a table of functions on plain memory.
#pragma once

#include <cstdint>

namespace quantflow::host {

enum class Coding : std::uint8_t { f32, u8, s8 };

// How reals lie in memory: f32, or codes q with x = (q - zero_point) * scale.
struct Real {
    Coding coding = Coding::f32;
    float scale = 1, inverse = 1;
    float zero_point = 0;
    float lowest = 0, highest = 0;  // qmin - zero_point, qmax - zero_point
    std::int64_t bytes() const { return coding == Coding::f32 ? 4 : 1; }
};

// A matrix of reals; strides in elements.
struct RealMatrix {
    void* data = nullptr;
    std::int64_t row_stride = 0, column_stride = 1;
    Real real;
};

// C = A @ B + bias for f32 A (m, k) and C (m, n) with dense rows.
// B is cut into panels of `tile_columns` columns; in each, row i starts at `panel + i * b_stride`. All columns of
// the last panel are read, but only n are written.
struct GemmBlock {
    std::int64_t m, n, k;
    const float* a;
    std::int64_t a_stride;
    const float* b;
    std::int64_t b_stride, panel_stride;
    float* c;
    std::int64_t c_stride;
    const float* bias;  // n, or null
};

// y[p][c] = bias[c] + sum_t w[w_offsets[t] + c] * x[p * x_step + x_offsets[t] + c] for dense channels c.
struct DepthwiseRun {
    const float* x;
    std::int64_t x_step;
    const float* w;
    const std::int64_t *x_offsets, *w_offsets;
    std::int64_t taps;
    const float* bias;  // channels, or null
    float* y;
    std::int64_t y_step, pixels, channels;
};

enum class Mask : std::uint8_t { none, f32, b8 };

// One head of softmax(scale * q @ k.T + mask) @ v, over rows of q, mask and y.
struct AttentionHead {
    RealMatrix q, k, v, y;                // (l, e), (s, e), (s, f), (l, f)
    // Of a head as large, with the same strides, that this thread takes next; or null.
    const void *next_q = nullptr, *next_k = nullptr, *next_v = nullptr;
    std::int64_t l = 0, s = 0, e = 0, f = 0;
    Mask mask_kind = Mask::none;
    const void* mask = nullptr;           // (l, s)
    std::int64_t mask_row_stride = 0, mask_column_stride = 0;
    bool is_causal = false;
    float scale = 1;
};

struct FloatKernels {
    int tile_rows, tile_columns;
    int attention_rows;  // that `attention` takes at once

    // Dequantizes or copies (rows, columns) into f32 rows.
    void (*load)(const RealMatrix&, std::int64_t rows, std::int64_t columns, float* to, std::int64_t to_stride);
    // Quantizes or copies f32 rows into (rows, columns).
    void (*store)(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                  const RealMatrix&);
    // B (k, n) into panels of (k, tile_columns), the last one filled up with 0.
    void (*pack)(const RealMatrix& b, std::int64_t k, std::int64_t n, float* panels);
    void (*gemm)(const GemmBlock&);
    void (*depthwise)(const DepthwiseRun&);

    // Whether the mask, if any, changes no score of rows [begin, end); false where that takes long to see.
    bool (*mask_is_neutral)(const AttentionHead&, std::int64_t begin, std::int64_t end);
    // Floats of scratch memory that `attention` needs for at most `rows` rows.
    std::int64_t (*attention_scratch)(const AttentionHead&, std::int64_t rows);
    // Rows [begin, end) of y.
    void (*attention)(const AttentionHead&, std::int64_t begin, std::int64_t end, float* scratch);

    // y may be x.
    void (*softmax_row)(const float* x, std::int64_t n, float* y);
    // Down each of 16 columns of (n, 16), in place.
    void (*softmax_columns)(float* x, std::int64_t n);
    // gamma, beta: n values or null; y may be x.
    void (*layer_norm_row)(const float* x, std::int64_t n, const float* gamma, const float* beta, float eps,
                           bool is_rms, float* y);
    // The mean of n > 0 values, and the sum of their squared deviations from it.
    void (*row_moments)(const float* x, std::int64_t n, double* mean, double* square);
    // The same down each column of (rows, columns), both > 0; `mean` and `square` take `columns` values.
    void (*column_moments)(const float* x, std::int64_t rows, std::int64_t columns, double* mean, double* square);
};

namespace isa_generic { const FloatKernels& float_kernels(); }
namespace isa_avx2 { const FloatKernels& float_kernels(); }
namespace isa_avx512_vnni {
const FloatKernels& float_kernels();
// With AMX's tile registers of bfloat16.
const FloatKernels& float_kernels_by_tiles();
}  // namespace isa_avx512_vnni

}  // namespace quantflow::host
