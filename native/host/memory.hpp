// Memory of the host backend, on huge pages where the system grants them: weights and activations are read from end to
// end, and with small pages the processor spends a good part of that on finding the pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace quantflow::host {

constexpr std::size_t kHugePage = 2u << 20;

// Only a wish; `memory` begins at a huge page's boundary.
void prefer_huge_pages(void* memory, std::size_t bytes);

// Zeroed, on a cache line's boundary. Large blocks are shared out to many users and live until the last one is gone.
// Throws std::bad_alloc.
std::shared_ptr<std::byte> shared_memory(std::size_t bytes);

// An array in such memory.
template <typename T>
class Aligned {
public:
    Aligned() = default;
    explicit Aligned(std::int64_t count)
        : memory_(shared_memory(static_cast<std::size_t>(count) * sizeof(T))), size_(count) {}
    T* data() const { return reinterpret_cast<T*>(memory_.get()); }
    std::int64_t size() const { return size_; }
    T& operator[](std::int64_t i) const { return data()[i]; }

private:
    std::shared_ptr<std::byte> memory_;
    std::int64_t size_ = 0;
};

}  // namespace quantflow::host
