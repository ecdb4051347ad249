#include "reached.hpp"

#include <sys/mman.h>

#include <cstring>

extern "C" {
extern char __executable_start, etext;
void __sanitizer_cov_trace_pc(void);
}

namespace {

unsigned char* marks = nullptr;
long found = 0;

std::uintptr_t begin() { return reinterpret_cast<std::uintptr_t>(&__executable_start); }
std::size_t size() { return static_cast<std::size_t>(&etext - &__executable_start); }

}  // namespace

extern "C" __attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc(void) {
    if (marks == nullptr) return;
    unsigned char& mark = marks[reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)) - begin()];
    if (mark != 0) return;
    mark = 1;
    ++found;
}

namespace quantflow::fuzz {

__attribute__((no_sanitize("address", "undefined"))) std::vector<std::uintptr_t> places() {
    // Of all calls in the code (E8, and how far it is), those of the function above.
    std::vector<std::uintptr_t> all;
    const auto target = reinterpret_cast<std::uintptr_t>(&__sanitizer_cov_trace_pc);
    const unsigned char* const code = reinterpret_cast<const unsigned char*>(begin());
    for (std::size_t i = 0; i + 5 <= size(); ++i) {
        if (code[i] != 0xE8) continue;
        std::int32_t distance = 0;
        for (int b = 3; b >= 0; --b) distance = static_cast<std::int32_t>(static_cast<std::uint32_t>(distance) << 8 | code[i + 1 + static_cast<std::size_t>(b)]);
        const std::uintptr_t behind = begin() + i + 5;
        if (behind + static_cast<std::uintptr_t>(static_cast<std::intptr_t>(distance)) == target) all.push_back(behind);
    }
    return all;
}

void watch() {
    void* const memory = mmap(nullptr, size() + 1, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED) marks = static_cast<unsigned char*>(memory);
}

long fresh() {
    const long count = found;
    found = 0;
    return count;
}

bool is_reached(std::uintptr_t place) { return marks != nullptr && marks[place - begin()] != 0; }

}  // namespace quantflow::fuzz
