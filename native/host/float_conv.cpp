// Float convolutions.
#include "float_steps.hpp"

namespace quantflow::host {

using namespace floats;

namespace {

// Convolution of channels-last floats: one space of up to 3 dimensions, the missing ones in front of size 1.
struct Space {
    Int in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
    Int stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0}, dilation[3] = {1, 1, 1};
    Int taps = 1, pixels = 1;  // of a window; of all of y

    Space(const ConvGeometry& g, const Tensor& x, const Tensor& w, const Tensor& y) {
        const std::size_t n = g.stride.size();
        for (std::size_t i = 0; i < n; ++i) {
            const std::size_t d = 3 - n + i;
            in[d] = x.dims[i + 2];
            out[d] = y.dims[i + 2];
            kernel[d] = w.dims[i + 2];
            stride[d] = g.stride[i];
            padding[d] = g.padding[i];
            dilation[d] = g.dilation[i];
        }
        for (const Int k : kernel) taps *= k;
        pixels = y.dims[0] * out[0] * out[1] * out[2];
    }
    // Where tap k of dimension d reads for position `at` of y; outside [0, in) lies padding.
    Int source(int d, Int at, Int k) const { return at * stride[d] - padding[d] + k * dilation[d]; }
    bool is_inside(int d, Int at) const { return at >= 0 && at < in[d]; }
    // Whether y's pixels are x's, one by one.
    bool is_pointwise() const {
        for (int d = 0; d < 3; ++d)
            if (kernel[d] != 1 || stride[d] != 1 || padding[d] != 0 || in[d] != out[d]) return false;
        return true;
    }
};

// Windows laid out as rows (all taps of a pixel, each with its channels) and multiplied as matrices, group by group.
class FloatConv final : public Step {
public:
    FloatConv(ThreadPool& pool, const ConvGeometry& g, const Tensor& x, const Tensor& w, const Tensor* bias,
              const Tensor& y)
        : pool_(pool), space_(g, x, w, y), x_(x.place), y_(y.place), groups_(g.groups), width_(w.dims[1]),
          out_(w.dims[0] / g.groups), k_(space_.taps * width_) {
        if (bias != nullptr) bias_ = bias->place, has_bias_ = true;
        // (out, in, taps) to rows of taps and channels, which is the order of a window in memory.
        const auto* from = reinterpret_cast<const float*>(w.place.get());
        std::vector<float> turned(static_cast<std::size_t>(k_ * out_));
        for (Int group = 0; group < groups_; ++group) {
            const float* const own = from + group * out_ * k_;
            for (Int o = 0; o < out_; ++o)
                for (Int i = 0; i < width_; ++i)
                    for (Int t = 0; t < space_.taps; ++t)
                        turned[static_cast<std::size_t>((t * width_ + i) * out_ + o)] = own[(o * width_ + i) * space_.taps + t];
            packed_.push_back(packed_weight(own, {turned.data(), out_, 1, Real{}}, k_, out_));
        }
        const double work = 1.0 * static_cast<double>(space_.pixels) * static_cast<double>(groups_ * k_ * out_);
        const Int wanted = pool.size() == 1 || work < 2e5 ? 1 : Int{4} * pool.size();
        const Int most = std::clamp<Int>(65536 / std::max<Int>(k_, 1), 1, kRowBlock);
        block_ = round_up(std::min(most, divide_up(space_.pixels, wanted)), tile_.tile_rows);
        blocks_ = divide_up(space_.pixels, block_);
        parts_ = wanted == 1 ? Parts(blocks_ * groups_, blocks_ * groups_, 1) : Parts(blocks_ * groups_, 1, pool.size());
    }

    void run() override {
        const bool is_direct = space_.is_pointwise();
        pool_.run(parts_.count, [this, is_direct](Int part) {
            float* const rows = is_direct ? nullptr : scratch(block_ * k_);
            for (Int i = part * parts_.size, end = std::min(blocks_ * groups_, i + parts_.size); i < end; ++i) {
                const Int group = i % groups_, first = i / groups_ * block_, channels = groups_ * width_;
                const auto* x = reinterpret_cast<const float*>(x_.get()) + group * width_;
                GemmBlock g{};
                g.m = std::min(block_, space_.pixels - first);
                g.k = k_;
                g.n = out_;
                g.a = is_direct ? x + first * channels : rows;
                g.a_stride = is_direct ? channels : k_;
                if (!is_direct) lay_out(x, first, g.m, rows);
                g.b = packed_[static_cast<std::size_t>(group)]->panels.get();
                g.b_stride = tile_.tile_columns;
                g.panel_stride = tile_.tile_columns * k_;
                g.c = reinterpret_cast<float*>(y_.get()) + first * groups_ * out_ + group * out_;
                g.c_stride = groups_ * out_;
                g.bias = has_bias_ ? reinterpret_cast<const float*>(bias_.get()) + group * out_ : nullptr;
                tile_.gemm(g);
            }
        });
    }

    std::string kernel() const override { return kernel_name("sgemm") + " convolution"; }
    void share(Lasting& lasting) const override { lasting.insert(packed_.begin(), packed_.end()); }

private:
    void lay_out(const float* x, Int first, Int count, float* to) const {
        const Space& s = space_;
        const Int channels = groups_ * width_;
        for (Int p = first; p < first + count; ++p) {
            const Int at[3] = {p / (s.out[2] * s.out[1]) % s.out[0], p / s.out[2] % s.out[1], p % s.out[2]};
            const float* const image = x + p / (s.out[0] * s.out[1] * s.out[2]) * s.in[0] * s.in[1] * s.in[2] * channels;
            for (Int kz = 0; kz < s.kernel[0]; ++kz)
                for (Int ky = 0; ky < s.kernel[1]; ++ky) {
                    const Int z = s.source(0, at[0], kz), row = s.source(1, at[1], ky);
                    const bool is_row = s.is_inside(0, z) && s.is_inside(1, row);
                    for (Int kx = 0; kx < s.kernel[2]; ++kx, to += width_) {
                        const Int column = s.source(2, at[2], kx);
                        if (is_row && s.is_inside(2, column))
                            std::copy_n(image + ((z * s.in[1] + row) * s.in[2] + column) * channels, width_, to);
                        else
                            std::fill_n(to, width_, 0.0f);
                    }
                }
        }
    }

    ThreadPool& pool_;
    const FloatKernels& tile_ = kernels();
    Space space_;
    Place x_, y_, bias_;
    bool has_bias_ = false;
    Int groups_, width_, out_, k_;
    std::vector<std::shared_ptr<const PackedWeight>> packed_;
    Int block_ = 1, blocks_ = 0;
    Parts parts_;
};

// One channel in, one out: row by row of y, its middle at once and its edges pixel by pixel.
class FloatDepthwise final : public Step {
public:
    FloatDepthwise(ThreadPool& pool, const ConvGeometry& g, const Tensor& x, const Tensor& w, const Tensor* bias,
                   const Tensor& y)
        : pool_(pool), space_(g, x, w, y), x_(x.place), y_(y.place), channels_(w.dims[0]) {
        if (bias != nullptr) bias_ = bias->place, has_bias_ = true;
        const auto* from = reinterpret_cast<const float*>(w.place.get());
        weight_ = allocate_floats(channels_ * space_.taps);
        for (Int c = 0; c < channels_; ++c)
            for (Int t = 0; t < space_.taps; ++t) weight_.get()[t * channels_ + c] = from[c * space_.taps + t];
        const Space& s = space_;
        rows_ = s.out[2] == 0 ? 0 : s.pixels / s.out[2];
        parts_ = Parts(rows_, static_cast<Int>(2e4) / std::max<Int>(1, s.out[2] * channels_ * s.taps / 16), pool.size());
        // Positions in [first_, last_) of a row read no padding.
        while (first_ < s.out[2] && !s.is_inside(2, s.source(2, first_, 0))) ++first_;
        last_ = s.out[2];
        while (last_ > first_ && !s.is_inside(2, s.source(2, last_ - 1, s.kernel[2] - 1))) --last_;
    }

    void run() override {
        pool_.run(parts_.count, [this](Int part) {
            std::vector<Int> x_offsets, w_offsets;
            for (Int row = part * parts_.size, end = std::min(rows_, row + parts_.size); row < end; ++row) {
                Int at = 0;
                for (; at < first_; ++at) run_pixels(row, at, 1, x_offsets, w_offsets);
                if (last_ > first_) run_pixels(row, first_, last_ - first_, x_offsets, w_offsets);
                for (at = std::max(last_, first_); at < space_.out[2]; ++at) run_pixels(row, at, 1, x_offsets, w_offsets);
            }
        });
    }

    std::string kernel() const override { return kernel_name("sdepthwise"); }

private:
    void run_pixels(Int row, Int at, Int pixels, std::vector<Int>& x_offsets, std::vector<Int>& w_offsets) const {
        const Space& s = space_;
        const Int y1 = row % s.out[1], y0 = row / s.out[1] % s.out[0], image = row / s.out[1] / s.out[0];
        x_offsets.clear();
        w_offsets.clear();
        for (Int t = 0; t < s.taps; ++t) {
            const Int z = s.source(0, y0, t / (s.kernel[1] * s.kernel[2]));
            const Int line = s.source(1, y1, t / s.kernel[2] % s.kernel[1]), column = s.source(2, at, t % s.kernel[2]);
            if (!s.is_inside(0, z) || !s.is_inside(1, line) || !s.is_inside(2, column)) continue;
            x_offsets.push_back((((image * s.in[0] + z) * s.in[1] + line) * s.in[2] + column) * channels_);
            w_offsets.push_back(t * channels_);
        }
        DepthwiseRun r{};
        r.x = reinterpret_cast<const float*>(x_.get());
        r.x_step = s.stride[2] * channels_;
        r.w = weight_.get();
        r.x_offsets = x_offsets.data();
        r.w_offsets = w_offsets.data();
        r.taps = static_cast<Int>(x_offsets.size());
        r.bias = has_bias_ ? reinterpret_cast<const float*>(bias_.get()) : nullptr;
        r.y = reinterpret_cast<float*>(y_.get()) + (row * s.out[2] + at) * channels_;
        r.y_step = channels_;
        r.pixels = pixels;
        r.channels = channels_;
        kernels_.depthwise(r);
    }

    ThreadPool& pool_;
    const FloatKernels& kernels_ = kernels();
    Space space_;
    Place x_, y_, bias_;
    bool has_bias_ = false;
    Int channels_, rows_ = 0, first_ = 0, last_ = 0;
    Floats weight_;
    Parts parts_;
};

}  // namespace

StepPtr make_float_conv(ThreadPool& pool, const ConvGeometry& g, const Tensor& x, const Tensor& w, const Tensor* bias,
                        const Tensor& y) {
    for (const Tensor* t : {&x, &w, &y})
        if (t->dtype != DType::f32 || t->q) throw Unsupported("float convolution takes f32 tensors");
    if (bias != nullptr && (bias->dtype != DType::f32 || bias->q || (bias->dims[0] > 1 && bias->strides[0] != 1)))
        throw Unsupported("float convolution takes a dense f32 bias");
    if (w.dims[1] == 1 && g.groups == w.dims[0]) return std::make_unique<FloatDepthwise>(pool, g, x, w, bias, y);
    return std::make_unique<FloatConv>(pool, g, x, w, bias, y);
}

}  // namespace quantflow::host
