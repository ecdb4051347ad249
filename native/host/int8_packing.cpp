#include "int8_packing.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "int8_cost.hpp"

namespace quantflow::host::int8 {

namespace {

// Of each quad of panels of weights, whether it and the one behind it may be multiplied at once; empty where few may, or
// few are summed, and looking costs more than it gains. The last of `stretch` quads has none behind it in the same sum.
Aligned<u8> joint_quads(const Int8Kernels& kernels, const Aligned<std::int8_t>& codes, i64 panels, i64 quads,
                        i64 stretch) {
    constexpr i64 kFewest = 32, kMost = 32;
    const i64 halves = kernels.columns * 2;
    if ((stretch < kFewest && quads < kFewest) || halves > kMost) return {};
    Aligned<u8> joint(panels * quads);
    i64 count = 0;
    // Of each half of a column's quad: its two weights, what is above 0 of them and what is below; and the quad's before.
    std::int16_t words[kMost], above[2][kMost], below[2][kMost];
    for (i64 panel = 0; panel < panels; ++panel)
        for (i64 q = 0; q < quads; ++q) {
            const i64 own = q % 2;
            std::memcpy(words, codes.data() + (panel * quads + q) * 2 * halves, static_cast<std::size_t>(2 * halves));
            std::int16_t most = 0;
            for (i64 h = 0; h < halves; ++h) {
                const unsigned word = static_cast<std::uint16_t>(words[h]);
                const auto low = static_cast<std::int16_t>(static_cast<std::int16_t>(word << 8) >> 8);
                const auto high = static_cast<std::int16_t>(words[h] >> 8);
                above[own][h] = std::max<std::int16_t>(low, 0) + std::max<std::int16_t>(high, 0);
                below[own][h] = -std::min<std::int16_t>(low, 0) - std::min<std::int16_t>(high, 0);
            }
            if (q == 0) continue;
            for (i64 h = 0; h < halves; ++h) {
                most = std::max<std::int16_t>(most, above[0][h] + above[1][h]);
                most = std::max<std::int16_t>(most, below[0][h] + below[1][h]);
            }
            const bool is_joint = q % stretch != 0 && most <= kernels.joint_weights;
            joint[panel * quads + q - 1] = is_joint;
            count += is_joint;
        }
    return 4 * count < 3 * panels * quads ? Aligned<u8>() : joint;
}

}  // namespace

PackedWeights pack_gemm_weights(const Int8Kernels& kernels, const Weights& w, const Grouping& g, i64 taps,
                                const Runs& runs) {
    const i64 columns = kernels.columns, quads = runs.all_quads;
    const i64 panels = divide_up(g.out_channels, columns);
    const PanelLayout layout(kernels);
    const i64 own_in = g.in_channels / g.merged, own_out = g.out_channels / g.merged;
    PackedWeights packed{Aligned<std::int8_t>(g.groups * panels * quads * columns * 4),
                         Aligned<std::int32_t>(g.groups * panels * columns),
                         {}};
    const i64 codes = own_in * taps;
    std::vector<i64> place(static_cast<std::size_t>(codes));  // of an output's codes, in its column of a panel
    for (i64 own = 0; own < g.merged; ++own) {
        for (i64 c = 0; c < own_in; ++c)
            for (i64 t = 0; t < taps; ++t) {
                const i64 step = t * g.in_channels + own * own_in + c;
                const i64 k = step / runs.length * runs.quads * 4 + step % runs.length;
                place[static_cast<std::size_t>(c * taps + t)] = layout.of_code(k);
            }
        for (i64 group = 0; group < g.groups; ++group)
            for (i64 n = own * own_out; n < (own + 1) * own_out; ++n) {
                const i64 panel = group * panels + n / columns, column = n % columns;
                const std::int8_t* from = w.codes + (group * g.out_channels + n) * codes;
                std::int8_t* to = packed.codes.data() + panel * quads * columns * 4 + layout.of_column(column);
                for (i64 i = 0; i < codes; ++i) to[place[static_cast<std::size_t>(i)]] = from[i];
                packed.sums[panel * columns + column] = std::accumulate(from, from + codes, std::int32_t{0});
            }
    }
    if (kernels.joint_weights > 0)
        packed.joint = joint_quads(kernels, packed.codes, g.groups * panels, quads,
                                   runs.runs > 1 ? runs.quads : chunk_of(kernels, quads));
    return packed;
}

WinogradWeights pack_winograd_weights(const Int8Kernels& kernels, const Weights& w, i64 size) {
    static constexpr int kOf2[][3] = {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 2}};
    static constexpr int kOf4[][3] = {{6, 0, 0}, {-4, -4, -4}, {-4, 4, -4}, {1, 2, 4}, {1, -2, 4}, {0, 0, 6}};
    const int(*const g)[3] = size == 4 ? kOf4 : kOf2;
    const i64 out = w.dims[0], in = w.dims[1], columns = kernels.columns, panels = divide_up(out, columns), side = size + 2;
    constexpr i64 kMost = 2 * 32;  // no instruction set's panels have more columns
    const i64 count = 2 * columns;
    WinogradWeights packed{Aligned<std::int16_t>(side * side * panels * columns * in), panels};
    // combined[i] = f[0] * a[i] + f[1] * b[i] + f[2] * c[i], of 16 bits each.
    const auto combine = [count](const int* f, const std::int16_t* a, const std::int16_t* b, const std::int16_t* c,
                                 std::int16_t* combined) {
        for (i64 i = 0; i < count; ++i) combined[i] = static_cast<std::int16_t>(f[0] * a[i] + f[1] * b[i] + f[2] * c[i]);
    };
    for (i64 panel = 0; panel < panels; ++panel)
        for (i64 pair = 0; pair < in / 2; ++pair) {
            std::int16_t taps[9][kMost] = {}, lines[3][kMost];
            const i64 own = std::min(columns, out - panel * columns);
            for (i64 i = 0; i < 2 * own; ++i) {
                const std::int8_t* from = w.codes + ((panel * columns + i / 2) * in + 2 * pair + i % 2) * 9;
                for (i64 t = 0; t < 9; ++t) taps[t][i] = from[t];
            }
            for (i64 y = 0; y < side; ++y) {
                for (i64 x = 0; x < 3; ++x) combine(g[y], taps[x], taps[3 + x], taps[6 + x], lines[x]);
                for (i64 x = 0; x < side; ++x)
                    combine(g[x], lines[0], lines[1], lines[2],
                            packed.words.data() + (((side * y + x) * panels + panel) * (in / 2) + pair) * count);
            }
        }
    return packed;
}

std::vector<i64> plain_taps(const Int8Kernels& kernels, i64 taps) {
    std::vector<i64> order(static_cast<std::size_t>(round_up(taps, kernels.tap_group)), -1);
    for (i64 t = 0; t < taps; ++t) order[static_cast<std::size_t>(t)] = t;
    return order;
}
std::vector<i64> rolling_taps(const Int8Kernels& kernels, i64 size) {
    std::vector<i64> order;
    const i64 group = kernels.tap_group;
    for (i64 row = 0; row < size; row += group) {
        const bool is_last_alone = row + 1 == size;
        for (i64 column = 0; column < size; column += is_last_alone ? group : 1)
            for (i64 t = 0; t < group; ++t) {
                const i64 y = is_last_alone ? row : row + t, x = is_last_alone ? column + t : column;
                order.push_back(y < size && x < size ? y * size + x : -1);
            }
    }
    return order;
}

PackedWeights pack_depthwise_weights(const Int8Kernels& kernels, const Weights& w, i64 channels, i64 taps,
                                     const std::vector<i64>& order) {
    const i64 block = 4 * kernels.lanes, blocks = divide_up(channels, block), group = kernels.tap_group;
    const i64 places = static_cast<i64>(order.size()), groups = places / group;
    PackedWeights packed{Aligned<std::int8_t>(blocks * groups * block * 4), Aligned<std::int32_t>(blocks * block), {}};
    for (i64 c = 0; c < channels; ++c) {
        const i64 b = c / block, at = block_position(kernels, c % block);
        for (i64 place = 0; place < places; ++place) {
            const i64 tap = order[static_cast<std::size_t>(place)], t = place % group;
            if (tap < 0) continue;
            const std::int8_t code = w.codes[c * taps + tap];
            std::int8_t* to = packed.codes.data() + ((b * groups + place / group) * block + at) * 4;
            if (group == 2) {
                const std::int16_t wide = code;
                std::memcpy(to + 2 * t, &wide, 2);
            } else {
                to[t] = code;
            }
            packed.sums[b * block + at] += code;
        }
    }
    return packed;
}

}  // namespace quantflow::host::int8
