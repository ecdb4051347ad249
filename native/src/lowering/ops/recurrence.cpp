#include "nodes.hpp"

namespace quantflow::lowering {

// gates (steps, batch, gates * hidden), first states (batch, hidden) or none; y (steps, batch, hidden), an LSTM's with one
// more row, for its last c. Always float32: what reads it quantizes it.
void recurrence(Context& c, const Node& n) {
    const bool is_int8 = n.weights.codes != nullptr, is_lstm = n.cell == Cell::lstm;
    const View gates = c.in_row_major(c.as_f32(c.real_operand(0, "gates")));
    std::optional<View> weight;
    if (!is_int8) weight = c.constant(n.float_weight);
    const std::int64_t hidden = is_int8 ? n.weights.dims[1] : weight->dims[1];
    const std::int64_t width = is_int8 ? n.weights.dims[0] : weight->dims[0];
    if (gates.rank() != 3 || gates.dims[2] != width)
        throw Error("takes gates (steps, batch, " + std::to_string(width) + ")");
    const std::int64_t steps = gates.dims[0], batch = gates.dims[1];
    const auto first = [&](std::size_t position, const char* name) {
        std::optional<View> state = c.optional_operand(position, name);
        if (!state) return state;
        state = c.in_row_major(c.as_f32(*state));
        if (state->dims != Dims{batch, hidden}) throw Error(std::string(name) + " is not (batch, hidden)");
        return state;
    };
    const std::optional<View> h0 = first(1, "h0"), c0 = is_lstm ? first(2, "c0") : std::nullopt;
    const Dims dims{steps + (is_lstm ? 1 : 0), batch, hidden};
    const View y = c.allocate(DType::f32, dims, row_major(dims));
    c.define(n.output, y);
    if (has_no_elements(dims)) return;
    const View products = c.allocate(DType::f32, {batch, width}, {width, 1});
    const View state = c.allocate(DType::f32, {batch, hidden}, {hidden, 1});
    // h = (q - 128) / 127
    const QParams q{1.0f / 127.0f, 128, 0, 255};
    const View codes = c.allocate(DType::u8, {batch, hidden}, {hidden, 1}, q);
    const OptionalTensor w = c.tensor(weight), h = c.tensor(h0), cell_state = c.tensor(c0);
    Recurrence r;
    r.cell = n.cell;
    r.is_reverse = n.is_reverse;
    r.weights = n.weights;
    r.weights.bias = nullptr;
    r.bias = n.weights.bias;
    r.float_weight = w.get();
    RecurrenceTensors t;
    t.gates = c.tensor(gates);
    t.h0 = h.get();
    t.c0 = cell_state.get();
    t.y = c.tensor(y);
    t.products = c.tensor(products);
    t.state = c.tensor(state);
    t.codes = c.tensor(codes);
    c.emit(c.backend.recurrence(r, t),
           {&gates, pointer_to(weight), pointer_to(h0), pointer_to(c0)}, {&y, &products, &state, &codes});
}

}  // namespace quantflow::lowering
