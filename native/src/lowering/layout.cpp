#include "layout.hpp"

#include <algorithm>
#include <numeric>
#include <string>

namespace quantflow::lowering {

bool has_no_elements(const Dims& dims) {
    return std::any_of(dims.begin(), dims.end(), [](std::int64_t d) { return d == 0; });
}

int axis(std::int64_t dim, int rank) {
    const std::int64_t at = dim < 0 ? dim + rank : dim;
    if (at < 0 || at >= rank)
        throw Error("dimension " + std::to_string(dim) + " of a tensor of rank " + std::to_string(rank));
    return static_cast<int>(at);
}

Dims broadcast_dims(const Dims& a, const Dims& b) {
    Dims out(std::max(a.size(), b.size()));
    for (std::size_t i = 0; i < out.size(); ++i) {
        const std::int64_t x = i < a.size() ? a[a.size() - 1 - i] : 1, y = i < b.size() ? b[b.size() - 1 - i] : 1;
        if (x != y && x != 1 && y != 1) throw Error("shapes do not broadcast");
        out[out.size() - 1 - i] = x == 1 ? y : x;
    }
    return out;
}

Dims spread(Dims v, std::size_t n) {
    if (v.size() == 1) v.assign(n, v[0]);
    if (v.size() != n) throw Error(std::to_string(v.size()) + " numbers for " + std::to_string(n) + " dimensions");
    return v;
}

Dims fitted(Dims dims, std::int64_t count) {
    const auto open = std::find(dims.begin(), dims.end(), -1);
    if (open != dims.end()) {
        *open = 1;
        const std::int64_t known = checked_count(dims);
        if (known == 0) throw Error("a shape with -1 and 0");
        *open = count / known;
    }
    if (checked_count(dims) != count)
        throw Error("a tensor of " + std::to_string(count) + " elements can't have the shape asked for");
    return dims;
}

bool repeats(const View& v) {
    return std::any_of(v.strides.begin(), v.strides.end(), [](std::int64_t s) { return s == 0; });
}

Dims dense_like(const View& v) {
    checked_count(v.dims);
    std::vector<std::size_t> order(v.dims.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return v.strides[a] > v.strides[b]; });
    Dims strides(v.dims.size());
    std::int64_t step = 1;
    for (std::size_t i = order.size(); i-- > 0;) {
        strides[order[i]] = step;
        step *= v.dims[order[i]];
    }
    return strides;
}

Dims dense_like(const View& v, const Dims& dims) {
    View shape = v;
    shape.dims = dims;
    return dense_like(shape);
}

bool is_dense(const View& v) { return same_layout(v.dims, v.strides, dense_like(v)); }

std::optional<Dims> strides_for_reshape(const View& v, const Dims& dims) {
    if (v.count() == 0) return row_major(dims);
    Dims strides(dims.size());
    int to = static_cast<int>(dims.size()) - 1;
    std::int64_t chunk = 1, covered = 1;
    std::int64_t base = v.rank() > 0 ? v.strides.back() : 1;
    for (int from = v.rank() - 1; from >= 0; --from) {
        chunk *= v.dims[static_cast<std::size_t>(from)];
        const bool ends = from == 0 || (v.dims[static_cast<std::size_t>(from) - 1] != 1 &&
                                        v.strides[static_cast<std::size_t>(from) - 1] != chunk * base);
        if (!ends) continue;
        while (to >= 0 && (covered < chunk || dims[static_cast<std::size_t>(to)] == 1)) {
            strides[static_cast<std::size_t>(to)] = covered * base;
            covered *= dims[static_cast<std::size_t>(to)];
            --to;
        }
        if (covered != chunk) return std::nullopt;
        if (from > 0) {
            base = v.strides[static_cast<std::size_t>(from) - 1];
            chunk = covered = 1;
        }
    }
    for (; to >= 0; --to) strides[static_cast<std::size_t>(to)] = 1;
    return strides;
}

View expanded(const View& v, const Dims& dims) {
    checked_count(dims);
    if (dims.size() < v.dims.size()) throw Error("shapes do not broadcast");
    View out = v;
    out.dims = dims;
    out.strides.assign(dims.size(), 0);
    const std::size_t lead = dims.size() - v.dims.size();
    for (std::size_t i = 0; i < v.dims.size(); ++i) {
        if (v.dims[i] != dims[lead + i] && v.dims[i] != 1) throw Error("shapes do not broadcast");
        if (v.dims[i] == dims[lead + i]) out.strides[lead + i] = v.strides[i];
    }
    return out;
}

View permuted(const View& x, const Dims& order) {
    View y = x;
    if (order.size() != x.dims.size()) throw Error("permute names another number of dimensions");
    std::vector<bool> is_taken(order.size(), false);
    for (std::size_t i = 0; i < order.size(); ++i) {
        const auto from = static_cast<std::size_t>(axis(order[i], x.rank()));
        if (is_taken[from]) throw Error("permute names dimension " + std::to_string(order[i]) + " twice");
        is_taken[from] = true;
        y.dims[i] = x.dims[from];
        y.strides[i] = x.strides[from];
    }
    return y;
}

std::optional<View> permuted_as(const View& x, const Dims& dims, const Dims& order) {
    if (x.count() == 0) return std::nullopt;
    Dims sizes, strides;
    std::vector<std::size_t> ends;  // of each of `dims` among these
    std::size_t from = 0;
    std::int64_t left = x.dims.empty() ? 1 : x.dims[0];  // of x's dimension `from`
    for (std::int64_t wanted : dims) {
        while (wanted > 1) {
            while (left == 1) left = x.dims[++from];
            const std::int64_t part = std::min(wanted, left);
            if (wanted % part != 0 || left % part != 0) return std::nullopt;
            wanted /= part;
            left /= part;
            sizes.push_back(part);
            strides.push_back(x.strides[from] * left);
        }
        ends.push_back(sizes.size());
    }
    View y = x;
    y.dims.clear();
    y.strides.clear();
    for (std::int64_t dim : order) {
        const auto i = static_cast<std::size_t>(axis(dim, static_cast<int>(dims.size())));
        for (std::size_t k = i == 0 ? 0 : ends[i - 1]; k < ends[i]; ++k) {
            y.dims.push_back(sizes[k]);
            y.strides.push_back(strides[k]);
        }
    }
    return y;
}

View sliced(const View& x, int at, std::int64_t start, std::int64_t end, std::int64_t step) {
    const auto i = static_cast<std::size_t>(at);
    const std::int64_t size = x.dims[i];
    const auto clip = [&](std::int64_t p) {
        return std::clamp<std::int64_t>(p < 0 ? std::max(p, -size) + size : p, 0, size);
    };
    if (step < 1) throw Unsupported("a slice that runs backwards");
    const std::int64_t from = clip(start), to = std::max(from, clip(end));
    View y = x;
    y.dims[i] = to == from ? 0 : (to - from - 1) / step + 1;
    y.offset += from * x.strides[i] * size_of(x.dtype);
    y.strides[i] = y.dims[i] > 1 ? x.strides[i] * step : x.strides[i];
    if (y.count() == 0) y.offset = x.offset;
    return y;
}

View selected(const View& x, int at, std::int64_t index) {
    const auto i = static_cast<std::size_t>(at);
    const std::int64_t p = index < 0 ? index + x.dims[i] : index;
    if (p < 0 || p >= x.dims[i]) throw Error("index " + std::to_string(index) + " is outside its dimension");
    View y = x;
    y.offset += p * x.strides[i] * size_of(x.dtype);
    erase_dim(y, at);
    return y;
}

void erase_dim(View& v, int at) {
    if (at < 0 || at >= v.rank()) throw Error("no dimension at " + std::to_string(at));
    v.dims.erase(v.dims.begin() + at);
    v.strides.erase(v.strides.begin() + at);
}

void insert_dim(View& v, int at, std::int64_t stride) {
    if (at < 0 || at > v.rank()) throw Error("a dimension at " + std::to_string(at));
    v.dims.insert(v.dims.begin() + at, 1);
    v.strides.insert(v.strides.begin() + at, stride);
}

}  // namespace quantflow::lowering
