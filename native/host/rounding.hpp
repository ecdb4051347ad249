// Whole numbers divided and rounded up.
#pragma once

#include <cstdint>

namespace quantflow::host {

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

}  // namespace quantflow::host
