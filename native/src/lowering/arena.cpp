#include "arena.hpp"

#include <algorithm>
#include <utility>

namespace quantflow::lowering {
namespace {

constexpr std::int64_t kAlignment = 64;  // of vector loads, and of cache lines

std::int64_t aligned(std::int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

int Buffers::add(Storage storage, std::int64_t bytes) {
    buffers_.push_back({storage, bytes, -1, -1});
    return static_cast<int>(buffers_.size()) - 1;
}

void Buffers::touch(int buffer, int step) {
    Buffer& b = buffers_[static_cast<std::size_t>(buffer)];
    if (b.first < 0) b.first = step;
    b.last = step;
}

ArenaPlan plan_arena(const std::vector<Buffer>& buffers, Storage storage) {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < buffers.size(); ++i)
        if (buffers[i].storage == storage && buffers[i].first >= 0) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return buffers[a].bytes > buffers[b].bytes; });
    ArenaPlan plan;
    plan.offsets.assign(buffers.size(), -1);
    for (auto next = order.begin(); next != order.end(); ++next) {
        const Buffer& b = buffers[*next];
        std::vector<std::pair<std::int64_t, std::int64_t>> taken;
        for (auto placed = order.begin(); placed != next; ++placed) {
            const Buffer& other = buffers[*placed];
            if (storage == Storage::kept || (other.first <= b.last && b.first <= other.last))
                taken.emplace_back(plan.offsets[*placed], plan.offsets[*placed] + aligned(other.bytes));
        }
        std::sort(taken.begin(), taken.end());
        std::int64_t at = 0;
        for (const auto& [from, to] : taken) {
            if (at + aligned(b.bytes) <= from) break;
            at = std::max(at, to);
        }
        plan.offsets[*next] = at;
        plan.bytes = std::max(plan.bytes, at + aligned(b.bytes));
    }
    return plan;
}

}  // namespace quantflow::lowering
