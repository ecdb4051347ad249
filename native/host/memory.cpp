#include "memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>

namespace quantflow::host {
namespace {

constexpr std::size_t kBlock = 4 * kHugePage, kLine = 64;

std::size_t round_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

// Pages of its own from the system, from a huge page's boundary on; untouched pages take no memory.
class Block {
public:
    explicit Block(std::size_t bytes) : size_(bytes), mapped_(bytes + kHugePage) {
        base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        const auto address = reinterpret_cast<std::uintptr_t>(base_);
        begin_ = static_cast<std::byte*>(base_) + (round_up(address, kHugePage) - address);
        prefer_huge_pages(begin_, size_);
    }
    ~Block() { munmap(base_, mapped_); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    // Null: not enough is left.
    std::byte* take(std::size_t bytes) {
        if (bytes > size_ - used_) return nullptr;
        std::byte* taken = begin_ + used_;
        used_ += bytes;
        return taken;
    }

private:
    void* base_ = nullptr;
    std::byte* begin_ = nullptr;
    std::size_t size_, mapped_, used_ = 0;
};

}  // namespace

void prefer_huge_pages(void* memory, std::size_t bytes) { madvise(memory, bytes, MADV_HUGEPAGE); }

std::shared_ptr<std::byte> shared_memory(std::size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Block> last;
    if (bytes > SIZE_MAX - kBlock) throw std::bad_alloc();
    const std::size_t wanted = round_up(std::max<std::size_t>(bytes, 1), kLine);
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Block> block = last.lock();
    std::byte* taken = block ? block->take(wanted) : nullptr;
    if (taken == nullptr) {
        block = std::make_shared<Block>(std::max(kBlock, round_up(wanted, kHugePage)));
        taken = block->take(wanted);
        last = block;
    }
    return {std::move(block), taken};
}

}  // namespace quantflow::host
