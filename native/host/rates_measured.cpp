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
        whole.forced = Way{y.count() / out, divide_up(out, kernels.columns), 0, {}};
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

// Where noise leaves nothing, the bounds of rates serve.
double positive(double value) { return std::max(value, 1e-9); }

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

// The steps that tell the rates of one instruction set's kernels.
class Measurement {
public:
    explicit Measurement(const Int8Kernels& kernels) : kernels_(kernels) {
        linear(rows_, short_k_, panel_);
        linear(rows_, short_k_, 2 * panel_);
        linear(rows_, long_k_, panel_);
        linear(rows_, long_k_, 2 * panel_);
        linear(rows_, long_k_ - odd_, panel_);
        linear(rows_, long_k_ - odd_, 2 * panel_);
        linear(kernels.rows, long_k_, near_panels_ * panel_);
        linear(kernels.rows, kFarK, far_panels_ * panel_);
        conv(few_, panel_);
        conv(few_, 2 * panel_);
        conv(2 * few_, panel_);
        conv(2 * few_, 2 * panel_);
        linear(rows_, short_k_, narrow_);
        linear(rows_, long_k_, narrow_);
        conv(few_, narrow_);
        conv(2 * few_, narrow_);
        if (has_tiles_) return;
        linear(many_rows_, 2 * long_k_, panel_);
        linear(many_rows_, 2 * long_k_, 2 * panel_);
    }

    // Short turns: what disturbs the machine, such as a neighbour on the same core, comes and goes.
    void turn() {
        for (auto& probe : probes_) probe->time(0.3e6);
    }

    Rates rates(double ghz) const {
        const auto cycles = [&](int i) { return probes_[static_cast<std::size_t>(i)]->ns() * ghz; };
        const auto second_panel = [&](int one, int two) { return cycles(two) - cycles(one); };
        const Rates usual = built_in_rates(kernels_);
        const auto bounded = [](double value, double usual_value) {
            return std::clamp(value, usual_value / kMostApart, usual_value * kMostApart);
        };
        Rates r = usual;
        r.ghz = ghz;
        r.product = positive((second_panel(kLong1, kLong2) - second_panel(kShort1, kShort2)) /
                             (tile_rows(rows_) * quads(long_k_ - short_k_)));
        const double product = bounded(r.product, usual.product);
        const double short_products = tile_rows(rows_) * quads(short_k_) * product;
        r.finishing = positive((second_panel(kShort1, kShort2) - short_products) / count(rows_ * panel_));
        const double finishing = bounded(r.finishing, usual.finishing);
        r.narrow_finishing = positive((cycles(kShort1) - short_products) / count(rows_ * panel_));
        r.packing = positive((cycles(kOdd1) - second_panel(kOdd1, kOdd2)) / count(rows_ * long_k_));
        // Rows that other cores wrote cost tile registers what one thread, which reads its own, doesn't see.
        if (!has_tiles_)
            r.passing = positive((second_panel(kMany1, kMany2) - tile_rows(many_rows_) * quads(2 * long_k_) * product -
                                  count(many_rows_ * panel_) * finishing) /
                                 count(many_rows_ * (2 * long_k_ + 64)));
        const auto fetching = [&](int probe, i64 k, i64 panels) {
            const double rest = count(panels) * (tile_rows(kernels_.rows) * quads(k) * product +
                                                 count(kernels_.rows * panel_) * finishing);
            return positive((cycles(probe) - rest) / count(panels * panel_ * k));
        };
        r.fetching_near = fetching(kNear, long_k_, near_panels_);
        r.fetching_far = fetching(kFar, kFarK, far_panels_);
        const double pixels = count(Probe::kLines) * tile_rows(width_), more = quads(9 * few_);
        r.window_product =
            positive((second_panel(kWindow3, kWindow4) - second_panel(kWindow1, kWindow2)) / (pixels * more));
        r.narrow_product = positive(
            ((cycles(kNarrow2) - cycles(kNarrow1)) / count(rows_) -
             (kernels_.is_exact ? 0 : r.packing * count(long_k_ - short_k_))) / (2 * quads(long_k_ - short_k_)));
        r.narrow_window = positive((cycles(kNarrowWindow2) - cycles(kNarrowWindow1)) /
                                   (count(Probe::kLines * width_) * more * 2));
        return r;
    }

private:
    enum { kShort1, kShort2, kLong1, kLong2, kOdd1, kOdd2, kNear, kFar, kWindow1, kWindow2, kWindow3, kWindow4, kNarrow1,
           kNarrow2, kNarrowWindow1, kNarrowWindow2, kMany1, kMany2 };
    static constexpr i64 kFarK = 1792;

    void linear(i64 m, i64 k, i64 n) { probes_.push_back(std::make_unique<Probe>(kernels_, alone_, false, m, k, n)); }
    void conv(i64 k, i64 n) { probes_.push_back(std::make_unique<Probe>(kernels_, alone_, true, width_, k, n)); }
    double tile_rows(i64 m) const { return count(divide_up(m, kernels_.rows) * (has_tiles_ ? 8 : 1) + m); }
    static double quads(i64 k) { return count(k) / 4; }
    static double count(i64 n) { return static_cast<double>(n); }

    const Int8Kernels& kernels_;
    ThreadPool alone_{1};
    const bool has_tiles_ = kernels_.depth > 1;
    const i64 rows_ = 16 * kernels_.rows, width_ = std::max<i64>(12, 2 * kernels_.rows), step_ = 4 * kernels_.depth;
    // Tile registers multiply so fast that only a long reduction stands out from what is done for each sum.
    const i64 panel_ = kernels_.columns, short_k_ = round_up(128, step_), long_k_ = (has_tiles_ ? 4 : 2) * short_k_;
    const i64 odd_ = kernels_.is_exact ? 1 : 0;  // a length that can't be read where it lies
    const i64 near_bytes_ = caches().l2 / 4, far_bytes_ = std::min<i64>(4 * caches().l2, 8 << 20);
    const i64 near_panels_ = std::max<i64>(2, near_bytes_ / (long_k_ * panel_));
    const i64 far_panels_ = far_bytes_ / (kFarK * panel_);
    const i64 many_rows_ = round_up(near_bytes_ / (2 * long_k_), kernels_.rows);
    const i64 few_ = std::max<i64>(32, step_), narrow_ = 2 * kernels_.lanes;
    std::vector<std::unique_ptr<Probe>> probes_;
};

}  // namespace

std::vector<Rates> measure_rates(const std::vector<const Int8Kernels*>& all, int threads) {
    std::vector<std::unique_ptr<Measurement>> running;
    for (const Int8Kernels* kernels : all) running.push_back(std::make_unique<Measurement>(*kernels));
    double ghz = 0;
    for (int round = 0; round < 16; ++round) {
        ghz = std::max(ghz, clock_ghz());
        for (auto& each : running) each->turn();  // side by side, since they are compared
    }
    std::vector<Rates> found;
    for (auto& each : running) found.push_back(each->rates(ghz));
    if (threads == 1) return found;
    const double hand_over = positive(hand_over_ns(threads) * ghz), waiting = positive(waiting_share(*all[0], threads));
    for (Rates& r : found) {
        r.hand_over = hand_over;
        r.waiting = waiting;
    }
    return found;
}

}  // namespace quantflow::host::int8
