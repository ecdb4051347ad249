// Memory of the host backend, on huge pages where the system grants them: weights and activations are read from end to
// end, and with small pages the processor spends a good part of that on finding the pages.
#pragma once

#include <cstddef>
#include <memory>

namespace quantflow::host {

constexpr std::size_t kHugePage = 2u << 20;

// Only a wish; `memory` begins at a huge page's boundary.
void prefer_huge_pages(void* memory, std::size_t bytes);

// Zeroed, on a cache line's boundary. Large blocks are shared out to many users and live until the last one is gone.
// Throws std::bad_alloc.
std::shared_ptr<std::byte> shared_memory(std::size_t bytes);

}  // namespace quantflow::host
