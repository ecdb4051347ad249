// Weights of int8 steps, packed as the kernels read them.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "../src/backend.hpp"
#include "int8_gemm_isa.hpp"
#include "memory.hpp"
#include "rounding.hpp"

namespace quantflow::host::int8 {

using i64 = std::int64_t;
using u8 = std::uint8_t;

// Weights as the kernels read them. Steps for other shapes, and other instances of a model, share them.
struct PackedWeights {
    Aligned<std::int8_t> codes;
    Aligned<std::int32_t> sums;  // per padded channel
    Aligned<u8> joint;           // see Int8Gemm; empty where the kernels multiply quad by quad
};

template <typename Make>
auto shared_weights(const std::vector<i64>& key, const Make& make) {
    using Packed = decltype(make());
    static std::mutex mutex;
    static std::map<std::vector<i64>, std::weak_ptr<const Packed>> known;
    std::lock_guard<std::mutex> lock(mutex);
    auto& entry = known[key];
    if (auto found = entry.lock()) return found;
    std::shared_ptr<const Packed> made = std::make_shared<Packed>(make());
    entry = made;
    for (auto i = known.begin(); i != known.end();) i = i->second.expired() ? known.erase(i) : std::next(i);
    return made;
}

inline i64 address(const void* p) { return static_cast<i64>(reinterpret_cast<std::intptr_t>(p)); }

// How a convolution's groups are computed: `merged` neighbouring groups at a time, as one group whose weights are
// zero off the diagonal, because a group of a few channels would leave most of a register tile empty.
struct Grouping {
    i64 groups, in_channels, out_channels, merged;
};

// The reduction as the kernels run through it: `runs` runs of `length` steps, each padded to whole multiplications.
struct Runs {
    i64 runs, length, quads, all_quads;  // quads: of a padded run
    Runs(const Int8Kernels& kernels, i64 count, i64 steps)
        : runs(count), length(steps), quads(round_up(divide_up(steps, 4), kernels.depth)), all_quads(runs * quads) {}
    // Padded to quads, and all together to whole multiplications.
    static Runs joined(const Int8Kernels& kernels, i64 count, i64 steps) {
        Runs all(kernels, count, steps);
        all.quads = divide_up(steps, 4);
        all.all_quads = round_up(count * all.quads, kernels.depth);
        return all;
    }
};

// Where a panel's codes lie: [step of a tile][vector][quad][column][4], so that a tile register is loaded from lines that
// follow each other. Without tile registers a step is one quad: [quad][column][4].
struct PanelLayout {
    i64 depth, lanes, columns;
    explicit PanelLayout(const Int8Kernels& kernels)
        : depth(kernels.depth), lanes(kernels.lanes), columns(kernels.columns) {}
    // The place of code k of column n is of_code(k) + of_column(n).
    i64 of_code(i64 k) const { return (k / 4 / depth * columns * depth + k / 4 % depth * lanes) * 4 + k % 4; }
    i64 of_column(i64 n) const { return (n / lanes * lanes * depth + n % lanes) * 4; }
};

// [group][panel], each as PanelLayout says; the reduction runs over (tap, channel).
PackedWeights pack_gemm_weights(const Int8Kernels&, const Weights&, const Grouping&, i64 taps, const Runs&);

// [point][panel][pair][column][2]: G' w G'^T, of tiles of 2x2 pixels with G' = 2 G = [2 0 0; 1 1 1; 1 -1 1; 0 0 2], at most
// 9 * 127; of 4x4 with 24 G but for the last row, [6 0 0; -4 -4 -4; -4 4 -4; 1 2 4; 1 -2 4; 0 0 6], at most 144 * 127.
struct WinogradWeights {
    Aligned<std::int16_t> words;
    i64 panels = 0;
};
WinogradWeights pack_winograd_weights(const Int8Kernels&, const Weights&, i64 size);

// Where channel `c` of a depthwise block lies among four vectors: see "Block" in int8_vector.hpp.
inline i64 block_position(const Int8Kernels& kernels, i64 c) { return c % 16 / 4 * kernels.lanes + c / 16 * 4 + c % 4; }

// The taps of a depthwise window in the order of the kernels' groups; -1: none.
std::vector<i64> plain_taps(const Int8Kernels&, i64 taps);
std::vector<i64> rolling_taps(const Int8Kernels&, i64 size);

// `order`: the taps, by their places in the kernels' groups.
PackedWeights pack_depthwise_weights(const Int8Kernels&, const Weights&, i64 channels, i64 taps,
                                     const std::vector<i64>& order);

}  // namespace quantflow::host::int8
