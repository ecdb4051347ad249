// Which instruction sets this CPU and operating system offer, in the order in which kernels get faster.
#pragma once

#include <string>

namespace quantflow {

enum class Isa { generic, avx2, avx_vnni, avx512_vnni, amx_int8 };

// The best one here; QUANTFLOW_ISA=generic|avx2|avx_vnni|avx512_vnni asks for a lower one (tests). amx_int8 is
// avx512_vnni with tiles for int8 products, and attention's where they multiply bfloat16.
Isa best_isa();
// Whether the best one's tiles multiply bfloat16, too.
bool has_bfloat16_tiles();
const char* name_of(Isa isa);
// What the processor calls itself, with its family, model and stepping.
std::string cpu_name();

}  // namespace quantflow
