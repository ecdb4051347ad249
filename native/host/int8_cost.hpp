// What int8 steps cost in cycles, and what is chosen by it: how groups are merged, how the work is cut into tasks.
#pragma once

#include "int8_packing.hpp"

namespace quantflow::host::int8 {

struct Shape3;

// Whether windows are read from lines of x with their padding, which saves the copying of rows, where every pixel repeats
// once per tap. What it costs is the padding of runs.
bool takes_windows(const Int8Kernels&, const Grouping&, const Shape3&);

// Whether short runs are copied side by side, where tiles would multiply mostly padding.
bool joins_runs(const Int8Kernels&, const Runs&);

Grouping merge_groups(const Int8Kernels&, const Grouping& unmerged, const Shape3&);

// Tasks of `rows` rows and `panels` panels. A thread works on neighbouring tasks: on the same rows, where these are the
// larger part of what it touches (the next step finds them in its cache), else on the same panels.
struct Tasks {
    i64 rows = 1, panels = 1, row_tasks = 1, panel_tasks = 1;
    bool shares_rows = false;
    double least_ms = 0;  // predicted of the best cut there is
};

// Quads summed at a time: the panel's and the tile's operands then share the L1 cache.
i64 chunk_of(const Int8Kernels&, i64 quads);

// Cycles that spreading a step over threads costs, where it was not measured.
constexpr double kHandOver = 6000;

// Weighs packing and fetching, which small tasks repeat, against idle threads at the end, which large ones cause: by the
// rates in use, or as was measured for this shape. Leaves its decision.
Tasks cut(const Int8Kernels&, const Int8Gemm&, i64 groups, i64 rows, int threads);

// Predicted for a task by itself, by the rates in use.
double task_ms(const Int8Kernels&, const Int8Gemm&, i64 rows, i64 panels);

}  // namespace quantflow::host::int8
