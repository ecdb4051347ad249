#include "registry.hpp"

#include "../graph.hpp"

namespace quantflow::lowering {

const std::unordered_map<std::string, const OpRow*>& op_table() {
    static const auto table = [] {
        std::unordered_map<std::string, const OpRow*> rows;
        for (const OpRows* family : {&shape_ops(), &piece_ops(), &size_ops(), &window_ops(), &elementwise_ops(),
                                     &activation_ops(), &linear_ops(), &attention_ops(), &float_math_ops(),
                                     &indexing_ops()})
            for (const OpRow& row : *family) rows.emplace(row.name, &row);
        return rows;
    }();
    return table;
}

const OpRow* find_op(const Node& n) {
    if (!n.is_in_table) return nullptr;
    const auto it = op_table().find(base_name(n.target));
    return it == op_table().end() ? nullptr : it->second;
}

Role role_of(const Node& n) {
    const OpRow* row = n.op == Op::aten ? find_op(n) : nullptr;
    return row == nullptr ? Role::none : row->role;
}

std::optional<Epilogue> activation_of(const Node& n) {
    const OpRow* row = find_op(n);
    return row == nullptr || row->activation == nullptr ? std::nullopt : row->activation(n);
}

}  // namespace quantflow::lowering
