// The code that AMX runs, with emulated tiles, for test_int8_gemm.cpp on CPUs that have AVX512-VNNI but no AMX.
#include "emulated_tiles.hpp"

#define QF_ISA_NAMESPACE isa_emulated_amx
#define QF_INT8_EMULATED_AMX
#include "../host/int8_gemm_isa.cpp"
