// QUANTFLOW_TARGET driven by libFuzzer, which counts and prints by itself.
#include "targets.hpp"

namespace quantflow::fuzz {
void count(const std::string&) {}
}  // namespace quantflow::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    quantflow::fuzz::QUANTFLOW_TARGET(data, size);
    return 0;
}
