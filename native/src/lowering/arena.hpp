// Buffers of a lowered section, the steps between which each is alive, and the arena that they share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace quantflow::lowering {

// `kept`: written once, when the plan is made, and read at every run.
enum class Storage : std::uint8_t { arena, input, output, constant, kept };

struct Buffer {
    Storage storage = Storage::arena;
    std::int64_t bytes = 0;
    int first = -1, last = -1;  // steps that touch it; -1: none does
};

// Numbered in the order in which they are made: the number of a buffer is that of its cell.
class Buffers {
public:
    int add(Storage storage, std::int64_t bytes);
    // Step `step`, no earlier than any before, reads or writes the buffer.
    void touch(int buffer, int step);
    void make_output(int buffer) { buffers_[static_cast<std::size_t>(buffer)].storage = Storage::output; }
    const Buffer& operator[](int buffer) const { return buffers_[static_cast<std::size_t>(buffer)]; }
    const std::vector<Buffer>& all() const { return buffers_; }

private:
    std::vector<Buffer> buffers_;
};

struct ArenaPlan {
    std::vector<std::int64_t> offsets;  // per buffer, multiples of 64; -1: not in the arena
    std::int64_t bytes = 0;
};

// Where the buffers of `storage` lie. The largest first, each at the lowest place that is free while it lives. A buffer takes memory from the step
// that touches it first to the one that touches it last, both included.
ArenaPlan plan_arena(const std::vector<Buffer>& buffers, Storage storage = Storage::arena);

}  // namespace quantflow::lowering
