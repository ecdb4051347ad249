// Pools.
#include <algorithm>
#include <limits>
#include <numeric>

#include "window_steps.hpp"

namespace quantflow::host {

using namespace windows;

namespace {

// What of a window lies inside x along one dimension.
struct Span {
    std::int64_t first = 0, count = 0;  // first element and how many, `dilation` apart
    std::int64_t extent = 0;            // with padding
};

Span span_of(const PoolGeometry& g, std::size_t d, std::int64_t out, std::int64_t in, std::int64_t outs) {
    Span s;
    if (g.is_adaptive) {
        s.first = out * in / outs;
        s.count = s.extent = ((out + 1) * in + outs - 1) / outs - s.first;
        return s;
    }
    const std::int64_t dilation = g.is_max ? g.dilation[d] : 1;
    const std::int64_t start = out * g.stride[d] - g.padding[d];
    const std::int64_t skipped = start < 0 ? (-start + dilation - 1) / dilation : 0;
    const std::int64_t last = in > start ? (in - start + dilation - 1) / dilation : 0;
    s.first = start + skipped * dilation;
    s.count = std::max<std::int64_t>(0, std::min(g.kernel[d], last) - skipped);
    s.extent = std::max<std::int64_t>(0, std::min(start + g.kernel[d], in + g.padding[d]) - start);
    return s;
}

class PoolStep final : public Step {
public:
    PoolStep(ThreadPool& pool, const PoolGeometry& g, const Tensor& x, const Tensor& y)
        : pool_(pool), g_(g), x_(x), y_(y) {
        const std::size_t spatial = x.dims.size() - 2;
        job_.x = form_of(x);
        job_.y = form_of(y);
        batch_ = y.dims[0];
        channels_ = y.dims[1];
        // Three spatial dimensions always; those in front that x lacks have one element.
        for (std::size_t d = 0; d < 3; ++d) {
            if (d + spatial < 3) {
                spans_[d] = {Span{0, 1, 1}};
                continue;
            }
            const std::size_t from = d + spatial - 3;
            if (y.dims[from + 2] > 1 << 22) throw Unsupported("a pool of more than 2**22 windows along one dimension");
            if (g.is_max) dilation_[d] = g.dilation[from];
            x_step_[d] = x.strides[from + 2];
            y_step_[d] = y.strides[from + 2];
            for (std::int64_t out = 0; out < y.dims[from + 2]; ++out)
                spans_[d].push_back(span_of(g, from, out, x.dims[from + 2], y.dims[from + 2]));
        }
        // The cost of one row of the output, in bytes read.
        std::int64_t taps = 1;
        for (const auto& spans : spans_)
            if (!spans.empty()) taps *= std::max<std::int64_t>(1, spans[spans.size() / 2].count);
        if (taps > 1 << 23) throw Unsupported("a pool over more than 2**23 elements");
        row_bytes_ = static_cast<std::int64_t>(spans_[2].size()) * taps * size_of(x.dtype);
        is_dense_ = channels_ > 1 && x.strides[1] == 1 && y.strides[1] == 1;
    }

    std::string kernel() const override {
        return g_.is_max ? "host.max_pool" : g_.is_adaptive ? "host.adaptive_avg_pool" : "host.avg_pool";
    }

    void run() override {
        if (y_.count() == 0) return;
        const std::int64_t rows = batch_ * size(0) * size(1);
        if (!is_dense_)
            return run_ranges(pool_, rows * channels_, rows * channels_ * row_bytes_ * 4,
                              [&](std::int64_t first, std::int64_t last) {
                                  for (std::int64_t i = first; i < last; ++i) plain_row(i / channels_, i % channels_);
                              });
        const std::int64_t bytes = rows * channels_ * row_bytes_;
        constexpr std::int64_t line = 64;
        const std::int64_t pieces = std::clamp<std::int64_t>((task_count(pool_, bytes) + rows - 1) / rows, 1,
                                                             (channels_ + 2 * line - 1) / (2 * line));
        const std::int64_t width = ((channels_ + pieces - 1) / pieces + line - 1) / line * line;
        run_ranges(pool_, rows * pieces, bytes, [&](std::int64_t first, std::int64_t last) {
            std::vector<std::int64_t> offsets;
            for (std::int64_t i = first; i < last; ++i) {
                const std::int64_t from = i % pieces * width;
                if (from < channels_) dense_row(i / pieces, from, std::min(width, channels_ - from), offsets);
            }
        });
    }

private:
    std::int64_t size(std::size_t d) const { return static_cast<std::int64_t>(spans_[d].size()); }

    struct Row {
        const Span *depth, *height;
        std::int64_t x, y;  // offsets of the row's first element
    };
    Row row_of(std::int64_t row) const {
        const std::int64_t h = row % size(1), d = row / size(1) % size(0), b = row / size(1) / size(0);
        return {&spans_[0][static_cast<std::size_t>(d)], &spans_[1][static_cast<std::size_t>(h)], b * x_.strides[0],
                b * y_.strides[0] + d * y_step_[0] + h * y_step_[1]};
    }

    std::int64_t divisor(const Row& row, const Span& w) const {
        if (g_.divisor_override != 0) return g_.divisor_override;
        const bool padded = g_.count_include_pad && !g_.is_adaptive;
        const std::int64_t n = padded ? row.depth->extent * row.height->extent * w.extent
                                      : row.depth->count * row.height->count * w.count;
        return std::max<std::int64_t>(1, n);  // of an empty window: its mean is 0
    }

    // Calls f(offset in x) for each element of a window, for the channel at offset 0.
    template <class Function>
    void each_tap(const Row& row, const Span& w, const Function& f) const {
        for (std::int64_t d = 0; d < row.depth->count; ++d)
            for (std::int64_t h = 0; h < row.height->count; ++h) {
                const std::int64_t at = row.x + (row.depth->first + d * dilation_[0]) * x_step_[0] +
                                        (row.height->first + h * dilation_[1]) * x_step_[1];
                for (std::int64_t k = 0; k < w.count; ++k) f(at + (w.first + k * dilation_[2]) * x_step_[2]);
            }
    }

    // A row of pixels whose channels are dense: neighbours with windows of one shape in one call.
    void dense_row(std::int64_t index, std::int64_t channel, std::int64_t n, std::vector<std::int64_t>& offsets) const {
        const Row row = row_of(index);
        const auto& spans = spans_[2];
        MeanJob job = job_;
        for (std::size_t i = 0; i < spans.size();) {
            std::size_t end = i + 1;
            std::int64_t step = 0;
            if (end < spans.size()) step = spans[end].first - spans[i].first;
            while (end < spans.size() && spans[end].count == spans[i].count && spans[end].extent == spans[i].extent &&
                   spans[end].first - spans[end - 1].first == step)
                ++end;
            offsets.clear();
            each_tap(row, spans[i], [&](std::int64_t offset) { offsets.push_back(offset); });
            const Window window{offsets.data(), static_cast<std::int64_t>(offsets.size())};
            const PixelRun run{address(x_, channel), step * x_step_[2],
                               address(y_, row.y + static_cast<std::int64_t>(i) * y_step_[2] + channel), y_step_[2],
                               static_cast<std::int64_t>(end - i), n};
            job.divisor = divisor(row, spans[i]);
            if (!g_.is_max)
                k_.mean(job, window, run);
            else if (offsets.empty())
                for (std::int64_t p = 0; p < run.pixels; ++p) put_lowest(run, p);
            else if (job_.x.is_codes())
                k_.max_codes(window, run);
            else
                k_.max_floats(window, run);
            i = end;
        }
    }

    void put_lowest(const PixelRun& run, std::int64_t pixel) const {
        if (job_.y.is_codes())
            std::fill_n(static_cast<std::uint8_t*>(run.y) + pixel * run.y_step, run.channels,
                        static_cast<std::uint8_t>(y_.q->qmin));
        else
            std::fill_n(static_cast<float*>(run.y) + pixel * run.y_step, run.channels,
                        -std::numeric_limits<float>::infinity());
    }

    // Any layout, one channel, element by element.
    void plain_row(std::int64_t index, std::int64_t channel) const {
        const Row row = row_of(index);
        const bool of_codes = job_.x.is_codes();
        const std::byte* x = address(x_, channel * x_.strides[1]);
        const auto value = [&](std::int64_t offset) {
            return of_codes ? static_cast<float>(reinterpret_cast<const std::uint8_t*>(x)[offset])
                            : reinterpret_cast<const float*>(x)[offset];
        };
        for (std::size_t i = 0; i < spans_[2].size(); ++i) {
            const Span& w = spans_[2][i];
            std::byte* y = address(y_, row.y + channel * y_.strides[1] + static_cast<std::int64_t>(i) * y_step_[2]);
            if (g_.is_max) {
                float best = -std::numeric_limits<float>::infinity();
                each_tap(row, w, [&](std::int64_t offset) {
                    const float next = value(offset);
                    if (next > best || next != next) best = next;
                });
                if (of_codes)
                    *reinterpret_cast<std::uint8_t*>(y) =
                        static_cast<std::uint8_t>(best < 0 ? y_.q->qmin : static_cast<int>(best));
                else
                    *reinterpret_cast<float*>(y) = best;
                continue;
            }
            double sum = 0;
            std::int64_t count = 0;
            each_tap(row, w, [&](std::int64_t offset) {
                sum += static_cast<double>(value(offset));
                ++count;
            });
            if (of_codes) sum -= static_cast<double>(count) * static_cast<double>(job_.x.zero_point);
            const float mean = static_cast<float>(sum / static_cast<double>(divisor(row, w)));
            const float real = of_codes ? mean * job_.x.scale : mean;
            e_.store(job_.y, &real, 1, y, 1);
        }
    }

    ThreadPool& pool_;
    const PoolGeometry g_;
    const Tensor x_, y_;
    const WindowKernels& k_ = window_kernels();
    const ElementwiseKernels& e_ = elementwise_kernels();
    MeanJob job_;
    std::int64_t batch_ = 0, channels_ = 0, row_bytes_ = 0;
    std::vector<Span> spans_[3];
    std::int64_t dilation_[3] = {1, 1, 1}, x_step_[3] = {}, y_step_[3] = {};
    bool is_dense_ = false;
};

// One window over all of x without padding.
bool is_global_mean(const PoolGeometry& g, const Tensor& x, const Tensor& y) {
    if (g.is_max || g.divisor_override != 0 || x.dims.size() < 3) return false;
    for (std::size_t d = 2; d < x.dims.size(); ++d) {
        if (y.dims[d] != 1) return false;
        if (!g.is_adaptive && (g.padding[d - 2] != 0 || g.kernel[d - 2] != x.dims[d])) return false;
    }
    return true;
}

}  // namespace

StepPtr make_pool(ThreadPool& pool, const PoolGeometry& g, const Tensor& x, const Tensor& y) {
    const bool is_moved = g.is_max && x.dtype == y.dtype && x.q == y.q;
    if (!holds_reals(x) || !holds_reals(y) || (g.is_max && !is_moved)) refuse("a pool", x, y);
    if (x.rank() < 3 || x.rank() > 5) throw Unsupported("a pool over other than 1 to 3 dimensions");
    if (is_global_mean(g, x, y)) {
        std::vector<int> axes(x.dims.size() - 2);
        std::iota(axes.begin(), axes.end(), 2);
        return make_reduce(pool, Reduction::mean, x, axes, y);
    }
    return std::make_unique<PoolStep>(pool, g, x, y);
}

}  // namespace quantflow::host
