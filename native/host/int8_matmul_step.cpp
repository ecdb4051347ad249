// A product of two tensors of codes.
#include <algorithm>

#include "int8_steps.hpp"

namespace quantflow::host {
namespace int8 {
namespace {

// b's codes become weights b - 128 when the step runs. With A = a - zero_a:
// sum A * (b - zero_b) = sum A * (b - 128) + (128 - zero_b) * sum A, and the last term is one number per row.
class MatmulStep final : public Step {
public:
    MatmulStep(ThreadPool& pool, const Tensor& a, const Tensor& b, const Tensor& y)
        : pool_(pool), kernels_(*int8_kernels_in_use()), a_(a), b_(b), y_(y) {
        const int rank = a.rank();
        rows_ = a.dims[rank - 2];
        steps_ = a.dims[rank - 1];
        columns_ = b.dims[rank - 1];
        for (int i = 0; i < rank - 2; ++i) batches_ *= y.dims[i];
        const i64 largest_b = std::max<i64>(b.q->zero_point, 255 - b.q->zero_point);
        check_reduction(steps_, a.q->zero_point, largest_b);

        gemm_.zero = a.q->zero_point;
        gemm_.in_channels = gemm_.run_length = steps_;
        gemm_.is_pointwise = true;
        copies_a_ = steps_ > 1 && a.strides[rank - 1] != 1;
        gemm_.pixel = copies_a_ ? steps_ : a.strides[rank - 2];
        gemm_.is_direct = kernels_.is_exact && steps_ % (4 * kernels_.depth) == 0 && gemm_.pixel % 2048 != 0;
        gemm_.channels = columns_;
        gemm_.panels = gemm_.task_panels = divide_up(columns_, kernels_.columns);
        gemm_.quads = Runs(kernels_, 1, steps_).quads;
        gemm_.chunk = chunk_of(kernels_, gemm_.quads);
        gemm_.output = output_of(nullptr, Epilogue{}, y, columns_);
        const i64 padded = gemm_.panels * kernels_.columns;
        scale_ = Aligned<float>(padded);
        bias_ = Aligned<float>(padded);
        const double scale = static_cast<double>(a.q->scale) * b.q->scale;
        std::fill_n(scale_.data(), padded, static_cast<float>(scale));
        gemm_.output.scale = scale_.data();
        gemm_.output.bias = bias_.data();

        panel_bytes_ = gemm_.quads * kernels_.columns * 4;
        packed_b_ = Aligned<std::int8_t>(batches_ * gemm_.panels * panel_bytes_);
        const PanelLayout layout(kernels_);
        for (i64 k = 0; k < steps_; ++k) of_code_.push_back(layout.of_code(k));
        for (i64 n = 0; n < kernels_.columns; ++n) of_column_.push_back(layout.of_column(n));
        start_ = Aligned<std::int32_t>(batches_ * padded);
        corrects_rows_ = b.q->zero_point != 128;
        if (corrects_rows_) row_start_ = Aligned<std::int32_t>(batches_ * rows_);
        if (copies_a_) dense_a_ = Aligned<u8>(batches_ * rows_ * steps_);
        tasks_ = cut(kernels_, gemm_, batches_, rows_, pool.size());
    }

    void run() override {
        if (y_.count() == 0) return;
        const i64 panels = gemm_.panels;
        pool_.run(batches_ * (panels + 1), [&](i64 task) {
            const i64 batch = task / (panels + 1), panel = task % (panels + 1);
            if (panel < panels)
                pack_panel(batch, panel);
            else if (corrects_rows_ || copies_a_)
                prepare_rows(batch);
        });
        const i64 per_batch = tasks_.row_tasks * tasks_.panel_tasks;
        pool_.run(batches_ * per_batch, [&](i64 task) {
            const i64 batch = task / per_batch;
            Int8Gemm g = gemm_;
            g.x = rows_of(batch);
            g.x_end = g.x + (rows_ - 1) * g.pixel + steps_;
            g.weights = packed_b_.data() + batch * panels * panel_bytes_;
            g.start = start_.data() + batch * panels * kernels_.columns;
            if (corrects_rows_) g.row_start = row_start_.data() + batch * rows_;
            const i64 offset = batch * rows_ * columns_;
            g.output.y = g.output.is_float ? static_cast<void*>(y_.data<float>() + offset) : y_.data<u8>() + offset;
            run_part(kernels_, g, Part(g, tasks_, rows_, task % per_batch));
        });
    }

    std::string kernel() const override { return tile_name(kernels_, "matmul"); }

private:
    const u8* batch_of(const Tensor& t, i64 batch) const {
        i64 offset = 0;
        for (int i = t.rank() - 3; i >= 0; --i) {
            offset += batch % y_.dims[i] * t.strides[i];
            batch /= y_.dims[i];
        }
        return t.data<const u8>() + offset;
    }
    const u8* rows_of(i64 batch) const {
        return copies_a_ ? dense_a_.data() + batch * rows_ * steps_ : batch_of(a_, batch);
    }

    void pack_panel(i64 batch, i64 panel) {
        const int rank = b_.rank();
        const i64 k_stride = b_.strides[rank - 2], n_stride = b_.strides[rank - 1], width = kernels_.columns;
        const i64 first = panel * width, count = std::min(width, columns_ - first);
        const u8* from = batch_of(b_, batch) + first * n_stride;
        std::int8_t* to = packed_b_.data() + (batch * gemm_.panels + panel) * panel_bytes_;
        std::int32_t* start = start_.data() + (batch * gemm_.panels + panel) * width;
        std::vector<std::int32_t> sums(static_cast<std::size_t>(width), 0);
        const auto put = [&](i64 k, i64 n) {
            const int code = from[k * k_stride + n * n_stride] - 128;
            const std::size_t step = static_cast<std::size_t>(k), column = static_cast<std::size_t>(n);
            to[of_code_[step] + of_column_[column]] = static_cast<std::int8_t>(code);
            sums[column] += code;
        };
        // The inner loop follows the memory.
        if (k_stride < n_stride) {
            for (i64 n = 0; n < count; ++n)
                for (i64 k = 0; k < steps_; ++k) put(k, n);
        } else {
            for (i64 k = 0; k < steps_; ++k)
                for (i64 n = 0; n < count; ++n) put(k, n);
        }
        for (i64 n = 0; n < count; ++n)
            start[n] = kernels_.is_exact ? static_cast<std::int32_t>(0u - static_cast<std::uint32_t>(gemm_.zero) *
                                                                              static_cast<std::uint32_t>(sums[n]))
                                         : 0;
    }

    void prepare_rows(i64 batch) {
        const int rank = a_.rank();
        const i64 m_stride = a_.strides[rank - 2], k_stride = a_.strides[rank - 1];
        const u8* from = batch_of(a_, batch);
        for (i64 m = 0; m < rows_; ++m) {
            i64 sum = 0;
            for (i64 k = 0; k < steps_; ++k) {
                const u8 code = from[m * m_stride + k * k_stride];
                sum += code;
                if (copies_a_) dense_a_[(batch * rows_ + m) * steps_ + k] = code;
            }
            if (corrects_rows_)
                row_start_[batch * rows_ + m] =
                    static_cast<std::int32_t>((128 - b_.q->zero_point) * (sum - steps_ * gemm_.zero));
        }
    }

    ThreadPool& pool_;
    const Int8Kernels& kernels_;
    Tensor a_, b_, y_;
    i64 rows_ = 0, steps_ = 0, columns_ = 0, batches_ = 1, panel_bytes_ = 0;
    bool copies_a_ = false, corrects_rows_ = false;
    std::vector<i64> of_code_, of_column_;  // their places in a panel
    Aligned<float> scale_, bias_;
    Aligned<std::int8_t> packed_b_;
    Aligned<std::int32_t> start_, row_start_;
    Aligned<u8> dense_a_;
    Int8Gemm gemm_;
    Tasks tasks_;
};

}  // namespace
}  // namespace int8

StepPtr make_int8_matmul(ThreadPool& pool, const Tensor& a, const Tensor& b, const Tensor& y) {
    using int8::require;
    require(a.dtype == DType::u8 && a.q && b.dtype == DType::u8 && b.q, "matmul operands must be u8 codes");
    require((y.dtype == DType::u8 && y.q) || (y.dtype == DType::f32 && !y.q), "y must be u8 codes or f32");
    require(a.rank() >= 2 && a.rank() == b.rank() && a.rank() == y.rank() && is_row_major(y),
            "matmul takes operands of equal rank and a row-major result");
    return std::make_unique<int8::MatmulStep>(pool, a, b, y);
}

}  // namespace quantflow::host
