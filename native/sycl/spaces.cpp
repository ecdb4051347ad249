// How tensors become iteration spaces, and spaces become launches.
#include <limits>

#include "steps.hpp"

namespace quantflow::xpu {
namespace {

constexpr std::size_t kLanes = 16;  // the kernels' sub-group size
constexpr std::int64_t kMostItems = std::numeric_limits<std::int32_t>::max();

std::size_t power_of_two_from(std::size_t n) {
    std::size_t p = 1;
    while (p < n) p *= 2;
    return p;
}

std::size_t rounded_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

// lanes x rows per work-group. A CPU runs a work-group on one thread and pays for each: large ones, as long as there
// are enough for all threads. 256 keep a GPU's vector engine busy.
sycl::nd_range<3> make_range(const Device& device, std::size_t outer, std::size_t rows, std::size_t lanes) {
    std::size_t target = 256;
    if (device.is_cpu) {
        const std::size_t share = outer * rows * lanes / (4 * device.compute_units);
        target = std::min<std::size_t>(2048, std::max<std::size_t>(128, power_of_two_from(share)));
    }
    const std::size_t group_lanes = std::min(target, std::max(kLanes, power_of_two_from(lanes)));
    const std::size_t group_rows = std::min(target / group_lanes, power_of_two_from(rows));
    return {sycl::range<3>(outer, rounded_up(rows, group_rows), rounded_up(lanes, group_lanes)),
            sycl::range<3>(1, group_rows, group_lanes)};
}

}  // namespace

Space make_space(const Dims& dims, const std::vector<const Dims*>& strides, std::size_t first) {
    struct Axis {
        std::int64_t extent;
        std::vector<std::int64_t> stride;
    };
    std::vector<Axis> axes;
    std::int64_t items = 1;
    for (std::size_t d = 0; d < dims.size(); ++d) {
        items *= dims[d];
        if (items > kMostItems)
            throw Unsupported("the SYCL kernels take tensors of less than 2**31 elements, not " + text_of(dims));
        if (dims[d] == 1) continue;
        Axis axis{dims[d], {}};
        for (const auto* s : strides) axis.stride.push_back((*s)[d]);
        axes.push_back(std::move(axis));
    }
    std::stable_sort(axes.begin(), axes.end(), [first](const Axis& a, const Axis& b) {
        if (a.stride[first] != b.stride[first]) return a.stride[first] < b.stride[first];
        return a.stride < b.stride;
    });
    for (std::size_t i = 0; i + 1 < axes.size();) {
        bool merges = true;
        for (std::size_t n = 0; n < strides.size(); ++n)
            merges = merges && axes[i + 1].stride[n] == axes[i].stride[n] * axes[i].extent;
        if (merges) {
            axes[i].extent *= axes[i + 1].extent;
            axes.erase(axes.begin() + static_cast<std::ptrdiff_t>(i) + 1);
        } else {
            ++i;
        }
    }
    if (axes.size() > 6)
        throw Unsupported("the SYCL kernels take 6 dimensions that can't be merged, not " + text_of(dims));
    // Lanes along 3 channels would leave 13 of 16 idle.
    if (axes.size() > 1 && axes[0].extent < 16) {
        const auto longest = std::max_element(axes.begin(), axes.end(),
                                              [](const Axis& a, const Axis& b) { return a.extent < b.extent; });
        std::rotate(axes.begin(), longest, longest + 1);
    }
    Space space{};
    space.rank = static_cast<int>(axes.size());
    space.unit = 1;
    for (std::size_t d = 0; d < 6; ++d) {
        space.extent[d] = d < axes.size() ? static_cast<unsigned>(axes[d].extent) : 1;
        for (std::size_t n = 0; n < strides.size() && d < axes.size(); ++n)
            space.stride[n][d] = axes[d].stride[n];
    }
    for (std::size_t n = 0; n < strides.size(); ++n) space.unit &= axes.empty() || space.stride[n][0] == 1;
    return space;
}

sycl::nd_range<3> range_of(const Device& device, const Space& s) {
    const std::size_t outer = std::size_t{s.extent[2]} * s.extent[3] * s.extent[4] * s.extent[5];
    return make_range(device, outer, s.extent[1], s.extent[0]);
}

sycl::nd_range<3> row_range_of(const Device& device, const Space& s) {
    const std::size_t outer = std::size_t{s.extent[1]} * s.extent[2] * s.extent[3] * s.extent[4] * s.extent[5];
    const std::size_t share = outer * s.extent[0] / (4 * device.compute_units);
    const std::size_t most = device.is_cpu ? std::max<std::size_t>(1, std::min<std::size_t>(64, share)) : 8;
    const std::size_t rows = std::min(power_of_two_from(most), power_of_two_from(s.extent[0]));
    return {sycl::range<3>(outer, rounded_up(s.extent[0], rows), kLanes), sycl::range<3>(1, rows, kLanes)};
}

sycl::nd_range<3> range_of(const Device& device, const Image& m) {
    const std::size_t outer = std::size_t{m.extent[0]} * m.extent[2] * m.extent[3];
    return m.lane_is_channel ? make_range(device, outer, m.extent[4], m.extent[1])
                             : make_range(device, outer, m.extent[1], m.extent[4]);
}

}  // namespace quantflow::xpu
