#include <cmath>
#include <numeric>

#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

// softmax(scale * q @ k.T + mask) @ v into the value `output`.
void attend(Context& c, View q, View k, View v, std::optional<View> mask, bool causal, double scale, int output) {
    q = c.as_real_operand(q);
    k = c.as_real_operand(k);
    v = c.as_real_operand(v);
    if (q.rank() < 2 || k.rank() != q.rank() || v.rank() != q.rank()) throw Unsupported("attention of these ranks");
    const auto rank = q.dims.size();
    const Dims batch =
        broadcast_dims(broadcast_dims(Dims(q.dims.begin(), q.dims.end() - 2), Dims(k.dims.begin(), k.dims.end() - 2)),
                       Dims(v.dims.begin(), v.dims.end() - 2));
    const auto shaped = [&](const View& x) {
        Dims dims = batch;
        dims.insert(dims.end(), x.dims.end() - 2, x.dims.end());
        return expanded(x, dims);
    };
    q = shaped(q);
    k = shaped(k);
    v = shaped(v);
    if (has_no_elements({q.dims[rank - 1], k.dims[rank - 2], v.dims[rank - 1]})) throw Unsupported("attention to nothing");
    if (q.dims[rank - 1] != k.dims[rank - 1] || k.dims[rank - 2] != v.dims[rank - 2])
        throw Error("attention of shapes that do not fit");
    if (mask) {
        if (!mask->q && mask->dtype != DType::b8 && mask->dtype != DType::f32) throw Error("a mask of integers");
        if (mask->dtype != DType::b8) mask = c.as_f32(*mask);
        Dims dims = batch;
        dims.insert(dims.end(), {q.dims[rank - 2], k.dims[rank - 2]});
        mask = expanded(*mask, dims);
    }
    Dims dims = q.dims;
    dims[rank - 1] = v.dims[rank - 1];
    // Heads side by side per position, (batch, length, heads, width) in memory: what comes next joins them. Where the
    // queries have the batch inside the length, so does what is added to the result.
    Dims strides = row_major(dims);
    if (rank == 4) {
        const std::int64_t heads = dims[1], width = dims[3], row = heads * width;
        const bool is_batch_inside = q.strides[0] > 0 && q.strides[0] < q.strides[2];
        strides = {is_batch_inside ? row : dims[2] * row, width, is_batch_inside ? dims[0] * row : row, 1};
    }
    View y = c.allocate_result(dims, strides, output);
    c.emit(c.backend.attention(c.tensor(q), c.tensor(k), c.tensor(v), c.tensor(mask).get(), causal,
                               static_cast<float>(scale), c.tensor(y)),
           {&q, &k, &v, pointer_to(mask)}, {&y});
    c.define(output, y);
}

void attention(Context& c, const Node& n) {
    if (c.real(4, "dropout_p", 0.0) != 0.0) throw Unsupported("attention with dropout");
    if (c.flag(6, "enable_gqa", false) || c.flag(99, "enable_gqa", false)) throw Unsupported("grouped-query attention");
    const View q = c.real_operand(0, "query"), k = c.real_operand(1, "key"), v = c.real_operand(2, "value");
    std::optional<View> mask;
    if (c.has(3, "attn_mask")) mask = c.operand(3, "attn_mask");
    if (mask && c.flag(5, "is_causal", false)) throw Unsupported("a mask beside is_causal");
    const double scale = c.real(6, "scale", std::nan(""));
    const double width = q.dims.empty() ? 1.0 : static_cast<double>(q.dims.back());
    attend(c, q, k, v, mask, c.flag(5, "is_causal", false),
           std::isnan(scale) ? 1.0 / std::sqrt(width) : scale, n.output);
}

// NaN: it is none.
double number_of(const Arg& a) {
    if (const auto* i = a.as<std::int64_t>()) return static_cast<double>(*i);
    const auto* d = a.as<double>();
    return d == nullptr ? std::nan("") : *d;
}

}  // namespace

bool written_out_attention(Context& c, const Node& n) {
    double scale = 1;
    std::optional<View> mask;
    std::vector<int> links;
    bool is_softmax = false;
    for (int index = n.output;;) {
        const int user = c.graph.only_user(index);
        if (user < 0) return false;
        const Node& link = c.graph.node(user);
        if (link.op != Op::aten || link.args.size() < 2) return false;
        const auto reads = [&](std::size_t i) {
            const Ref* ref = link.args[i].as<Ref>();
            return ref != nullptr && ref->value == index;
        };
        const Role role = role_of(link);
        links.push_back(user);
        if (is_softmax) {
            if (role != Role::product || !reads(0) || reads(1)) return false;
            const View q = c.operand(0, "self"), k = c.operand(1, "other");
            const std::optional<View> v = c.known(link.args[1]);
            const auto is_real = [](const View& x) { return x.q || x.dtype == DType::f32; };
            if (!v || !is_real(q) || !is_real(k) || !is_real(*v)) return false;
            if (q.rank() < 2 || k.rank() != q.rank() || v->rank() != q.rank()) return false;
            Dims swapped(k.dims.size());
            std::iota(swapped.begin(), swapped.end(), 0);
            std::swap(swapped[swapped.size() - 1], swapped[swapped.size() - 2]);
            c.fusion.absorb(links);
            attend(c, q, permuted(k, swapped), *v, mask, false, scale, link.output);
            return true;
        }
        const double number = number_of(link.args[1]);
        if ((role == Role::multiply || role == Role::divide) && !mask && reads(0) && !std::isnan(number) &&
            link.kwargs.count("rounding_mode") == 0) {
            scale = role == Role::multiply ? scale * number : scale / number;
        } else if (role == Role::add && !mask && reads(0) != reads(1) && link.args.size() == 2 && link.kwargs.empty()) {
            mask = c.known(link.args[reads(0) ? 1 : 0]);
            if (!mask || mask->q || mask->dtype != DType::f32) return false;
        } else if (role == Role::softmax && reads(0) && (number == -1 || number == c.operand(0, "self").rank() - 1) &&
                   link.args.size() == 2 && link.kwargs.empty()) {
            is_softmax = true;
        } else {
            return false;
        }
        index = link.output;
    }
}

const OpRows& attention_ops() {
    static const OpRows rows = {
        {"scaled_dot_product_attention", attention},
    };
    return rows;
}

}  // namespace quantflow::lowering
