// What a node's operands must be, whatever is computed of them.
#pragma once

#include <string>

#include "program.hpp"

namespace quantflow {

// Raises Error: "program.json: WHERE: WHAT".
[[noreturn]] void fail(const std::string& where, const std::string& what);
// Operands that must be codes are, the others are not, and ops that pass codes on keep their meaning. The node's output is
// one of the program's values already.
void check_operands(const Program&, const Node&, const std::string& where);

}  // namespace quantflow
