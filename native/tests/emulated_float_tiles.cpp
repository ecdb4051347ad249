// The code that attention runs on AMX, with emulated tiles, for test_float_math.cpp on CPUs without.
#include "emulated_tiles.hpp"

#define QF_ISA_NAMESPACE isa_emulated_tiles
#define QF_EMULATED_TILES
#include "../host/float_math_isa.cpp"
