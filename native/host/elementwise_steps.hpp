// What copies and elementwise steps share.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "elementwise_isa.hpp"
#include "elementwise_nest.hpp"
#include "steps.hpp"

namespace quantflow::host::elementwise {

struct Bool {
    std::uint8_t value;
};

template <class T>
struct Type {
    using type = T;
};

template <class Function>
auto with_type(DType dtype, Function f) {
    switch (dtype) {
        case DType::f32: return f(Type<float>{});
        case DType::u8: return f(Type<std::uint8_t>{});
        case DType::s8: return f(Type<std::int8_t>{});
        case DType::s32: return f(Type<std::int32_t>{});
        case DType::s64: return f(Type<std::int64_t>{});
        default: return f(Type<Bool>{});
    }
}

// An unsigned integer as wide as an element, to move it whatever it is.
template <class Function>
auto with_width(DType dtype, Function f) {
    switch (size_of(dtype)) {
        case 1: return f(Type<std::uint8_t>{});
        case 4: return f(Type<std::uint32_t>{});
        default: return f(Type<std::uint64_t>{});
    }
}

inline bool is_real(const Tensor& t) { return t.q.has_value() || t.dtype == DType::f32; }
inline bool same_kind(const Tensor& a, const Tensor& b) { return a.dtype == b.dtype && a.q == b.q; }

// Activations that only clamp need no pass of their own where y holds codes: they bound the codes. hardtanh would give
// its bound for NaN, so it stays where NaN may come.
void fold_clamp(Epilogue&, Form& y, bool may_be_nan);

// "host.OP", and the activation's name behind it.
std::string name_with(const char* op, const Epilogue&);

[[noreturn]] void refuse(const char* what, std::initializer_list<const Tensor*> tensors);

inline std::uint8_t code_of(float r, const QParams& q) {
    float steps = r / q.scale;
    const float low = static_cast<float>(q.qmin - q.zero_point), high = static_cast<float>(q.qmax - q.zero_point);
    steps = steps < high ? steps : high;  // NaN becomes high
    steps = std::max(steps, low);
    return static_cast<std::uint8_t>(static_cast<int>(std::nearbyint(steps)) + q.zero_point);
}

// f of the real that each byte stands for, by byte.
template <class Function>
std::shared_ptr<std::array<float, 256>> table_of(const Tensor& x, Function f) {
    auto table = std::make_shared<std::array<float, 256>>();
    for (int i = 0; i < 256; ++i) {
        const int code = x.dtype == DType::s8 ? static_cast<std::int8_t>(i) : i;
        const float real = static_cast<float>(code - x.q->zero_point) * x.q->scale;
        (*table)[static_cast<std::size_t>(i)] = static_cast<float>(f(static_cast<double>(real)));
    }
    return table;
}

inline std::shared_ptr<std::array<std::uint8_t, 256>> coded(const std::array<float, 256>& reals, const QParams& q) {
    auto table = std::make_shared<std::array<std::uint8_t, 256>>();
    for (std::size_t i = 0; i < 256; ++i) (*table)[i] = code_of(reals[i], q);
    return table;
}

}  // namespace quantflow::host::elementwise
