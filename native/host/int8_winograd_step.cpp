// A 3x3 convolution by Winograd's F(2x2, 3x3).
#include <algorithm>
#include <cstring>
#include <limits>

#include "int8_steps.hpp"

namespace quantflow::host::int8 {

bool suits_winograd(const Int8Kernels& kernels, const Weights& w, const ConvGeometry& geometry, const Shape3& s,
                    const Tensor& x, const Tensor& y) {
    if (kernels.winograd == nullptr || geometry.groups != 1 || x.rank() != 4) return false;
    for (int i = 1; i < 3; ++i)
        if (s.kernel[i] != 3 || s.stride[i] != 1 || s.dilation[i] != 1) return false;
    const i64 in = w.dims[1], out = w.dims[0];
    if (in % 16 != 0 || in < 32 || out < 24) return false;
    // Four times the sum must fit.
    const i64 largest = std::max<i64>(x.q->zero_point, 255 - x.q->zero_point) * 127;
    if (4 * 9 * in > std::numeric_limits<std::int32_t>::max() / largest) return false;
    // Its weights take 3.6 times the memory: few pixels do not pay for fetching them.
    const i64 tiles = y.dims[0] * divide_up(s.out[1], 2) * divide_up(s.out[2], 2);
    return tiles >= 24 && 4 * tiles <= y.dims[0] * s.pixels() * 5 / 4;
}

namespace {

class WinogradStep final : public Step {
public:
    WinogradStep(ThreadPool& pool, const Weights& w, const Shape3& shape, const Tensor& x, const Tensor* residual,
                 const Epilogue& epilogue, const Tensor& y, const Tensor* rest)
        : pool_(pool), kernels_(*int8_kernels_in_use()), x_(x), y_(y) {
        if (residual != nullptr) residual_ = *residual;
        if (rest != nullptr) rest_ = *rest;
        const std::vector<i64> key{address(w.codes), address(&kernels_), w.dims[0], w.dims[1]};
        weights_ = shared_weights(key, [&] { return pack_winograd_weights(kernels_, w); });
        constants_ = std::make_unique<ChannelConstants>(
            w, *x.q, Aligned<std::int32_t>(weights_->panels * kernels_.columns), true, [](i64 c) { return c; });
        outside_ = Aligned<u8>(w.dims[1]);
        std::memset(outside_.data(), x.q->zero_point, static_cast<std::size_t>(outside_.size()));
        job_.outside = outside_.data();
        job_.zero = x.q->zero_point;
        job_.in_channels = w.dims[1];
        for (int i = 0; i < 2; ++i) {
            job_.in[i] = shape.in[i + 1];
            job_.out[i] = shape.out[i + 1];
            job_.padding[i] = shape.padding[i + 1];
            job_.tiles[i] = divide_up(shape.out[i + 1], 2);
        }
        job_.weights = weights_->words.data();
        job_.channels = w.dims[0];
        job_.panels = weights_->panels;
        job_.output = output_of(residual, epilogue, y, w.dims[0], rest);
        job_.output.scale = constants_->scale.data();
        job_.output.bias = constants_->bias.data();

        tiles_ = y.dims[0] * job_.tiles[0] * job_.tiles[1];
        // Transformed pixels and sums of a task share the L2 cache.
        const i64 most = std::max<i64>(2 * kernels_.rows, 320 * 1024 / (32 * job_.in_channels + 2048));
        tile_tasks_ = divide_up(tiles_, most);
        const i64 wanted = pool.size() == 1 ? 1 : 4 * pool.size();
        task_panels_ = round_up(divide_up(job_.panels * tile_tasks_, std::max(wanted, tile_tasks_)), 2);
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

StepPtr make_winograd_step(ThreadPool& pool, const Weights& w, const Shape3& shape, const Tensor& x,
                           const Tensor* residual, const Epilogue& epilogue, const Tensor& y, const Tensor* rest) {
    return std::make_unique<WinogradStep>(pool, w, shape, x, residual, epilogue, y, rest);
}

}  // namespace quantflow::host::int8
