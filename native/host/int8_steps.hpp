// The steps behind `linear` and `conv` on codes, one file each. Which of them a layer gets: int8_gemm.cpp.
#pragma once

#include <algorithm>

#include "int8_cost.hpp"
#include "int8_output.hpp"
#include "steps.hpp"

namespace quantflow::host::int8 {

std::string tile_name(const Int8Kernels&, const char* what);

// A thread's own scratch, kept between runs and steps: it stays in the cache.
u8* thread_scratch(i64 bytes);

// The part of a step that a task is.
struct Part {
    i64 group, row, rows, panel, panels;
    Part(const Int8Gemm& g, const Tasks& tasks, i64 all_rows, i64 task) {
        const i64 rest = task % (tasks.row_tasks * tasks.panel_tasks);
        group = task / (tasks.row_tasks * tasks.panel_tasks);
        row = (tasks.shares_rows ? rest / tasks.panel_tasks : rest % tasks.row_tasks) * tasks.rows;
        panel = (tasks.shares_rows ? rest % tasks.panel_tasks : rest / tasks.row_tasks) * tasks.panels;
        rows = std::min(tasks.rows, all_rows - row);
        panels = std::min(tasks.panels, g.task_panels - panel);
    }
};
void run_part(const Int8Kernels&, const Int8Gemm&, const Part&);

// Where the taps of a convolution lie in x, from the window's first: dilation * tap - padding.
struct TapTable {
    std::vector<std::int32_t> z, y, x;
};

// A convolution with spatial dimensions padded to three.
struct Shape3 {
    i64 in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
    i64 stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0}, dilation[3] = {1, 1, 1};
    i64 taps() const { return kernel[0] * kernel[1] * kernel[2]; }
    i64 pixels() const { return out[0] * out[1] * out[2]; }
    bool is_pointwise() const {
        bool all = true;
        for (int i = 0; i < 3; ++i) all = all && kernel[i] == 1 && stride[i] == 1 && padding[i] == 0 && out[i] == in[i];
        return all;
    }
    // Whether an image is one plane, with nothing before or after it.
    bool is_flat() const { return in[0] == 1 && out[0] == 1 && kernel[0] == 1 && padding[0] == 0; }
    // Whether the pixels under a kernel row lie side by side.
    bool is_row_run(i64 groups) const { return groups == 1 && dilation[2] == 1; }
    // One entry per tap, or per kernel row.
    TapTable table(bool of_rows) const {
        TapTable t;
        for (i64 z = 0; z < kernel[0]; ++z)
            for (i64 y = 0; y < kernel[1]; ++y)
                for (i64 x = 0; x < (of_rows ? 1 : kernel[2]); ++x) {
                    t.z.push_back(static_cast<std::int32_t>(z * dilation[0] - padding[0]));
                    t.y.push_back(static_cast<std::int32_t>(y * dilation[1] - padding[1]));
                    t.x.push_back(static_cast<std::int32_t>(x * dilation[2] - padding[2]));
                }
        return t;
    }
};

Shape3 shape_of(const Weights&, const ConvGeometry&, const Tensor& x, const Tensor& y);

// On those of the kernels at hand that are predicted to take less time. `unmerged`: one group per group.
StepPtr make_gemm_step(ThreadPool&, const Weights&, const Grouping& unmerged, const Shape3&, const Tensor& x,
                       const Tensor* residual, const Epilogue&, const Tensor& y, i64 rows, const Terms&);
StepPtr make_gemm_step_on(const Int8Kernels&, ThreadPool&, const Weights&, const Grouping& unmerged, const Shape3&,
                          const Tensor& x, const Tensor* residual, const Epilogue&, const Tensor& y, i64 rows,
                          const Terms&);
StepPtr make_depthwise_step(ThreadPool&, const Weights&, const Shape3&, const Tensor& x, const Tensor* residual,
                            const Epilogue&, const Tensor& y, const Terms&);
// The size of Winograd's tiles by which a convolution takes less time; 0: by none.
i64 winograd_size(const Int8Kernels&, int threads, const Weights&, const ConvGeometry&, const Shape3&, const Tensor& x,
                  const Tensor& y);
StepPtr make_winograd_step(ThreadPool&, const Weights&, i64 size, const Shape3&, const Tensor& x, const Tensor* residual,
                           const Epilogue&, const Tensor& y, const Tensor* rest);

}  // namespace quantflow::host::int8
