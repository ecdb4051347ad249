// The table of what a program may do (quantflow/ir/aten_ops.txt, which Python reads too), and a node held against it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.hpp"

namespace quantflow {

// Entries of one list of arguments. As in quantflow/ir/op_table.py.
constexpr std::size_t kMaxItems = std::size_t{1} << 16;
// Nodes of a program, steps of a plan.
constexpr std::size_t kMaxNodes = std::size_t{1} << 15;
constexpr std::size_t kMaxSteps = std::size_t{1} << 16;

enum class Kind : std::uint8_t { tensor, operand, integer, real, flag, number, text, dtype, layout, device, memory_format, none };

struct TableArgument {
    std::string name;
    Kind kind = Kind::tensor;
    bool is_list = false, takes_none = false, takes_none_inside = false, is_optional = false, is_keyword = false;
    std::size_t length = 0;  // of a list; 0: any
    bool takes_single = false;  // one number in place of the list
    bool is_bounded = false;
    std::int64_t low = 0, high = 0;
    bool is_axis = false;
};

struct TableRow {
    std::string target;
    std::vector<TableArgument> arguments;
};

// The row of an op, as in "softmax.int"; null: it is not in the table.
const TableRow* table_row(const std::string& target);
// Every op of the table, in its order.
const std::vector<std::string>& table_targets();

// Raises Error where an argument is missing, given twice, unknown, of another type or outside its range.
void check_arguments(const TableRow&, const Node&, const std::string& where);

}  // namespace quantflow
