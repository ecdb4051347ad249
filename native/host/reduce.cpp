// Sums, means, largest and smallest elements.
#include <algorithm>
#include <limits>

#include "window_steps.hpp"

namespace quantflow::host {

using namespace windows;

namespace {

// Codes are summed in parts of this many; a kernel's 16-bit sums hold no more.
constexpr std::int64_t kPart = 256;
// Elements up to which a mean is one sum: of floats, its error grows with them.
constexpr std::int64_t kDirect = 1024;
// Positions are summed in up to so many groups, which threads share: the same groups in the same order for any number of
// threads, so that sums of floats are the same.
constexpr std::int64_t kMostGroups = 64;
// Channels that a task holds sums of.
constexpr std::int64_t kChannels = 256;

// The elements that are reduced into one, by their offsets in x.
class Positions {
public:
    Positions(const Tensor& x, const std::vector<int>& axes) {
        struct Loop {
            std::int64_t size, stride;
        };
        std::vector<Loop> loops;
        for (int axis : axes) {
            const auto a = static_cast<std::size_t>(axis);
            count_ *= x.dims[a];
            if (x.dims[a] != 1) loops.push_back({x.dims[a], x.strides[a]});
        }
        std::stable_sort(loops.begin(), loops.end(), [](const Loop& a, const Loop& b) { return a.stride > b.stride; });
        for (const Loop& loop : loops) {
            if (!sizes_.empty() && strides_.back() == loop.stride * loop.size) {
                sizes_.back() *= loop.size;
                strides_.back() = loop.stride;
            } else {
                sizes_.push_back(loop.size);
                strides_.push_back(loop.stride);
            }
        }
        if (sizes_.empty()) {
            sizes_.push_back(1);
            strides_.push_back(1);
        }
    }

    std::int64_t count() const { return count_; }
    // The innermost dimension.
    std::int64_t row_size() const { return sizes_.back(); }
    std::int64_t row_stride() const { return strides_.back(); }

    // Offsets of positions first, first + 1, ...
    void offsets(std::int64_t first, std::int64_t n, std::int64_t* out) const {
        while (n > 0) {
            std::int64_t rest = first / sizes_.back(), offset = 0;
            for (std::size_t d = sizes_.size() - 1; d-- > 0;) {
                offset += rest % sizes_[d] * strides_[d];
                rest /= sizes_[d];
            }
            const std::int64_t at = first % sizes_.back(), count = std::min(n, sizes_.back() - at);
            for (std::int64_t i = 0; i < count; ++i) out[i] = offset + (at + i) * strides_.back();
            out += count;
            first += count;
            n -= count;
        }
    }

private:
    std::int64_t count_ = 1;
    Dims sizes_, strides_;
};

class ReduceStep final : public Step {
public:
    ReduceStep(ThreadPool& pool, Reduction how, const Tensor& x, const std::vector<int>& axes, const Tensor& y)
        : pool_(pool), how_(how), x_(x), y_(y), from_(form_of(x)), to_(form_of(y)), positions_(x, axes),
          kept_(y.dims, {x.strides, y.strides}) {
        // Many sums side by side where what is kept is dense in x, else one row after another.
        const bool rows_are_dense = positions_.row_stride() == 1 && positions_.row_size() > 1;
        is_side_by_side_ = kept_.column(0) == 1 && !rows_are_dense && kept_.count() > 0;
        if (!is_side_by_side_) return;
        if (how == Reduction::mean && positions_.count() <= kDirect && positions_.count() > 0 && kept_.column(1) == 1) {
            job_ = {from_, to_, positions_.count()};
            offsets_.resize(static_cast<std::size_t>(positions_.count()));
            positions_.offsets(0, positions_.count(), offsets_.data());
            return;
        }
        const std::int64_t pieces = (positions_.count() + kPart - 1) / kPart;
        group_ = kPart * std::max<std::int64_t>(1, (pieces + kMostGroups - 1) / kMostGroups);
        groups_ = std::max<std::int64_t>(1, (positions_.count() + group_ - 1) / group_);
        const std::int64_t wanted = task_count(pool_, kept_.count() * positions_.count() * size_of(x.dtype));
        const std::int64_t blocks = (kept_.count() + kChannels - 1) / kChannels;
        parts_ = std::clamp<std::int64_t>((wanted + blocks - 1) / blocks, 1, groups_);
        // Few sums over many elements: threads share a sum, and what they found is put together afterwards.
        if (parts_ > 1) partial_.resize(static_cast<std::size_t>(groups_ * kept_.count()));
    }

    std::string kernel() const override {
        static const char* const words[] = {"sum", "mean", "max", "min"};
        return std::string("host.") + words[static_cast<int>(how_)];
    }

    void run() override {
        if (kept_.count() == 0) return;
        if (!is_side_by_side_) return run_rows();
        if (parts_ == 1) return run_columns();
        run_shared();
    }

private:
    bool is_sum() const { return how_ == Reduction::sum || how_ == Reduction::mean; }
    double start() const {
        if (is_sum()) return 0;
        return how_ == Reduction::max ? -std::numeric_limits<double>::infinity()
                                      : std::numeric_limits<double>::infinity();
    }
    void join(double& found, double next) const {
        if (is_sum())
            found += next;
        else if (found == found && (next != next || (how_ == Reduction::max ? next > found : next < found)))
            found = next;
    }

    // The real that `found` means: sums of codes lack their zero points and scale.
    float finished(double found) const {
        if (!is_sum()) return static_cast<float>(found);
        const double count = static_cast<double>(positions_.count());
        if (from_.is_codes()) found -= count * static_cast<double>(from_.zero_point);
        if (how_ == Reduction::mean) found /= count;
        return from_.is_codes() ? static_cast<float>(found) * from_.scale : static_cast<float>(found);
    }

    // found[i] over the positions of a group for n <= kChannels kept elements from `offset` on, dense in x.
    void columns(std::int64_t offset, std::int64_t n, std::int64_t group, double* found) const {
        const std::int64_t first = group * group_, last = std::min(first + group_, positions_.count());
        std::int64_t offsets[kPart];
        std::int32_t sums[kChannels];
        float reals[kChannels];
        std::fill_n(found, n, start());
        for (std::int64_t at = first; at < last; at += kPart) {
            const Window window{offsets, std::min(kPart, last - at)};
            positions_.offsets(at, window.count, offsets);
            const std::byte* x = address(x_, offset);
            if (!is_sum())
                k_.best(from_, how_ == Reduction::max, window, x, n, reals);
            else if (from_.is_codes())
                k_.sum_codes(window, reinterpret_cast<const std::uint8_t*>(x), n, sums);
            else
                k_.sum_floats(window, reinterpret_cast<const float*>(x), n, reals);
            const bool in_sums = is_sum() && from_.is_codes();
            for (std::int64_t i = 0; i < n; ++i) join(found[i], in_sums ? sums[i] : static_cast<double>(reals[i]));
        }
    }

    void finish(const double* found, std::int64_t n, std::int64_t y_offset) const {
        float reals[kChannels];
        for (std::int64_t i = 0; i < n; ++i) reals[i] = finished(found[i]);
        e_.store(to_, reals, n, address(y_, y_offset), kept_.column(1));
    }

    void run_columns() const {
        const std::int64_t bytes = positions_.count() * size_of(x_.dtype);
        kept_.run(pool_, bytes, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            if (!offsets_.empty())
                return k_.mean(job_, {offsets_.data(), positions_.count()},
                               {address(x_, offset[0]), kept_.row(0), address(y_, offset[1]), kept_.row(1), rows, n});
            double found[kChannels], next[kChannels];
            for (std::int64_t r = 0; r < rows; ++r)
                for (std::int64_t i = 0; i < n; i += kChannels) {
                    const std::int64_t count = std::min(kChannels, n - i), from = offset[0] + r * kept_.row(0) + i;
                    columns(from, count, 0, found);
                    for (std::int64_t group = 1; group < groups_; ++group) {
                        columns(from, count, group, next);
                        for (std::int64_t c = 0; c < count; ++c) join(found[c], next[c]);
                    }
                    finish(found, count, offset[1] + r * kept_.row(1) + i * kept_.column(1));
                }
        });
    }

    // Some groups of the positions in a task, for all that is kept.
    void run_shared() {
        const std::int64_t kept = kept_.count();
        const auto task = [&](std::int64_t part) {
            for (std::int64_t group = part * groups_ / parts_; group < (part + 1) * groups_ / parts_; ++group) {
                double* found = partial_.data() + group * kept;
                each_block([&](std::int64_t x_offset, std::int64_t, std::int64_t count) {
                    columns(x_offset, count, group, found);
                    found += count;
                });
            }
        };
        pool_.run(parts_, [&task](std::int64_t part) { task(part); });
        double* total = partial_.data();
        each_block([&](std::int64_t, std::int64_t y_offset, std::int64_t count) {
            for (std::int64_t group = 1; group < groups_; ++group)
                for (std::int64_t i = 0; i < count; ++i) join(total[i], total[group * kept + i]);
            finish(total, count, y_offset);
            total += count;
        });
    }

    // Calls f(x offset, y offset, n) for blocks of at most kChannels kept elements, in order.
    template <class Function>
    void each_block(const Function& f) const {
        kept_.run_here([&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            for (std::int64_t r = 0; r < rows; ++r)
                for (std::int64_t i = 0; i < n; i += kChannels)
                    f(offset[0] + r * kept_.row(0) + i, offset[1] + r * kept_.row(1) + i * kept_.column(1),
                      std::min(kChannels, n - i));
        });
    }

    void run_rows() const {
        const std::int64_t bytes = std::max<std::int64_t>(1, positions_.count()) * size_of(x_.dtype);
        kept_.run(pool_, bytes, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            double found[kChannels];
            for (std::int64_t r = 0; r < rows; ++r)
                for (std::int64_t i = 0; i < n; i += kChannels) {
                    const std::int64_t count = std::min(kChannels, n - i);
                    for (std::int64_t c = 0; c < count; ++c)
                        found[c] = row(offset[0] + r * kept_.row(0) + (i + c) * kept_.column(0));
                    finish(found, count, offset[1] + r * kept_.row(1) + i * kept_.column(1));
                }
        });
    }

    double row(std::int64_t offset) const {
        const std::int64_t size = positions_.row_size(), stride = positions_.row_stride();
        double found = start();
        for (std::int64_t at = 0; at < positions_.count(); at += size) {
            std::int64_t inside = 0;
            positions_.offsets(at, 1, &inside);
            const std::byte* x = address(x_, offset + inside);
            join(found, is_sum() ? k_.sum_row(from_, x, stride, size)
                                 : static_cast<double>(k_.best_row(from_, how_ == Reduction::max, x, stride, size)));
        }
        return found;
    }

    ThreadPool& pool_;
    const Reduction how_;
    const Tensor x_, y_;
    const Form from_, to_;
    const Positions positions_;
    const Nest kept_;
    const WindowKernels& k_ = window_kernels();
    const ElementwiseKernels& e_ = elementwise_kernels();
    bool is_side_by_side_ = false;
    std::int64_t parts_ = 1, group_ = 1, groups_ = 1;  // tasks; positions of a group, groups
    std::vector<double> partial_;
    // A mean that one kernel finds.
    MeanJob job_;
    std::vector<std::int64_t> offsets_;
};

}  // namespace

StepPtr make_reduce(ThreadPool& pool, Reduction how, const Tensor& x, const std::vector<int>& axes, const Tensor& y) {
    if (!holds_reals(x) || !holds_reals(y)) refuse("a reduction", x, y);
    return std::make_unique<ReduceStep>(pool, how, x, axes, y);
}

}  // namespace quantflow::host
