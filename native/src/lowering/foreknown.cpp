#include "foreknown.hpp"

#include <algorithm>

namespace quantflow::lowering {
namespace {

// Longer tables are no positions, and looking through them takes time.
constexpr std::int64_t kMostLookedAt = 1 << 16;

bool is_readable(const Stored& s, DType dtype) {
    return s.data != nullptr && s.dtype == dtype && s.count() > 0 && s.count() <= kMostLookedAt;
}

}  // namespace

std::int64_t Counting::least(const Dims& dims) const {
    std::int64_t sum = start;
    for (std::size_t d = 0; d < dims.size(); ++d) sum += std::min<std::int64_t>(0, (dims[d] - 1) * steps[d]);
    return sum;
}

std::int64_t Counting::most(const Dims& dims) const {
    std::int64_t sum = start;
    for (std::size_t d = 0; d < dims.size(); ++d) sum += std::max<std::int64_t>(0, (dims[d] - 1) * steps[d]);
    return sum;
}

std::optional<Counting> Foreknown::counting(const View& v) {
    if (v.dtype != DType::s64 || v.q || has_no_elements(v.dims)) return std::nullopt;
    if (lines_.count(v.buffer) == 0) {
        std::optional<Line> line;
        const auto it = stored_.find(v.buffer);
        if (it != stored_.end() && is_readable(*it->second, DType::s64)) {
            const auto* numbers = reinterpret_cast<const std::int64_t*>(it->second->data);
            const std::int64_t count = it->second->count();
            constexpr std::int64_t bound = std::int64_t{1} << 40;
            const auto is_small = [](std::int64_t number) { return -bound < number && number < bound; };
            bool counts = is_small(numbers[0]) && (count == 1 || is_small(numbers[1]));
            const std::int64_t step = counts && count > 1 ? numbers[1] - numbers[0] : 1;
            for (std::int64_t i = 1; counts && i < count; ++i) counts = numbers[i] == numbers[0] + i * step;
            if (counts) line = Line{numbers[0], step};
        }
        lines_[v.buffer] = line;
    }
    const std::optional<Line>& line = lines_[v.buffer];
    if (!line) return std::nullopt;
    Counting found;
    found.start = line->start + v.offset / size_of(v.dtype) * line->step;
    for (std::int64_t stride : v.strides) found.steps.push_back(stride * line->step);
    return found;
}

std::optional<bool> Foreknown::flag(const View& v) {
    if (v.dtype != DType::b8 || has_no_elements(v.dims)) return std::nullopt;
    if (flags_.count(v.buffer) == 0) {
        std::optional<bool> found;
        const auto it = stored_.find(v.buffer);
        if (it != stored_.end() && is_readable(*it->second, DType::b8)) {
            const std::byte* begin = it->second->data;
            const std::byte first = *begin;
            if (std::all_of(begin, begin + it->second->count(), [&](std::byte b) { return b == first; }))
                found = first != std::byte{0};
        }
        flags_[v.buffer] = found;
    }
    return flags_[v.buffer];
}

std::optional<bool> Foreknown::compared(Binary op, const Counting& a, const Dims& a_dims, const Counting& b,
                                        const Dims& b_dims) {
    const std::int64_t a_least = a.least(a_dims), a_most = a.most(a_dims), b_least = b.least(b_dims),
                       b_most = b.most(b_dims);
    const auto decided = [](bool always, bool never) {
        return always ? std::optional<bool>(true) : never ? std::optional<bool>(false) : std::nullopt;
    };
    switch (op) {
        case Binary::lt: return decided(a_most < b_least, a_least >= b_most);
        case Binary::le: return decided(a_most <= b_least, a_least > b_most);
        case Binary::gt: return decided(a_least > b_most, a_most <= b_least);
        case Binary::ge: return decided(a_least >= b_most, a_most < b_least);
        default: return std::nullopt;
    }
}

}  // namespace quantflow::lowering
