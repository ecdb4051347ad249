#include "isa.hpp"

#include <cpuid.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace quantflow {
namespace {

// GCC 12 knows no name for AVX-VNNI in __builtin_cpu_supports: CPUID leaf 7, subleaf 1, EAX bit 4.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && ((a >> 4) & 1u) != 0;
}

Isa detect() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        return Isa::avx512_vnni;
    return has_avx_vnni() ? Isa::avx_vnni : Isa::avx2;
}

}  // namespace

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx2: return "avx2";
        case Isa::avx_vnni: return "avx_vnni";
        case Isa::avx512_vnni: return "avx512_vnni";
        default: return "generic";
    }
}

Isa best_isa() {
    static const Isa found = [] {
        const Isa best = detect();
        const char* asked = std::getenv("QUANTFLOW_ISA");
        if (asked == nullptr) return best;
        for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx_vnni, Isa::avx512_vnni})
            // AVX-VNNI is no subset of AVX512-VNNI: a CPU may have either alone.
            if (std::strcmp(asked, name_of(isa)) == 0 && isa <= best && (isa != Isa::avx_vnni || has_avx_vnni()))
                return isa;
        return best;
    }();
    return found;
}

}  // namespace quantflow
