#include "budget.hpp"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "tensor.hpp"

namespace quantflow {

std::int64_t memory_bytes() {
    static const std::int64_t found = [] {
        const std::int64_t pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
        std::int64_t bytes = pages > 0 && size > 0 ? pages * size : std::int64_t{1} << 46;
        for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
            std::ifstream file(path);
            std::int64_t limit = 0;
            if (file >> limit && limit > 0) bytes = std::min(bytes, limit);
        }
        return bytes;
    }();
    return found;
}

void require_memory(std::int64_t bytes, const char* what) {
    if (bytes <= memory_bytes()) return;
    throw Error(std::string(what) + " of " + std::to_string(bytes >> 20) + " MiB; this machine has " +
                std::to_string(memory_bytes() >> 20) + " MiB");
}

}  // namespace quantflow
