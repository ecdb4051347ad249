#include "isa.hpp"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
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

// The tiles' registers belong to a process only after it has asked the kernel for them.
bool has_amx_int8() {
    constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) == 0 || (d & kInt8) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa detect() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        return has_amx_int8() ? Isa::amx_int8 : Isa::avx512_vnni;
    return has_avx_vnni() ? Isa::avx_vnni : Isa::avx2;
}

}  // namespace

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx2: return "avx2";
        case Isa::avx_vnni: return "avx_vnni";
        case Isa::avx512_vnni: return "avx512_vnni";
        case Isa::amx_int8: return "amx_int8";
        default: return "generic";
    }
}

std::string cpu_name() {
    char brand[49] = "";
    unsigned words[4] = {};
    for (unsigned i = 0; i < 3; ++i)
        if (__get_cpuid(0x80000002u + i, &words[0], &words[1], &words[2], &words[3]) != 0)
            std::memcpy(brand + 16 * i, words, 16);
    std::string name(brand);
    for (char& c : name)  // it goes into file names and JSON
        if (c < ' ' || c > '~') c = ' ';
    name = name.substr(std::min(name.find_first_not_of(' '), name.size()));
    name = name.substr(0, name.find_last_not_of(' ') + 1);
    __get_cpuid(1, &words[0], &words[1], &words[2], &words[3]);
    const unsigned a = words[0], family = (a >> 8 & 15) + (a >> 20 & 255), model = (a >> 4 & 15) + (a >> 12 & 240);
    return name + " " + std::to_string(family) + "." + std::to_string(model) + "." + std::to_string(a & 15);
}

Isa best_isa() {
    static const Isa found = [] {
        const Isa best = detect();
        const char* asked = std::getenv("QUANTFLOW_ISA");
        if (asked == nullptr) return best;
        for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx_vnni, Isa::avx512_vnni, Isa::amx_int8})
            // AVX-VNNI is no subset of AVX512-VNNI: a CPU may have either alone.
            if (std::strcmp(asked, name_of(isa)) == 0 && isa <= best && (isa != Isa::avx_vnni || has_avx_vnni()))
                return isa;
        return best;
    }();
    return found;
}

bool has_bfloat16_tiles() {
    constexpr unsigned kBfloat16 = 1u << 22;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return best_isa() == Isa::amx_int8 && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBfloat16) != 0;
}

}  // namespace quantflow
