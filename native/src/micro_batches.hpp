// Large batches, a sample at a time on each thread: where the results of a step for the whole batch fit into no cache, and
// those for a sample do, or where many threads would wait for the slowest at every step, several steps run on one sample
// before they go on with the next.
#pragma once

#include "lower.hpp"

namespace quantflow {

// As `lower`, and runs of steps on parts of the batch where that gains something by `nearness`. Results are the same.
Lowered lower_in_micro_batches(const Program&, const Section&, const std::vector<InputForm>&, Backend&, Constants&,
                               const Nearness& nearness);

}  // namespace quantflow
