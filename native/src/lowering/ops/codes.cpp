#include "nodes.hpp"

namespace quantflow::lowering {

void quantize(Context& c, const Node& n) {
    const View x = c.real_operand(0, "self");
    const StoredAs s = c.graph.stored_as(n.output);
    if (x.q && x.is_real && *x.q == s.q && x.dtype == s.dtype) {  // written as these codes already
        View codes = x;
        codes.is_real = false;
        return c.define(n.output, codes);
    }
    const bool images = x.rank() >= 4 || (x.rank() == 3 && c.graph.feeds_conv(n.output));
    const Dims strides = images && c.graph.feeds_conv(n.output) ? channels_last(x.dims) : dense_like(x);
    c.define(n.output, c.copied(c.as_real_operand(x), strides, s.dtype, s.q));
}

void dequantize(Context& c, const Node& n) {
    View x = c.operand(0, "self");
    x.is_real = true;
    c.define(n.output, x);
}

void clamp_codes(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    const StoredAs s = c.graph.stored_as(n.output);
    // Codes are compared, so the bounds are codes too: a clamp of the reals that they stand for.
    const QParams& q = *c.graph.value(n.output).q;
    const auto bound = [&](std::int64_t code) {
        return static_cast<float>(code - q.zero_point) * q.scale;
    };
    View y = c.allocate(s.dtype, x.dims, dense_like(x), s.q);
    const Epilogue clamp{Activation::hardtanh, bound(n.low), bound(n.high)};
    c.emit(c.backend.unary(Unary::activation, 0, 0, clamp, c.tensor(x), c.tensor(y)), {&x}, {&y});
    c.define(n.output, y);
}

}  // namespace quantflow::lowering
