// The int8 kernels of one instruction set, behind plain structs: int8_gemm_isa.cpp is compiled once per instruction
// set, so nothing in here may be an inline function that the linker could take from the wrong one.
#pragma once

#include <cstdint>

#include "../src/activations.hpp"

namespace quantflow::host {

// Activation's values.
#define QF_INT8_ENUMERATOR(name, Name, ...) kInt8##Name,
enum Int8Activation : int {
    kInt8None, QF_ACTIVATIONS(QF_INT8_ENUMERATOR) kInt8Activations,
    kInt8Linear = kInt8Activations,  // see Int8Output::is_linear; of depthwise convolutions
};
#undef QF_INT8_ENUMERATOR

// Sums of a product that comes before, with constants as those of Int8Output.
struct Int8Before {
    const std::int32_t* sums = nullptr;
    const float *scale = nullptr, *bias = nullptr, *code_scale = nullptr;
};
constexpr int kMostBefore = 2;  // Terms::kMost

// What happens to an exact sum: r = sum * scale[c] + bias[c] (+ residual), the activation, then codes or float32.
// `scale` and `bias` are padded as the weights are, `channel` and `y` count real channels.
struct Int8Output {
    const float* scale = nullptr;
    const float* bias = nullptr;
    const std::uint8_t* residual = nullptr;  // codes, the shape of y
    const float* real_residual = nullptr;    // or float32
    float residual_scale = 0;
    std::int32_t residual_zero = 0;
    void* y = nullptr;
    bool is_float = false;
    std::int64_t row = 0;  // elements from one row (pixel) of y to the next
    float inverse_scale = 0, low = 0, high = 0;  // of y's codes; low and high have the zero point subtracted
    std::int32_t zero = 0;
    int activation = kInt8None;
    float a = 0, b = 0;
    // Codes at once, for activations that only clamp: round(sum * code_scale[c] + code_bias[c] (+ (residual -
    // residual_zero) * residual_step)) + zero, clamped to [low_code, high_code]. The constants are divided by y's scale
    // beforehand, and each product is added with one rounding: equal to the reference runtime to the bit.
    bool is_linear = false;
    bool is_gelu_in_steps = false;  // the same with GELU in between, and nothing else added
    const float *code_scale = nullptr, *code_bias = nullptr;
    float residual_step = 0;
    std::uint8_t low_code = 0, high_code = 255;
    // Where y is codes: what they leave over of r, as codes of its own; null: not wanted.
    std::uint8_t* rest = nullptr;
    float step = 0;  // y's scale
    float rest_inverse_scale = 0, rest_low = 0, rest_high = 0;
    std::int32_t rest_zero = 0;
    // The sums go here as they are, and nothing else is written; null: not wanted. Padded as `scale` is: those of a row
    // `sums_row` apart, of a depthwise pixel one block after the other.
    std::int32_t* raw_sums = nullptr;
    // What was kept so of products that come before: r = (sum * scale + bias) of each, the first one plus the residual,
    // each added to the one before. `is_linear`: code_bias is that of all of them.
    Int8Before before[kMostBefore];
    int befores = 0;
    std::int64_t sums_row = 0;
};

// A convolution as rows (output pixels) times channels. Spatial dimensions are padded to three.
struct Int8Gemm {
    const std::uint8_t* x = nullptr;
    const std::uint8_t* x_end = nullptr;  // nothing at or beyond may be read
    std::int32_t zero = 0;
    std::int64_t pixel = 0;  // bytes from one input pixel (row of a linear) to the next
    std::int64_t in_channels = 0;  // per group
    // Whether row m reads pixel m and nothing else; `is_direct`: it is read where it lies, without packing.
    bool is_pointwise = false, is_direct = false;
    std::int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, stride[3] = {1, 1, 1};
    // The reduction, cut into runs of adjacent bytes: one kernel row if pixels are adjacent, else one tap each.
    bool is_row_run = false;
    std::int64_t runs = 1, run_length = 0;
    const std::int32_t *run_z = nullptr, *run_y = nullptr, *run_x = nullptr;  // dilation * tap - padding
    const std::int64_t* run_offset = nullptr;                                // bytes from a window's position
    // Windows are read from a copy of the lines of x with their padding. `window_offset`: where a run begins there.
    // Weights of a run are padded to whole steps of `Int8Kernels::depth` quads. Groups share the copy: their panels are
    // counted through, as those of group 0.
    bool is_windowed = false, reads_in_place = false;  // reads_in_place: from x itself, nothing needs padding
    const std::int64_t* window_offset = nullptr;
    // Not 0: the copy holds the windows' parts in each line side by side, of one column of y below another, so that a whole
    // window lies in one run. Bytes of a part.
    std::int64_t column_bytes = 0;
    std::int64_t padding[3] = {0, 0, 0}, reach[3] = {0, 0, 0};  // reach: dilation * (kernel - 1)
    // Positions (stride * output) whose windows lie inside x: [inside_from, inside_to) in every dimension.
    std::int64_t inside_from[3] = {0, 0, 0}, inside_to[3] = {1, 1, 1};

    // Codes [group][panel][quad][column][4] (with tile registers see PanelLayout): a quad is four steps of the reduction, a
    // panel `columns` channels.
    const std::int8_t* weights = nullptr;
    // What sums start from, per padded channel: -zero * (sum of weights). Tile registers: null is zeros.
    const std::int32_t* start = nullptr;
    const std::int32_t* row_start = nullptr;  // per row, added to `start`; null: none
    std::int64_t channels = 0, panels = 0;  // per group
    std::int64_t task_panels = 0;           // that one call may compute: of a group, or of all groups
    // chunk: quads summed at a time, so that operands stay in the L1 cache. Tile registers sum all of them.
    std::int64_t quads = 0, chunk = 0;
    // [group][panel][quad]: whether the quad and the one behind it may be multiplied at once (Int8Kernels::joint_weights),
    // never the last of a run or chunk; null: none may.
    const std::uint8_t* joint = nullptr;
    // What tile registers fetch meanwhile: the panels behind those of a task, if its thread goes on with them, else the
    // task's share (of all rows and panels) of the weights of the next step; null: there are none.
    bool goes_on = false;
    const std::uint8_t* next = nullptr;
    std::int64_t next_bytes = 0, all_rows = 0, all_panels = 0;
    Int8Output output;
};

// A convolution of each channel by itself.
struct Int8Depthwise {
    const std::uint8_t* x = nullptr;
    const std::uint8_t* x_end = nullptr;
    const std::uint8_t* outside = nullptr;  // `outside_bytes` zero points, at least a padded pixel
    std::int64_t outside_bytes = 0;
    // Columns of y whose windows lie inside x's columns.
    std::int64_t inner_begin = 0, inner_end = 0;
    std::int64_t channels = 0, blocks = 0;  // blocks of 4 * lanes channels
    std::int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, stride[3] = {1, 1, 1};
    std::int64_t taps = 0;  // padded to a multiple of `tap_group`
    std::int64_t real_taps = 0;
    const std::int32_t *tap_z = nullptr, *tap_y = nullptr, *tap_x = nullptr;  // dilation * tap - padding
    const std::uint8_t* weights = nullptr;  // [block][group of taps][4][lane], four bytes each
    const std::int32_t* start = nullptr;    // [block][4][lane]
    Int8Output output;                      // scale, bias: [block][4][lane]
};

// A 3x3 convolution with stride 1 by Winograd's F(2x2, 3x3) or F(4x4, 3x3), in integers: with the filter transform doubled in
// both directions, or 24-fold, all its numbers are whole, and the result is 4 times the sum, or 24^2 times. All arithmetic is
// modulo 2^32, where 9 can be divided by, so only 4 or 64 times the sum has to fit. 16 instead of 36 products per tile of
// 2x2 output pixels, 36 instead of 144 per tile of 4x4, of 16 bits.
struct Int8Winograd {
    const std::uint8_t* x = nullptr;
    const std::uint8_t* outside = nullptr;  // a pixel of zero points
    std::int32_t zero = 0;
    std::int64_t in_channels = 0;  // a multiple of 2 * lanes
    std::int64_t size = 2;  // of a tile of output pixels: 2 or 4
    std::int64_t in[2] = {1, 1}, out[2] = {1, 1}, padding[2] = {0, 0}, tiles[2] = {1, 1};  // rows, columns
    const std::int16_t* weights = nullptr;  // [point][panel][pair][column][2]; (size + 2)^2 points
    std::int64_t channels = 0, panels = 0;
    Int8Output output;
};

// Weights that tile registers pass over a tile's rows before the next tile: they stay in the L2 cache beside the rows.
constexpr std::int64_t kInt8BlockBytes = 768 * 1024;

struct Int8Kernels {
    const char* name;
    int lanes;      // 32-bit lanes of a vector
    int rows;       // of a register tile
    int columns;    // of a register tile, and channels in a panel
    int depth;      // quads multiplied at once: weights and packed rows are padded to a multiple of it
    bool is_exact;  // any u8 code times any s8 code: rows can be read where they lie
    int tap_group;  // depthwise taps multiplied at once: 4 (weights int8) or 2 (weights int16)
    // Not 0: two quads behind each other are multiplied at once where, of each half of a column's, the four weights of one
    // sign add up to no more than this.
    int joint_weights;
    // Rows [row, row + rows), panels [panel, panel + panels) of one group.
    void (*gemm)(const Int8Gemm&, std::int64_t group, std::int64_t row, std::int64_t rows, std::int64_t panel,
                 std::int64_t panels, std::uint8_t* scratch);
    std::int64_t (*gemm_scratch)(const Int8Gemm&, std::int64_t rows, std::int64_t panels);  // bytes
    std::int64_t (*line_bytes)(const Int8Gemm&);  // from one line of windows to the next
    // Output lines [line, line + lines) over (batch, depth, height), blocks [block, block + blocks).
    void (*depthwise)(const Int8Depthwise&, std::int64_t line, std::int64_t lines, std::int64_t block,
                      std::int64_t blocks, std::uint8_t* scratch);
    std::int64_t (*depthwise_scratch)(const Int8Depthwise&);
    // The same for windows of 3x3 or 5x5 that slide by 1 or 2, undilated. Groups of taps: those of `tap_group` rows,
    // column by column; of a last row by itself, of as many columns. Null where there are too few registers.
    // Reads a line and a block of `outside`.
    void (*rolling)(const Int8Depthwise&, std::int64_t line, std::int64_t lines, std::int64_t block,
                    std::int64_t blocks, std::uint8_t* scratch);
    std::int64_t (*rolling_scratch)(const Int8Depthwise&);
    // Tiles [tile, tile + tiles) over (batch, rows, columns). Null where `dot` on bytes is always the faster way.
    void (*winograd)(const Int8Winograd&, std::int64_t tile, std::int64_t tiles, std::int64_t panel,
                     std::int64_t panels, std::uint8_t* scratch);
    std::int64_t (*winograd_scratch)(const Int8Winograd&, std::int64_t tiles);
};

// Writes a tile of sums, `channels` wide, into rows [row, row + rows) of the output. stride: from one row of sums to the
// next; padded: where the tile's channels begin in what is kept per channel; channel: where they begin in a row.
using FinishTile = void (*)(const Int8Output&, const std::int32_t* sums, std::int64_t stride, std::int64_t row,
                            std::int64_t rows, std::int64_t padded, std::int64_t channel, std::int64_t channels);

namespace isa_generic {
extern const Int8Kernels int8_kernels;
}
namespace isa_avx2 {
extern const Int8Kernels int8_kernels;
// AVX-VNNI's, too.
struct Finishing {
    static FinishTile tile(const Int8Output&);
};
}
namespace isa_avx_vnni {
extern const Int8Kernels int8_kernels;
}
namespace isa_avx512_vnni {
extern const Int8Kernels int8_kernels;
// AMX's, too.
struct Finishing {
    static FinishTile tile(const Int8Output&);
};
struct Depthwise {
    static void lines(const Int8Depthwise&, std::int64_t line, std::int64_t lines, std::int64_t block,
                      std::int64_t blocks, std::uint8_t* scratch);
    static std::int64_t scratch(const Int8Depthwise&);
    static void rolling_lines(const Int8Depthwise&, std::int64_t line, std::int64_t lines, std::int64_t block,
                              std::int64_t blocks, std::uint8_t* scratch);
    static std::int64_t rolling_scratch(const Int8Depthwise&);
};
}
namespace isa_amx_int8 {
extern const Int8Kernels int8_kernels;
}

// The kernels that steps built from now on use; tests set them to try other instruction sets' code.
const Int8Kernels*& int8_kernels_in_use();
// Those that a step may take instead, where these are predicted to be the faster: vectors beside tile registers. Null: none.
const Int8Kernels*& int8_kernels_beside();

}  // namespace quantflow::host
