// The rates of this machine, from the times of small steps that differ in one thing.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "int8_steps.hpp"
#include "rates.hpp"

namespace quantflow::host::int8 {
namespace {

double now_ns() {
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Multiplications that wait for each other, three cycles each on all processors of these instruction sets. (Additions of
// constants are folded by some.)
double clock_ghz() {
    constexpr int kCycles = 4 * 3, kRounds = 2000;
    double best = std::numeric_limits<double>::infinity();
    for (int i = 0; i < 10; ++i) {
        std::uint64_t x = 3;
        const double start = now_ns();
        for (int j = 0; j < kRounds; ++j)
            __asm__ volatile("imul %0, %0\n\timul %0, %0\n\timul %0, %0\n\timul %0, %0" : "+r"(x));
        best = std::min(best, now_ns() - start);
    }
    return kCycles * kRounds / best;
}

// A linear of `size` rows, or a 3x3 convolution of an image of kLines lines of `size` pixels.
class Probe {
public:
    static constexpr i64 kLines = 8;
    Probe(const Int8Kernels& kernels, ThreadPool& pool, bool is_conv, i64 size, i64 in, i64 out) {
        const std::vector<i64> xd = is_conv ? std::vector<i64>{1, in, kLines, size} : std::vector<i64>{size, in};
        std::vector<i64> yd = xd;
        yd[1] = out;
        const Tensor x = tensor(xd, x_, x_base_), y = tensor(yd, y_, y_base_);
        codes_ = Aligned<std::int8_t>(out * in * (is_conv ? 9 : 1));
        for (i64 i = 0; i < codes_.size(); ++i) codes_[i] = static_cast<std::int8_t>(i % 61 - 30);
        std::vector<i64> wd{out, in};
        if (is_conv) wd.insert(wd.end(), {3, 3});
        const Weights w{codes_.data(), wd, &scale_, 1, nullptr};
        const Epilogue relu{Activation::relu, 0, 0};
        // In one piece, whatever the rates in use make of it.
        Trial whole;
        whole.forced = Way{y.count() / out, divide_up(out, kernels.columns)};
        const InTrial trial(whole);
        if (is_conv) {
            const ConvGeometry geometry{{1, 1}, {1, 1}, {1, 1}, 1};
            step_ = make_gemm_step_on(kernels, pool, w, Grouping{1, in, out, 1}, shape_of(w, geometry, x, y), x, nullptr,
                                      relu, y, kLines * size, Terms{});
        } else {
            step_ = make_gemm_step_on(kernels, pool, w, Grouping{1, in, out, 1}, Shape3{}, x, nullptr, relu, y, size,
                                      Terms{});
        }
        take_decision();
        step_->run();
    }

    void run() { step_->run(); }
    // The least time of a run, of all that were asked for.
    void time(double budget_ns) {
        const double begin = now_ns();
        do {
            const double start = now_ns();
            step_->run();
            best_ns_ = std::min(best_ns_, now_ns() - start);
        } while (now_ns() - begin < budget_ns);
    }
    double ns() const { return best_ns_; }

private:
    static Tensor tensor(const std::vector<i64>& dims, Aligned<u8>& memory, std::byte*& base) {
        Tensor t;
        t.dtype = DType::u8;
        t.dims = dims;
        t.strides = dims.size() == 2 ? row_major(dims) : channels_last(dims);
        t.q = QParams{0.02f, 128, 0, 255};
        memory = Aligned<u8>(t.count() + 64);
        for (i64 i = 0; i < t.count(); ++i) memory[i] = static_cast<u8>(128 + i % 101);
        base = reinterpret_cast<std::byte*>(memory.data());
        t.place = Place{&base, 0};
        return t;
    }

    Aligned<u8> x_, y_;
    std::byte *x_base_ = nullptr, *y_base_ = nullptr;
    Aligned<std::int8_t> codes_;
    float scale_ = 0.002f;
    StepPtr step_;
    double best_ns_ = std::numeric_limits<double>::infinity();
};

double hand_over_ns(int threads) {
    ThreadPool pool(threads);
    std::vector<double> taken;
    const std::function<void(i64)> nothing = [](i64) {};
    pool.during([&] {
        for (int i = 0; i < 400; ++i) {
            const double start = now_ns();
            pool.run(threads, nothing);
            taken.push_back(now_ns() - start);
        }
    });
    // What other programs disturbed is in the upper half.
    std::sort(taken.begin(), taken.end());
    return taken[taken.size() / 4];
}

// Every thread computes the same, in its own cache, and then waits.
double waiting_share(const Int8Kernels& kernels, int threads) {
    ThreadPool pool(threads), alone(1);
    const i64 columns = 8 * kernels.columns;
    std::vector<std::unique_ptr<Probe>> probes;
    for (int i = 0; i < threads; ++i) probes.push_back(std::make_unique<Probe>(kernels, alone, false, 256, 256, columns));
    std::vector<double> taken(probes.size()), shares;
    pool.during([&] {
        for (int i = 0; i < 60; ++i) {
            const double start = now_ns();
            pool.run(threads, [&](i64 t) {
                const double begin = now_ns();
                for (int again = 0; again < 2; ++again) probes[static_cast<std::size_t>(t)]->run();
                taken[static_cast<std::size_t>(t)] = now_ns() - begin;
            });
            const double all = now_ns() - start;
            shares.push_back(all * threads / std::accumulate(taken.begin(), taken.end(), 0.0) - 1);
        }
    });
    std::sort(shares.begin(), shares.end());
    return shares[shares.size() / 2];
}

}  // namespace

Rates measure_rates(const Int8Kernels& kernels, int threads) {
    const Rates usual = built_in_rates(kernels);
    ThreadPool alone(1);
    const i64 rows = 16 * kernels.rows, width = std::max<i64>(12, 2 * kernels.rows), step = 4 * kernels.depth;
    // Tile registers multiply so fast that only a long reduction stands out from what is done for each sum.
    const i64 panel = kernels.columns, short_k = round_up(128, step), long_k = (kernels.depth > 1 ? 4 : 2) * short_k;
    const i64 tile_cost = kernels.depth > 1 ? 8 : 1;
    const i64 odd = kernels.is_exact ? 1 : 0;  // a length that can't be read where it lies
    const i64 near_bytes = caches().l2 / 4, far_bytes = std::min<i64>(4 * caches().l2, 8 << 20), far_k = 1792;
    const i64 near_panels = std::max<i64>(2, near_bytes / (long_k * panel)), far_panels = far_bytes / (far_k * panel);
    const i64 many_rows = round_up(near_bytes / (2 * long_k), kernels.rows);
    enum { kShort1, kShort2, kLong1, kLong2, kOdd1, kOdd2, kMany1, kMany2, kNear, kFar, kWindow1, kWindow2, kWindow3,
           kWindow4, kNarrow1, kNarrow2, kNarrowWindow1, kNarrowWindow2, kProbes };
    std::vector<std::unique_ptr<Probe>> probes;
    const auto linear = [&](i64 m, i64 k, i64 n) { probes.push_back(std::make_unique<Probe>(kernels, alone, false, m, k, n)); };
    const auto conv = [&](i64 k, i64 n) { probes.push_back(std::make_unique<Probe>(kernels, alone, true, width, k, n)); };
    linear(rows, short_k, panel);
    linear(rows, short_k, 2 * panel);
    linear(rows, long_k, panel);
    linear(rows, long_k, 2 * panel);
    linear(rows, long_k - odd, panel);
    linear(rows, long_k - odd, 2 * panel);
    linear(many_rows, 2 * long_k, panel);
    linear(many_rows, 2 * long_k, 2 * panel);
    linear(kernels.rows, long_k, near_panels * panel);
    linear(kernels.rows, far_k, far_panels * panel);
    const i64 few = std::max<i64>(32, step), narrow = 2 * kernels.lanes;
    conv(few, panel);
    conv(few, 2 * panel);
    conv(2 * few, panel);
    conv(2 * few, 2 * panel);
    linear(rows, short_k, narrow);
    linear(rows, long_k, narrow);
    conv(few, narrow);
    conv(2 * few, narrow);
    double ghz = 0;
    // Short turns: what disturbs the machine, such as a neighbour on the same core, comes and goes.
    for (int round = 0; round < 10; ++round) {
        ghz = std::max(ghz, clock_ghz());
        for (auto& probe : probes) probe->time(0.45e6);
    }
    const auto cycles = [&](int i) { return probes[static_cast<std::size_t>(i)]->ns() * ghz; };
    // Where noise leaves nothing, the bound below serves.
    const auto positive = [](double value) { return std::max(value, 1e-9); };
    const auto count = [](i64 n) { return static_cast<double>(n); };
    const auto tile_rows = [&](i64 m) { return count(divide_up(m, kernels.rows) * tile_cost + m); };
    const auto quads = [](i64 k) { return static_cast<double>(k) / 4; };

    Rates r = usual;
    r.ghz = ghz;
    const auto second_panel = [&](int one, int two) { return cycles(two) - cycles(one); };
    r.product = positive((second_panel(kLong1, kLong2) - second_panel(kShort1, kShort2)) /
                         (tile_rows(rows) * quads(long_k - short_k)));
    const double product = std::clamp(r.product, usual.product / kMostApart, usual.product * kMostApart);
    r.finishing = positive((second_panel(kShort1, kShort2) - tile_rows(rows) * quads(short_k) * product) /
                           count(rows * panel));
    const double finishing = std::clamp(r.finishing, usual.finishing / kMostApart, usual.finishing * kMostApart);
    r.narrow_finishing = positive((cycles(kShort1) - tile_rows(rows) * quads(short_k) * product) / count(rows * panel));
    r.packing = positive((cycles(kOdd1) - second_panel(kOdd1, kOdd2)) / count(rows * long_k));
    r.passing = positive((second_panel(kMany1, kMany2) - tile_rows(many_rows) * quads(2 * long_k) * product -
                          count(many_rows * panel) * finishing) /
                         count(many_rows * (2 * long_k + 64)));
    const auto fetching = [&](int probe, i64 k, i64 panels) {
        const double rest = count(panels) * (tile_rows(kernels.rows) * quads(k) * product +
                                             count(kernels.rows * panel) * finishing);
        return positive((cycles(probe) - rest) / count(panels * panel * k));
    };
    r.fetching_near = fetching(kNear, long_k, near_panels);
    r.fetching_far = fetching(kFar, far_k, far_panels);
    const double pixels = count(Probe::kLines) * tile_rows(width), more = quads(9 * few);
    r.window_product = positive((second_panel(kWindow3, kWindow4) - second_panel(kWindow1, kWindow2)) / (pixels * more));
    r.narrow_product = positive(
        ((cycles(kNarrow2) - cycles(kNarrow1)) / count(rows) -
         (kernels.is_exact ? 0 : r.packing * count(long_k - short_k))) / (2 * quads(long_k - short_k)));
    r.narrow_window = positive((cycles(kNarrowWindow2) - cycles(kNarrowWindow1)) /
                               (count(Probe::kLines * width) * more * 2));
    if (threads > 1) {
        r.hand_over = positive(hand_over_ns(threads) * ghz);
        r.waiting = positive(waiting_share(kernels, threads));
    }
    return r;
}

}  // namespace quantflow::host::int8
