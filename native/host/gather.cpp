// Rows of a table.
#include <cstring>

#include "window_steps.hpp"

namespace quantflow::host {

using namespace windows;

StepPtr make_gather(ThreadPool& pool, const Tensor& table, const Tensor& index, const Tensor& y) {
    const bool is_moved = table.dtype == y.dtype && table.q == y.q;
    const bool are_rows_moved = is_moved && table.strides[1] == 1 && y.strides.back() == 1;
    if (index.dtype != DType::s64 || (!are_rows_moved && (!holds_reals(table) || !holds_reals(y))))
        refuse("a gather", table, y);
    const std::int64_t count = index.count(), width = table.dims[1];
    // Where the k-th row of y and its index lie.
    const Dims dims = index.dims, index_strides = index.strides, y_strides = y.strides;
    const auto offset = [dims](std::int64_t k, const Dims& strides) {
        std::int64_t sum = 0;
        for (std::size_t d = dims.size(); d-- > 0;) {
            sum += k % dims[d] * strides[d];
            k /= dims[d];
        }
        return sum;
    };
    const Form from = form_of(table), to = form_of(y);
    return make_step("host.gather", [=, &pool, &e = elementwise_kernels()] {
        if (count == 0 || width == 0) return;
        // Before anything is written, and here: a task must not throw.
        for (std::int64_t k = 0; k < count; ++k) {
            const std::int64_t row = index.data<std::int64_t>()[offset(k, index_strides)];
            if (row < 0 || row >= table.dims[0])
                throw Error("index " + std::to_string(row) + " is outside a table of " + std::to_string(table.dims[0]) +
                            " rows");
        }
        const std::int64_t x_column = table.strides[1], y_column = y_strides.back(), size = size_of(y.dtype);
        run_ranges(pool, count, count * width * (size_of(table.dtype) + size),
                   [&](std::int64_t first, std::int64_t last) {
                       constexpr std::int64_t block = 512;
                       float reals[block];
                       for (std::int64_t k = first; k < last; ++k) {
                           const std::int64_t row = index.data<std::int64_t>()[offset(k, index_strides)];
                           const std::int64_t x_offset = row * table.strides[0], y_offset = offset(k, y_strides);
                           if (are_rows_moved) {
                               std::memcpy(address(y, y_offset), address(table, x_offset),
                                           static_cast<std::size_t>(width * size));
                               continue;
                           }
                           for (std::int64_t i = 0; i < width; i += block) {
                               const std::int64_t n = std::min(block, width - i);
                               e.load(from, address(table, x_offset + i * x_column), x_column, n, reals);
                               e.store(to, reals, n, address(y, y_offset + i * y_column), y_column);
                           }
                       }
                   });
    });
}

}  // namespace quantflow::host
