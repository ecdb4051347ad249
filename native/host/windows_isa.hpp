// Kernels over windows of pixels whose channels are dense, of one instruction set. Also rows, for reductions.
#pragma once

#include <cstdint>

#include "elementwise_isa.hpp"

namespace quantflow::host {

// The elements of a window: x[offsets[k] + c] for k < count. Offsets and steps in elements.
struct Window {
    const std::int64_t* offsets;
    std::int64_t count;
};

// Windows of equal shape: pixel p reads at x + p * x_step and writes at y + p * y_step.
struct PixelRun {
    const void* x;
    std::int64_t x_step;
    void* y;
    std::int64_t y_step;
    std::int64_t pixels, channels;
};

// Mean of a window, as sum(q - zero_point) / divisor * scale for codes.
struct MeanJob {
    Form x, y;
    std::int64_t divisor = 1;
};

// Which two pixels of a row each pixel lies between.
struct Blends {
    const std::int32_t* low;
    const std::int32_t* high;
    const float* weight;
    std::int64_t pixels;
};

struct WindowKernels {
    // x and y do not overlap; the window has at least one element.
    void (*max_codes)(const Window&, const PixelRun&);
    void (*max_floats)(const Window&, const PixelRun&);
    // Of codes: at most 2**23 elements, so that their sum fits int32.
    void (*mean)(const MeanJob&, const Window&, const PixelRun&);

    // sums[c], c < n; at most 256 elements of codes. Codes are summed as they are.
    void (*sum_codes)(const Window&, const std::uint8_t* x, std::int64_t n, std::int32_t* sums);
    void (*sum_floats)(const Window&, const float* x, std::int64_t n, float* sums);
    // Largest or smallest real; NaN wins. The window has at least one element.
    void (*best)(const Form&, bool is_max, const Window&, const void* x, std::int64_t n, float* bests);

    // Along a row: the sum of codes as they are or of floats, the best real of n > 0.
    double (*sum_row)(const Form&, const void* x, std::int64_t stride, std::int64_t n);
    float (*best_row)(const Form&, bool is_max, const void* x, std::int64_t stride, std::int64_t n);

    // r = (1 - weight) * above + weight * below, over n dense reals.
    void (*blend_rows)(const Form&, const void* above, const void* below, float weight, std::int64_t n, float* r);
    // y[p] = (1 - weight[p]) * row[low[p]] + weight[p] * row[high[p]], over pixels of dense channels.
    void (*blend_pixels)(const float* row, const Blends&, std::int64_t channels, const Form&, void* y,
                         std::int64_t y_step);
};

namespace isa_generic { const WindowKernels& window_kernels(); }
namespace isa_avx2 { const WindowKernels& window_kernels(); }
namespace isa_avx512_vnni { const WindowKernels& window_kernels(); }

}  // namespace quantflow::host
