// All steps of a recurrent layer: a product of the state with its weight, then the cell, step after step.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.hpp"
#include "recurrence_isa.hpp"
#include "rounding.hpp"
#include "steps.hpp"

namespace quantflow::host {
namespace {

using i64 = std::int64_t;

// Samples are shared out between threads, which then wait for nobody, where each has enough of them to use what it reads
// of the weight, and the weight stays in the cache beside a core. Else threads share the product of every step.
constexpr i64 kLeastSamples = 4, kMostWeightBytes = i64{1} << 20;

const RecurrenceKernels& kernels() {
    switch (best_isa()) {
        case Isa::amx_int8:
        case Isa::avx512_vnni: return isa_avx512_vnni::recurrence_kernels;
        case Isa::avx_vnni:
        case Isa::avx2: return isa_avx2::recurrence_kernels;
        default: return isa_generic::recurrence_kernels;
    }
}

void (*kernel_of(Cell cell))(const CellStep&) {
    switch (cell) {
        case Cell::lstm: return kernels().lstm;
        case Cell::gru: return kernels().gru;
        case Cell::rnn_tanh: return kernels().rnn_tanh;
        default: return kernels().rnn_relu;
    }
}

// max(1, max |h|); NaN where h holds one.
float reach_of(const float* h, i64 hidden) {
    float reach = 1;
    bool is_number = true;
    for (i64 j = 0; j < hidden; ++j) {
        reach = std::max(reach, std::fabs(h[j]));
        is_number = is_number && h[j] == h[j];
    }
    return is_number ? reach : NAN;
}

// Samples [first, first + count).
class Samples {
public:
    Samples(ThreadPool& pool, const Recurrence& r, const RecurrenceTensors& t, i64 first, i64 count)
        : r_(r), t_(t), first_(first), count_(count), steps_(t.gates.dims[0]), batch_(t.gates.dims[1]),
          hidden_(t.y.dims[2]), width_(t.gates.dims[2]), advance_(kernel_of(r.cell)),
          reach_(static_cast<std::size_t>(count), 1.0f) {
        const auto part = [&](Tensor whole) {
            whole.place.offset += first * whole.strides[0] * size_of(whole.dtype);
            whole.dims[0] = count;
            return whole;
        };
        if (t.h0 == nullptr) zeros_.assign(static_cast<std::size_t>(count_ * hidden_), 0.0f);
        products_ = part(t.products);
        state_ = part(t.state);
        if (r.float_weight == nullptr) {
            codes_ = part(t.codes);
            product_ = make_linear(pool, r.weights, codes_, nullptr, Epilogue{}, products_);
        } else {
            Tensor before = state_;
            before.place = {&before_, 0};
            product_ = make_float_linear(pool, before, *r.float_weight, nullptr, products_);
        }
    }
    Samples(const Samples&) = delete;  // steps hold the address of `before_`
    Samples& operator=(const Samples&) = delete;

    void run() {
        begin();
        const auto* gates = t_.gates.data<const float>();
        auto* y = t_.y.data<float>();
        const float* before = first_state();
        for (i64 s = 0; s < steps_; ++s) {
            const i64 row = (r_.is_reverse ? steps_ - 1 - s : s) * batch_ + first_;
            before_ = reinterpret_cast<std::byte*>(const_cast<float*>(before));
            product_->run();
            for (i64 b = 0; b < count_; ++b) advance_(step(gates + (row + b) * width_, before, y + (row + b) * hidden_, b));
            before = y + row * hidden_;
        }
        if (r_.cell == Cell::lstm) std::memcpy(y + (steps_ * batch_ + first_) * hidden_, state_.data<float>(), bytes());
    }

    std::string kernel() const { return product_->kernel(); }
    void share(Lasting& lasting) const { product_->share(lasting); }

private:
    std::size_t bytes() const { return static_cast<std::size_t>(count_ * hidden_) * sizeof(float); }

    // h0, or zeros.
    const float* first_state() const {
        return t_.h0 == nullptr ? zeros_.data() : t_.h0->data<const float>() + first_ * hidden_;
    }

    void begin() {
        if (r_.cell == Cell::lstm) {
            auto* c = state_.data<float>();
            if (t_.c0 == nullptr)
                std::fill_n(c, count_ * hidden_, 0.0f);
            else
                std::memcpy(c, t_.c0->data<const float>() + first_ * hidden_, bytes());
        }
        if (r_.float_weight != nullptr) return;
        const float* h = first_state();
        for (i64 b = 0; b < count_; ++b) {
            float& reach = reach_[static_cast<std::size_t>(b)];
            reach = reach_of(h + b * hidden_, hidden_);
            kernels().code(h + b * hidden_, hidden_, 127.0f / reach, codes_.data<std::uint8_t>() + b * hidden_);
        }
    }

    CellStep step(const float* gates, const float* before, float* after, i64 b) const {
        CellStep s;
        s.gates = gates;
        s.products = products_.data<const float>() + b * width_;
        s.reach = reach_[static_cast<std::size_t>(b)];
        s.bias = r_.bias;
        s.before = before + b * hidden_;
        s.c = state_.data<float>() + b * hidden_;
        s.after = after;
        if (r_.float_weight == nullptr) s.codes = codes_.data<std::uint8_t>() + b * hidden_;
        s.steps = 127.0f / s.reach;
        s.hidden = hidden_;
        return s;
    }

    const Recurrence& r_;
    const RecurrenceTensors& t_;
    i64 first_, count_, steps_, batch_, hidden_, width_;
    void (*advance_)(const CellStep&);
    std::vector<float> reach_, zeros_;
    Tensor products_, state_, codes_;
    std::byte* before_ = nullptr;
    StepPtr product_;
};

class RecurrenceStep final : public Step {
public:
    RecurrenceStep(ThreadPool& pool, const Recurrence& r, const RecurrenceTensors& t) : pool_(pool), r_(r), t_(t) {
        if (r.float_weight != nullptr) {
            weight_ = *r.float_weight;
            r_.float_weight = &weight_;
        }
        keep(h0_, t_.h0);
        keep(c0_, t_.c0);
        const i64 batch = t.gates.dims[1], hidden = t.y.dims[2];
        const i64 weight_bytes = t.gates.dims[2] * hidden * (r.float_weight == nullptr ? 1 : 4);
        const i64 most = weight_bytes <= kMostWeightBytes ? std::min<i64>(pool.size(), batch / kLeastSamples) : 1;
        const i64 parts = std::max<i64>(most, 1);
        for (i64 i = 0; i < parts; ++i) {
            const i64 first = batch * i / parts;
            parts_.push_back(std::make_unique<Samples>(pool, r_, t_, first, batch * (i + 1) / parts - first));
        }
    }

    // With one part its products use the pool; with several, each runs on one thread, its products too.
    void run() override {
        pool_.run(static_cast<i64>(parts_.size()), [this](i64 i) { parts_[static_cast<std::size_t>(i)]->run(); });
    }

    std::string kernel() const override { return "host.recurrence of " + parts_[0]->kernel(); }
    void share(Lasting& lasting) const override { parts_[0]->share(lasting); }

private:
    static void keep(Tensor& own, const Tensor*& given) {
        if (given == nullptr) return;
        own = *given;
        given = &own;
    }

    ThreadPool& pool_;
    Recurrence r_;
    RecurrenceTensors t_;
    Tensor weight_, h0_, c0_;
    std::vector<std::unique_ptr<Samples>> parts_;
};

}  // namespace

StepPtr make_recurrence(ThreadPool& pool, const Recurrence& r, const RecurrenceTensors& t) {
    return std::make_unique<RecurrenceStep>(pool, r, t);
}

}  // namespace quantflow::host
