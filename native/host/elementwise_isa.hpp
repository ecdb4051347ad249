// The elementwise kernels of one instruction set, as a table of functions on plain memory.
#pragma once

#include <cstdint>

#include "../src/backend.hpp"

namespace quantflow::host {

// How reals lie in memory. Codes: x = (q - zero_point) * scale. `low` and `high` bound q - zero_point; an activation
// that only clamps is folded into them.
struct Form {
    DType dtype = DType::f32;  // f32, u8 or s8
    float scale = 1;
    float zero_point = 0;
    float low = 0, high = 0;
    bool is_codes() const { return dtype != DType::f32; }
};

// Rows of elements; strides in elements, 0 repeats.
struct RowsIn {
    const void* data;
    std::int64_t row, column;
};
struct RowsOut {
    void* data;
    std::int64_t row, column;
};

struct BinaryJob {
    Binary op = Binary::add;
    Epilogue epilogue;
    Form a, b, y;
    bool is_comparison = false;  // y is b8
    // add of codes to codes as ta * a_factor + tb * b_factor, mul as ta * tb * a_factor, in steps of y's codes:
    // legal where rounding to float stays far below 1e-3 steps, and no sum reaches 2**30.
    bool is_folded = false;
    float a_factor = 0, b_factor = 0;
};

struct AffineJob {
    Epilogue epilogue;
    Form x, y;
    bool is_in_steps = false;  // the affine map gives steps of y's codes, not reals
};

struct UnaryJob {
    Unary op = Unary::activation;
    float a = 0, b = 0;
    Epilogue epilogue;
    Form x, y;
};

struct ElementwiseKernels {
    // n reals to or from f32.
    void (*load)(const Form&, const void* x, std::int64_t stride, std::int64_t n, float* r);
    void (*store)(const Form&, const float* r, std::int64_t n, void* y, std::int64_t stride);

    // y may be a or b.
    void (*binary)(const BinaryJob&, RowsIn a, RowsIn b, RowsOut y, std::int64_t rows, std::int64_t n);
    // y = (q - zero_point) * scale + shift for codes, x * scale + shift for f32. y may be x.
    void (*affine)(const AffineJob&, RowsIn x, RowsIn scale, RowsIn shift, RowsOut y, std::int64_t rows,
                   std::int64_t n);
    // y may be x.
    void (*unary)(const UnaryJob&, RowsIn x, RowsOut y, std::int64_t rows, std::int64_t n);
    // y[i] = table[x[i]] for bytes; y may be x.
    void (*table_to_codes)(const std::uint8_t* table, RowsIn x, RowsOut y, std::int64_t rows, std::int64_t n);
    void (*table_to_floats)(const float* table, RowsIn x, RowsOut y, std::int64_t rows, std::int64_t n);

    // Rows of `bytes` bytes; row strides in bytes. x and y do not overlap, here and below.
    void (*copy_rows)(const void* x, std::int64_t x_row, void* y, std::int64_t y_row, std::int64_t rows,
                      std::int64_t bytes);
    // y[r * y_row + i] = x[r + i * x_column] for r < rows, i < n.
    void (*transpose_bytes)(const std::uint8_t* x, std::int64_t x_column, std::uint8_t* y, std::int64_t y_row,
                            std::int64_t rows, std::int64_t n);
    void (*transpose_words)(const std::uint32_t* x, std::int64_t x_column, std::uint32_t* y, std::int64_t y_row,
                            std::int64_t rows, std::int64_t n);
};

namespace isa_generic { const ElementwiseKernels& elementwise_kernels(); }
namespace isa_avx2 { const ElementwiseKernels& elementwise_kernels(); }
namespace isa_avx512_vnni { const ElementwiseKernels& elementwise_kernels(); }

// Those of `best_isa()`.
const ElementwiseKernels& elementwise_kernels();

Form form_of(const Tensor&);

}  // namespace quantflow::host
