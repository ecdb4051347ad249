#include "window_steps.hpp"

#include "isa.hpp"

namespace quantflow::host::windows {

const WindowKernels& window_kernels() {
    switch (best_isa()) {
        case Isa::amx_int8:
        case Isa::avx512_vnni: return isa_avx512_vnni::window_kernels();
        case Isa::avx_vnni:
        case Isa::avx2: return isa_avx2::window_kernels();
        default: return isa_generic::window_kernels();
    }
}

void refuse(const char* what, const Tensor& x, const Tensor& y) {
    throw Unsupported(std::string(what) + " from " + name_of(x.dtype) + (x.q ? " codes" : "") + " to " +
                      name_of(y.dtype) + (y.q ? " codes" : ""));
}

}  // namespace quantflow::host::windows
