// Normalization over groups of channels: what each block of x holds is counted first, then x is scaled, channel by
// channel.
#include "elementwise_steps.hpp"
#include "float_steps.hpp"

namespace quantflow::host {

using namespace elementwise;
using floats::Int;

namespace {

// Elements of a block: as floats they stay in the L2 cache, and no mean of a block drifts far from its first rows'.
constexpr Int kBlockElements = 8192;
constexpr Int kMostRows = 256;

class GroupNorm final : public Step {
public:
    GroupNorm(ThreadPool& pool, const Tensor& x, Int groups, const Tensor* gamma, const Tensor* beta, float eps,
              const Epilogue& epilogue, const Tensor& y)
        : pool_(pool), x_(x), y_(y), real_(floats::real_of(x, "group_norm")), groups_(groups), eps_(eps) {
        for (const Tensor* t : {gamma, beta})
            if (t != nullptr && (t->dtype != DType::f32 || t->q || !is_row_major(*t)))
                throw Unsupported("group_norm takes dense f32 gamma and beta");
        if (gamma != nullptr) gamma_ = gamma->place;
        if (beta != nullptr) beta_ = beta->place;
        job_.epilogue = epilogue;
        job_.x = form_of(x);
        job_.y = form_of(y);
        fold_clamp(job_.epilogue, job_.y, true);
        job_.is_in_steps = y.q && job_.epilogue.kind == Activation::none;
        name_ = name_with("group_norm", epilogue);
        batch_ = x.dims[0];
        channels_ = x.dims[1];
        for (std::size_t i = 2; i < x.dims.size(); ++i) positions_ *= x.dims[i];
        if (x.count() == 0) return;
        const auto is_apart = [](const Tensor& t) { return is_row_major(t) && t.count() != t.dims[0] * t.dims[1]; };
        is_by_channel_ = is_apart(x) && is_apart(y);
        const auto is_together = [](const Tensor& t) { return t.rank() == 2 ? is_row_major(t) : is_channels_last(t); };
        if (!is_by_channel_ && !(is_together(x) && is_together(y)))
            throw Unsupported("group_norm of a layout that is neither row-major nor channels_last");
        block_ = is_by_channel_ ? std::min(positions_, kBlockElements)
                                : std::clamp(kBlockElements / channels_, Int{1}, std::min(positions_, kMostRows));
        blocks_ = divide_up(positions_, block_);
        const auto size = static_cast<std::size_t>(batch_ * blocks_ * channels_);
        means_.resize(size);
        squares_.resize(size);
        factors_.resize(static_cast<std::size_t>(2 * batch_ * channels_));
    }

    void run() override {
        if (x_.count() == 0) return;
        const Int parts = batch_ * blocks_ * (is_by_channel_ ? channels_ : 1);
        run_ranges(pool_, parts, x_.count() * 4, [this](Int first, Int last) { measure(first, last); });
        combine();
        const Int rows = batch_ * (is_by_channel_ ? channels_ : positions_);
        const Int work = size_of(x_.dtype) + size_of(y_.dtype) + (job_.epilogue.kind == Activation::none ? 0 : 16);
        run_ranges(pool_, rows, x_.count() * work, [this](Int first, Int last) { scale(first, last); });
    }

    std::string kernel() const override { return name_; }

private:
    // Means and sums of squares around them, of blocks [first, last). Where channels lie together a block is of all of
    // them, else of one.
    void measure(Int first, Int last) {
        const FloatKernels& k = floats::kernels();
        const bool is_plain = real_.coding == Coding::f32;
        const Int per_sample = blocks_ * (is_by_channel_ ? channels_ : 1);
        float* const memory = is_plain ? nullptr : floats::scratch(is_by_channel_ ? block_ : block_ * channels_);
        for (Int i = first; i < last; ++i) {
            const Int sample = i / per_sample, block = i % blocks_, from = block * block_;
            const Int channel = is_by_channel_ ? i % per_sample / blocks_ : 0;
            const Int count = std::min(block_, positions_ - from);
            const Int rows = is_by_channel_ ? 1 : count, columns = is_by_channel_ ? count : channels_;
            const Int at = is_by_channel_ ? (sample * channels_ + channel) * positions_ + from
                                          : (sample * positions_ + from) * channels_;
            const RealMatrix matrix{address(x_, at), columns, 1, real_};
            if (!is_plain) k.load(matrix, rows, columns, memory, columns);
            const float* x = is_plain ? static_cast<const float*>(matrix.data) : memory;
            const auto to = static_cast<std::size_t>((sample * blocks_ + block) * channels_ + channel);
            if (is_by_channel_)
                k.row_moments(x, columns, &means_[to], &squares_[to]);
            else
                k.column_moments(x, rows, columns, &means_[to], &squares_[to]);
        }
    }

    // From the blocks to the groups (Chan, Golub and LeVeque 1983), and from these to each channel's scale and shift.
    void combine() {
        const Int width = channels_ / groups_;
        const float* gamma = gamma_ ? reinterpret_cast<const float*>(gamma_->get()) : nullptr;
        const float* beta = beta_ ? reinterpret_cast<const float*>(beta_->get()) : nullptr;
        const double in_scale = x_.q ? x_.q->scale : 1.0, out_scale = job_.is_in_steps ? y_.q->scale : 1.0;
        const double count = static_cast<double>(width) * static_cast<double>(positions_);
        for (Int g = 0; g < batch_ * groups_; ++g) {
            const Int sample = g / groups_, begin = g % groups_ * width;
            const auto each = [&](const auto& add) {
                for (Int block = 0; block < blocks_; ++block) {
                    const auto n = static_cast<double>(std::min(block_, positions_ - block * block_));
                    const auto at = static_cast<std::size_t>((sample * blocks_ + block) * channels_ + begin);
                    for (std::size_t c = at; c < at + static_cast<std::size_t>(width); ++c) add(n, c);
                }
            };
            double mean = 0, square = 0;
            each([&](double n, std::size_t c) { mean += n * means_[c]; });
            mean /= count;
            each([&](double n, std::size_t c) {
                const double d = means_[c] - mean;
                square += squares_[c] + n * d * d;
            });
            const double inverse = 1 / std::sqrt(square / count + static_cast<double>(eps_));
            float* const factor = factors_.data() + 2 * sample * channels_;
            for (Int c = begin; c < begin + width; ++c) {
                const double s = inverse * (gamma == nullptr ? 1.0 : static_cast<double>(gamma[c]));
                factor[c] = static_cast<float>(s * in_scale / out_scale);
                factor[channels_ + c] =
                    static_cast<float>(((beta == nullptr ? 0.0 : static_cast<double>(beta[c])) - mean * s) / out_scale);
            }
        }
    }

    // Rows [first, last) of y: a row is a channel's positions, or a position's channels.
    void scale(Int first, Int last) {
        const ElementwiseKernels& k = elementwise_kernels();
        const Int per_sample = is_by_channel_ ? channels_ : positions_, n = is_by_channel_ ? positions_ : channels_;
        const Int row = is_by_channel_ ? 1 : 0, column = 1 - row;
        while (first < last) {
            const Int sample = first / per_sample, end = std::min(last, (sample + 1) * per_sample);
            const float* factor = factors_.data() + 2 * sample * channels_ + row * (first % per_sample);
            k.affine(job_, {address(x_, first * n), n, 1}, {factor, row, column}, {factor + channels_, row, column},
                     {address(y_, first * n), n, 1}, end - first, n);
            first = end;
        }
    }

    ThreadPool& pool_;
    Tensor x_, y_;
    Real real_;
    std::optional<Place> gamma_, beta_;
    Int groups_, batch_ = 0, channels_ = 0, positions_ = 1;
    float eps_;
    AffineJob job_;
    std::string name_;
    bool is_by_channel_ = false;
    Int block_ = 1, blocks_ = 0;  // positions of a block, and blocks of a sample (of each channel, if by channel)
    std::vector<double> means_, squares_;  // (batch, blocks, channels)
    std::vector<float> factors_;           // (batch, 2, channels): scales, then shifts
};

}  // namespace

StepPtr make_group_norm(ThreadPool& pool, const Tensor& x, std::int64_t groups, const Tensor* gamma,
                        const Tensor* beta, float eps, const Epilogue& epilogue, const Tensor& y) {
    return std::make_unique<GroupNorm>(pool, x, groups, gamma, beta, eps, epilogue, y);
}

}  // namespace quantflow::host
