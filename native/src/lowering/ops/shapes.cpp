#include <algorithm>
#include <limits>

#include "../../op_table.hpp"
#include "../moves.hpp"
#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

void reshape(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const Dims dims = fitted(c.integers(1, "shape"), x.count());
    if (!strides_for_reshape(x, dims) && joined_apart(c, n, x, dims)) return;
    c.define(n.output, c.reshaped(x, dims));
}

void flatten(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    if (x.rank() == 0) return c.define(n.output, c.reshaped(x, {1}));
    const int from = axis(c.integer(1, "start_dim", 0), x.rank()), to = axis(c.integer(2, "end_dim", -1), x.rank());
    if (from > to) throw Error("flatten from dimension " + std::to_string(from) + " to " + std::to_string(to));
    Dims dims(x.dims.begin(), x.dims.begin() + from);
    std::int64_t joined = 1;
    for (int i = from; i <= to; ++i) joined *= x.dims[static_cast<std::size_t>(i)];  // no more than x has
    dims.push_back(joined);
    dims.insert(dims.end(), x.dims.begin() + to + 1, x.dims.end());
    c.define(n.output, c.reshaped(x, dims));
}

void unflatten(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const int at = axis(c.integer(1, "dim"), x.rank());
    Dims sizes = c.integers(2, "sizes");
    const auto open = std::find(sizes.begin(), sizes.end(), -1);
    if (open != sizes.end()) {
        *open = 1;
        const std::int64_t known = checked_count(sizes);
        *open = known == 0 ? 0 : x.dims[static_cast<std::size_t>(at)] / known;
    }
    if (checked_count(sizes) != x.dims[static_cast<std::size_t>(at)]) throw Error("unflatten to sizes that do not fit");
    Dims dims(x.dims.begin(), x.dims.begin() + at);
    dims.insert(dims.end(), sizes.begin(), sizes.end());
    dims.insert(dims.end(), x.dims.begin() + at + 1, x.dims.end());
    c.define(n.output, c.reshaped(x, dims));
}

void permute(Context& c, const Node& n) { c.define(n.output, permuted(c.operand(0, "self"), c.integers(1, "dims"))); }

void swap_dims(Context& c, const Node& n, std::optional<Dims> pair) {
    View x = c.operand(0, "self");
    if (pair && x.rank() > 2) throw Error("t of " + std::to_string(x.rank()) + " dimensions");
    if (pair && x.rank() < 2) return c.define(n.output, x);
    if (x.rank() == 0) throw Unsupported("a transposed number");
    const auto a = static_cast<std::size_t>(axis(pair ? (*pair)[0] : c.integer(1, "dim0"), x.rank()));
    const auto b = static_cast<std::size_t>(axis(pair ? (*pair)[1] : c.integer(2, "dim1"), x.rank()));
    std::swap(x.dims[a], x.dims[b]);
    std::swap(x.strides[a], x.strides[b]);
    c.define(n.output, x);
}

void transpose(Context& c, const Node& n) { swap_dims(c, n, std::nullopt); }
void transpose_matrix(Context& c, const Node& n) { swap_dims(c, n, Dims{0, 1}); }

void slice(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const int at = axis(c.integer(1, "dim", 0), x.rank());
    const std::int64_t end = c.integer(3, "end", std::numeric_limits<std::int64_t>::max());
    c.define(n.output, sliced(x, at, c.integer(2, "start", 0), end, c.integer(4, "step", 1)));
}

void narrow(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const int at = axis(c.integer(1, "dim", 0), x.rank());
    const std::int64_t size = x.dims[static_cast<std::size_t>(at)];
    const std::int64_t start = c.integer(2, "start"), length = c.integer(3, "length");
    const std::int64_t from = start < 0 ? start + size : start;
    if (from < 0 || length < 0 || from > size || length > size - from) throw Error("narrow outside its input");
    c.define(n.output, sliced(x, at, from, from + length, 1));
}

void select(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    c.define(n.output, selected(x, axis(c.integer(1, "dim"), x.rank()), c.integer(2, "index")));
}

void squeeze(Context& c, const Node& n) {
    View x = c.operand(0, "self");
    std::vector<bool> drop(x.dims.size(), !c.has(1, "dim"));
    if (c.has(1, "dim"))
        for (auto d : c.integers(1, "dim")) drop[static_cast<std::size_t>(axis(d, x.rank()))] = true;
    for (int i = x.rank() - 1; i >= 0; --i)
        if (drop[static_cast<std::size_t>(i)] && x.dims[static_cast<std::size_t>(i)] == 1) erase_dim(x, i);
    c.define(n.output, x);
}

void unsqueeze(Context& c, const Node& n) {
    View x = c.operand(0, "self");
    const int at = axis(c.integer(1, "dim"), x.rank() + 1);
    const auto i = static_cast<std::size_t>(at);
    const std::int64_t stride = i < x.dims.size() ? x.dims[i] * x.strides[i] : 1;
    insert_dim(x, at, stride);
    c.define(n.output, x);
}

void expand(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    Dims dims = c.integers(1, "size");
    if (dims.size() < x.dims.size()) throw Error("expand to fewer dimensions");
    const std::size_t lead = dims.size() - x.dims.size();
    for (std::size_t i = 0; i < dims.size(); ++i)
        if (dims[i] == -1 && i >= lead) dims[i] = x.dims[i - lead];
    c.define(n.output, expanded(x, dims));
}

void require_parts(std::int64_t count) {
    if (count > static_cast<std::int64_t>(kMaxItems)) throw Unsupported("a list of " + std::to_string(count) + " parts");
}

// `counts`: one number is how many parts there are, not how long each is.
void split(Context& c, const Node& n, bool counts) {
    const View x = c.operand(0, "self");
    const int at = axis(c.integer(2, "dim", 0), x.rank());
    const std::int64_t size = x.dims[static_cast<std::size_t>(at)];
    const Arg* given = c.argument(1, counts ? "chunks" : n.target == "split.Tensor" ? "split_size" : "split_sizes");
    if (given == nullptr) throw Unsupported("a split into parts of no size");
    const Val value = c.evaluated(*given);
    Dims sizes;
    if (const auto* items = value.as<Vals>())
        for (const Val& item : *items) sizes.push_back(as_integer(item, "split_sizes"));
    if (value.as<Vals>() == nullptr) {
        sizes = {as_integer(value, "split_size")};
        std::int64_t each = sizes[0];
        if (counts) each = each > 0 ? std::max<std::int64_t>(1, (size == 0 ? 0 : (size - 1) / each + 1)) : 0;
        if (each <= 0) throw Unsupported("a split into parts of no size");
        const std::int64_t count = size == 0 ? 1 : (size - 1) / each + 1;
        require_parts(count);
        sizes.assign(static_cast<std::size_t>(count), each);
        sizes.back() = size - (count - 1) * each;
    }
    require_parts(static_cast<std::int64_t>(sizes.size()));
    Vals parts;
    std::int64_t from = 0;
    for (auto s : sizes)
        if (s < 0 || s > size - from)
            throw Error("a split into parts that do not fit");
        else
            from += s;
    if (from != size) throw Error("a split into parts that do not fit");
    from = 0;
    for (const std::int64_t part : sizes) {
        parts.emplace_back(sliced(x, at, from, from + part, 1));
        from += part;
    }
    c.define(n.output, parts);
}

void unbind(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const int at = axis(c.integer(1, "dim", 0), x.rank());
    Vals parts;
    require_parts(x.dims[static_cast<std::size_t>(at)]);
    for (std::int64_t i = 0; i < x.dims[static_cast<std::size_t>(at)]; ++i) parts.emplace_back(selected(x, at, i));
    c.define(n.output, parts);
}

}  // namespace

void identity(Context& c, const Node& n) { c.define(n.output, c.operand(0, "self")); }

void dropout(Context& c, const Node& n) {
    const double p = c.real(1, "p");
    if (!(p >= 0 && p <= 1) || (c.flag(2, "train", false) && p != 0)) throw Unsupported("dropout while training");
    c.define(n.output, c.operand(0, "input"));
}

const OpRows& shape_ops() {
    static const OpRows rows = {
        {"reshape", reshape, Role::move},
        {"view", reshape, Role::move},
        {"_unsafe_view", reshape},
        {"flatten", flatten, Role::move},
        {"unflatten", unflatten, Role::move},
        {"permute", permute, Role::move},
        {"transpose", transpose, Role::move},
        {"t", transpose_matrix, Role::move},
        {"slice", slice, Role::move},
        {"narrow", narrow, Role::move},
        {"select", select, Role::move},
        {"squeeze", squeeze, Role::move},
        {"unsqueeze", unsqueeze, Role::move},
        {"expand", expand},
        {"split", with<split, false>},
        {"split_with_sizes", with<split, false>},
        {"chunk", with<split, true>},
        {"unbind", unbind},
        {"contiguous", identity, Role::move},
        {"clone", identity, Role::move},
        {"detach", identity},
        {"alias", identity},
        {"dropout", dropout},
    };
    return rows;
}

}  // namespace quantflow::lowering
