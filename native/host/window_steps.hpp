// What pools, reductions, embeddings and upsampling share.
#pragma once

#include "elementwise_nest.hpp"
#include "steps.hpp"
#include "windows_isa.hpp"

namespace quantflow::host::windows {

const WindowKernels& window_kernels();

inline bool holds_reals(const Tensor& t) { return t.dtype == DType::f32 ? !t.q : t.dtype == DType::u8 && t.q; }

[[noreturn]] void refuse(const char* what, const Tensor& x, const Tensor& y);

}  // namespace quantflow::host::windows
