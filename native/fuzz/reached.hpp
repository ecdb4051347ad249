// Which places of the code were reached: GCC calls __sanitizer_cov_trace_pc at each (-fsanitize-coverage=trace-pc).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace quantflow::fuzz {

// Addresses behind the calls, in order; none where the code was built without them.
std::vector<std::uintptr_t> places();
// Marks are kept in memory that forked processes share.
void watch();
// Places that this process reached and nobody before it, since it was last asked.
long fresh();
bool is_reached(std::uintptr_t place);

}  // namespace quantflow::fuzz
