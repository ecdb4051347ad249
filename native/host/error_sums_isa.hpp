// How far one tensor is from another, in one pass over both; compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantflow::host {

// signal = sum x^2, noise = sum (x - x')^2, largest = max |x|, largest_error = max |x - x'|, in double, added up in the
// same order on every instruction set. Where a value is not finite, the noise is not either, and the others mean nothing.
struct ErrorSums {
    double signal = 0, noise = 0, largest = 0, largest_error = 0;
};

// Codes stand for x' = (q - zero_point) * scale in float.
struct ErrorCoding {
    float scale;
    std::int32_t zero_point;
};

struct ErrorKernels {
    ErrorSums (*of_floats)(const float* x, const float* actual, std::size_t n);
    ErrorSums (*of_u8)(const float* x, const std::uint8_t* codes, ErrorCoding, std::size_t n);
    ErrorSums (*of_s8)(const float* x, const std::int8_t* codes, ErrorCoding, std::size_t n);
};

namespace isa_generic { const ErrorKernels& error_kernels(); }
namespace isa_avx2 { const ErrorKernels& error_kernels(); }
namespace isa_avx512_vnni { const ErrorKernels& error_kernels(); }

// Those of this CPU.
const ErrorKernels& error_kernels();

}  // namespace quantflow::host
