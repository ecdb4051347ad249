// Every op by its ATen name. A name stands once: in its row, in the file of its family.
#pragma once

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "../../program.hpp"

namespace quantflow::lowering {

class Context;

// What others ask about an op by its name, besides how it is lowered.
enum class Role : std::uint8_t {
    none,
    move,  // the same elements elsewhere: codes pass through, so what quantizes the result may quantize what it reads
    add, subtract, multiply, divide,  // where a subgraph is recognised by its arithmetic
    product, softmax,                 // where attention is
    item,                             // of a list, of tensors or of sizes
};

struct OpRow {
    const char* name;  // the target up to its first dot
    void (*lower)(Context&, const Node&);
    Role role = Role::none;
    // Of an activation that its operand's step can compute; nullopt: not with this node's overload.
    std::optional<Epilogue> (*activation)(const Node&) = nullptr;
};

// The lowering of one op by a function for several.
template <auto lower, auto... which>
void with(Context& c, const Node& n) {
    lower(c, n, which...);
}

using OpRows = std::vector<OpRow>;
const OpRows& shape_ops();
const OpRows& piece_ops();
const OpRows& size_ops();
const OpRows& window_ops();
const OpRows& elementwise_ops();
const OpRows& activation_ops();
const OpRows& linear_ops();
const OpRows& attention_ops();
const OpRows& float_math_ops();
const OpRows& indexing_ops();

const std::unordered_map<std::string, const OpRow*>& op_table();

// The row of a node that is lowered by its ATen name; null: there is none.
const OpRow* find_op(const Node&);
// Of an aten node; of others none.
Role role_of(const Node&);
std::optional<Epilogue> activation_of(const Node&);

}  // namespace quantflow::lowering
