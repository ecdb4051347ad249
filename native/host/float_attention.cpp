// Attention: softmax(scale * q @ k.T + mask) @ v.
#include <atomic>

#include "float_steps.hpp"

namespace quantflow::host {

using namespace floats;

namespace {

class Attention final : public Step {
public:
    Attention(ThreadPool& pool, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask, bool is_causal,
              float scale, const Tensor& y)
        : pool_(pool), q_(operand(q)), k_(operand(k)), v_(operand(v)), y_(operand(y)) {
        const std::size_t batch = q.dims.size() - 2;
        head_.l = q.dims[batch];
        head_.e = q.dims[batch + 1];
        head_.s = k.dims[batch];
        head_.f = v.dims[batch + 1];
        head_.is_causal = is_causal;
        head_.scale = scale;
        if (mask != nullptr) {
            if (mask->q || (mask->dtype != DType::f32 && mask->dtype != DType::b8))
                throw Unsupported(std::string("attention takes no mask of ") + name_of(mask->dtype));
            head_.mask_kind = mask->dtype == DType::f32 ? Mask::f32 : Mask::b8;
            head_.mask_row_stride = head_.l > 1 ? mask->strides[batch] : 0;
            head_.mask_column_stride = mask->strides[batch + 1];
            mask_ = mask->place;
        }
        const auto outer = [batch](const Tensor& t) {
            return std::vector<Int>(t.strides.begin(), t.strides.begin() + static_cast<std::ptrdiff_t>(batch));
        };
        heads_ = Walk<5>({q.dims.begin(), q.dims.begin() + static_cast<std::ptrdiff_t>(batch)},
                         {outer(q), outer(k), outer(v), outer(y), mask ? outer(*mask) : std::vector<Int>(batch)});
        if (y.count() == 0) return;
        // Every task packs the keys and values of its head, so a head is cut only where there are too few of them.
        const Int heads = heads_.count(), threads = pool.size();
        const Int enough = threads == 1 ? 1 : divide_up(2 * threads, heads);
        const Int few_rows = Int{4} * kernels_.tile_rows, many_rows = 480;
        const Int chunks = std::max(std::min(enough, divide_up(head_.l, few_rows)), divide_up(head_.l, many_rows));
        chunk_ = round_up(divide_up(head_.l, chunks), kernels_.attention_rows);
        chunks_ = divide_up(head_.l, chunk_);
    }

    void run() override {
        static std::atomic<std::uint64_t> runs{0};
        pool_.run(heads_.count() * chunks_, [this, run = ++runs](Int task) {
            const auto offset = heads_[task / chunks_];
            AttentionHead h = head_;
            h.q = q_.at(offset[0]);
            h.k = k_.at(offset[1]);
            h.v = v_.at(offset[2]);
            h.y = y_.at(offset[3]);
            if (h.mask_kind != Mask::none) h.mask = mask_.get() + offset[4] * (h.mask_kind == Mask::f32 ? 4 : 1);
            if (chunks_ == 1 && task + 1 < heads_.count()) {
                const auto next = heads_[task + 1];
                h.next_q = q_.at(next[0]).data;
                h.next_k = k_.at(next[1]).data;
                h.next_v = v_.at(next[2]).data;
            }
            const Int begin = task % chunks_ * chunk_, end = std::min(h.l, begin + chunk_);
            if (hides_nothing(h, begin, end, run)) h.mask_kind = Mask::none;
            kernels_.attention(h, begin, end, scratch(kernels_.attention_scratch(h, end - begin)));
        });
    }

    std::string kernel() const override { return kernel_name("attention"); }

private:
    // Masks that hide nothing are common, and heads share theirs: each thread looks at it once.
    bool hides_nothing(const AttentionHead& h, Int begin, Int end, std::uint64_t run) const {
        struct Seen {
            std::uint64_t run = 0;
            const void* mask = nullptr;
            Int begin = 0;
            bool is_neutral = false;
        };
        thread_local Seen seen;
        if (seen.run != run || seen.mask != h.mask || seen.begin != begin)
            seen = {run, h.mask, begin, kernels_.mask_is_neutral(h, begin, end)};
        return seen.is_neutral;
    }

    static Operand operand(const Tensor& t) {
        const std::size_t r = t.dims.size();
        return {t.place, real_of(t, "attention"), t.strides[r - 2], t.dims[r - 1] > 1 ? t.strides[r - 1] : 1};
    }

    ThreadPool& pool_;
    const FloatKernels& kernels_ = kernels();
    Operand q_, k_, v_, y_;
    Place mask_;
    AttentionHead head_;
    Walk<5> heads_;
    Int chunk_ = 1, chunks_ = 0;
};

}  // namespace

StepPtr make_attention(ThreadPool& pool, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask,
                       bool causal, float scale, const Tensor& y) {
    return std::make_unique<Attention>(pool, q, k, v, mask, causal, scale, y);
}

}  // namespace quantflow::host
