// Offsets in the arena: buffers that live at the same time lie apart, and together take little more than they must.
#include <algorithm>
#include <random>

#include "../src/lowering/arena.hpp"
#include "lowering_checks.hpp"

using namespace lowering_checks;
using namespace quantflow::lowering;

namespace {

Int rounded(Int bytes) { return (bytes + 63) / 64 * 64; }

bool live_together(const Buffer& a, const Buffer& b) { return a.first <= b.last && b.first <= a.last; }

void random_lifetimes() {
    std::mt19937 bits(17);
    const auto pick = [&](Int low, Int high) { return std::uniform_int_distribution<Int>(low, high)(bits); };
    for (int round = 0; round < 300; ++round) {
        const int steps = static_cast<int>(pick(1, 60));
        std::vector<Buffer> buffers(static_cast<std::size_t>(pick(0, 80)));
        for (Buffer& b : buffers) {
            b.bytes = pick(0, 3) == 0 ? pick(0, 3) : pick(1, 5000);
            b.first = static_cast<int>(pick(0, steps - 1));
            b.last = static_cast<int>(pick(b.first, std::min(steps - 1, b.first + 9)));
            if (pick(0, 9) == 0) b.storage = static_cast<Storage>(pick(1, 3));
            if (pick(0, 19) == 0) b.first = b.last = -1;
        }
        const ArenaPlan plan = plan_arena(buffers);
        expect(plan.offsets.size() == buffers.size(), "an offset per buffer");
        Int sum = 0, peak = 0;
        for (std::size_t i = 0; i < buffers.size(); ++i) {
            const Buffer& b = buffers[i];
            const bool is_placed = b.storage == Storage::arena && b.first >= 0;
            expect((plan.offsets[i] >= 0) == is_placed,
                   "exactly the buffers of the arena that steps touch have a place");
            if (!is_placed) continue;
            sum += rounded(b.bytes);
            expect(plan.offsets[i] % 64 == 0, "an offset of a multiple of 64");
            expect(plan.offsets[i] + b.bytes <= plan.bytes, "a buffer inside the arena");
            for (std::size_t j = 0; j < i; ++j) {
                if (plan.offsets[j] < 0 || !live_together(b, buffers[j])) continue;
                expect(plan.offsets[i] + b.bytes <= plan.offsets[j] ||
                           plan.offsets[j] + buffers[j].bytes <= plan.offsets[i],
                       "buffers that live at the same time lie apart");
            }
        }
        for (int step = 0; step < steps; ++step) {
            Int live = 0;
            for (std::size_t i = 0; i < buffers.size(); ++i)
                if (plan.offsets[i] >= 0 && buffers[i].first <= step && step <= buffers[i].last)
                    live += rounded(buffers[i].bytes);
            peak = std::max(peak, live);
        }
        expect(plan.bytes <= sum, "no more than all buffers side by side");
        expect(plan.bytes >= peak, "no less than what lives at the same time");
    }
}

void placement() {
    const auto plan = [](std::vector<Buffer> b) { return plan_arena(b); };
    const auto at = Storage::arena;
    expect(plan({}).bytes == 0, "nothing takes nothing");
    expect(plan({{at, 100, 0, 1}, {at, 1000, 1, 2}}).offsets == Dims{1024, 0}, "the largest lies lowest");
    expect(plan({{at, 64, 0, 1}, {at, 64, 1, 2}}).offsets == Dims{0, 64}, "of equal ones the first made lies lowest");
    expect(plan({{at, 64, 0, 1}, {at, 64, 2, 3}}).offsets == Dims{0, 0}, "memory is used again");
    expect(plan({{at, 64, 0, 1}, {at, 64, 1, 1}}).bytes == 128, "operand and result of one step lie apart");
    // 512 and 256 are live with the small one, but not the hole that the second leaves behind.
    const ArenaPlan hole = plan({{at, 512, 0, 3}, {at, 256, 0, 1}, {at, 128, 0, 3}, {at, 192, 2, 3}});
    expect(hole.offsets == Dims{0, 512, 768, 512}, "the lowest hole that is large enough");
    expect(hole.bytes == 896, "the arena ends behind the last buffer");

    Buffers buffers;
    const int a = buffers.add(at, 10), b = buffers.add(Storage::input, 20);
    expect(a == 0 && b == 1, "buffers are numbered in order");
    buffers.touch(a, 3);
    buffers.touch(a, 7);
    expect(buffers[a].first == 3 && buffers[a].last == 7,
           "a buffer lives from the first to the last step that touches it");
    buffers.make_output(a);
    expect(plan_arena(buffers.all()).offsets == Dims{-1, -1}, "outputs and inputs are not in the arena");
}

}  // namespace

int main() {
    random_lifetimes();
    placement();
    return report("arena");
}
