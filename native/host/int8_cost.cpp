#include <algorithm>
#include <limits>

#include "int8_steps.hpp"
#include "rates.hpp"

namespace quantflow::host::int8 {
namespace {

// A tile register takes as long for few rows as for 16, and for few bytes as for 64: what is lost at the ends of lines and
// of runs, against copying the windows. Cycles for one image.
bool tiles_take_windows(const Int8Kernels& kernels, const Grouping& grouping, const Shape3& s, const Runs& run) {
    const i64 rows = s.out[1] * s.out[2], height = kernels.rows / 2, steps = run.runs * run.length;
    i64 pieces = s.out[1] * divide_up(s.out[2], height);
    if (s.stride[1] == 1 && s.stride[2] == 1)  // they span lines
        pieces = std::min(pieces, divide_up(s.out[1] * (s.out[2] + s.dilation[2] * (s.kernel[2] - 1)), height));
    // Of a step, through all panels.
    const double cycles = 2.0 * static_cast<double>(height * divide_up(grouping.out_channels, kernels.columns));
    const double windows = cycles * static_cast<double>(pieces * run.runs * (run.quads / kernels.depth));
    const double row = 6 * static_cast<double>(run.runs) + static_cast<double>(steps) / 24;  // to copy it
    const i64 packed = divide_up(rows, height) * divide_up(steps, 4 * kernels.depth);
    return windows <= cycles * static_cast<double>(packed) + static_cast<double>(rows) * row;
}

}  // namespace

bool takes_windows(const Int8Kernels& kernels, const Grouping& grouping, const Shape3& s) {
    const i64 length = grouping.in_channels * (s.is_row_run(grouping.groups) ? s.kernel[2] : 1);
    if (!s.is_flat() || s.is_pointwise() || length == 0) return false;
    const double padding = static_cast<double>(4 * Runs(kernels, 1, length).quads) / static_cast<double>(length);
    if (kernels.depth > 1 && grouping.groups > 1) return false;  // a tile's row is longer than a group's pixel
    if (kernels.depth == 1 && padding >= 1.4) return false;
    const Runs run(kernels, s.taps() * grouping.in_channels / length, length);
    if (kernels.depth > 1 && !tiles_take_windows(kernels, grouping, s, run)) return false;
    // x is copied anyhow, and chunks of long rows fit the L1 cache; widened lines keep quads together, so that a run must
    // begin with one.
    if (!kernels.is_exact && (grouping.groups * grouping.merged == 1 || grouping.in_channels % 4 != 0)) return false;
    return s.kernel[1] > 1 || s.kernel[2] > 1 || (kernels.is_exact && padding == 1);
}

bool joins_runs(const Int8Kernels& kernels, const Runs& run) {
    return kernels.depth > 1 && 3 * Runs::joined(kernels, run.runs, run.length).all_quads <= 2 * run.all_quads;
}

Grouping merge_groups(const Int8Kernels& kernels, const Grouping& unmerged, const Shape3& shape) {
    const i64 groups = unmerged.groups, in_channels = unmerged.in_channels, out_channels = unmerged.out_channels;
    const i64 taps = shape.taps();
    const Rates rates = rates_of(kernels);
    Grouping best = unmerged;
    double best_cost = std::numeric_limits<double>::infinity();
    for (i64 merged = 1; merged <= groups; ++merged) {
        if (groups % merged != 0 || (merged > 1 && merged * out_channels > 2 * kernels.columns)) continue;
        const Grouping own{groups / merged, merged * in_channels, merged * out_channels, merged};
        const i64 quads = divide_up(taps * own.in_channels, 4), vectors = divide_up(own.out_channels, kernels.lanes);
        // Cycles for one row of all groups: packing, then products.
        double cost = static_cast<double>(taps) * (6 + static_cast<double>(own.in_channels) / 16) +
                      rates.narrow_product * static_cast<double>(quads * std::max<i64>(vectors, 2));
        if (kernels.depth == 1 && takes_windows(kernels, own, shape))
            cost = static_cast<double>(taps) +
                   static_cast<double>(taps * divide_up(own.in_channels, 4) * vectors) * rates.narrow_window;
        cost *= static_cast<double>(own.groups);
        if (cost < best_cost) {
            best_cost = cost;
            best = own;
        }
    }
    return best;
}

i64 chunk_of(const Int8Kernels& kernels, i64 quads) {
    if (kernels.depth > 1) return std::max<i64>(kernels.depth, quads);  // tile registers keep their sums
    const i64 most = 20 * 1024 / (4 * (kernels.columns + 2 * kernels.rows));
    return std::max<i64>(kernels.depth, round_up(divide_up(quads, std::max<i64>(1, divide_up(quads, most))), kernels.depth));
}

namespace {

// Of what a step's rows take: all that decides which ways it has, and their costs.
std::string shape_text(const Int8Kernels& kernels, const Int8Gemm& g, i64 groups, i64 rows, int threads) {
    std::string text = std::to_string(rows) + "x" + std::to_string(4 * g.quads) + "x" +
                       std::to_string(g.task_panels * kernels.columns);
    if (groups > 1) text += " of " + std::to_string(groups) + " groups";
    if (g.is_windowed)
        text += " windows " + std::to_string(g.reach[1] + 1) + "x" + std::to_string(g.reach[2] + 1) + "/" +
                std::to_string(g.stride[1]) + " over lines of " + std::to_string(g.out[2]) + "x" +
                std::to_string(g.pixel) + (g.reads_in_place ? " in place" : "");
    else if (!g.is_direct)
        text += " packed" + (g.runs > 1 ? " from " + std::to_string(g.runs) : std::string());
    if (g.output.is_float) text += " to float";
    if (g.output.residual_scale != 0 || g.output.real_residual != nullptr) text += " + residual";
    return text + ", " + kernels.name + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
}

struct Candidate {
    i64 rows, panels;
    double cycles, work;  // of all threads together, of all tasks
};

// Cycles to read a byte that another core wrote.
constexpr double kForeignByte = 0.25;

// What tasks of a step cost one thread.
class TaskCost {
public:
    TaskCost(const Int8Kernels& kernels, const Rates& rates, const Int8Gemm& g, i64 groups)
        : kernels_(kernels), rates_(rates), g_(g), has_tiles_(kernels.depth > 1),
          by_lines_(g.is_windowed || g.is_direct),
          unit_(g.is_windowed ? std::max<i64>(g.out[2], 1) : kernels.rows),
          line_bytes_(g.column_bytes > 0 ? g.out[2] * g.column_bytes
                                         : (g.out[2] * g.stride[2] + g.reach[2]) * g.pixel) {
        // Lines are copied first and read by tiles soon after; other rows lie where they are, or pass one by one.
        const bool stays = g.is_windowed ? !has_tiles_ : has_tiles_ || by_lines_;
        const i64 l2 = caches().l2;
        cache_ = stays ? l2 / 2 : l2 / 8;
        // Of the panels' columns those in vectors that hold channels; of these, those that tile registers finish in pairs
        // of panels.
        const double all_columns = static_cast<double>(g.panels * kernels.columns);
        used_ = static_cast<double>(round_up(g.channels, kernels.lanes)) / all_columns;
        const double paired =
            has_tiles_ ? static_cast<double>(g.channels / (2 * kernels.columns) * 2 * kernels.columns) : 0;
        paired_ = paired / (used_ * all_columns);
        const bool stays_near = groups * g.task_panels * g.quads * kernels.columns * 4 <= l2 / 2;
        fetching_ = stays_near ? rates.fetching_near : rates.fetching_far;
    }

    // What a thread waits for other cores' caches where `row_tasks` do not leave it rows of its own: for most of x, and for
    // as much of y when the next step reads it. Of tile registers it is part of `passing`.
    double foreign_cycles(i64 rows, i64 row_tasks, int threads) const {
        if (has_tiles_ || row_tasks >= threads) return 0;
        const double x_bytes = static_cast<double>(rows * g_.pixel);
        const double y_bytes = static_cast<double>(rows * g_.output.row * (g_.output.is_float ? 4 : 1));
        const double others = 1 - static_cast<double>(row_tasks) / threads;
        return others * (x_bytes + y_bytes / threads) * kForeignByte;
    }

    // Windows are cut at the ends of lines.
    i64 unit() const { return unit_; }
    bool fits(i64 rows) const {
        // Tile registers take rows in order, each through a whole block of panels.
        return rows <= unit_ || row_bytes(rows) <= cache_ || (has_tiles_ && g_.is_direct);
    }
    bool fits(i64 rows, i64 panels) const {
        return has_tiles_ || by_lines_ || g_.chunk >= g_.quads || panels == 1 ||
               rows * panels * kernels_.columns * 4 <= cache_;
    }
    double cycles(i64 rows, i64 panels) const {
        const double quads = static_cast<double>(g_.quads), columns = kernels_.columns;
        const double product = g_.is_windowed ? rates_.window_product : rates_.product;
        const double tile_cost = has_tiles_ ? 8 : 1;  // in rows: its weights are loaded
        const double r = static_cast<double>(rows), p = static_cast<double>(panels) * used_;
        const double tile_rows = static_cast<double>(divide_up(rows, kernels_.rows)) * tile_cost + r;
        const double products = tile_rows * p * quads * product;
        double fetching = p * quads * columns * 4 * fetching_;
        // Tile registers multiply while what comes next is fetched.
        if (has_tiles_) fetching = std::max(p * quads * columns * 4 * rates_.fetching_near, fetching - products);
        const double finishing = r * p * columns * finishing_rate(panels);
        // Every panel passes over the task's rows of x and y, which lie in the L1 cache or beyond; of tile registers,
        // every block of panels.
        const double x_bytes = static_cast<double>(row_bytes(rows)) / r;
        const double y_bytes = g_.output.residual_scale != 0 ? 128 : 64;
        double passing = r * (x_bytes + y_bytes) <= static_cast<double>(caches().l1)
                             ? 0
                             : r * p * (x_bytes + y_bytes) * rates_.passing;
        if (has_tiles_)
            passing = r * x_bytes * rates_.passing *
                      static_cast<double>(divide_up(panels * g_.quads * kernels_.columns * 4, kInt8BlockBytes));
        double packing = 0;
        if (g_.is_windowed)
            packing = g_.reads_in_place
                          ? 0
                          : static_cast<double>(lines(rows)) * (static_cast<double>(line_bytes_) / 16 + 40);
        else if (!g_.is_direct)
            packing = r * (4 * quads * rates_.packing + 5 * static_cast<double>(g_.runs));
        return products + fetching + finishing + passing + packing + 400;
    }

private:
    // A task of an odd number of panels finishes its last one by itself.
    double finishing_rate(i64 panels) const {
        if (!has_tiles_) return rates_.finishing;
        const double pairs = static_cast<double>(panels / 2 * 2) / static_cast<double>(panels);
        return rates_.narrow_finishing + paired_ * pairs * (rates_.finishing - rates_.narrow_finishing);
    }
    i64 lines(i64 rows) const { return rows / unit_ * g_.stride[1] + g_.reach[1] + 1; }
    i64 row_bytes(i64 rows) const {
        const i64 row_quads = has_tiles_ || g_.is_direct ? g_.quads : g_.chunk;
        return g_.is_windowed ? lines(rows) * line_bytes_ : rows * row_quads * 4;
    }

    const Int8Kernels& kernels_;
    const Rates& rates_;
    const Int8Gemm& g_;
    const bool has_tiles_, by_lines_;
    const i64 unit_, line_bytes_;
    i64 cache_ = 0;
    double used_ = 1, paired_ = 0, fetching_ = 0;
};

// Calls visit(candidate) for the cuts that fit into the caches.
template <typename Visit>
void each_cut(const Int8Kernels& kernels, const Rates& rates, const Int8Gemm& g, i64 groups, i64 rows, int threads,
              const Visit& visit) {
    const TaskCost cost(kernels, rates, g, groups);
    const i64 unit = cost.unit(), units = divide_up(rows, unit);
    const double last = rates.last_task();
    // The smallest tasks are always among those that are looked at: they are the only ones that fit where a line is long.
    const auto next = [](i64 tasks, i64 most) { return tasks == most ? tasks + 1 : std::min(tasks + 1 + tasks / 8, most); };
    for (i64 row_tasks = 1; row_tasks <= units; row_tasks = next(row_tasks, units)) {
        // A task for each thread is of as many rows; of more tasks those of whole register tiles take less time.
        const bool is_even = kernels.depth == 1 && !g.is_windowed && row_tasks <= threads;
        const i64 task_rows = is_even ? divide_up(rows, row_tasks) : std::min(rows, unit * divide_up(units, row_tasks));
        if (!cost.fits(task_rows)) continue;
        for (i64 panel_tasks = 1; panel_tasks <= g.task_panels; panel_tasks = next(panel_tasks, g.task_panels)) {
            const i64 task_panels = divide_up(g.task_panels, panel_tasks);
            if (!cost.fits(task_rows, task_panels)) continue;
            const double task = cost.cycles(task_rows, task_panels);
            const i64 tasks = divide_up(rows, task_rows) * divide_up(g.task_panels, task_panels) * groups;
            double cycles = task * static_cast<double>(divide_up(tasks, threads));
            if (threads > 1 && tasks > 1)
                cycles += last * task + rates.hand_over + cost.foreign_cycles(rows, divide_up(rows, task_rows), threads);
            visit(Candidate{task_rows, task_panels, cycles, task * static_cast<double>(tasks)});
        }
    }
}

// The best predictions that are not nearly the same: neighbours take the same time.
std::vector<Candidate> distinct(std::vector<Candidate> all, const Trial& trial) {
    std::stable_sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) { return a.cycles < b.cycles; });
    const auto is_near = [](i64 a, i64 b) { return 4 * std::max(a, b) < 6 * std::min(a, b); };
    std::vector<Candidate> kept;
    for (const Candidate& c : all) {
        if (kept.size() == trial.most || c.cycles > (1 + trial.margin) * all[0].cycles) break;
        if (std::none_of(kept.begin(), kept.end(), [&](const Candidate& k) {
                return is_near(k.rows, c.rows) && is_near(k.panels, c.panels);
            }))
            kept.push_back(c);
    }
    return kept;
}

}  // namespace

Tasks cut(const Int8Kernels& kernels, const Int8Gemm& g, i64 groups, i64 rows, int threads) {
    const Rates rates = rates_of(kernels);
    auto decision = std::make_shared<Decision>();
    decision->shape = shape_text(kernels, g, groups, rows, threads);
    const Trial* trial = current_trial();
    const std::optional<Way> wanted = trial != nullptr ? trial->forced : measured_way(decision->shape);
    const bool looks_at_all = trial != nullptr && !trial->forced;
    std::vector<Candidate> all;
    Candidate best{1, 1, std::numeric_limits<double>::infinity(), 0};
    double least = best.cycles;
    bool found = false;
    each_cut(kernels, rates, g, groups, rows, threads, [&](const Candidate& c) {
        least = std::min(least, c.cycles);
        if (looks_at_all) all.push_back(c);
        const bool is_wanted = wanted && wanted->rows == c.rows && wanted->panels == c.panels;
        if (is_wanted || (!found && c.cycles < best.cycles)) best = c;
        found = found || is_wanted;
    });
    const auto way = [&](const Candidate& c) { return Way{c.rows, c.panels, c.cycles / (rates.ghz * 1e6), decision->shape}; };
    if (looks_at_all && !all.empty()) {
        all = distinct(std::move(all), *trial);
        for (const Candidate& c : all) decision->ways.push_back(way(c));
        decision->taken = std::min(trial->rank, all.size() - 1);
        best = all[decision->taken];
    } else {
        decision->ways.push_back(way(best));
        decision->is_measured = found;
    }
    decision->work_ms = best.work / (rates.ghz * 1e6);
    leave_decision(std::move(decision));
    const i64 row_tasks = divide_up(rows, best.rows);
    // Threads that have rows of their own find them in their caches; tile registers also look at what is read again.
    const bool shares_rows = (kernels.depth == 1 && row_tasks >= threads) ||
                             rows * (g.in_channels + g.channels) > g.channels * g.quads * 4;
    return {best.rows, best.panels, row_tasks, divide_up(g.task_panels, best.panels), shares_rows,
            least / (rates.ghz * 1e6)};
}

double task_ms(const Int8Kernels& kernels, const Int8Gemm& g, i64 rows, i64 panels) {
    const Rates rates = rates_of(kernels);
    return TaskCost(kernels, rates, g, 1).cycles(rows, panels) / (rates.ghz * 1e6);
}

}  // namespace quantflow::host::int8
