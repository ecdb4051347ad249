// The CPU, by kernels of our own: every call goes to the maker of that name.
#include <cstdlib>
#include <cstring>

#include "isa.hpp"
#include "memory.hpp"
#include "steps.hpp"

namespace quantflow {
namespace {

class HostBackend final : public Backend {
public:
    explicit HostBackend(int threads) : pool_(threads) {}

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

    std::unique_ptr<Step> linear(const Weights& w, const Tensor& x, const Tensor* residual, const Epilogue& e,
                                 const Tensor& y, const Terms& terms) override {
        return decided([&] { return host::make_linear(pool_, w, x, residual, e, y, terms); });
    }
    std::unique_ptr<Step> conv(const Weights& w, const ConvGeometry& g, const Tensor& x, const Tensor* residual,
                               const Epilogue& e, const Tensor& y, const Terms& terms) override {
        return decided([&] { return host::make_conv(pool_, w, g, x, residual, e, y, terms); });
    }
    std::unique_ptr<Step> matmul(const Tensor& a, const Tensor& b, const Tensor& y) override {
        return a.q ? decided([&] { return host::make_int8_matmul(pool_, a, b, y); })
                   : host::make_float_matmul(pool_, a, b, y);
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
        return host::make_attention(pool_, q, k, v, mask, causal, scale, y);
    }
    std::unique_ptr<Step> copy(const Tensor& x, const Tensor& y) override { return host::make_copy(pool_, x, y); }
    std::unique_ptr<Step> fill(double value, const Tensor& y) override { return host::make_fill(pool_, value, y); }
    std::unique_ptr<Step> binary(Binary op, const Tensor& a, const Tensor& b, const Epilogue& e,
                                 const Tensor& y) override {
        return host::make_binary(pool_, op, a, b, e, y);
    }
    std::unique_ptr<Step> unary(Unary op, float a, float b, const Epilogue& e, const Tensor& x,
                                const Tensor& y) override {
        return host::make_unary(pool_, op, a, b, e, x, y);
    }
    std::unique_ptr<Step> where(const Tensor& c, const Tensor& a, const Tensor& b, const Tensor& y) override {
        return host::make_where(pool_, c, a, b, y);
    }
    std::unique_ptr<Step> channel_affine(const Tensor& x, int axis, const Tensor& scale, const Tensor& shift,
                                         const Epilogue& e, const Tensor& y) override {
        return host::make_channel_affine(pool_, x, axis, scale, shift, e, y);
    }
    std::unique_ptr<Step> pool(const PoolGeometry& g, const Tensor& x, const Tensor& y) override {
        return host::make_pool(pool_, g, x, y);
    }
    std::unique_ptr<Step> recurrence(const Recurrence& r, const RecurrenceTensors& t) override {
        return host::make_recurrence(pool_, r, t);
    }
    std::unique_ptr<Step> reduce(Reduction r, const Tensor& x, const std::vector<int>& axes,
                                 const Tensor& y) override {
        return host::make_reduce(pool_, r, x, axes, y);
    }
    std::unique_ptr<Step> softmax(const Tensor& x, int axis, const Tensor& y) override {
        return host::make_softmax(pool_, x, axis, y);
    }
    std::unique_ptr<Step> layer_norm(const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps, bool is_rms,
                                     const Tensor& y, const Tensor* codes) override {
        return host::make_layer_norm(pool_, x, gamma, beta, eps, is_rms, y, codes);
    }
    std::unique_ptr<Step> group_norm(const Tensor& x, std::int64_t groups, const Tensor* gamma, const Tensor* beta,
                                     float eps, const Epilogue& e, const Tensor& y) override {
        return host::make_group_norm(pool_, x, groups, gamma, beta, eps, e, y);
    }
    std::unique_ptr<Step> gather(const Tensor& table, const Tensor& index, const Tensor& y) override {
        return host::make_gather(pool_, table, index, y);
    }
    std::unique_ptr<Step> upsample(Interpolation how, bool align, const std::vector<double>& scales, const Tensor& x,
                                   const Tensor& y) override {
        return host::make_upsample(pool_, how, align, scales, x, y);
    }
    std::unique_ptr<Step> index(const Tensor& x, const std::vector<std::optional<Tensor>>& indices,
                                const Tensor& y) override {
        return host::make_index(pool_, x, indices, y);
    }
    std::unique_ptr<Step> running_sum(const Tensor& x, int axis, const Tensor& y) override {
        return host::make_running_sum(pool_, x, axis, y);
    }

private:
    template <typename Make>
    static std::unique_ptr<Step> decided(const Make& make) {
        take_decision();
        std::unique_ptr<Step> step = make();
        step->decision = take_decision();
        return step;
    }

    ThreadPool pool_;
};

}  // namespace

std::unique_ptr<Backend> make_host_backend(int threads) { return std::make_unique<HostBackend>(threads); }

}  // namespace quantflow
