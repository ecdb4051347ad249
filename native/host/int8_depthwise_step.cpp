// A convolution of each channel by itself.
#include <algorithm>
#include <cstring>

#include "int8_steps.hpp"
#include "rates.hpp"

namespace quantflow::host::int8 {
namespace {

class DepthwiseStep final : public Step {
    static bool suits_rolling(const Int8Kernels& kernels, const Shape3& s) {
        return kernels.rolling != nullptr && s.is_flat() && s.kernel[1] == s.kernel[2] &&
               (s.kernel[1] == 3 || s.kernel[1] == 5) && s.dilation[2] == 1 && s.stride[2] <= 2;
    }

public:
    DepthwiseStep(ThreadPool& pool, const Weights& w, const Shape3& shape, const Tensor& x, const Tensor* residual,
                  const Epilogue& epilogue, const Tensor& y, const Terms& terms)
        : pool_(pool), kernels_(*int8_kernels_in_use()), x_(x), y_(y) {
        for (const Product& p : terms.products)
            before_.push_back(
                std::make_unique<DepthwiseStep>(pool, p.weights, shape, p.x, nullptr, Epilogue{}, y, Terms{}));
        if (residual != nullptr) residual_ = *residual;
        if (terms.rest != nullptr) rest_ = *terms.rest;
        const i64 channels = w.dims[0], taps = shape.taps(), block = 4 * kernels_.lanes;
        rolls_ = suits_rolling(kernels_, shape);
        std::vector<i64> key{address(w.codes), address(&kernels_), -1, channels, taps, rolls_};
        weights_ = shared_weights(key, [&] {
            const auto order = rolls_ ? rolling_taps(kernels_, shape.kernel[1]) : plain_taps(kernels_, taps);
            return pack_depthwise_weights(kernels_, w, channels, taps, order);
        });
        constants_ = std::make_unique<ChannelConstants>(w, *x.q, weights_->sums, false, [&](i64 c) {
            return c / block * block + block_position(kernels_, c % block);
        });
        taps_ = shape.table(false);
        job_.channels = channels;
        job_.blocks = divide_up(channels, block);
        for (int i = 0; i < 3; ++i) {
            job_.in[i] = shape.in[i];
            job_.out[i] = shape.out[i];
            job_.stride[i] = shape.stride[i];
        }
        // As long as a line, so that lines at the edge are no special case; very long lines are, but where windows roll.
        const i64 line_bytes = rolls_ ? shape.in[2] * channels
                                      : std::min<i64>(shape.out[2] * shape.stride[2] * channels, 64 * 1024);
        outside_ = Aligned<u8>(job_.blocks * block + line_bytes);
        std::memset(outside_.data(), x.q->zero_point, static_cast<std::size_t>(outside_.size()));
        job_.outside = outside_.data();
        job_.outside_bytes = outside_.size();
        const i64 reach = (shape.kernel[2] - 1) * shape.dilation[2] - shape.padding[2];
        job_.inner_begin = std::min(shape.out[2], divide_up(shape.padding[2], shape.stride[2]));
        job_.inner_end = shape.in[2] > reach ? (shape.in[2] - 1 - reach) / shape.stride[2] + 1 : 0;
        job_.inner_end = std::clamp(job_.inner_end, job_.inner_begin, shape.out[2]);
        job_.real_taps = taps;
        job_.taps = round_up(taps, kernels_.tap_group);
        job_.tap_z = taps_.z.data();
        job_.tap_y = taps_.y.data();
        job_.tap_x = taps_.x.data();
        job_.weights = reinterpret_cast<const u8*>(weights_->codes.data());
        job_.start = constants_->start.data();
        job_.output = output_of(residual, epilogue, y, channels, terms.rest);
        std::vector<const ChannelConstants*> before;
        for (const auto& step : before_) before.push_back(step->constants_.get());
        constants_->bind(job_.output, taps, *x.q, y.q, is_real(residual) || rest_, before);
        lines_ = y.dims[0] * shape.out[0] * shape.out[1];
        // Lines first: tasks that share a line both compute its taps' addresses.
        const i64 wanted = pool.size() == 1 || cycles(lines_) < 3 * kHandOver ? 1 : 6 * pool.size();
        task_lines_ = std::max<i64>(1, lines_ / wanted);
        const i64 line_tasks = divide_up(lines_, task_lines_);
        task_blocks_ = line_tasks == 0 ? 1 : std::max<i64>(1, divide_up(job_.blocks * line_tasks, wanted));
        task_blocks_ = std::min(task_blocks_, job_.blocks);
    }

    void run() override {
        if (y_.count() == 0) return;
        bind();
        const i64 line_tasks = divide_up(lines_, task_lines_), block_tasks = divide_up(job_.blocks, task_blocks_);
        const i64 scratch = rolls_ ? kernels_.rolling_scratch(job_) : kernels_.depthwise_scratch(job_);
        const auto kernel = rolls_ ? kernels_.rolling : kernels_.depthwise;
        pool_.run(line_tasks * block_tasks, [&](i64 task) {
            const i64 line = task / block_tasks * task_lines_, block = task % block_tasks * task_blocks_;
            const i64 lines = std::min(task_lines_, lines_ - line), blocks = std::min(task_blocks_, job_.blocks - block);
            if (before_.empty()) return kernel(job_, line, lines, block, blocks, thread_scratch(scratch));
            // A line through all products before the next one.
            const i64 line_sums = job_.out[2] * job_.blocks * 4 * kernels_.lanes, befores = i64(before_.size());
            u8* sums = thread_scratch(befores * 4 * line_sums + scratch);
            for (i64 l = line; l < line + lines; ++l) {
                Int8Depthwise last = job_;
                for (i64 i = 0; i <= befores; ++i) {
                    Int8Depthwise job = i < befores ? before_[static_cast<std::size_t>(i)]->job_ : last;
                    if (i < befores) {
                        auto* kept = reinterpret_cast<std::int32_t*>(sums) + i * line_sums;
                        last.output.before[i].sums = job.output.raw_sums = reaching(kept, l * line_sums);
                    }
                    kernel(job, l, 1, block, blocks, sums + befores * 4 * line_sums);
                }
            }
        });
    }

    Lines lines() const override { return {before_.empty() && !rest_ ? lines_ : 0, x_.place.base}; }
    void prepare() override { bind(); }
    void run_lines(i64 first, i64 count) override {
        const i64 scratch = rolls_ ? kernels_.rolling_scratch(job_) : kernels_.depthwise_scratch(job_);
        (rolls_ ? kernels_.rolling : kernels_.depthwise)(job_, first, count, 0, job_.blocks, thread_scratch(scratch));
    }
    double lines_ms(i64 count) const override { return cycles(count) / (rates_of(kernels_).ghz * 1e6); }

    std::string kernel() const override { return std::string("host.depthwise.") + kernels_.name; }
    void share(Lasting& lasting) const override { lasting.insert(weights_); }

private:
    double cycles(i64 lines) const {
        return static_cast<double>(lines * job_.out[2] * job_.blocks * (3 * job_.real_taps + 20));
    }
    void bind() {
        for (const auto& step : before_) step->bind();
        job_.x = x_.data<const u8>();
        job_.x_end = job_.x + x_.count();
        bind_output(job_.output, residual_, y_, rest_);
    }

    ThreadPool& pool_;
    const Int8Kernels& kernels_;
    Tensor x_, y_;
    std::optional<Tensor> residual_, rest_;
    std::vector<std::unique_ptr<DepthwiseStep>> before_;  // products that come before this one
    std::shared_ptr<const PackedWeights> weights_;
    std::unique_ptr<ChannelConstants> constants_;
    TapTable taps_;
    Aligned<u8> outside_;
    Int8Depthwise job_;
    bool rolls_ = false;
    i64 lines_ = 0, task_lines_ = 1, task_blocks_ = 1;
};

}  // namespace

StepPtr make_depthwise_step(ThreadPool& pool, const Weights& w, const Shape3& shape, const Tensor& x,
                            const Tensor* residual, const Epilogue& epilogue, const Tensor& y, const Terms& terms) {
    return std::make_unique<DepthwiseStep>(pool, w, shape, x, residual, epilogue, y, terms);
}

}  // namespace quantflow::host::int8
