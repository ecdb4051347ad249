// Where a value lies while a program runs, and how its bytes are read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace quantflow {

// Elements of one tensor, and its dimensions.
constexpr std::int64_t kMaxElements = std::int64_t{1} << 33;
constexpr std::size_t kMaxRank = 16;

enum class DType : std::uint8_t { f32, u8, s8, s32, s64, b8 };

constexpr std::int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::f32:
        case DType::s32: return 4;
        case DType::s64: return 8;
        default: return 1;
    }
}

const char* name_of(DType dtype);

// An error that the user can act on. `where` names the layer or the file.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Elements of a tensor of these dimensions; a file or a program may ask for any, so those that are negative or too many,
// and products that overflow, are refused. A size of 0 hides no others: strides are products of them.
inline std::int64_t checked_count(const std::vector<std::int64_t>& dims) {
    if (dims.size() > kMaxRank)
        throw Error("a tensor of " + std::to_string(dims.size()) + " dimensions; " + std::to_string(kMaxRank) +
                    " are possible");
    std::int64_t without_zeros = 1;
    bool is_empty = false;
    for (const std::int64_t d : dims) {
        if (d < 0) throw Error("a dimension of " + std::to_string(d));
        is_empty = is_empty || d == 0;
        if (d > 0 && (__builtin_mul_overflow(without_zeros, d, &without_zeros) || without_zeros > kMaxElements))
            throw Error("a tensor of more than " + std::to_string(kMaxElements) + " elements");
    }
    return is_empty ? 0 : without_zeros;
}

// This backend has no kernel for what was asked; the caller looks for another way or says so.
struct Unsupported : Error {
    using Error::Error;
};

// x' = (q - zero_point) * scale for codes q in [qmin, qmax], as they are stored.
struct QParams {
    float scale = 1.0f;
    std::int32_t zero_point = 0;
    std::int32_t qmin = 0;
    std::int32_t qmax = 255;
    bool operator==(const QParams& o) const {
        return scale == o.scale && zero_point == o.zero_point && qmin == o.qmin && qmax == o.qmax;
    }
};

// A byte address that is known when the step runs: the arena, an input or an output may move between runs.
struct Place {
    std::byte* const* base = nullptr;
    std::int64_t offset = 0;  // bytes
    std::byte* get() const { return *base + offset; }
};

// A strided view. A tensor with `q` holds codes (u8 or s8) that stand for reals; without it, plain numbers.
struct Tensor {
    DType dtype = DType::f32;
    std::vector<std::int64_t> dims;
    std::vector<std::int64_t> strides;  // in elements, >= 0; 0 repeats one element along a dimension
    Place place;
    std::optional<QParams> q;

    int rank() const { return static_cast<int>(dims.size()); }
    std::int64_t count() const {
        std::int64_t n = 1;
        for (auto d : dims) n *= d;
        return n;
    }
    template <typename T>
    T* data() const {
        return reinterpret_cast<T*>(place.get());
    }
};

// Strides of a dense tensor whose last dimension varies fastest. Raises Error where there can be no such tensor.
inline std::vector<std::int64_t> row_major(const std::vector<std::int64_t>& dims) {
    checked_count(dims);
    std::vector<std::int64_t> strides(dims.size());
    std::int64_t step = 1;
    for (std::size_t i = dims.size(); i-- > 0;) {
        strides[i] = step;
        step *= dims[i];
    }
    return strides;
}

// Strides of a dense tensor (batch, channels, *spatial) whose channels vary fastest.
inline std::vector<std::int64_t> channels_last(const std::vector<std::int64_t>& dims) {
    checked_count(dims);
    std::vector<std::int64_t> strides(dims.size());
    std::int64_t step = 1;
    auto put = [&](std::size_t i) {
        strides[i] = step;
        step *= dims[i];
    };
    put(1);
    for (std::size_t i = dims.size(); i-- > 2;) put(i);
    put(0);
    return strides;
}

// Whether two layouts are the same wherever a dimension has more than one element.
inline bool same_layout(const std::vector<std::int64_t>& dims, const std::vector<std::int64_t>& a,
                        const std::vector<std::int64_t>& b) {
    for (std::size_t i = 0; i < dims.size(); ++i)
        if (dims[i] != 1 && a[i] != b[i]) return false;
    return true;
}

inline bool is_row_major(const Tensor& t) { return same_layout(t.dims, t.strides, row_major(t.dims)); }
inline bool is_channels_last(const Tensor& t) {
    return t.rank() >= 3 && same_layout(t.dims, t.strides, channels_last(t.dims));
}

}  // namespace quantflow
