// Float products of matrices.
#include "float_steps.hpp"

namespace quantflow::host {

using namespace floats;

namespace {

// y = a @ b + bias, for every position of a walk over batches.
class Gemm final : public Step {
public:
    // `walk`: the offsets in a, b and y of every row of a. Where b stays the same along the innermost dimension,
    // those rows are multiplied together.
    Gemm(ThreadPool& pool, const Operand& a, const Operand& b, const Operand& y, Walk<3> walk, Int k, Int n,
         const Tensor* bias, bool is_b_constant)
        : pool_(pool), a_(a), b_(b), y_(y), k_(k), n_(n) {
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

    void share(Lasting& lasting) const override {
        if (packed_ != nullptr) lasting.insert(packed_);
    }

    std::string kernel() const override {
        const FloatKernels& f = kernels();
        return kernel_name("sgemm") + " " + std::to_string(f.tile_rows) + "x" + std::to_string(f.tile_columns);
    }

private:
    // A unit: one batch, a block of rows, a block of panels.
    void plan() {
        const int threads = pool_.size();
        const Int panels = divide_up(n_, tile_.tile_columns), batches = batches_.count();
        const double work = 1.0 * batches * rows_ * n_ * std::max<Int>(k_, 1);
        const Int wanted = threads == 1 || work < 2e5 ? 1 : Int{4} * threads;
        Int row_blocks = 1, panel_blocks = 1;
        if (packed_ != nullptr) {
            row_blocks = divide_up(rows_, kRowBlock);
            panel_blocks = std::min(divide_up(wanted, batches * row_blocks), std::max<Int>(1, panels / 4));
        } else {
            // B is packed anew by every unit, so units share no part of it if they can help it; what one packs
            // should stay in cache.
            constexpr Int most_packed = Int{1} << 18;
            panel_blocks = std::min(divide_up(wanted, batches), std::max<Int>(1, panels / 4));
            panel_blocks = std::max(panel_blocks, std::min(panels, panels * tile_.tile_columns * k_ / most_packed));
        }
        if (batches * row_blocks * panel_blocks < wanted)
            row_blocks = std::max(row_blocks, std::min(divide_up(wanted, batches * panel_blocks),
                                                       divide_up(rows_, Int{4} * tile_.tile_rows)));
        row_block_ = round_up(divide_up(rows_, row_blocks), tile_.tile_rows);
        panel_block_ = divide_up(panels, panel_blocks);
        row_blocks_ = divide_up(rows_, row_block_);
        panel_blocks_ = divide_up(panels, panel_block_);
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
        return round_up(divide_up(m, divide_up(m, most)), tile_.tile_rows);
    }

    ThreadPool& pool_;
    const FloatKernels& tile_ = kernels();
    Operand a_, b_, y_;
    Walk<3> batches_;
    Int rows_ = 0, k_, n_;
    Place bias_;
    bool has_bias_ = false;
    std::shared_ptr<const PackedWeight> packed_;
    Int row_block_ = 1, panel_block_ = 1, row_blocks_ = 0, panel_blocks_ = 0, units_ = 0;
    Parts parts_;
};

}  // namespace

StepPtr make_float_matmul(ThreadPool& pool, const Tensor& a, const Tensor& b, const Tensor& y) {
    const std::size_t r = a.dims.size();
    const Int k = a.dims[r - 1], n = b.dims[r - 1];
    const Operand a_operand{a.place, real_of(a, "float matmul"), 0, k > 1 ? a.strides[r - 1] : 1};
    const Operand b_operand{b.place, real_of(b, "float matmul"), b.strides[r - 2], n > 1 ? b.strides[r - 1] : 1};
    const Operand y_operand{y.place, real_of(y, "float matmul"), 0, n > 1 ? y.strides[r - 1] : 1};
    auto b_strides = b.strides;
    b_strides[r - 2] = 0;  // along the rows of a and y
    return std::make_unique<Gemm>(pool, a_operand, b_operand, y_operand,
                                  Walk<3>({a.dims.begin(), a.dims.end() - 1}, {a.strides, b_strides, y.strides}), k, n,
                                  nullptr, false);
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
                                  k, n, bias, true);
}

}  // namespace quantflow::host
