// Which steps of a lowered section run at every call, and which once, when the plan is made.
#pragma once

#include <vector>

#include "arena.hpp"

namespace quantflow::lowering {

// The buffers that a step reads and writes.
struct Use {
    std::vector<int> reads, writes;
};

// Larger results are computed at every call: they would take memory of their own for as long as the plan lives.
constexpr std::int64_t kMostKeptBytes = 256 * 1024;

struct Schedule {
    std::vector<int> order;    // of the steps; those that run once come first
    int once = 0;              // how many these are
    std::vector<Buffer> buffers;  // with lifetimes in that order; `kept` where a step that runs once writes for later
};

// A step runs once where all that it touches depends on constants alone, whoever else writes there.
Schedule schedule(std::vector<Buffer> buffers, const std::vector<Use>& steps);

}  // namespace quantflow::lowering
