// Upsampling.
#include <algorithm>
#include <cmath>

#include "window_steps.hpp"

namespace quantflow::host {

using namespace windows;

namespace {

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

StepPtr make_upsample(ThreadPool& pool, Interpolation how, bool align_corners, const std::vector<double>& scales,
                      const Tensor& x, const Tensor& y) {
    const bool is_moved = x.dtype == y.dtype && x.q == y.q;
    const bool is_nearest = how == Interpolation::nearest;
    if (is_nearest ? !is_moved : !holds_reals(x) || !holds_reals(y)) refuse("upsampling", x, y);
    if (x.rank() < 3 || x.rank() > 5 || (!is_nearest && x.rank() != 4))
        throw Unsupported("upsampling of this many dimensions");
    return std::make_unique<UpsampleStep>(pool, how, align_corners, scales, x, y);
}

}  // namespace quantflow::host
