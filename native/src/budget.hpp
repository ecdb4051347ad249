// How much memory there is, asked before any is taken.
#pragma once

#include <cstdint>

namespace quantflow {

// Of this machine, or of the container that the process runs in.
std::int64_t memory_bytes();
// Raises Error where `what` needs more, with both figures.
void require_memory(std::int64_t bytes, const char* what);

}  // namespace quantflow
