#include "int8_steps.hpp"

namespace quantflow::host::int8 {

std::string tile_name(const Int8Kernels& kernels, const char* what) {
    return std::string("host.") + what + "." + kernels.name + " " + std::to_string(kernels.rows) + "x" +
           std::to_string(kernels.columns);
}

u8* thread_scratch(i64 bytes) {
    thread_local Aligned<u8> memory;
    // Grows by doubling: what it leaves behind is not used again.
    if (memory.size() < bytes) memory = Aligned<u8>(std::max(bytes, 2 * memory.size()));
    return memory.data();
}

void run_part(const Int8Kernels& kernels, const Int8Gemm& g, const Part& part) {
    kernels.gemm(g, part.group, part.row, part.rows, part.panel, part.panels,
                 thread_scratch(kernels.gemm_scratch(g, part.rows, part.panels)));
}

Shape3 shape_of(const Weights& w, const ConvGeometry& geometry, const Tensor& x, const Tensor& y) {
    Shape3 s;
    const int spatial = x.rank() - 2;
    for (int i = 0; i < spatial; ++i) {
        const int to = 3 - spatial + i;
        s.in[to] = x.dims[i + 2];
        s.out[to] = y.dims[i + 2];
        s.kernel[to] = w.dims[i + 2];
        s.stride[to] = geometry.stride[i];
        s.padding[to] = geometry.padding[i];
        s.dilation[to] = geometry.dilation[i];
    }
    return s;
}

}  // namespace quantflow::host::int8
