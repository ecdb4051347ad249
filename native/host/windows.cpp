// Pools, reductions, embeddings and upsampling.
#include "windows_isa.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

#include "elementwise_nest.hpp"
#include "isa.hpp"
#include "steps.hpp"

namespace quantflow::host {
namespace {

const WindowKernels& window_kernels() {
    switch (best_isa()) {
        case Isa::amx_int8:
        case Isa::avx512_vnni: return isa_avx512_vnni::window_kernels();
        case Isa::avx_vnni: return isa_avx_vnni::window_kernels();
        case Isa::avx2: return isa_avx2::window_kernels();
        default: return isa_generic::window_kernels();
    }
}

std::byte* address(const Tensor& t, std::int64_t element) { return t.place.get() + element * size_of(t.dtype); }

bool is_real(const Tensor& t) { return t.dtype == DType::f32 ? !t.q : t.dtype == DType::u8 && t.q; }

[[noreturn]] void refuse(const char* what, const Tensor& x, const Tensor& y) {
    throw Unsupported(std::string(what) + " from " + name_of(x.dtype) + (x.q ? " codes" : "") + " to " +
                      name_of(y.dtype) + (y.q ? " codes" : ""));
}

// --- reductions

// Codes are summed in parts of this many; a kernel's 16-bit sums hold no more.
constexpr std::int64_t kPart = 256;
// Elements up to which a mean is one sum: of floats, its error grows with them.
constexpr std::int64_t kDirect = 1024;
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
        const std::int64_t wanted = task_count(pool_, kept_.count() * positions_.count() * size_of(x.dtype));
        const std::int64_t blocks = (kept_.count() + kChannels - 1) / kChannels;
        parts_ = std::clamp<std::int64_t>((wanted + blocks - 1) / blocks, 1,
                                          std::max<std::int64_t>(1, positions_.count() / 64));
        if (how == Reduction::mean && parts_ == 1 && positions_.count() <= kDirect && positions_.count() > 0 &&
            kept_.column(1) == 1) {
            job_ = {from_, to_, positions_.count()};
            offsets_.resize(static_cast<std::size_t>(positions_.count()));
            positions_.offsets(0, positions_.count(), offsets_.data());
        }
        // Few sums over many elements: threads share a sum, and what they found is put together afterwards.
        if (parts_ > 1) partial_.resize(static_cast<std::size_t>(parts_ * kept_.count()));
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

    // found[i] over positions [first, last) for n <= kChannels kept elements from `offset` on, dense in x.
    void columns(std::int64_t offset, std::int64_t n, std::int64_t first, std::int64_t last, double* found) const {
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
            double found[kChannels];
            for (std::int64_t r = 0; r < rows; ++r)
                for (std::int64_t i = 0; i < n; i += kChannels) {
                    const std::int64_t count = std::min(kChannels, n - i);
                    columns(offset[0] + r * kept_.row(0) + i, count, 0, positions_.count(), found);
                    finish(found, count, offset[1] + r * kept_.row(1) + i * kept_.column(1));
                }
        });
    }

    // Each part of the positions in a task of its own, for all that is kept.
    void run_shared() {
        const std::int64_t kept = kept_.count();
        const auto task = [&](std::int64_t part) {
            const std::int64_t first = part * positions_.count() / parts_,
                               last = (part + 1) * positions_.count() / parts_;
            double* found = partial_.data() + part * kept;
            each_block([&](std::int64_t x_offset, std::int64_t, std::int64_t count) {
                columns(x_offset, count, first, last, found);
                found += count;
            });
        };
        pool_.run(parts_, [&task](std::int64_t part) { task(part); });
        double* total = partial_.data();
        each_block([&](std::int64_t, std::int64_t y_offset, std::int64_t count) {
            for (std::int64_t part = 1; part < parts_; ++part)
                for (std::int64_t i = 0; i < count; ++i) join(total[i], total[part * kept + i]);
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
    std::int64_t parts_ = 1;
    std::vector<double> partial_;
    // A mean that one kernel finds.
    MeanJob job_;
    std::vector<std::int64_t> offsets_;
};

// --- pools

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

// --- upsampling

// The input elements that an output element lies between, along one dimension.
struct Between {
    std::int64_t low = 0, high = 0;
    float weight = 0;  // of `high`
};

std::vector<Between> between(Interpolation how, bool align_corners, double given_scale, std::int64_t in,
                             std::int64_t out) {
    std::vector<Between> result;
    const float scale = static_cast<float>(given_scale);
    for (std::int64_t i = 0; i < out; ++i) {
        const float at = static_cast<float>(i);
        Between b;
        if (how == Interpolation::nearest) {
            b.low = b.high = std::clamp<std::int64_t>(static_cast<std::int64_t>(std::floor(at * scale)), 0, in - 1);
        } else {
            const float source = align_corners ? scale * at : std::max(0.0f, scale * (at + 0.5f) - 0.5f);
            b.low = std::clamp<std::int64_t>(static_cast<std::int64_t>(source), 0, in - 1);
            b.high = std::min(b.low + 1, in - 1);
            b.weight = std::clamp(source - static_cast<float>(b.low), 0.0f, 1.0f);
        }
        result.push_back(b);
    }
    return result;
}

class UpsampleStep final : public Step {
public:
    UpsampleStep(ThreadPool& pool, Interpolation how, bool align_corners, const std::vector<double>& scales,
                 const Tensor& x, const Tensor& y)
        : pool_(pool), how_(how), x_(x), y_(y), from_(form_of(x)), to_(form_of(y)) {
        const std::size_t spatial = x.dims.size() - 2;
        for (std::size_t d = 0; d < 3; ++d) {
            if (d + spatial < 3) {
                places_[d] = {Between{}};
                continue;
            }
            const std::size_t at = d + spatial - 1;
            x_step_[d] = x.strides[at];
            y_step_[d] = y.strides[at];
            if (x.dims[at] > 0 && y.dims[at] > 0)
                places_[d] = between(how, align_corners, scales[at - 2], x.dims[at], y.dims[at]);
        }
        is_dense_ = x.strides[1] == 1 && y.strides[1] == 1 && y.dims[1] > 1;
        if (x.dims.back() == 1) x_step_[2] = x.dims[1];  // never taken
        // Blending works on rows of pixels that lie side by side.
        if (how == Interpolation::bilinear && x_step_[2] != x.dims[1]) is_dense_ = false;
        pixel_ = is_dense_ ? x.dims[1] : 1;
        for (const Between& p : places_[2]) {
            low_.push_back(static_cast<std::int32_t>(p.low));
            high_.push_back(static_cast<std::int32_t>(p.high));
            weight_.push_back(p.weight);
        }
        // Each input pixel the same number of times, in order.
        const std::int64_t in = x.dims.back(), out = y.dims.back();
        repeats_ = in > 0 && out % in == 0 ? out / in : 0;
        for (std::int64_t i = 0; i < out && repeats_ > 0; ++i)
            if (low_[static_cast<std::size_t>(i)] != i / repeats_) repeats_ = 0;
    }

    std::string kernel() const override {
        return how_ == Interpolation::nearest ? "host.upsample_nearest" : "host.upsample_bilinear";
    }

    void run() override {
        if (y_.count() == 0) return;
        const std::int64_t channels = is_dense_ ? 1 : y_.dims[1];
        const std::int64_t rows = y_.dims[0] * size(0) * size(1) * channels;
        const std::int64_t bytes = y_.count() * (size_of(y_.dtype) + size_of(x_.dtype));
        run_ranges(pool_, rows, bytes, [&](std::int64_t first, std::int64_t last) {
            std::vector<float> row;
            for (std::int64_t i = first; i < last; ++i) {
                const std::int64_t h = i % size(1), d = i / size(1) % size(0);
                const std::int64_t c = i / size(1) / size(0) % channels, b = i / size(1) / size(0) / channels;
                const Between& depth = places_[0][static_cast<std::size_t>(d)];
                const Between& height = places_[1][static_cast<std::size_t>(h)];
                const std::int64_t base = b * x_.strides[0] + c * x_.strides[1] + depth.low * x_step_[0];
                const std::int64_t y = b * y_.strides[0] + c * y_.strides[1] + d * y_step_[0] + h * y_step_[1];
                if (how_ == Interpolation::nearest)
                    nearest_row(base + height.low * x_step_[1], y);
                else
                    bilinear_row(base + height.low * x_step_[1], base + height.high * x_step_[1], height.weight, y,
                                 row);
            }
        });
    }

private:
    std::int64_t size(std::size_t d) const { return static_cast<std::int64_t>(places_[d].size()); }

    void nearest_row(std::int64_t x, std::int64_t y) const {
        const auto& places = places_[2];
        if (is_dense_) {
            const std::int64_t bytes = y_.dims[1] * size_of(y_.dtype);
            if (repeats_ > 0) {
                for (std::int64_t k = 0; k < repeats_; ++k)
                    copy_pixels(x, x_step_[2], y + k * y_step_[2], repeats_ * y_step_[2], x_.dims.back(), bytes);
            } else {
                for (std::size_t i = 0; i < places.size(); ++i)
                    copy_pixels(x + places[i].low * x_step_[2], 0, y + static_cast<std::int64_t>(i) * y_step_[2], 0, 1,
                                bytes);
            }
            return;
        }
        if (size_of(y_.dtype) == 1)
            pick(reinterpret_cast<const std::uint8_t*>(address(x_, x)),
                 reinterpret_cast<std::uint8_t*>(address(y_, y)));
        else if (size_of(y_.dtype) == 4)
            pick(reinterpret_cast<const std::uint32_t*>(address(x_, x)),
                 reinterpret_cast<std::uint32_t*>(address(y_, y)));
        else
            pick(reinterpret_cast<const std::uint64_t*>(address(x_, x)),
                 reinterpret_cast<std::uint64_t*>(address(y_, y)));
    }

    void copy_pixels(std::int64_t x, std::int64_t x_step, std::int64_t y, std::int64_t y_step, std::int64_t pixels,
                     std::int64_t bytes) const {
        const std::int64_t size = size_of(y_.dtype);
        e_.copy_rows(address(x_, x), x_step * size, address(y_, y), y_step * size, pixels, bytes);
    }

    template <class T>
    void pick(const T* x, T* y) const {
        for (const Between& p : places_[2]) {
            *y = x[p.low * x_step_[2]];
            y += y_step_[2];
        }
    }

    // The rows above and below, in x; `weight` is of the one below.
    void bilinear_row(std::int64_t above, std::int64_t below, float weight, std::int64_t y,
                      std::vector<float>& row) const {
        const std::int64_t n = x_.dims.back() * pixel_;
        row.resize(static_cast<std::size_t>(2 * n));
        if (x_step_[2] == pixel_) {
            k_.blend_rows(from_, address(x_, above), address(x_, below), weight, n, row.data());
        } else {
            e_.load(from_, address(x_, above), x_step_[2], n, row.data());
            e_.load(from_, address(x_, below), x_step_[2], n, row.data() + n);
            k_.blend_rows({}, row.data(), row.data() + n, weight, n, row.data());
        }
        k_.blend_pixels(row.data(), {low_.data(), high_.data(), weight_.data(), size(2)}, pixel_, to_, address(y_, y),
                        y_step_[2]);
    }

    ThreadPool& pool_;
    const Interpolation how_;
    const Tensor x_, y_;
    const Form from_, to_;
    const WindowKernels& k_ = window_kernels();
    const ElementwiseKernels& e_ = elementwise_kernels();
    std::vector<Between> places_[3];
    std::vector<std::int32_t> low_, high_;
    std::vector<float> weight_;
    std::int64_t x_step_[3] = {}, y_step_[3] = {};
    std::int64_t pixel_ = 1, repeats_ = 0;
    bool is_dense_ = false;
};

}  // namespace

StepPtr make_reduce(ThreadPool& pool, Reduction how, const Tensor& x, const std::vector<int>& axes, const Tensor& y) {
    if (!is_real(x) || !is_real(y)) refuse("a reduction", x, y);
    return std::make_unique<ReduceStep>(pool, how, x, axes, y);
}

StepPtr make_pool(ThreadPool& pool, const PoolGeometry& g, const Tensor& x, const Tensor& y) {
    const bool is_moved = g.is_max && x.dtype == y.dtype && x.q == y.q;
    if (!is_real(x) || !is_real(y) || (g.is_max && !is_moved)) refuse("a pool", x, y);
    if (x.rank() < 3 || x.rank() > 5) throw Unsupported("a pool over other than 1 to 3 dimensions");
    if (is_global_mean(g, x, y)) {
        std::vector<int> axes(x.dims.size() - 2);
        std::iota(axes.begin(), axes.end(), 2);
        return std::make_unique<ReduceStep>(pool, Reduction::mean, x, axes, y);
    }
    return std::make_unique<PoolStep>(pool, g, x, y);
}

StepPtr make_gather(ThreadPool& pool, const Tensor& table, const Tensor& index, const Tensor& y) {
    const bool is_moved = table.dtype == y.dtype && table.q == y.q;
    const bool are_rows_moved = is_moved && table.strides[1] == 1 && y.strides.back() == 1;
    if (index.dtype != DType::s64 || (!are_rows_moved && (!is_real(table) || !is_real(y))))
        refuse("a gather", table, y);
    const std::int64_t count = index.count(), width = table.dims[1];
    // Where the k-th row of y and its index lie.
    const Dims dims = index.dims, index_strides = index.strides, y_strides = y.strides;
    const auto offset = [dims](std::int64_t k, const Dims& strides) {
        std::int64_t sum = 0;
        for (std::size_t d = dims.size(); d-- > 0;) {
            sum += k % dims[d] * strides[d];
            k /= dims[d];
        }
        return sum;
    };
    const Form from = form_of(table), to = form_of(y);
    return make_step("host.gather", [=, &pool, &e = elementwise_kernels()] {
        if (count == 0 || width == 0) return;
        // Before anything is written, and here: a task must not throw.
        for (std::int64_t k = 0; k < count; ++k) {
            const std::int64_t row = index.data<std::int64_t>()[offset(k, index_strides)];
            if (row < 0 || row >= table.dims[0])
                throw Error("index " + std::to_string(row) + " is outside a table of " + std::to_string(table.dims[0]) +
                            " rows");
        }
        const std::int64_t x_column = table.strides[1], y_column = y_strides.back(), size = size_of(y.dtype);
        run_ranges(pool, count, count * width * (size_of(table.dtype) + size),
                   [&](std::int64_t first, std::int64_t last) {
                       constexpr std::int64_t block = 512;
                       float reals[block];
                       for (std::int64_t k = first; k < last; ++k) {
                           const std::int64_t row = index.data<std::int64_t>()[offset(k, index_strides)];
                           const std::int64_t x_offset = row * table.strides[0], y_offset = offset(k, y_strides);
                           if (are_rows_moved) {
                               std::memcpy(address(y, y_offset), address(table, x_offset),
                                           static_cast<std::size_t>(width * size));
                               continue;
                           }
                           for (std::int64_t i = 0; i < width; i += block) {
                               const std::int64_t n = std::min(block, width - i);
                               e.load(from, address(table, x_offset + i * x_column), x_column, n, reals);
                               e.store(to, reals, n, address(y, y_offset + i * y_column), y_column);
                           }
                       }
                   });
    });
}

StepPtr make_upsample(ThreadPool& pool, Interpolation how, bool align_corners, const std::vector<double>& scales,
                      const Tensor& x, const Tensor& y) {
    const bool is_moved = x.dtype == y.dtype && x.q == y.q;
    const bool is_nearest = how == Interpolation::nearest;
    if (is_nearest ? !is_moved : !is_real(x) || !is_real(y)) refuse("upsampling", x, y);
    if (x.rank() < 3 || x.rank() > 5 || (!is_nearest && x.rank() != 4))
        throw Unsupported("upsampling of this many dimensions");
    return std::make_unique<UpsampleStep>(pool, how, align_corners, scales, x, y);
}

}  // namespace quantflow::host
