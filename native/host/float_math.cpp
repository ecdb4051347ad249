// Float kernels of the host backend: matrix products, attention, softmax, normalization. Here: which part of which
// tensor each task works on. The arithmetic is in float_math_isa.cpp.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <tuple>

#include "float_math_isa.hpp"
#include "isa.hpp"
#include "steps.hpp"

namespace quantflow::host {
namespace {

using Int = std::int64_t;

const FloatKernels& kernels() {
    switch (best_isa()) {
        case Isa::amx_int8:
        case Isa::avx512_vnni: return isa_avx512_vnni::float_kernels();
        case Isa::avx_vnni: return isa_avx_vnni::float_kernels();
        case Isa::avx2: return isa_avx2::float_kernels();
        default: return isa_generic::float_kernels();
    }
}

std::string kernel_name(const char* kernel) { return std::string("host.") + kernel + "." + name_of(best_isa()); }

Int ceil_div(Int n, Int d) { return (n + d - 1) / d; }
Int round_up(Int n, Int step) { return ceil_div(n, step) * step; }

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate_floats(Int count) {
    void* memory = std::aligned_alloc(64, static_cast<std::size_t>(round_up(std::max<Int>(count, 1) * 4, 64)));
    if (memory == nullptr) throw std::bad_alloc();
    return Floats(static_cast<float*>(memory));
}

// Memory of this thread, shared by all steps: valid until the next call.
float* scratch(Int floats) {
    thread_local Floats memory;
    thread_local Int size = 0;
    if (floats > size) {
        memory.reset();
        size = 0;
        memory = allocate_floats(floats);
        size = floats;
    }
    return memory.get();
}

Real real_of(const Tensor& t, const char* kernel) {
    Real real;
    if (!t.q) {
        if (t.dtype != DType::f32) throw Unsupported(std::string(kernel) + " takes no " + name_of(t.dtype));
        return real;
    }
    if (t.dtype != DType::u8 && t.dtype != DType::s8)
        throw Unsupported(std::string(kernel) + " takes no codes of " + name_of(t.dtype));
    real.coding = t.dtype == DType::u8 ? Coding::u8 : Coding::s8;
    real.scale = t.q->scale;
    real.inverse = 1.0f / t.q->scale;
    real.zero_point = static_cast<float>(t.q->zero_point);
    real.lowest = static_cast<float>(t.q->qmin - t.q->zero_point);
    real.highest = static_cast<float>(t.q->qmax - t.q->zero_point);
    return real;
}

// A tensor as the kernels see it: rows and columns along two of its dimensions.
struct Operand {
    Place place;
    Real real;
    Int row_stride = 0, column_stride = 1;

    RealMatrix at(Int element) const {
        return {place.get() + element * real.bytes(), row_stride, column_stride, real};
    }
    // Whether a row is an array of floats.
    bool is_plain() const { return real.coding == Coding::f32 && column_stride == 1; }
};

// All positions of some dimensions, with the offset of each in N tensors. Dimensions that lie densely in all of them
// are joined, and those of size 1 left out.
template <std::size_t N>
class Walk {
public:
    Walk() = default;
    Walk(const std::vector<Int>& dims, const std::array<std::vector<Int>, N>& strides) {
        for (std::size_t i = 0; i < dims.size(); ++i) {
            count_ *= dims[i];
            if (dims[i] == 1) continue;
            Dimension d{dims[i], {}};
            for (std::size_t t = 0; t < N; ++t) d.stride[t] = strides[t][i];
            const auto joins = [&](const Dimension& outer) {
                for (std::size_t t = 0; t < N; ++t)
                    if (outer.stride[t] != d.size * d.stride[t]) return false;
                return true;
            };
            if (!dims_.empty() && joins(dims_.back()))
                dims_.back() = {dims_.back().size * d.size, d.stride};
            else
                dims_.push_back(d);
        }
    }

    struct Dimension {
        Int size;
        std::array<Int, N> stride;
    };

    Int count() const { return count_; }
    const Dimension* innermost() const { return dims_.empty() ? nullptr : &dims_.back(); }
    void drop_innermost() {
        dims_.pop_back();
        count_ = 1;
        for (const Dimension& d : dims_) count_ *= d.size;
    }
    std::array<Int, N> operator[](Int index) const {
        std::array<Int, N> offset{};
        for (std::size_t i = dims_.size(); i-- > 0;) {
            const Dimension& d = dims_[i];
            const Int at = i == 0 ? index : index % d.size;
            index /= d.size;
            for (std::size_t t = 0; t < N; ++t) offset[t] += at * d.stride[t];
        }
        return offset;
    }

private:
    std::vector<Dimension> dims_;
    Int count_ = 1;
};

// `count` positions in parts of about `size`, but enough of them to keep `threads` busy if there is work for it.
struct Parts {
    Int count = 0, size = 1;
    Parts() = default;
    Parts(Int total, Int wanted_size, int threads)
        : size(std::max<Int>(1, std::max(wanted_size, threads == 1 ? total : ceil_div(total, Int{8} * threads)))) {
        count = ceil_div(total, size);
    }
};

// Matrix products ----------------------------------------------------------------------------------------------

constexpr Int kRowBlock = 192;  // rows of A that stay in the second level cache while panels of B pass by

struct PackedWeight {
    Floats panels;
};

// One packed form of one weight, however many programs and steps use it. The hash of its values guards against a
// weight that was freed and another one put in its place while its packed form is still held.
// `owner`: the weight's own memory, of which `b` is this form.
std::shared_ptr<const PackedWeight> packed_weight(const void* owner, const RealMatrix& b, Int k, Int n) {
    using Key = std::tuple<const void*, Int, Int, Int, Int, std::uint64_t>;
    static std::mutex mutex;
    static std::map<Key, std::weak_ptr<const PackedWeight>> known;

    std::uint64_t hash = 14695981039346656037u;  // FNV-1a over words
    for (Int j = 0; j < n; ++j)
        for (Int i = 0; i < k; ++i) {
            std::uint32_t word;
            std::memcpy(&word, static_cast<const float*>(b.data) + i * b.row_stride + j * b.column_stride, 4);
            hash = (hash ^ word) * 1099511628211u;
        }
    std::lock_guard<std::mutex> lock(mutex);
    const Key key(owner, k, n, b.row_stride, b.column_stride, hash);
    if (auto found = known[key].lock()) return found;
    const FloatKernels& f = kernels();
    auto packed = std::make_shared<PackedWeight>();
    packed->panels = allocate_floats(k * round_up(n, f.tile_columns));
    f.pack(b, k, n, packed->panels.get());
    for (auto i = known.begin(); i != known.end();) i = i->second.expired() ? known.erase(i) : std::next(i);
    known[key] = packed;
    return packed;
}

// y = alpha * a @ b + bias, for every position of a walk over batches.
class Gemm final : public Step {
public:
    // `walk`: the offsets in a, b and y of every row of a. Where b stays the same along the innermost dimension,
    // those rows are multiplied together.
    Gemm(ThreadPool& pool, const Operand& a, const Operand& b, const Operand& y, Walk<3> walk, Int k, Int n,
         float alpha, const Tensor* bias, bool is_b_constant)
        : pool_(pool), a_(a), b_(b), y_(y), k_(k), n_(n), alpha_(alpha) {
        if (bias != nullptr) {
            if (bias->dtype != DType::f32 || bias->q || (n > 1 && bias->strides[0] != 1))
                throw Unsupported("float linear takes a dense f32 bias");
            bias_ = bias->place;
            has_bias_ = true;
        }
        rows_ = 1;
        if (walk.count() == 0 || n == 0) return;
        if (const auto* inner = walk.innermost(); inner != nullptr && inner->stride[1] == 0) {
            rows_ = inner->size;
            a_.row_stride = inner->stride[0];
            y_.row_stride = inner->stride[2];
            walk.drop_innermost();
        }
        batches_ = walk;
        if (is_b_constant) packed_ = packed_weight(b_.at(0).data, b_.at(0), k, n);
        plan();
    }

    void run() override {
        pool_.run(parts_.count, [this](Int part) {
            for (Int i = part * parts_.size, end = std::min(units_, i + parts_.size); i < end; ++i) run_unit(i);
        });
    }

    std::string kernel() const override {
        const FloatKernels& f = kernels();
        return kernel_name("sgemm") + " " + std::to_string(f.tile_rows) + "x" + std::to_string(f.tile_columns);
    }

private:
    // A unit: one batch, a block of rows, a block of panels.
    void plan() {
        const int threads = pool_.size();
        const Int panels = ceil_div(n_, tile_.tile_columns), batches = batches_.count();
        const double work = 1.0 * batches * rows_ * n_ * std::max<Int>(k_, 1);
        const Int wanted = threads == 1 || work < 2e5 ? 1 : Int{4} * threads;
        Int row_blocks = 1, panel_blocks = 1;
        if (packed_ != nullptr) {
            row_blocks = ceil_div(rows_, kRowBlock);
            panel_blocks = std::min(ceil_div(wanted, batches * row_blocks), std::max<Int>(1, panels / 4));
        } else {
            // B is packed anew by every unit, so units share no part of it if they can help it; what one packs
            // should stay in cache.
            constexpr Int most_packed = Int{1} << 18;
            panel_blocks = std::min(ceil_div(wanted, batches), std::max<Int>(1, panels / 4));
            panel_blocks = std::max(panel_blocks, std::min(panels, panels * tile_.tile_columns * k_ / most_packed));
        }
        if (batches * row_blocks * panel_blocks < wanted)
            row_blocks = std::max(row_blocks, std::min(ceil_div(wanted, batches * panel_blocks),
                                                       ceil_div(rows_, Int{4} * tile_.tile_rows)));
        row_block_ = round_up(ceil_div(rows_, row_blocks), tile_.tile_rows);
        panel_block_ = ceil_div(panels, panel_blocks);
        row_blocks_ = ceil_div(rows_, row_block_);
        panel_blocks_ = ceil_div(panels, panel_block_);
        units_ = batches * row_blocks_ * panel_blocks_;
        parts_ = Parts(units_, static_cast<Int>(1e5 / (work / static_cast<double>(units_))), threads);
        if (wanted == 1) parts_ = Parts(units_, units_, 1);
    }

    void run_unit(Int unit) const {
        const Int panel_block = unit % panel_blocks_;
        const Int row_block = unit / panel_blocks_ % row_blocks_;
        const auto offset = batches_[unit / panel_blocks_ / row_blocks_];
        const Int width = tile_.tile_columns;
        const Int n0 = panel_block * panel_block_ * width, n = std::min(panel_block_ * width, n_ - n0);
        const Int m0 = row_block * row_block_, m = std::min(row_block_, rows_ - m0);
        const Int block = block_of(m);
        const bool copies_a = !a_.is_plain(), copies_c = !y_.is_plain();
        // Few rows don't pay for packing: dense rows of B serve as they are, but for a last panel that is not full.
        const bool packs_b = packed_ == nullptr;
        const bool is_b_direct = packs_b && b_.is_plain() && m <= 2 * tile_.tile_rows;
        const Int direct = is_b_direct ? n / width * width : 0;

        const Int b_floats = packs_b ? round_up(n - direct, width) * k_ : 0;
        const Int a_floats = copies_a ? round_up(block * k_, 16) : 0;
        float* const b_scratch = scratch(b_floats + a_floats + (copies_c ? block * n : 0));
        float* const a_scratch = b_scratch + b_floats;
        float* const c_scratch = a_scratch + a_floats;

        const RealMatrix b = b_.at(offset[1] + n0 * b_.column_stride);
        if (packs_b && direct < n) {
            RealMatrix rest = b;
            rest.data = static_cast<std::byte*>(b.data) + direct * b_.column_stride * b_.real.bytes();
            tile_.pack(rest, k_, n - direct, b_scratch);
        }
        for (Int i = m0; i < m0 + m; i += block) {
            GemmBlock g{};
            g.m = std::min(block, m0 + m - i);
            g.k = k_;
            g.alpha = alpha_;
            const RealMatrix a = a_.at(offset[0] + i * a_.row_stride);
            if (copies_a) tile_.load(a, g.m, k_, a_scratch, k_);
            g.a = copies_a ? a_scratch : static_cast<const float*>(a.data);
            g.a_stride = copies_a ? k_ : a_.row_stride;
            const RealMatrix y = y_.at(offset[2] + i * y_.row_stride + n0 * y_.column_stride);
            g.c = copies_c ? c_scratch : static_cast<float*>(y.data);
            g.c_stride = copies_c ? n : y_.row_stride;
            g.bias = has_bias_ ? reinterpret_cast<const float*>(bias_.get()) + n0 : nullptr;
            if (direct > 0) {
                g.n = direct;
                g.b = static_cast<const float*>(b.data);
                g.b_stride = b_.row_stride;
                g.panel_stride = width;
                tile_.gemm(g);
                g.c += direct;
                if (g.bias != nullptr) g.bias += direct;
            }
            if (direct < n) {
                g.n = n - direct;
                g.b = packs_b ? b_scratch : packed_->panels.get() + n0 * k_;
                g.b_stride = width;
                g.panel_stride = width * k_;
                tile_.gemm(g);
            }
            if (copies_c) tile_.store(c_scratch, n, g.m, n, y);
        }
    }

    // m rows in equal blocks, so that none is left with only a few.
    Int block_of(Int m) const {
        const Int most = a_.is_plain() ? kRowBlock : std::clamp<Int>(65536 / std::max<Int>(k_, 1), 1, kRowBlock);
        return round_up(ceil_div(m, ceil_div(m, most)), tile_.tile_rows);
    }

    ThreadPool& pool_;
    const FloatKernels& tile_ = kernels();
    Operand a_, b_, y_;
    Walk<3> batches_;
    Int rows_ = 0, k_, n_;
    float alpha_;
    Place bias_;
    bool has_bias_ = false;
    std::shared_ptr<const PackedWeight> packed_;
    Int row_block_ = 1, panel_block_ = 1, row_blocks_ = 0, panel_blocks_ = 0, units_ = 0;
    Parts parts_;
};

// Attention ----------------------------------------------------------------------------------------------------

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
        const Int enough = threads == 1 ? 1 : ceil_div(2 * threads, heads);
        const Int few_rows = Int{4} * kernels_.tile_rows, many_rows = 480;
        const Int chunks = std::max(std::min(enough, ceil_div(head_.l, few_rows)), ceil_div(head_.l, many_rows));
        chunk_ = round_up(ceil_div(head_.l, chunks), kernels_.tile_rows);
        chunks_ = ceil_div(head_.l, chunk_);
    }

    void run() override {
        pool_.run(heads_.count() * chunks_, [this](Int task) {
            const auto offset = heads_[task / chunks_];
            AttentionHead h = head_;
            h.q = q_.at(offset[0]);
            h.k = k_.at(offset[1]);
            h.v = v_.at(offset[2]);
            h.y = y_.at(offset[3]);
            if (h.mask_kind != Mask::none) h.mask = mask_.get() + offset[4] * (h.mask_kind == Mask::f32 ? 4 : 1);
            const Int begin = task % chunks_ * chunk_, end = std::min(h.l, begin + chunk_);
            kernels_.attention(h, begin, end, scratch(kernels_.attention_scratch(h, end - begin)));
        });
    }

    std::string kernel() const override { return kernel_name("attention"); }

private:
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

// Softmax and normalization ------------------------------------------------------------------------------------

constexpr Int kElementsPerTask = 8192;

// Row by row: x is read as floats (dequantized into scratch memory if need be), y is written as floats or quantized
// from scratch memory.
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
            }
        });
    }

protected:
    Rows(ThreadPool& pool, const Tensor& x, int axis, const Tensor& y, const char* kernel)
        : kernels_(kernels()), n_(x.dims[static_cast<std::size_t>(axis)]), pool_(pool) {
        const auto a = static_cast<std::size_t>(axis);
        x_ = {x.place, real_of(x, kernel), 0, n_ > 1 ? x.strides[a] : 1};
        y_ = {y.place, real_of(y, kernel), 0, n_ > 1 ? y.strides[a] : 1};
        auto dims = x.dims, x_strides = x.strides, y_strides = y.strides;
        for (auto* v : {&dims, &x_strides, &y_strides}) v->erase(v->begin() + axis);
        walk_ = Walk<2>(dims, {x_strides, y_strides});
        if (x.count() > 0) parts_ = Parts(walk_.count(), kElementsPerTask / n_, pool.size());
    }
    // y may be x.
    virtual void compute(const float* x, float* y) const = 0;

    const FloatKernels& kernels_;
    Int n_;

private:
    ThreadPool& pool_;
    Operand x_, y_;
    Walk<2> walk_;
    Parts parts_;
};

class SoftmaxRows final : public Rows {
public:
    SoftmaxRows(ThreadPool& pool, const Tensor& x, int axis, const Tensor& y) : Rows(pool, x, axis, y, "softmax") {}
    std::string kernel() const override { return kernel_name("softmax"); }

private:
    void compute(const float* x, float* y) const override { kernels_.softmax_row(x, n_, y); }
};

class LayerNorm final : public Rows {
public:
    LayerNorm(ThreadPool& pool, const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps, bool is_rms,
              const Tensor& y)
        : Rows(pool, x, x.rank() - 1, y, "layer_norm"), eps_(eps), is_rms_(is_rms) {
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
        blocks_ = ceil_div(columns_, kWidth);
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
        block_ = round_up(std::min(most, ceil_div(space_.pixels, wanted)), tile_.tile_rows);
        blocks_ = ceil_div(space_.pixels, block_);
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
                g.alpha = 1;
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

StepPtr make_float_matmul(ThreadPool& pool, const Tensor& a, const Tensor& b, float alpha, const Tensor& y) {
    const std::size_t r = a.dims.size();
    const Int k = a.dims[r - 1], n = b.dims[r - 1];
    const Operand a_operand{a.place, real_of(a, "float matmul"), 0, k > 1 ? a.strides[r - 1] : 1};
    const Operand b_operand{b.place, real_of(b, "float matmul"), b.strides[r - 2], n > 1 ? b.strides[r - 1] : 1};
    const Operand y_operand{y.place, real_of(y, "float matmul"), 0, n > 1 ? y.strides[r - 1] : 1};
    auto b_strides = b.strides;
    b_strides[r - 2] = 0;  // along the rows of a and y
    return std::make_unique<Gemm>(pool, a_operand, b_operand, y_operand,
                                  Walk<3>({a.dims.begin(), a.dims.end() - 1}, {a.strides, b_strides, y.strides}), k, n,
                                  alpha, nullptr, false);
}

StepPtr make_float_linear(ThreadPool& pool, const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor& y) {
    const std::size_t r = x.dims.size();
    const Int n = w.dims[0], k = w.dims[1];
    if (w.dtype != DType::f32 || w.q) throw Unsupported("float linear takes f32 weights");
    const Operand x_operand{x.place, real_of(x, "float linear"), 0, k > 1 ? x.strides[r - 1] : 1};
    const Operand w_operand{w.place, Real{}, w.strides[1], w.strides[0]};
    const Operand y_operand{y.place, real_of(y, "float linear"), 0, n > 1 ? y.strides[r - 1] : 1};
    return std::make_unique<Gemm>(pool, x_operand, w_operand, y_operand,
                                  Walk<3>({x.dims.begin(), x.dims.end() - 1},
                                          {x.strides, std::vector<Int>(r, 0), y.strides}),
                                  k, n, 1.0f, bias, true);
}

StepPtr make_float_conv(ThreadPool& pool, const ConvGeometry& g, const Tensor& x, const Tensor& w, const Tensor* bias,
                        const Tensor& y) {
    for (const Tensor* t : {&x, &w, &y})
        if (t->dtype != DType::f32 || t->q) throw Unsupported("float convolution takes f32 tensors");
    if (bias != nullptr && (bias->dtype != DType::f32 || bias->q || (bias->dims[0] > 1 && bias->strides[0] != 1)))
        throw Unsupported("float convolution takes a dense f32 bias");
    if (w.dims[1] == 1 && g.groups == w.dims[0]) return std::make_unique<FloatDepthwise>(pool, g, x, w, bias, y);
    return std::make_unique<FloatConv>(pool, g, x, w, bias, y);
}

StepPtr make_attention(ThreadPool& pool, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask,
                       bool causal, float scale, const Tensor& y) {
    return std::make_unique<Attention>(pool, q, k, v, mask, causal, scale, y);
}

StepPtr make_softmax(ThreadPool& pool, const Tensor& x, int axis, const Tensor& y) {
    const auto a = static_cast<std::size_t>(axis);
    if (x.dims[a] > 1 && x.strides[a] != 1)
        for (int d = 0; d < x.rank(); ++d)
            if (d != axis && x.dims[static_cast<std::size_t>(d)] > 1 && x.strides[static_cast<std::size_t>(d)] == 1)
                return std::make_unique<SoftmaxColumns>(pool, x, axis, d, y);
    return std::make_unique<SoftmaxRows>(pool, x, axis, y);
}

StepPtr make_layer_norm(ThreadPool& pool, const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps,
                        bool is_rms, const Tensor& y) {
    return std::make_unique<LayerNorm>(pool, x, gamma, beta, eps, is_rms, y);
}

}  // namespace quantflow::host
