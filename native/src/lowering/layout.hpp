// Views of tensors, and what can be done to one by its dimensions, strides and offset alone.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../tensor.hpp"

namespace quantflow::lowering {

using Dims = std::vector<std::int64_t>;

// Bounds padding, windows and steps, so that arithmetic on them stays inside int64.
constexpr std::int64_t kMaxExtent = (std::int64_t{1} << 31) - 1;

// A value while steps are chosen: a view of a buffer. Codes with `is_real` stand for a float32 value of the program
// whose dequantize (or quantize) was folded into the kernels around it.
struct View {
    int buffer = -1;
    std::int64_t offset = 0;  // bytes
    DType dtype = DType::f32;
    Dims dims, strides;
    std::optional<QParams> q;
    bool is_real = false;

    int rank() const { return static_cast<int>(dims.size()); }
    std::int64_t count() const {
        std::int64_t n = 1;
        for (auto d : dims) n *= d;
        return n;
    }
};

bool has_no_elements(const Dims& dims);
// The dimension that `dim`, which may count from the end, names.
int axis(std::int64_t dim, int rank);
Dims broadcast_dims(const Dims& a, const Dims& b);
// One number for all of `n` dimensions, or a number each.
Dims spread(Dims v, std::size_t n);

// The dimensions that a reshape of `count` elements asks for, with a number for -1.
Dims fitted(Dims dims, std::int64_t count);

// Whether some element is repeated along a dimension.
bool repeats(const View& v);
// The layout of `v` made dense: the same order of dimensions in memory, no gaps.
Dims dense_like(const View& v);
// The same for other dimensions in the order of v's.
Dims dense_like(const View& v, const Dims& dims);
bool is_dense(const View& v);
// Strides of a view of `v` with other dimensions and the same elements in row-major order, if no copy is needed.
std::optional<Dims> strides_for_reshape(const View& v, const Dims& dims);

View expanded(const View& v, const Dims& dims);
View permuted(const View& x, const Dims& order);
// x, read row by row as `dims` and permuted, in as many dimensions as its strides take; nullopt: `dims` cut across x's.
std::optional<View> permuted_as(const View& x, const Dims& dims, const Dims& order);
View sliced(const View& x, int at, std::int64_t start, std::int64_t end, std::int64_t step);
View selected(const View& x, int at, std::int64_t index);
void erase_dim(View& v, int at);
void insert_dim(View& v, int at, std::int64_t stride);

}  // namespace quantflow::lowering
