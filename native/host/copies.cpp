// Copies, fills and choices between two tensors.
#include <cstring>
#include <limits>
#include <type_traits>

#include "elementwise_steps.hpp"

namespace quantflow::host {

using namespace elementwise;

namespace {

template <class Y, class X>
Y converted(X x) {
    if constexpr (std::is_same_v<X, Bool>) {
        return converted<Y>(static_cast<std::int64_t>(x.value != 0));
    } else if constexpr (std::is_same_v<Y, Bool>) {
        return Bool{static_cast<std::uint8_t>(x != X(0))};
    } else if constexpr (std::is_floating_point_v<X> && !std::is_floating_point_v<Y>) {
        // What x86 gives for a float that no s64 holds.
        const bool fits = x >= X(-9223372036854775808.0) && x < X(9223372036854775808.0);
        return static_cast<Y>(fits ? static_cast<std::int64_t>(x) : std::numeric_limits<std::int64_t>::min());
    } else {
        return static_cast<Y>(x);
    }
}

// Elements as they are.
StepPtr moved(ThreadPool& pool, const Tensor& x, const Tensor& y, Nest nest) {
    const ElementwiseKernels& k = elementwise_kernels();
    const std::int64_t size = size_of(x.dtype);
    if (nest.column(0) == 1 && nest.column(1) == 1)
        return make_step("host.copy", [&pool, &k, x, y, nest, size] {
            nest.run(pool, 2 * size, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
                k.copy_rows(address(x, offset[0]), nest.row(0) * size, address(y, offset[1]), nest.row(1) * size, rows,
                            n * size);
            });
        });
    if (nest.column(1) == 1 && size <= 4 && nest.put_dense_in_rows(0))
        return make_step("host.transpose", [&pool, &k, x, y, nest, size] {
            nest.run(pool, 2 * size, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
                const std::byte* from = address(x, offset[0]);
                std::byte* to = address(y, offset[1]);
                if (size == 1)
                    k.transpose_bytes(reinterpret_cast<const std::uint8_t*>(from), nest.column(0),
                                      reinterpret_cast<std::uint8_t*>(to), nest.row(1), rows, n);
                else
                    k.transpose_words(reinterpret_cast<const std::uint32_t*>(from), nest.column(0),
                                      reinterpret_cast<std::uint32_t*>(to), nest.row(1), rows, n);
            });
        });
    return make_step("host.copy_strided", [&pool, x, y, nest, size] {
        nest.run(pool, 4 * size, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            with_width(x.dtype, [&](auto type) {
                using T = typename decltype(type)::type;
                const T* from = reinterpret_cast<const T*>(address(x, offset[0]));
                T* to = reinterpret_cast<T*>(address(y, offset[1]));
                const std::int64_t dx = nest.column(0), dy = nest.column(1);
                for (std::int64_t r = 0; r < rows; ++r, from += nest.row(0), to += nest.row(1))
                    for (std::int64_t i = 0; i < n; ++i) to[i * dy] = from[i * dx];
            });
        });
    });
}

// f32 to codes, codes to f32, codes to other codes; blocked where x and y are dense along different dimensions.
StepPtr recoded(ThreadPool& pool, const Tensor& x, const Tensor& y, Nest nest) {
    const ElementwiseKernels& k = elementwise_kernels();
    UnaryJob job;
    job.x = form_of(x);
    job.y = form_of(y);
    const bool to_codes = job.y.is_codes();
    std::shared_ptr<std::array<std::uint8_t, 256>> table;
    if (job.x.is_codes() && to_codes) table = coded(*table_of(x, [](double r) { return r; }), *y.q);
    const char* name = table ? "host.requantize" : to_codes ? "host.quantize" : "host.dequantize";
    const std::int64_t bytes = size_of(x.dtype) + size_of(y.dtype);
    // One row; strides in elements.
    const auto convert = [&k, job, table](const void* from, std::int64_t dx, void* to, std::int64_t dy,
                                          std::int64_t rows, std::int64_t x_row, std::int64_t y_row, std::int64_t n) {
        if (table)
            k.table_to_codes(table->data(), {from, x_row, dx}, {to, y_row, dy}, rows, n);
        else
            k.unary(job, {from, x_row, dx}, {to, y_row, dy}, rows, n);
    };
    const bool is_transposed = nest.column(1) == 1 && nest.column(0) > 1 && nest.put_dense_in_rows(0);
    if (!is_transposed)
        return make_step(name, [&pool, x, y, nest, convert, bytes] {
            nest.run(pool, bytes, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
                convert(address(x, offset[0]), nest.column(0), address(y, offset[1]), nest.column(1), rows, nest.row(0),
                        nest.row(1), n);
            });
        });
    // Bytes are what is transposed, in a tile that stays in L1: after coding, or before decoding.
    return make_step(name, [&pool, &k, x, y, nest, convert, bytes, to_codes] {
        nest.run(pool, bytes, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            // 256 long where the reals are, for few calls; a few planes to pixels all at once.
            constexpr std::int64_t tile = 64, length = 256, area = tile * length;
            std::uint8_t codes[area];
            const std::int64_t columns = std::min(n, to_codes ? tile : length);
            const std::int64_t depth =
                to_codes ? std::max(length, std::min<std::int64_t>(4096, area / columns / tile * tile)) : tile;
            for (std::int64_t r = 0; r < rows; r += depth) {
                const std::int64_t height = std::min(depth, rows - r);
                for (std::int64_t i = 0; i < n; i += columns) {
                    const std::int64_t width = std::min(columns, n - i);
                    const std::byte* from = address(x, offset[0] + r + i * nest.column(0));
                    std::byte* to = address(y, offset[1] + r * nest.row(1) + i);
                    if (to_codes) {
                        convert(from, 1, codes, 1, width, nest.column(0), depth, height);
                        k.transpose_bytes(codes, depth, reinterpret_cast<std::uint8_t*>(to), nest.row(1), height,
                                          width);
                    } else {
                        k.transpose_bytes(reinterpret_cast<const std::uint8_t*>(from), nest.column(0), codes, length,
                                          height, width);
                        convert(codes, 1, to, 1, height, length, nest.row(1), width);
                    }
                }
            }
        });
    });
}

// Between plain dtypes.
StepPtr cast(ThreadPool& pool, const Tensor& x, const Tensor& y, const Nest& nest) {
    return make_step("host.convert", [&pool, x, y, nest] {
        nest.run(pool, 16, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            with_type(x.dtype, [&](auto from_type) {
                with_type(y.dtype, [&](auto to_type) {
                    using X = typename decltype(from_type)::type;
                    using Y = typename decltype(to_type)::type;
                    const X* from = reinterpret_cast<const X*>(address(x, offset[0]));
                    Y* to = reinterpret_cast<Y*>(address(y, offset[1]));
                    const std::int64_t dx = nest.column(0), dy = nest.column(1);
                    for (std::int64_t r = 0; r < rows; ++r, from += nest.row(0), to += nest.row(1))
                        for (std::int64_t i = 0; i < n; ++i) to[i * dy] = converted<Y>(from[i * dx]);
                });
            });
        });
    });
}

}  // namespace

StepPtr make_copy(ThreadPool& pool, const Tensor& x, const Tensor& y) {
    const Nest nest(y.dims, {x.strides, y.strides});
    if (same_kind(x, y)) return moved(pool, x, y, nest);
    if (is_real(x) && is_real(y)) return recoded(pool, x, y, nest);
    if (!x.q && !y.q) return cast(pool, x, y, nest);
    refuse("a copy", {&x, &y});
}

StepPtr make_fill(ThreadPool& pool, double value, const Tensor& y) {
    const Nest nest(y.dims, {y.strides});
    std::uint64_t bits = 0;
    if (y.q)
        bits = code_of(static_cast<float>(value), *y.q);
    else
        with_type(y.dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const T element = converted<T>(value);
            std::memcpy(&bits, &element, sizeof element);
        });
    return make_step("host.fill", [&pool, y, nest, bits] {
        nest.run(pool, size_of(y.dtype), [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            with_width(y.dtype, [&](auto type) {
                using T = typename decltype(type)::type;
                T* to = reinterpret_cast<T*>(address(y, offset[0]));
                const T element = static_cast<T>(bits);
                for (std::int64_t r = 0; r < rows; ++r, to += nest.row(0)) {
                    if (nest.column(0) == 1)
                        std::fill_n(to, n, element);
                    else
                        for (std::int64_t i = 0; i < n; ++i) to[i * nest.column(0)] = element;
                }
            });
        });
    });
}

StepPtr make_where(ThreadPool& pool, const Tensor& cond, const Tensor& a, const Tensor& b, const Tensor& y) {
    if (cond.dtype != DType::b8 || !same_kind(a, b) || !same_kind(a, y)) refuse("where", {&cond, &a, &b, &y});
    const Nest nest(y.dims, {cond.strides, a.strides, b.strides, y.strides});
    return make_step("host.where", [&pool, cond, a, b, y, nest] {
        nest.run(pool, 1 + 3 * size_of(y.dtype), [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            with_width(y.dtype, [&](auto type) {
                using T = typename decltype(type)::type;
                const auto* pc = reinterpret_cast<const std::uint8_t*>(address(cond, offset[0]));
                const T* pa = reinterpret_cast<const T*>(address(a, offset[1]));
                const T* pb = reinterpret_cast<const T*>(address(b, offset[2]));
                T* py = reinterpret_cast<T*>(address(y, offset[3]));
                const std::int64_t dc = nest.column(0), da = nest.column(1), db = nest.column(2), dy = nest.column(3);
                for (std::int64_t r = 0; r < rows; ++r) {
                    // Steps known to the compiler let it use vectors.
                    if (dc == 1 && da == 1 && db == 1 && dy == 1)
                        for (std::int64_t i = 0; i < n; ++i) py[i] = pc[i] ? pa[i] : pb[i];
                    else if (dc == 1 && da == 0 && db == 1 && dy == 1)
                        for (std::int64_t i = 0; i < n; ++i) py[i] = pc[i] ? pa[0] : pb[i];
                    else if (dc == 1 && da == 1 && db == 0 && dy == 1)
                        for (std::int64_t i = 0; i < n; ++i) py[i] = pc[i] ? pa[i] : pb[0];
                    else
                        for (std::int64_t i = 0; i < n; ++i) py[i * dy] = pc[i * dc] ? pa[i * da] : pb[i * db];
                    pc += nest.row(0);
                    pa += nest.row(1);
                    pb += nest.row(2);
                    py += nest.row(3);
                }
            });
        });
    });
}

}  // namespace quantflow::host
