// Few samples, a few lines at a time on each thread: steps that take a line from the same line of what the step before gave
// run one after another on it, while it lies in the thread's cache, and the threads wait for each other once for all of
// them.
#pragma once

#include "lower.hpp"

namespace quantflow {

// Which of the runs of steps that may be joined are: those that gain something by `Nearness`, or as was measured; none; or
// all that come near a gain.
enum class Joining : std::uint8_t { decided, none, all };

// Results are the same.
void join_lines(Lowered&, const Nearness&, Joining);

}  // namespace quantflow
