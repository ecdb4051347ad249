// A 3x3 convolution by Winograd's F(2x2, 3x3) or F(4x4, 3x3).
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "int8_steps.hpp"

namespace quantflow::host::int8 {
namespace {

// Of any output channel's sums, from its weights.
i64 largest_sum(const Weights& w, const QParams& x) {
    const i64 each = w.dims[1] * 9;
    i64 most = 0;
    for (i64 n = 0; n < w.dims[0]; ++n) {
        i64 sum = 0;
        for (i64 k = 0; k < each; ++k) sum += std::abs(static_cast<int>(w.codes[n * each + k]));
        most = std::max(most, sum);
    }
    return most * std::max<i64>(x.zero_point, 255 - x.zero_point);
}

// Points of a task's tiles.
constexpr i64 kTaskPoints = 24 * 36;

// Register tiles that are full, at least one.
i64 full_tiles(const Int8Kernels& kernels, i64 tiles) { return std::max<i64>(1, tiles / kernels.rows); }

}  // namespace

i64 winograd_size(const Int8Kernels& kernels, int threads, const Weights& w, const ConvGeometry& geometry,
                  const Shape3& s, const Tensor& x, const Tensor& y) {
    if (kernels.winograd == nullptr || geometry.groups != 1 || x.rank() != 4) return 0;
    for (int i = 1; i < 3; ++i)
        if (s.kernel[i] != 3 || s.stride[i] != 1 || s.dilation[i] != 1) return 0;
    if (w.dims[1] % (2 * kernels.lanes) != 0 || w.dims[1] < 32 || w.dims[0] < 24) return 0;
    // Weights take 3.6 times the memory, or 8 times: few pixels do not pay for fetching them, nor many beyond the edges, nor
    // a thread's share that fills no register tile.
    const auto pays = [&](i64 size, i64 least, double most) {
        const i64 tiles = y.dims[0] * divide_up(s.out[1], size) * divide_up(s.out[2], size);
        const i64 parts = full_tiles(kernels, tiles) * divide_up(w.dims[0], std::max(32, kernels.columns));
        return tiles >= least && parts >= threads &&
               static_cast<double>(size * size * tiles) <= most * static_cast<double>(y.dims[0] * s.pixels());
    };
    // Looked at last: it passes over all weights.
    const auto fits = [&](i64 times) { return largest_sum(w, *x.q) <= std::numeric_limits<std::int32_t>::max() / times; };
    if (pays(4, w.dims[1] >= 64 ? 12 : 24, 1.4) && fits(64)) return 4;
    return !kernels.is_exact && pays(2, 24, 1.25) && fits(4) ? 2 : 0;
}

namespace {

class WinogradStep final : public Step {
public:
    WinogradStep(ThreadPool& pool, const Weights& w, i64 size, const Shape3& shape, const Tensor& x,
                 const Tensor* residual, const Epilogue& epilogue, const Tensor& y, const Tensor* rest)
        : pool_(pool), kernels_(*int8_kernels_in_use()), x_(x), y_(y) {
        if (residual != nullptr) residual_ = *residual;
        if (rest != nullptr) rest_ = *rest;
        const std::vector<i64> key{address(w.codes), address(&kernels_), w.dims[0], w.dims[1], size};
        weights_ = shared_weights(key, [&] { return pack_winograd_weights(kernels_, w, size); });
        constants_ = std::make_unique<ChannelConstants>(
            w, *x.q, Aligned<std::int32_t>(weights_->panels * kernels_.columns), true, [](i64 c) { return c; });
        outside_ = Aligned<u8>(w.dims[1]);
        std::memset(outside_.data(), x.q->zero_point, static_cast<std::size_t>(outside_.size()));
        job_.outside = outside_.data();
        job_.zero = x.q->zero_point;
        job_.in_channels = w.dims[1];
        job_.size = size;
        for (int i = 0; i < 2; ++i) {
            job_.in[i] = shape.in[i + 1];
            job_.out[i] = shape.out[i + 1];
            job_.padding[i] = shape.padding[i + 1];
            job_.tiles[i] = divide_up(shape.out[i + 1], size);
        }
        job_.weights = weights_->words.data();
        job_.channels = w.dims[0];
        job_.panels = weights_->panels;
        job_.output = output_of(residual, epilogue, y, w.dims[0], rest);
        const bool needs_reals = is_real(residual) || rest != nullptr;
        constants_->bind(job_.output, 9 * job_.in_channels, *x.q, y.q, needs_reals, {});

        tiles_ = y.dims[0] * job_.tiles[0] * job_.tiles[1];
        // Every task reads all weights, which pays from this many tiles on, whether they then fit the L2 cache or not. Of
        // fewer tiles than registers hold it reads them for little.
        const i64 enough = kTaskPoints / ((size + 2) * (size + 2)), tasks_of_enough = tiles_ / enough;
        tile_tasks_ = tasks_of_enough >= pool.size() ? tasks_of_enough / pool.size() * pool.size()
                                                     : std::min<i64>(pool.size(), full_tiles(kernels_, tiles_));
        // Every task transforms its pixels by itself: those of the same tiles do so again.
        const i64 tasks = std::max<i64>(pool.size(), tile_tasks_), together = std::max<i64>(1, 32 / kernels_.columns);
        task_panels_ = round_up(divide_up(job_.panels * tile_tasks_, tasks), together);
        panel_tasks_ = divide_up(job_.panels, task_panels_);
    }

    void run() override {
        if (y_.count() == 0) return;
        job_.x = x_.data<const u8>();
        bind_output(job_.output, residual_, y_, rest_);
        pool_.run(tile_tasks_ * panel_tasks_, [this](i64 task) {
            const i64 part = task % tile_tasks_, panel = task / tile_tasks_ * task_panels_;
            const i64 tile = tiles_ * part / tile_tasks_, tiles = tiles_ * (part + 1) / tile_tasks_ - tile;
            kernels_.winograd(job_, tile, tiles, panel, std::min(task_panels_, job_.panels - panel),
                              thread_scratch(kernels_.winograd_scratch(job_, tiles)));
        });
    }

    std::string kernel() const override { return tile_name(kernels_, "winograd"); }
    void share(Lasting& lasting) const override { lasting.insert(weights_); }

private:
    ThreadPool& pool_;
    const Int8Kernels& kernels_;
    Tensor x_, y_;
    std::optional<Tensor> residual_, rest_;
    std::shared_ptr<const WinogradWeights> weights_;
    std::unique_ptr<ChannelConstants> constants_;
    Aligned<u8> outside_;
    Int8Winograd job_;
    i64 tiles_ = 0, tile_tasks_ = 1, task_panels_ = 1, panel_tasks_ = 1;
};

}  // namespace

StepPtr make_winograd_step(ThreadPool& pool, const Weights& w, i64 size, const Shape3& shape, const Tensor& x,
                           const Tensor* residual, const Epilogue& epilogue, const Tensor& y, const Tensor* rest) {
    return std::make_unique<WinogradStep>(pool, w, size, shape, x, residual, epilogue, y, rest);
}

}  // namespace quantflow::host::int8
