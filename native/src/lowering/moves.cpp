#include "moves.hpp"

#include <numeric>
#include <utility>

#include "ops/registry.hpp"

namespace quantflow::lowering {
namespace {

bool reads_first(const Node& n, int value) {
    const Ref* ref = n.args.empty() ? nullptr : n.args[0].as<Ref>();
    return ref != nullptr && ref->value == value;
}

// Moves after which x, read row by row as n's result, has one stride for each dimension. They end at the first reshape, so
// that a long chain of them is looked at once.
bool parted_by_moves(Context& c, const Node& n, Moved x) {
    std::vector<int> nodes;
    for (int value = n.output;;) {
        const int user = c.graph.only_user(value);
        auto next = user < 0 ? std::nullopt : moved(c, c.graph.node(user), x);
        if (!next) return false;
        x = std::move(*next);
        nodes.push_back(user);
        value = c.graph.node(user).output;
        if (const auto plain = x.plain()) {
            c.fusion.absorb(nodes);
            c.define(value, *plain);
            return true;
        }
        if (base_name(c.graph.node(user).target) == "reshape") return false;
    }
}

// Quantize and linears, up to a reshape that reads their rows as they lie.
bool taken_by_rows(Context& c, const Node& n, const View& x, const Dims& dims) {
    if (dims.empty()) return false;
    Dims apart = x.dims;
    std::int64_t width = 1;
    while (!apart.empty() && width < dims.back()) {
        width *= apart.back();
        apart.pop_back();
    }
    if (width != dims.back()) return false;
    apart.push_back(width);
    const auto strides = strides_for_reshape(x, apart);
    if (!strides) return false;
    View rows = x;
    rows.dims = apart;
    rows.strides = *strides;
    for (int value = n.output;;) {
        const int user = c.graph.only_user(value);
        if (user < 0) return false;
        const Node& link = c.graph.node(user);
        if (!reads_first(link, value)) return false;
        if (link.op == Op::linear && link.args[1].is_none()) {
            apart.back() = link.weights.dims[0];
        } else if (link.op != Op::quantize) {
            const auto as_they_lie = rows_as_they_lie(rows, apart);
            if (!as_they_lie) return false;
            View y = rows;
            y.dims = apart;
            y.strides = *as_they_lie;
            const auto next = moved(c, link, {y, apart});
            if (base_name(link.target) != "reshape" || !next || !next->plain()) return false;
            c.define(n.output, rows);
            return true;
        }
        value = link.output;
    }
}

}  // namespace

std::optional<View> Moved::plain() const {
    if (view.dims == dims) return view;
    const auto strides = strides_for_reshape(view, dims);
    if (!strides) return std::nullopt;
    View v = view;
    v.dims = dims;
    v.strides = *strides;
    return v;
}

std::optional<Moved> moved(Context& c, const Node& n, const Moved& x) {
    const std::string name = n.op == Op::aten ? base_name(n.target) : std::string();
    const auto numbers = [&](std::size_t position) {
        return position < n.args.size() ? c.known_integers(n.args[position]) : std::nullopt;
    };
    if (name == "reshape") {
        const auto dims = numbers(1);
        if (!dims) return std::nullopt;
        return Moved{x.view, fitted(*dims, x.view.count())};
    }
    const int rank = static_cast<int>(x.dims.size());
    Dims order(x.dims.size());
    std::iota(order.begin(), order.end(), std::int64_t{0});
    if (name == "permute") {
        const auto dims = numbers(1);
        if (!dims) return std::nullopt;
        order = *dims;
    } else if (name == "transpose") {
        const auto a = numbers(1), b = numbers(2);
        if (!a || !b || a->size() != 1 || b->size() != 1 || rank == 0) return std::nullopt;
        std::swap(order[static_cast<std::size_t>(axis((*a)[0], rank))],
                  order[static_cast<std::size_t>(axis((*b)[0], rank))]);
    } else {
        return std::nullopt;
    }
    View read_so = x.view;
    read_so.dims = read_so.strides = x.dims;
    const Dims dims = permuted(read_so, order).dims;
    const auto view = permuted_as(x.view, x.dims, order);
    if (!view) return std::nullopt;
    return Moved{*view, dims};
}

std::optional<Dims> rows_as_they_lie(const View& x, const Dims& dims) {
    if (x.rank() == 0 || x.strides.back() != 1 || has_no_elements(x.dims) || has_no_elements(dims) || !is_dense(x))
        return std::nullopt;
    const Dims strides = dense_like(x, dims);
    return strides.back() == 1 ? std::optional(strides) : std::nullopt;
}

std::optional<MovedSum> sum_past_moves(Context& c, int value, const View& y) {
    std::vector<int> nodes;
    for (Moved at{y, y.dims};;) {
        if (const auto sum = c.fusion.sum_after(value)) {
            const View* other = c.value(sum->other).as<View>();
            const auto result = at.plain();
            if (!result || other == nullptr || other->dtype != DType::f32 || other->dims != result->dims ||
                !same_layout(result->dims, other->strides, result->strides))
                return std::nullopt;
            nodes.push_back(sum->node);
            return MovedSum{*other, *result, sum->output, std::move(nodes)};
        }
        const int user = c.graph.value(value).q ? -1 : c.graph.only_user(value);
        auto next = user < 0 ? std::nullopt : moved(c, c.graph.node(user), at);
        if (!next) return std::nullopt;
        at = std::move(*next);
        nodes.push_back(user);
        value = c.graph.node(user).output;
    }
}

bool joined_apart(Context& c, const Node& n, const View& x, const Dims& dims) {
    return n.op == Op::aten && (parted_by_moves(c, n, {x, dims}) || taken_by_rows(c, n, x, dims));
}

}  // namespace quantflow::lowering
