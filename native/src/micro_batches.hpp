// Large batches, a few samples at a time: where the results of a step for the whole batch fit into no cache, and those for
// a part of it do, several steps run on one part before they go on with the next.
#pragma once

#include "lower.hpp"

namespace quantflow {

// As `lower`, and runs of steps on parts of the batch where that gains something by `nearness`. Results are the same.
Lowered lower_in_micro_batches(const Program&, const Section&, const std::vector<InputForm>&, Backend&, Constants&,
                               const Nearness& nearness);

}  // namespace quantflow
