// The formulas of activations.hpp as functions. Not for files that are compiled once per instruction set.
#pragma once

#include <cmath>

#include "activations.hpp"

namespace quantflow {

template <typename T>
T clamped(T v, T low, T high) {
    return v < low ? low : v > high ? high : v;  // keeps NaN
}

inline double exact_activation(const Epilogue& e, double x) {
    using std::erfc, std::exp, std::sqrt, std::tanh;
    const auto clamped = quantflow::clamped<double>;
    const double a = e.a, b = e.b;
    switch (e.kind) {
        case Activation::none: return x;
#define QF_CASE(name, Name, aten, numbers, exact, ...) \
    case Activation::name: return exact;
        QF_ACTIVATIONS(QF_CASE)
#undef QF_CASE
    }
    return x;
}

inline float real_activation(const Epilogue& e, float r) {
    using std::erf, std::exp, std::tanh;
    const auto clamped = quantflow::clamped<float>;
    const float a = e.a, b = e.b;
    switch (e.kind) {
        case Activation::none: return r;
#define QF_CASE(name, Name, aten, numbers, exact, real, ...) \
    case Activation::name: return real;
        QF_ACTIVATIONS(QF_CASE)
#undef QF_CASE
    }
    return r;
}

}  // namespace quantflow
