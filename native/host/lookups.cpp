// Elements at looked-up coordinates, and running sums of integers.
#include <cstring>

#include "elementwise_nest.hpp"
#include "steps.hpp"

namespace quantflow::host {
namespace {

std::int64_t offset_of(std::int64_t k, const Dims& dims, const Dims& strides) {
    std::int64_t sum = 0;
    for (std::size_t d = dims.size(); d-- > 0;) {
        sum += k % dims[d] * strides[d];
        k /= dims[d];
    }
    return sum;
}

}  // namespace

StepPtr make_index(ThreadPool& pool, const Tensor& x, const std::vector<std::optional<Tensor>>& indices,
                   const Tensor& y) {
    if (x.dtype != y.dtype || !(x.q == y.q)) throw Unsupported("indexing that converts");
    struct Lookup {
        Tensor index;
        std::int64_t size, stride;
    };
    std::vector<Lookup> lookups;
    Dims rest, x_strides;
    for (std::size_t d = 0; d < x.dims.size(); ++d) {
        if (indices[d]) {
            if (indices[d]->dtype != DType::s64) throw Unsupported("indexing by what is no s64");
            lookups.push_back({*indices[d], x.dims[d], x.strides[d]});
        } else {
            rest.push_back(x.dims[d]);
            x_strides.push_back(x.strides[d]);
        }
    }
    const auto lead = static_cast<std::ptrdiff_t>(y.dims.size() - rest.size());
    const Dims places(y.dims.begin(), y.dims.begin() + lead), rest_strides(y.strides.begin() + lead, y.strides.end());
    const Dims place_strides(y.strides.begin(), y.strides.begin() + lead);
    std::int64_t count = 1, width = 1;
    for (auto n : places) count *= n;
    for (auto n : rest) width *= n;
    const bool is_dense =
        same_layout(rest, x_strides, row_major(rest)) && same_layout(rest, rest_strides, row_major(rest));
    return make_step("host.index", [=, &pool] {
        if (count == 0 || width == 0) return;
        const auto position = [&](const Lookup& l, std::int64_t k) {
            const std::int64_t i = l.index.data<std::int64_t>()[offset_of(k, places, l.index.strides)];
            return i < 0 ? i + l.size : i;
        };
        // Before anything is written, and here: a task must not throw.
        for (const Lookup& l : lookups)
            for (std::int64_t k = 0; k < count; ++k)
                if (const std::int64_t i = position(l, k); i < 0 || i >= l.size)
                    throw Error("index " + std::to_string(i < 0 ? i - l.size : i) + " is outside a dimension of " +
                                std::to_string(l.size));
        const std::int64_t size = size_of(y.dtype);
        run_ranges(pool, count, count * (2 * width * size + 32), [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t k = first; k < last; ++k) {
                std::int64_t from = 0;
                for (const Lookup& l : lookups) from += position(l, k) * l.stride;
                const std::int64_t to = offset_of(k, places, place_strides);
                if (is_dense) {
                    std::memcpy(address(y, to), address(x, from), static_cast<std::size_t>(width * size));
                    continue;
                }
                for (std::int64_t i = 0; i < width; ++i)
                    std::memcpy(address(y, to + offset_of(i, rest, rest_strides)),
                                address(x, from + offset_of(i, rest, x_strides)), static_cast<std::size_t>(size));
            }
        });
    });
}

StepPtr make_running_sum(ThreadPool& pool, const Tensor& x, int axis, const Tensor& y) {
    if (x.dtype != DType::s64 || y.dtype != DType::s64 || x.q || y.q)
        throw Unsupported("a running sum of what is no s64");
    const auto at = static_cast<std::size_t>(axis);
    Dims lanes = x.dims;
    const std::int64_t length = lanes[at], x_step = x.strides[at], y_step = y.strides[at];
    lanes[at] = 1;
    std::int64_t count = 1;
    for (auto n : lanes) count *= n;
    return make_step("host.running_sum", [=, &pool] {
        run_ranges(pool, count, count * length * 16, [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t k = first; k < last; ++k) {
                const std::int64_t* from = x.data<std::int64_t>() + offset_of(k, lanes, x.strides);
                std::int64_t* to = y.data<std::int64_t>() + offset_of(k, lanes, y.strides);
                std::uint64_t sum = 0;  // wraps around, as PyTorch's
                for (std::int64_t i = 0; i < length; ++i) {
                    sum += static_cast<std::uint64_t>(from[i * x_step]);
                    to[i * y_step] = static_cast<std::int64_t>(sum);
                }
            }
        });
    });
}

}  // namespace quantflow::host
