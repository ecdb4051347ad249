// int8 linear and convolution: which step computes a layer, on which kernels.
#include "int8_steps.hpp"
#include "isa.hpp"

namespace quantflow::host {

using namespace int8;

namespace {

const Int8Kernels* best_vectors() {
    switch (best_isa()) {
        case Isa::amx_int8:
        case Isa::avx512_vnni: return &isa_avx512_vnni::int8_kernels;
        case Isa::avx_vnni: return &isa_avx_vnni::int8_kernels;
        case Isa::avx2: return &isa_avx2::int8_kernels;
        default: return &isa_generic::int8_kernels;
    }
}

}  // namespace

const Int8Kernels*& int8_kernels_in_use() {
    static const Int8Kernels* kernels =
        best_isa() == Isa::amx_int8 ? &isa_amx_int8::int8_kernels : best_vectors();
    return kernels;
}

const Int8Kernels*& int8_kernels_beside() {
    static const Int8Kernels* kernels = best_isa() == Isa::amx_int8 ? best_vectors() : nullptr;
    return kernels;
}

StepPtr make_linear(ThreadPool& pool, const Weights& w, const Tensor& x, const Tensor* residual,
                    const Epilogue& epilogue, const Tensor& y, const Terms& terms) {
    check_operands(w, x, residual, y, terms);
    require(all_are(is_row_major, x, residual, y, terms), "linear takes row-major tensors");
    const i64 out = w.dims[0], in = w.dims[1];
    check_reduction(in, x.q->zero_point, 127);
    for (const Product& p : terms.products) check_reduction(in, p.x.q->zero_point, 127);
    i64 rows = 1;
    for (int i = 0; i + 1 < y.rank(); ++i) rows *= y.dims[i];
    return make_gemm_step(pool, w, Grouping{1, in, out, 1}, Shape3{}, x, residual, epilogue, y, rows, terms);
}

StepPtr make_conv(ThreadPool& pool, const Weights& w, const ConvGeometry& geometry, const Tensor& x,
                  const Tensor* residual, const Epilogue& epilogue, const Tensor& y, const Terms& terms) {
    check_operands(w, x, residual, y, terms);
    require(x.rank() >= 3 && x.rank() <= 5, "convolutions have 1 to 3 spatial dimensions");
    require(all_are(is_channels_last, x, residual, y, terms), "convolutions take channels_last tensors");
    const Shape3 shape = shape_of(w, geometry, x, y);
    const i64 groups = geometry.groups, in = w.dims[1], out = w.dims[0] / groups;
    check_reduction(shape.taps() * in, x.q->zero_point, 127);
    for (const Product& p : terms.products) check_reduction(shape.taps() * in, p.x.q->zero_point, 127);
    if (in == 1 && out == 1 && groups > 1) return make_depthwise_step(pool, w, shape, x, residual, epilogue, y, terms);
    const Int8Kernels& kernels = *int8_kernels_in_use();
    const i64 size = terms.products.empty() ? winograd_size(kernels, pool.size(), w, geometry, shape, x, y) : 0;
    if (size > 0) return make_winograd_step(pool, w, size, shape, x, residual, epilogue, y, terms.rest);
    return make_gemm_step(pool, w, Grouping{groups, in, out, 1}, shape, x, residual, epilogue, y,
                          y.dims[0] * shape.pixels(), terms);
}

}  // namespace quantflow::host
