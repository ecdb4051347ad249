// Nodes that are no ATen op, and what families of ops lend to each other.
#pragma once

#include "../context.hpp"
#include "registry.hpp"

namespace quantflow::lowering {

void quantize(Context&, const Node&);
void dequantize(Context&, const Node&);
void clamp_codes(Context&, const Node&);
void int8_linear(Context&, const Node&);  // and convolutions
void int8_matmul(Context&, const Node&);
void recurrence(Context&, const Node&);
void size(Context&, const Node&);

// The same elements as another value.
void dropout(Context&, const Node&);
void identity(Context&, const Node&);
// epilogue(op(a, b)), broadcast, into the value `output`, with the activation that follows it.
void binary(Context&, Binary op, View a, View b, int output, Epilogue epilogue = {});
// op(x) by the backend's unary step, into the value `output`.
void apply(Context&, Unary op, float a, float b, const Epilogue& epilogue, const View& x, int output);
// a @ b with PyTorch's rules for ranks and broadcasting.
void multiply(Context&, View a, View b, int output);
// softmax(q @ k * scale + mask) @ v as separate nodes, whose results nothing else reads, from the first product on: by
// the attention kernel. False: that is not what the node begins.
bool written_out_attention(Context&, const Node&);

}  // namespace quantflow::lowering
