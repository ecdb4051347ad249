#include "error_sums_isa.hpp"
#include "isa.hpp"

namespace quantflow::host {

const ErrorKernels& error_kernels() {
    switch (best_isa()) {
        case Isa::amx_int8:
        case Isa::avx512_vnni: return isa_avx512_vnni::error_kernels();
        case Isa::avx_vnni:
        case Isa::avx2: return isa_avx2::error_kernels();
        default: return isa_generic::error_kernels();
    }
}

}  // namespace quantflow::host
