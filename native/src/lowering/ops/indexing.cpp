#include <algorithm>
#include <cmath>
#include <cstring>

#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

// PyTorch's own kernels are faster on more: ours look each element up.
constexpr std::int64_t kMostLookups = 1 << 20;

void arange(Context& c, const Node& n) {
    const std::string overload = overload_name(n.target);
    const bool has_start = overload == "start" || overload == "start_step";
    std::vector<Val> numbers;
    for (const Arg& a : n.args) numbers.push_back(c.evaluated(a));
    if (numbers.size() != (overload == "start_step" ? 3u : has_start ? 2u : 1u))
        throw Unsupported("arange with these arguments");
    bool are_integers = true;
    for (const Val& v : numbers) are_integers = are_integers && (v.as<std::int64_t>() != nullptr || v.as<bool>() != nullptr);
    const double start = has_start ? as_real(numbers[0], "start") : 0, end = as_real(numbers[has_start ? 1 : 0], "end"),
                 step = numbers.size() == 3 ? as_real(numbers[2], "step") : 1;
    const DType dtype = c.asked_dtype().value_or(are_integers ? DType::s64 : DType::f32);
    // So that every element is exact in any dtype and in any order of computing it.
    constexpr double most = 1 << 24;
    if (std::floor(start) != start || std::floor(step) != step || step == 0 || std::abs(start) > most ||
        !(std::abs(end) < most) || std::abs(step) > most || dtype == DType::b8)
        throw Unsupported("arange of other than whole numbers");
    const auto count = static_cast<std::int64_t>(std::max(0.0, std::ceil((end - start) / step)));
    if (count > kMostLookups) throw Unsupported("arange of so many numbers");
    c.define(n.output, c.counted(static_cast<std::int64_t>(start), static_cast<std::int64_t>(step), count, dtype));
}

// One dimension of x, by what is looked up in it.
struct Lookup {
    std::size_t dim;
    View index;
    std::optional<Counting> counting;
};

// x at the coordinates that `lookups` give, in ascending order of their dimensions: (*places, *other dimensions of x),
// the places where the first looked up dimension was if these lie side by side, in front otherwise.
View looked_up(Context& c, const View& x, const std::vector<Lookup>& lookups, const Dims& places) {
    const std::size_t first = lookups.front().dim;
    const bool side_by_side = lookups.back().dim - first + 1 == lookups.size();
    const auto lead = static_cast<std::ptrdiff_t>(side_by_side ? first : 0);
    Dims dims, strides;  // of the dimensions that are kept whole
    for (std::size_t d = 0, next = 0; d < x.dims.size(); ++d) {
        if (next < lookups.size() && lookups[next].dim == d) {
            ++next;
            continue;
        }
        dims.push_back(x.dims[d]);
        strides.push_back(x.strides[d]);
    }
    View view = x;
    Dims steps(places.size(), 0);
    bool is_view = true;
    for (const Lookup& l : lookups) {
        const std::int64_t size = x.dims[l.dim];
        if (!l.counting || l.counting->least(places) < 0 || l.counting->most(places) >= size) {
            is_view = false;
            break;
        }
        view.offset += l.counting->start * x.strides[l.dim] * size_of(x.dtype);
        for (std::size_t d = 0; d < places.size(); ++d)
            steps[d] += l.counting->steps[d] * x.strides[l.dim];
    }
    for (std::size_t d = 0; d < places.size(); ++d)
        if (places[d] == 1) steps[d] = 1;
    is_view = is_view && std::all_of(steps.begin(), steps.end(), [](std::int64_t s) { return s >= 0; });
    if (is_view) {
        view.dims = dims;
        view.strides = strides;
        view.dims.insert(view.dims.begin() + lead, places.begin(), places.end());
        view.strides.insert(view.strides.begin() + lead, steps.begin(), steps.end());
        return view;
    }
    Dims found = places;
    found.insert(found.end(), dims.begin(), dims.end());
    if (checked_count(found) > kMostLookups) throw Unsupported("indexing of so many elements");
    Dims order;
    for (std::ptrdiff_t d = 0; d < lead; ++d) order.push_back(static_cast<std::int64_t>(places.size()) + d);
    for (std::size_t d = 0; d < places.size(); ++d) order.push_back(static_cast<std::int64_t>(d));
    for (std::size_t d = places.size() + static_cast<std::size_t>(lead); d < found.size(); ++d)
        order.push_back(static_cast<std::int64_t>(d));
    Dims result, found_strides(found.size());
    for (auto d : order) result.push_back(found[static_cast<std::size_t>(d)]);
    const Dims result_strides = row_major(result);
    for (std::size_t d = 0; d < order.size(); ++d)
        found_strides[static_cast<std::size_t>(order[d])] = result_strides[d];
    const View y = c.allocate_like(x, found, found_strides);
    std::vector<std::optional<Tensor>> indices(x.dims.size());
    for (const Lookup& l : lookups) indices[l.dim] = c.tensor(l.index);
    c.emit(c.backend.index(c.tensor(x), indices, c.tensor(y)), {&x}, {&y});
    for (const Lookup& l : lookups) c.also_reads(l.index);
    return permuted(y, order);
}

View integers_of(Context& c, const View& index) {
    if (index.dtype == DType::s32) return c.copied(index, row_major(index.dims), DType::s64, std::nullopt);
    if (index.dtype != DType::s64 || index.q) throw Unsupported("indexing by what is no integer");
    return index;
}

void index(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const Arg* indices = c.argument(1, "indices");
    if (indices == nullptr) throw Unsupported("indexing with these arguments");
    const Val given = c.evaluated(*indices);
    const auto* items = given.as<Vals>();
    if (items == nullptr || items->size() > x.dims.size()) throw Unsupported("indexing with these arguments");
    std::vector<Lookup> lookups;
    Dims places;
    for (std::size_t d = 0; d < items->size(); ++d) {
        if ((*items)[d].as<std::monostate>() != nullptr) continue;
        const auto* view = (*items)[d].as<View>();
        if (view == nullptr) throw Unsupported("indexing with these arguments");
        lookups.push_back({d, integers_of(c, *view), std::nullopt});
        places = broadcast_dims(places, view->dims);
    }
    if (lookups.empty()) throw Unsupported("indexing with these arguments");
    for (Lookup& l : lookups) {
        l.index = expanded(l.index, places);
        l.counting = c.foreknown.counting(l.index);
    }
    c.define(n.output, looked_up(c, x, lookups, places));
}

// y[i][j] = x[index[i][j]][j] along dimension 0, and so on; nothing is broadcast.
void gather(Context& c, const Node& n) {
    const View x = c.operand(0, "self"), index = integers_of(c, c.operand(2, "index"));
    if (x.rank() == 0 || index.rank() != x.rank() || c.flag(3, "sparse_grad", false))
        throw Unsupported("gather of these ranks");
    const auto along = static_cast<std::size_t>(axis(c.integer(1, "dim"), x.rank()));
    std::vector<Lookup> lookups;
    for (std::size_t d = 0; d < x.dims.size(); ++d) {
        View own = index;
        if (d != along) {
            if (index.dims[d] > x.dims[d]) throw Error("gather of an index larger than its input");
            own = c.counted(0, 1, index.dims[d], DType::s64);
            own.dims = index.dims;
            own.strides.assign(index.dims.size(), 0);
            own.strides[d] = 1;
        }
        lookups.push_back({d, own, c.foreknown.counting(own)});
    }
    c.define(n.output, looked_up(c, x, lookups, index.dims));
}

void running_sum(Context& c, const Node& n) {
    View x = c.operand(0, "self");
    if (x.q || x.dtype == DType::f32) throw Unsupported("a running sum of floats");
    if (c.asked_dtype().value_or(DType::s64) != DType::s64) throw Unsupported("a running sum in another dtype");
    if (x.rank() == 0) throw Unsupported("a running sum of a scalar");
    if (x.dtype != DType::s64) x = c.copied(x, row_major(x.dims), DType::s64, std::nullopt);
    View y = c.allocate(DType::s64, x.dims, row_major(x.dims));
    c.emit(c.backend.running_sum(c.tensor(x), axis(c.integer(1, "dim"), x.rank()), c.tensor(y)), {&x}, {&y});
    c.define(n.output, y);
}

}  // namespace

const OpRows& indexing_ops() {
    static const OpRows rows = {
        {"arange", arange},
        {"index", index},
        {"gather", gather},
        {"cumsum", running_sum},
    };
    return rows;
}

}  // namespace quantflow::lowering
