// A product of matrices: linear, and convolutions whose windows are rows.
#include "int8_steps.hpp"

namespace quantflow::host::int8 {
namespace {

// Large weights are packed once, for whatever number of rows.
constexpr i64 kSmallWeights = 64 * 1024;
// Other kernels that are predicted to take less than (1 + this) of the best way's time are worth a try.
constexpr double kOthersMargin = 1;

// Whether kernels are chosen for each number of rows by itself. Groups leave most of a tile empty.
bool may_take_either(const Weights& w, const Grouping& unmerged) {
    i64 codes = 1;
    for (i64 d : w.dims) codes *= d;
    return unmerged.groups > 1 || codes <= kSmallWeights;
}

class GemmStep final : public Step {
public:
    // Without its weights; leaves its decision.
    GemmStep(ThreadPool& pool, const Int8Kernels& kernels, const Grouping& unmerged, const Shape3& shape, const Tensor& x,
             const Tensor* residual, const Epilogue& epilogue, const Tensor& y, i64 rows, const Terms& terms)
        : pool_(pool), kernels_(kernels), grouping_(merge_groups(kernels, unmerged, shape)), x_(x), y_(y), rows_(rows) {
        for (const Product& p : terms.products)
            before_.push_back(std::make_unique<GemmStep>(pool, kernels, unmerged, shape, p.x, nullptr, Epilogue{}, y, rows,
                                                         Terms{}));
        if (residual != nullptr) residual_ = *residual;
        if (terms.rest != nullptr) rest_ = *terms.rest;
        const i64 steps = shape.taps() * grouping_.in_channels, channels = grouping_.out_channels;
        gemm_.zero = x.q->zero_point;
        gemm_.pixel = grouping_.groups * grouping_.in_channels;
        gemm_.in_channels = grouping_.in_channels;
        gemm_.is_pointwise = shape.is_pointwise();
        // Rows a multiple of 2 KiB apart would compete for the same few sets of the L1 cache.
        gemm_.is_direct = kernels_.is_exact && gemm_.is_pointwise && steps % (4 * kernels_.depth) == 0 &&
                          gemm_.pixel % 2048 != 0;
        gemm_.is_row_run = shape.is_row_run(grouping_.groups);
        taps_ = shape.table(gemm_.is_row_run);
        gemm_.runs = static_cast<i64>(taps_.z.size());
        gemm_.run_length = gemm_.is_row_run ? shape.kernel[2] * grouping_.in_channels : grouping_.in_channels;
        gemm_.run_z = taps_.z.data();
        gemm_.run_y = taps_.y.data();
        gemm_.run_x = taps_.x.data();
        for (int i = 0; i < 3; ++i) {
            gemm_.in[i] = shape.in[i];
            gemm_.out[i] = shape.out[i];
            gemm_.stride[i] = shape.stride[i];
            gemm_.padding[i] = shape.padding[i];
            gemm_.reach[i] = (shape.kernel[i] - 1) * shape.dilation[i];
            gemm_.inside_from[i] = shape.padding[i];
            gemm_.inside_to[i] = shape.in[i] + shape.padding[i] - gemm_.reach[i];
        }
        const Runs run(kernels_, gemm_.runs, gemm_.run_length);
        gemm_.is_windowed = takes_windows(kernels_, grouping_, shape);
        runs_ = gemm_.is_windowed ? run : Runs(kernels_, 1, steps);
        if (gemm_.is_windowed && joins_runs(kernels_, run) && gemm_.is_row_run && shape.dilation[1] == 1) {
            runs_ = Runs::joined(kernels_, run.runs, run.length);
            gemm_.column_bytes = 4 * runs_.quads;
            gemm_.runs = 1;
        }
        gemm_.reads_in_place = gemm_.is_windowed && gemm_.column_bytes == 0 && kernels_.is_exact && 4 * run.quads == run.length;
        for (int i = 1; i < 3; ++i)
            gemm_.reads_in_place = gemm_.reads_in_place && shape.padding[i] == 0 &&
                                   (shape.out[i] - 1) * shape.stride[i] + gemm_.reach[i] < shape.in[i];
        for (i64 i = 0; i < gemm_.runs; ++i) {
            const std::size_t r = static_cast<std::size_t>(i);
            run_offset_.push_back(((taps_.z[r] * shape.in[1] + taps_.y[r]) * shape.in[2] + taps_.x[r]) * gemm_.pixel);
            window_offset_.push_back((taps_.y[r] + shape.padding[1]) * kernels_.line_bytes(gemm_) +
                                     (taps_.x[r] + shape.padding[2]) * gemm_.pixel);
        }
        gemm_.run_offset = run_offset_.data();
        gemm_.window_offset = window_offset_.data();
        gemm_.channels = channels;
        gemm_.panels = divide_up(channels, kernels_.columns);
        groups_ = gemm_.is_windowed ? 1 : grouping_.groups;
        gemm_.task_panels = gemm_.panels * grouping_.groups / groups_;
        gemm_.quads = runs_.all_quads;
        gemm_.chunk = chunk_of(kernels_, gemm_.quads);
        gemm_.output = output_of(residual, epilogue, y, grouping_.groups * channels, terms.rest);
        tasks_ = cut(kernels_, gemm_, groups_, rows_, pool.size());
        gemm_.goes_on = tasks_.row_tasks * tasks_.panel_tasks * groups_ > pool.size();
        gemm_.all_rows = rows_;
        line_ = shape.out[2];
        gemm_.all_panels = gemm_.panels * grouping_.groups;
    }

    // Before it may run.
    void take_weights(const Weights& w, const Shape3& shape, const Terms& terms) {
        for (std::size_t i = 0; i < before_.size(); ++i)
            before_[i]->take_weights(terms.products[i].weights, shape, Terms{});
        const i64 taps = shape.taps();
        std::vector<i64> key{address(w.codes), address(&kernels_), grouping_.merged, taps, gemm_.is_windowed,
                             gemm_.column_bytes};
        key.insert(key.end(), w.dims.begin(), w.dims.end());
        weights_ = shared_weights(key, [&] { return pack_gemm_weights(kernels_, w, grouping_, taps, runs_); });
        constants_ = std::make_unique<ChannelConstants>(
            w, *x_.q, weights_->sums, !kernels_.is_exact, [&](i64 c) {
                const i64 channels = grouping_.out_channels;
                return c / channels * gemm_.panels * kernels_.columns + c % channels;
            });
        gemm_.weights = weights_->codes.data();
        if (weights_->joint.size() > 0) gemm_.joint = weights_->joint.data();
        // Tile registers are cleared faster than loaded.
        gemm_.start = kernels_.depth > 1 && gemm_.zero == 0 ? nullptr : constants_->start.data();
        std::vector<const ChannelConstants*> before;
        for (const auto& step : before_) before.push_back(step->constants_.get());
        const bool needs_reals = is_real(residual_ ? &*residual_ : nullptr) || rest_;
        constants_->bind(gemm_.output, taps * w.dims[1], *x_.q, y_.q, needs_reals, before);
    }

    double predicted_ms() const { return tasks_.least_ms; }

    void run() override {
        if (y_.count() == 0) return;
        bind();
        pool_.run(tasks_.row_tasks * tasks_.panel_tasks * groups_, [this](i64 task) {
            const Part part(gemm_, tasks_, rows_, task);
            before_.empty() ? run_part(kernels_, gemm_, part) : run_products(part);
        });
    }

    Lines lines() const override {
        if (!before_.empty() || rest_ || groups_ != 1 || rows_ == 0) return {};
        return {rows_ / line_, gemm_.is_pointwise ? nullptr : x_.place.base};
    }
    void prepare() override { bind(); }
    void run_lines(i64 first, i64 count) override {
        const i64 rows = count * line_;
        kernels_.gemm(gemm_, 0, first * line_, rows, 0, gemm_.task_panels,
                      thread_scratch(kernels_.gemm_scratch(gemm_, rows, gemm_.task_panels)));
    }
    double lines_ms(i64 count) const override { return task_ms(kernels_, gemm_, count * line_, gemm_.task_panels); }

    std::string kernel() const override { return tile_name(kernels_, "igemm"); }
    ConstantBytes weights() const override { return {weights_->codes.data(), weights_->codes.size()}; }
    void expect(ConstantBytes next) override {
        gemm_.next = static_cast<const u8*>(next.data);
        gemm_.next_bytes = next.size;
    }
    void share(Lasting& lasting) const override {
        lasting.insert(weights_);
        for (const auto& step : before_) step->share(lasting);
    }

private:
    void bind() {
        for (const auto& step : before_) step->bind();
        gemm_.x = x_.data<const u8>();
        gemm_.x_end = gemm_.x + x_.count();
        bind_output(gemm_.output, residual_, y_, rest_);
    }

    // A block of rows through all products before the next one.
    void run_products(Part part) const {
        const i64 width = part.panels * kernels_.columns, unit = gemm_.is_windowed ? gemm_.out[2] : kernels_.rows;
        const i64 block = unit * std::max<i64>(1, kSumsBytes / (4 * width * unit)), end = part.row + part.rows;
        const i64 sums_bytes = round_up(4 * width * std::min(block, part.rows), 64);
        i64 scratch_bytes = 0;
        for (part.rows = std::min(block, part.rows); part.row < end; part.row += part.rows) {
            part.rows = std::min(block, end - part.row);
            if (scratch_bytes == 0) scratch_bytes = kernels_.gemm_scratch(gemm_, part.rows, part.panels);
            u8* scratch = thread_scratch(static_cast<i64>(before_.size()) * sums_bytes + scratch_bytes);
            u8* own = scratch + static_cast<i64>(before_.size()) * sums_bytes;
            const i64 first = part.row * width + (part.group * gemm_.panels + part.panel) * kernels_.columns;
            const auto run = [&](const Int8Gemm& g) {
                kernels_.gemm(g, part.group, part.row, part.rows, part.panel, part.panels, own);
            };
            Int8Gemm last = gemm_;
            last.output.sums_row = width;
            for (std::size_t i = 0; i < before_.size(); ++i) {
                Int8Gemm g = before_[i]->gemm_;
                auto* sums = reinterpret_cast<std::int32_t*>(scratch + static_cast<i64>(i) * sums_bytes);
                g.output.raw_sums = reaching(sums, first);
                g.output.sums_row = width;
                last.output.before[i].sums = g.output.raw_sums;
                run(g);
            }
            run(last);
        }
    }

    ThreadPool& pool_;
    const Int8Kernels& kernels_;
    const Grouping grouping_;
    Runs runs_{kernels_, 1, 0};
    Tensor x_, y_;
    std::optional<Tensor> residual_, rest_;
    std::vector<std::unique_ptr<GemmStep>> before_;  // products that come before this one
    i64 rows_, groups_ = 1;  // groups_: computed one by one
    i64 line_ = 1;           // rows
    std::shared_ptr<const PackedWeights> weights_;
    std::unique_ptr<ChannelConstants> constants_;
    TapTable taps_;
    std::vector<i64> run_offset_, window_offset_;
    Int8Gemm gemm_;
    Tasks tasks_;
};

}  // namespace

StepPtr make_gemm_step_on(const Int8Kernels& kernels, ThreadPool& pool, const Weights& w, const Grouping& unmerged,
                          const Shape3& shape, const Tensor& x, const Tensor* residual, const Epilogue& epilogue,
                          const Tensor& y, i64 rows, const Terms& terms) {
    auto step = std::make_unique<GemmStep>(pool, kernels, unmerged, shape, x, residual, epilogue, y, rows, terms);
    step->take_weights(w, shape, terms);
    return step;
}

StepPtr make_gemm_step(ThreadPool& pool, const Weights& w, const Grouping& unmerged, const Shape3& shape,
                       const Tensor& x, const Tensor* residual, const Epilogue& epilogue, const Tensor& y, i64 rows,
                       const Terms& terms) {
    struct Made {
        std::unique_ptr<GemmStep> step;
        std::shared_ptr<const Decision> decision;
    };
    const auto made = [&](const Int8Kernels& kernels) {
        auto step = std::make_unique<GemmStep>(pool, kernels, unmerged, shape, x, residual, epilogue, y, rows, terms);
        return Made{std::move(step), take_decision()};
    };
    const Int8Kernels *kernels = int8_kernels_in_use(), *others = int8_kernels_beside();
    Made best = made(*kernels);
    if (others != nullptr && may_take_either(w, unmerged)) {
        Made other = made(*others);
        const bool is_kept = best.decision->is_measured, is_other_kept = other.decision->is_measured;
        if (is_kept == is_other_kept ? other.step->predicted_ms() < best.step->predicted_ms() : is_other_kept) {
            std::swap(best, other);
            std::swap(kernels, others);
        }
        const Trial* trial = current_trial();
        if (trial != nullptr && trial->most > 1 &&
            other.step->predicted_ms() < (1 + kOthersMargin) * best.step->predicted_ms()) {
            auto both = std::make_shared<Decision>(*best.decision);
            if (trial->rank >= both->ways.size()) {
                Trial first = *trial;
                first.rank = 0;
                const InTrial now(first);
                best = made(*others);
                both->taken = both->ways.size();
                both->work_ms = best.decision->work_ms;
            }
            both->ways.push_back(other.decision->ways[0]);
            best.decision = std::move(both);
        }
    }
    leave_decision(std::move(best.decision));
    best.step->take_weights(w, shape, terms);
    return std::move(best.step);
}

}  // namespace quantflow::host::int8
