// The tile instructions that kernels use, for CPUs without AMX; those of int8 by AVX512-VNNI. What the processor would
// refuse, or leave undefined, ends the program.
#pragma once

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace emulated_tiles {

struct Config {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t bytes_per_row[16];
    std::uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

inline thread_local Config config{};
alignas(64) inline thread_local std::uint8_t tiles[8][16][64];

inline void require(bool ok, const char* what) {
    if (ok) return;
    std::printf("tile instruction: %s\n", what);
    std::abort();
}
inline void require_tile(int t) {
    require(config.palette == 1, "the tiles have no configuration");
    require(config.rows[t] > 0 && config.bytes_per_row[t] > 0, "the tile is empty");
}

inline void loadconfig(const void* from) {
    std::memcpy(&config, from, sizeof config);
    require(config.palette == 1 && config.start_row == 0, "no such palette");
    for (int t = 0; t < 8; ++t) require(config.rows[t] <= 16 && config.bytes_per_row[t] <= 64, "the tile is too large");
    std::memset(tiles, 0, sizeof tiles);
}
inline void release() { config = Config{}; }

inline void load(int t, const void* from, std::int64_t stride) {
    require_tile(t);
    std::memset(tiles[t], 0, sizeof tiles[t]);
    for (int m = 0; m < config.rows[t]; ++m)
        std::memcpy(tiles[t][m], static_cast<const char*>(from) + m * stride, config.bytes_per_row[t]);
}
inline void store(int t, void* to, std::int64_t stride) {
    require_tile(t);
    for (int m = 0; m < config.rows[t]; ++m)
        std::memcpy(static_cast<char*>(to) + m * stride, tiles[t][m], config.bytes_per_row[t]);
}

inline void zero(int t) {
    require_tile(t);
    std::memset(tiles[t], 0, sizeof tiles[t]);
}

// Returns the words in a row of a.
inline int require_product(int sums, int a, int b) {
    for (int t : {sums, a, b}) require_tile(t);
    require(sums != a && sums != b && a != b, "operands must differ");
    const int words = config.bytes_per_row[a] / 4;
    require(config.rows[sums] == config.rows[a] && config.rows[b] == words &&
                config.bytes_per_row[sums] == config.bytes_per_row[b], "shapes differ");
    return words;
}

// sums[m][n] (f32) += pairs of a (bfloat16) [m][k] times pairs of b [k][n], one after the other; what is too small for a
// normal number is 0.
inline void dpbf16ps(int sums, int a, int b) {
    const int words = require_product(sums, a, b);
    const auto normal = [](float x) { return x < 0x1p-126f && x > -0x1p-126f ? 0.0f : x; };
    const auto number = [&](int t, int row, int place) {
        const std::uint32_t bits = static_cast<std::uint32_t>(tiles[t][row][2 * place]) << 16 |
                                   static_cast<std::uint32_t>(tiles[t][row][2 * place + 1]) << 24;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return normal(x);
    };
    for (int m = 0; m < config.rows[sums]; ++m)
        for (int n = 0; n < config.bytes_per_row[sums] / 4; ++n) {
            float sum;
            std::memcpy(&sum, tiles[sums][m] + 4 * n, sizeof sum);
            for (int k = 0; k < 2 * words; ++k)
                sum = normal(sum + number(a, m, k) * number(b, k / 2, 2 * n + k % 2));
            std::memcpy(tiles[sums][m] + 4 * n, &sum, sizeof sum);
        }
}

#if defined(__AVX512VNNI__)
// sums[m][n] += quads of a (u8) [m][k] times quads of b (s8) [k][n].
inline void dpbusd(int sums, int a, int b) {
    const int quads = require_product(sums, a, b);
    // Columns beyond the configured ones are 0 in b.
    for (int m = 0; m < config.rows[sums]; ++m) {
        __m512i row = _mm512_loadu_si512(tiles[sums][m]);
        for (int k = 0; k < quads; ++k) {
            std::int32_t quad;
            std::memcpy(&quad, tiles[a][m] + 4 * k, sizeof quad);
            row = _mm512_dpbusd_epi32(row, _mm512_set1_epi32(quad), _mm512_loadu_si512(tiles[b][k]));
        }
        _mm512_storeu_si512(tiles[sums][m], row);
    }
}
#endif

}  // namespace emulated_tiles

// The compiler's own header may have these as macros.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#undef _tile_zero
#define _tile_loadconfig emulated_tiles::loadconfig
#define _tile_release emulated_tiles::release
#define _tile_loadd emulated_tiles::load
#define _tile_stream_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_dpbusd emulated_tiles::dpbusd
#define _tile_dpbf16ps emulated_tiles::dpbf16ps
#define _tile_zero emulated_tiles::zero
