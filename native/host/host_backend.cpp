// The CPU, by kernels of our own: every call goes to the maker of that name.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "isa.hpp"
#include "memory.hpp"
#include "rates.hpp"
#include "steps.hpp"

namespace quantflow {
namespace {

constexpr double kStepCycles = 1000;  // of a step that one thread computes
// So many lose more than few by waiting for each other at every step, and by lines that move between their caches.
constexpr int kManyThreads = 8;
constexpr int kMostHelpers = 4;  // for which a part's steps are divided

class HostBackend final : public Backend {
public:
    explicit HostBackend(int threads) : pool_(threads) {}
    explicit HostBackend(ThreadPool::Helpers helpers) : pool_(helpers) {}

    std::string name() const override { return std::string("host.") + name_of(best_isa()); }
    bool stores_unsigned() const override { return true; }
    void* allocate(std::size_t bytes) override {
        const std::size_t alignment = bytes >= host::kHugePage / 2 ? host::kHugePage : 64;
        const std::size_t rounded = (bytes + 64 + alignment - 1) / alignment * alignment;
        void* memory = std::aligned_alloc(alignment, rounded);
        if (memory == nullptr) throw Error("out of memory: " + std::to_string(bytes) + " bytes for activations");
        if (alignment == host::kHugePage) host::prefer_huge_pages(memory, rounded);
        return memory;
    }
    void release(void* memory) override { std::free(memory); }
    void copy(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
    bool reads_process_memory() const override { return true; }
    bool takes_terms() const override { return true; }
    void wait() override {}
    void during(const std::function<void()>& body) override { pool_.during(body); }
    std::optional<Nearness> nearness() const override {
        const host::int8::Rates rates = host::int8::rates_of(*host::int8_kernels_in_use());
        Nearness n;
        n.threads = pool_.size();
        if (has_helpers()) {
            n.least_samples = 1;
            n.waiting = rates.waiting;
        }
        n.cache_bytes = host::int8::caches().l2;
        n.far_byte_ns = rates.fetching_far / rates.ghz;
        n.hand_over_ns = pool_.size() > 1 ? rates.hand_over / rates.ghz : kStepCycles / rates.ghz;
        n.step_ns = kStepCycles / rates.ghz;
        n.last_task = rates.last_task();
        return n;
    }
    Backend& alone() override {
        if (pool_.size() == 1) return *this;
        if (!alone_) alone_ = std::make_unique<HostBackend>(ThreadPool::Helpers{has_helpers() ? kMostHelpers : 1});
        return *alone_;
    }
    void spread(std::int64_t count, const std::function<void(std::int64_t)>& task) override {
        has_helpers() ? pool_.run_helped(count, task) : pool_.run(count, task);
    }
    void share_out(std::int64_t count, const std::function<void(std::int64_t)>& task) override {
        pool_.run(count, task);
    }

    std::unique_ptr<Step> linear(const Weights& w, const Tensor& x, const Tensor* residual, const Epilogue& e,
                                 const Tensor& y, const Terms& terms) override {
        return of_samples(decided([&] { return host::make_linear(pool_, w, x, residual, e, y, terms); }),
                          with_terms({&x, residual, &y}, terms), x.rank() > 1);
    }
    std::unique_ptr<Step> conv(const Weights& w, const ConvGeometry& g, const Tensor& x, const Tensor* residual,
                               const Epilogue& e, const Tensor& y, const Terms& terms) override {
        return of_samples(decided([&] { return host::make_conv(pool_, w, g, x, residual, e, y, terms); }),
                          with_terms({&x, residual, &y}, terms));
    }
    std::unique_ptr<Step> matmul(const Tensor& a, const Tensor& b, const Tensor& y) override {
        if (!a.q) return host::make_float_matmul(pool_, a, b, y);
        return of_samples(decided([&] { return host::make_int8_matmul(pool_, a, b, y); }), {&a, &b, &y}, y.rank() > 2);
    }
    std::unique_ptr<Step> float_linear(const Tensor& x, const Tensor& w, const Tensor* bias,
                                       const Tensor& y) override {
        return host::make_float_linear(pool_, x, w, bias, y);
    }
    std::unique_ptr<Step> float_conv(const ConvGeometry& g, const Tensor& x, const Tensor& w, const Tensor* bias,
                                     const Tensor& y) override {
        return host::make_float_conv(pool_, g, x, w, bias, y);
    }
    std::unique_ptr<Step> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask, bool causal,
                                    float scale, const Tensor& y) override {
        return of_samples(host::make_attention(pool_, q, k, v, mask, causal, scale, y), {&q, &k, &v, mask, &y},
                          y.rank() > 2);
    }
    std::unique_ptr<Step> copy(const Tensor& x, const Tensor& y) override {
        return of_samples(host::make_copy(pool_, x, y), {&x, &y});
    }
    std::unique_ptr<Step> fill(double value, const Tensor& y) override {
        return of_samples(host::make_fill(pool_, value, y), {&y});
    }
    std::unique_ptr<Step> binary(Binary op, const Tensor& a, const Tensor& b, const Epilogue& e,
                                 const Tensor& y) override {
        return of_samples(host::make_binary(pool_, op, a, b, e, y), {&a, &b, &y});
    }
    std::unique_ptr<Step> unary(Unary op, float a, float b, const Epilogue& e, const Tensor& x,
                                const Tensor& y) override {
        return of_samples(host::make_unary(pool_, op, a, b, e, x, y), {&x, &y});
    }
    std::unique_ptr<Step> where(const Tensor& c, const Tensor& a, const Tensor& b, const Tensor& y) override {
        return of_samples(host::make_where(pool_, c, a, b, y), {&c, &a, &b, &y});
    }
    std::unique_ptr<Step> channel_affine(const Tensor& x, int axis, const Tensor& scale, const Tensor& shift,
                                         const Epilogue& e, const Tensor& y) override {
        return of_samples(host::make_channel_affine(pool_, x, axis, scale, shift, e, y), {&x, &y}, axis > 0);
    }
    std::unique_ptr<Step> pool(const PoolGeometry& g, const Tensor& x, const Tensor& y) override {
        return of_samples(host::make_pool(pool_, g, x, y), {&x, &y});
    }
    std::unique_ptr<Step> recurrence(const Recurrence& r, const RecurrenceTensors& t) override {
        return host::make_recurrence(pool_, r, t);
    }
    std::unique_ptr<Step> reduce(Reduction r, const Tensor& x, const std::vector<int>& axes,
                                 const Tensor& y) override {
        return of_samples(host::make_reduce(pool_, r, x, axes, y), {&x, &y},
                          std::find(axes.begin(), axes.end(), 0) == axes.end());
    }
    std::unique_ptr<Step> softmax(const Tensor& x, int axis, const Tensor& y) override {
        return of_samples(host::make_softmax(pool_, x, axis, y), {&x, &y}, axis > 0);
    }
    std::unique_ptr<Step> layer_norm(const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps, bool is_rms,
                                     const Tensor& y, const Tensor* codes) override {
        return of_samples(host::make_layer_norm(pool_, x, gamma, beta, eps, is_rms, y, codes), {&x, &y, codes},
                          x.rank() > 1);
    }
    std::unique_ptr<Step> group_norm(const Tensor& x, std::int64_t groups, const Tensor* gamma, const Tensor* beta,
                                     float eps, const Epilogue& e, const Tensor& y) override {
        return of_samples(host::make_group_norm(pool_, x, groups, gamma, beta, eps, e, y), {&x, &y});
    }
    std::unique_ptr<Step> gather(const Tensor& table, const Tensor& index, const Tensor& y) override {
        return of_samples(host::make_gather(pool_, table, index, y), {&index, &y}, index.rank() > 0);
    }
    std::unique_ptr<Step> upsample(Interpolation how, bool align, const std::vector<double>& scales, const Tensor& x,
                                   const Tensor& y) override {
        return of_samples(host::make_upsample(pool_, how, align, scales, x, y), {&x, &y});
    }
    std::unique_ptr<Step> index(const Tensor& x, const std::vector<std::optional<Tensor>>& indices,
                                const Tensor& y) override {
        return host::make_index(pool_, x, indices, y);
    }
    std::unique_ptr<Step> running_sum(const Tensor& x, int axis, const Tensor& y) override {
        return of_samples(host::make_running_sum(pool_, x, axis, y), {&x, &y}, axis > 0);
    }

private:
    template <typename Make>
    static std::unique_ptr<Step> decided(const Make& make) {
        take_decision();
        std::unique_ptr<Step> step = make();
        step->decision = take_decision();
        return step;
    }

    using Operands = std::vector<const Tensor*>;
    static Operands with_terms(Operands operands, const Terms& terms) {
        for (const Product& p : terms.products) operands.push_back(&p.x);
        operands.push_back(terms.rest);
        return operands;
    }
    // See Step::samples; null is no operand. Not for products of floats, which sum few rows otherwise than many.
    static std::unique_ptr<Step> of_samples(std::unique_ptr<Step> step, const Operands& operands, bool holds = true) {
        for (const Tensor* t : operands)
            if (holds && t != nullptr) step->samples.push_back(*t);
        return step;
    }

    bool has_helpers() const { return pool_.size() >= kManyThreads; }

    ThreadPool pool_;
    std::unique_ptr<HostBackend> alone_;
};

}  // namespace

std::unique_ptr<Backend> make_host_backend(int threads) { return std::make_unique<HostBackend>(threads); }

}  // namespace quantflow
