// Softmax and normalization.
#include "float_steps.hpp"

namespace quantflow::host {

using namespace floats;

namespace {

constexpr Int kElementsPerTask = 8192;

// Row by row: x is read as floats (dequantized into scratch memory if need be), y is written as floats or quantized
// from scratch memory. Floats may be written as codes, too.
class Rows : public Step {
public:
    void run() override {
        pool_.run(parts_.count, [this](Int part) {
            float* const memory = x_.is_plain() && y_.is_plain() ? nullptr : scratch(n_);
            for (Int i = part * parts_.size, end = std::min(walk_.count(), i + parts_.size); i < end; ++i) {
                const auto offset = walk_[i];
                const RealMatrix x = x_.at(offset[0]), y = y_.at(offset[1]);
                if (!x_.is_plain()) kernels_.load(x, 1, n_, memory, n_);
                const float* from = x_.is_plain() ? static_cast<const float*>(x.data) : memory;
                float* to = y_.is_plain() ? static_cast<float*>(y.data) : memory;
                compute(from, to);
                if (!y_.is_plain()) kernels_.store(memory, n_, 1, n_, y);
                if (codes_) kernels_.store(to, n_, 1, n_, codes_->at(offset[2]));
            }
        });
    }

protected:
    Rows(ThreadPool& pool, const Tensor& x, int axis, const Tensor& y, const Tensor* codes, const char* kernel)
        : kernels_(kernels()), n_(x.dims[static_cast<std::size_t>(axis)]), pool_(pool) {
        const auto a = static_cast<std::size_t>(axis);
        x_ = {x.place, real_of(x, kernel), 0, n_ > 1 ? x.strides[a] : 1};
        y_ = {y.place, real_of(y, kernel), 0, n_ > 1 ? y.strides[a] : 1};
        auto dims = x.dims, x_strides = x.strides, y_strides = y.strides;
        auto code_strides = codes != nullptr ? codes->strides : y.strides;
        if (codes != nullptr) codes_ = Operand{codes->place, real_of(*codes, kernel), 0, n_ > 1 ? codes->strides[a] : 1};
        for (auto* v : {&dims, &x_strides, &y_strides, &code_strides}) v->erase(v->begin() + axis);
        walk_ = Walk<3>(dims, {x_strides, y_strides, code_strides});
        if (x.count() > 0) parts_ = Parts(walk_.count(), kElementsPerTask / n_, pool.size());
    }
    // y may be x.
    virtual void compute(const float* x, float* y) const = 0;

    const FloatKernels& kernels_;
    Int n_;

private:
    ThreadPool& pool_;
    Operand x_, y_;
    std::optional<Operand> codes_;
    Walk<3> walk_;
    Parts parts_;
};

class SoftmaxRows final : public Rows {
public:
    SoftmaxRows(ThreadPool& pool, const Tensor& x, int axis, const Tensor& y) : Rows(pool, x, axis, y, nullptr, "softmax") {}
    std::string kernel() const override { return kernel_name("softmax"); }

private:
    void compute(const float* x, float* y) const override { kernels_.softmax_row(x, n_, y); }
};

class LayerNorm final : public Rows {
public:
    LayerNorm(ThreadPool& pool, const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps, bool is_rms,
              const Tensor& y, const Tensor* codes)
        : Rows(pool, x, x.rank() - 1, y, codes, "layer_norm"), eps_(eps), is_rms_(is_rms) {
        if (codes != nullptr && (y.q || !codes->q)) throw Unsupported("layer_norm gives codes beside an f32 y only");
        for (const Tensor* t : {gamma, beta})
            if (t != nullptr && (t->dtype != DType::f32 || t->q || !is_row_major(*t)))
                throw Unsupported("layer_norm takes dense f32 gamma and beta");
        if (gamma != nullptr) gamma_ = gamma->place;
        if (beta != nullptr) beta_ = beta->place;
    }
    std::string kernel() const override { return kernel_name(is_rms_ ? "rms_norm" : "layer_norm"); }

private:
    static const float* values(const std::optional<Place>& place) {
        return place ? reinterpret_cast<const float*>(place->get()) : nullptr;
    }
    void compute(const float* x, float* y) const override {
        kernels_.layer_norm_row(x, n_, values(gamma_), values(beta_), eps_, is_rms_, y);
    }

    std::optional<Place> gamma_, beta_;
    float eps_;
    bool is_rms_;
};

// Softmax along a dimension that is not dense, while another one is: 16 neighbours at a time.
class SoftmaxColumns final : public Step {
public:
    SoftmaxColumns(ThreadPool& pool, const Tensor& x, int axis, int dense, const Tensor& y) : pool_(pool) {
        const auto a = static_cast<std::size_t>(axis), d = static_cast<std::size_t>(dense);
        n_ = x.dims[a];
        columns_ = x.dims[d];
        x_ = {x.place, real_of(x, "softmax"), x.strides[a], x.strides[d]};
        y_ = {y.place, real_of(y, "softmax"), y.strides[a], y.strides[d]};
        auto dims = x.dims, x_strides = x.strides, y_strides = y.strides;
        for (auto* v : {&dims, &x_strides, &y_strides}) {
            v->erase(v->begin() + std::max(axis, dense));
            v->erase(v->begin() + std::min(axis, dense));
        }
        walk_ = Walk<2>(dims, {x_strides, y_strides});
        blocks_ = divide_up(columns_, kWidth);
        if (x.count() > 0) parts_ = Parts(walk_.count() * blocks_, kElementsPerTask / (n_ * kWidth), pool.size());
    }

    void run() override {
        pool_.run(parts_.count, [this](Int part) {
            float* const memory = scratch(n_ * kWidth);
            // Columns beyond the last one are computed too; any numbers do.
            std::fill_n(memory, n_ * kWidth, 0.0f);
            const Int total = walk_.count() * blocks_;
            for (Int i = part * parts_.size, end = std::min(total, i + parts_.size); i < end; ++i) {
                const auto offset = walk_[i / blocks_];
                const Int c = i % blocks_ * kWidth, columns = std::min(kWidth, columns_ - c);
                kernels_.load(x_.at(offset[0] + c * x_.column_stride), n_, columns, memory, kWidth);
                kernels_.softmax_columns(memory, n_);
                kernels_.store(memory, kWidth, n_, columns, y_.at(offset[1] + c * y_.column_stride));
            }
        });
    }

    std::string kernel() const override { return kernel_name("softmax") + " columns"; }

private:
    static constexpr Int kWidth = 16;

    ThreadPool& pool_;
    const FloatKernels& kernels_ = kernels();
    Operand x_, y_;
    Walk<2> walk_;
    Int n_ = 0, columns_ = 0, blocks_ = 0;
    Parts parts_;
};

}  // namespace

StepPtr make_softmax(ThreadPool& pool, const Tensor& x, int axis, const Tensor& y) {
    const auto a = static_cast<std::size_t>(axis);
    if (x.dims[a] > 1 && x.strides[a] != 1)
        for (int d = 0; d < x.rank(); ++d)
            if (d != axis && x.dims[static_cast<std::size_t>(d)] > 1 && x.strides[static_cast<std::size_t>(d)] == 1)
                return std::make_unique<SoftmaxColumns>(pool, x, axis, d, y);
    return std::make_unique<SoftmaxRows>(pool, x, axis, y);
}

StepPtr make_layer_norm(ThreadPool& pool, const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps,
                        bool is_rms, const Tensor& y, const Tensor* codes) {
    return std::make_unique<LayerNorm>(pool, x, gamma, beta, eps, is_rms, y, codes);
}

}  // namespace quantflow::host
