#include <algorithm>

#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

void repeat(Context& c, const Node& n) {
    View x = c.operand(0, "self");
    const Dims times = c.integers(1, "repeats");
    while (x.dims.size() < times.size()) insert_dim(x, 0, 0);
    Dims dims, split_dims, split_strides;
    if (times.size() != x.dims.size()) throw Error("repeat names fewer dimensions than its input has");
    checked_count(times);
    if (x.rank() > 8) throw Unsupported("repeat of more than eight dimensions");  // each is two while it is copied
    for (std::size_t i = 0; i < times.size(); ++i) {
        dims.push_back(checked_count({x.dims[i], times[i]}));
        split_dims.insert(split_dims.end(), {times[i], x.dims[i]});
        split_strides.insert(split_strides.end(), {0, x.strides[i]});
    }
    View source = x;
    source.dims = split_dims;
    source.strides = split_strides;
    View y = c.allocate_like(x, split_dims, row_major(split_dims));
    c.put(source, y);
    y.dims = dims;
    y.strides = row_major(dims);
    c.define(n.output, y);
}

void roll(Context& c, const Node& n) {
    View x = c.operand(0, "self");
    const Dims shifts = c.integers(1, "shifts"), dims = c.integers(2, "dims", Dims{});
    if (dims.size() != shifts.size() || dims.empty()) throw Unsupported("roll of a flattened tensor");
    // A dimension that is named twice moves by the sum.
    Dims along(x.dims.size(), 0);
    for (std::size_t i = 0; i < dims.size(); ++i) {
        const int at = axis(dims[i], x.rank());
        const std::int64_t size = x.dims[static_cast<std::size_t>(at)];
        auto& shift = along[static_cast<std::size_t>(at)];
        if (size > 0) shift = (shift + (shifts[i] % size) + size) % size;
    }
    // All dimensions at once: each keeps two ranges, so 2^k blocks move.
    std::vector<std::pair<int, std::int64_t>> moves;
    for (std::size_t i = 0; i < along.size(); ++i)
        if (along[i] != 0) moves.emplace_back(static_cast<int>(i), along[i]);
    if (moves.size() > 4) throw Unsupported("roll of more than four dimensions");
    View y = c.allocate_like(x, x.dims, dense_like(x));
    for (unsigned block = 0; block < 1u << moves.size(); ++block) {
        View from = x, to = y;
        for (std::size_t i = 0; i < moves.size(); ++i) {
            const auto [at, shift] = moves[i];
            const std::int64_t size = x.dims[static_cast<std::size_t>(at)];
            const bool wraps = ((block >> i) & 1u) != 0;
            from = wraps ? sliced(from, at, size - shift, size, 1) : sliced(from, at, 0, size - shift, 1);
            to = wraps ? sliced(to, at, 0, shift, 1) : sliced(to, at, shift, size, 1);
        }
        c.put(from, to);
    }
    c.define(n.output, y);
}

void join(Context& c, const Node& n, const std::vector<View>& all, std::int64_t dim) {
    std::vector<View> parts;
    for (const View& v : all)  // PyTorch ignores empty tensors of rank 1
        if (!(v.rank() == 1 && v.dims[0] == 0)) parts.push_back(v);
    if (parts.empty()) return c.define(n.output, all[0]);
    const int at = axis(dim, parts[0].rank());
    Dims dims = parts[0].dims;
    dims[static_cast<std::size_t>(at)] = 0;
    for (const View& v : parts) {
        for (std::size_t i = 0; i < dims.size(); ++i)
            if (v.dims.size() != dims.size() || (i != static_cast<std::size_t>(at) && v.dims[i] != dims[i]))
                throw Error("cat of tensors whose shapes do not fit");
        const bool is_real = v.q || v.dtype == DType::f32;
        if (!is_real && v.dtype != parts[0].dtype) throw Unsupported("cat of several kinds of integers");
        dims[static_cast<std::size_t>(at)] += v.dims[static_cast<std::size_t>(at)];
        if (dims[static_cast<std::size_t>(at)] > kMaxElements) throw Error("cat of more than any tensor holds");
    }
    const bool is_float = !c.graph.value(n.output).q;
    View y;
    View shape = parts[0];
    for (const View& v : parts)
        if (v.count() > shape.count()) shape = v;
    shape.dims = dims;
    const Dims strides = repeats(shape) ? row_major(dims) : dense_like(shape);
    if (is_float &&
        std::any_of(parts.begin(), parts.end(), [](const View& v) { return v.q || v.dtype == DType::f32; })) {
        y = c.allocate_result(dims, strides, n.output);
    } else {
        y = is_float ? c.allocate(parts[0].dtype, dims, strides) : c.allocate_result(dims, strides, n.output);
    }
    std::int64_t from = 0;
    for (const View& v : parts) {
        const std::int64_t size = v.dims[static_cast<std::size_t>(at)];
        c.put(v, sliced(y, at, from, from + size, 1));
        from += size;
    }
    c.define(n.output, y);
}

void cat(Context& c, const Node& n) { join(c, n, c.operands(), c.integer(1, "dim", 0)); }

void stack(Context& c, const Node& n) {
    std::vector<View> parts = c.operands();
    const int at = axis(c.integer(1, "dim", 0), parts[0].rank() + 1);
    for (const View& v : parts)
        if (v.dims != parts[0].dims) throw Error("stack of tensors whose shapes differ");
    for (View& v : parts) insert_dim(v, at, 0);
    join(c, n, parts, at);
}

void pixel_shuffle(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const std::int64_t r = c.integer(1, "upscale_factor");
    if (x.rank() != 4 || r < 1 || r > x.dims[1] || x.dims[1] % (r * r) != 0) throw Unsupported("pixel_shuffle of this shape");
    const std::int64_t channels = x.dims[1] / (r * r), h = x.dims[2], w = x.dims[3];
    const View split = c.reshaped(x, {x.dims[0], channels, r, r, h, w});
    c.define(n.output, c.reshaped(permuted(split, {0, 1, 4, 2, 5, 3}), {x.dims[0], channels, h * r, w * r}));
}

void channel_shuffle(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const std::int64_t g = c.integer(1, "groups");
    if (x.rank() < 3 || g < 1 || x.dims[1] % g != 0) throw Unsupported("channel_shuffle of this shape");
    Dims dims = x.dims, order;
    dims[1] = x.dims[1] / g;
    dims.insert(dims.begin() + 1, g);
    for (std::size_t i = 0; i < dims.size(); ++i) order.push_back(static_cast<std::int64_t>(i));
    std::swap(order[1], order[2]);
    c.define(n.output, c.reshaped(permuted(c.reshaped(x, dims), order), x.dims));
}

}  // namespace

const OpRows& piece_ops() {
    static const OpRows rows = {
        {"repeat", repeat},
        {"roll", roll},
        {"cat", cat},
        {"stack", stack},
        {"pixel_shuffle", pixel_shuffle},
        {"channel_shuffle", channel_shuffle},
    };
    return rows;
}

}  // namespace quantflow::lowering
