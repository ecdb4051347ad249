// The gates and states of recurrent cells, compiled once per instruction set. The formulas are in quantflow/ir/recurrence.py.
#include "recurrence_isa.hpp"

#include "vector_math.hpp"

namespace quantflow::host::QF_ISA_NAMESPACE {
namespace {

using i64 = std::int64_t;
using F = Vec::F;

enum class Kind { lstm, gru, rnn_tanh, rnn_relu };

// Elements [j, j + n) of arrays, n <= Vec::width.
struct Span {
    i64 j;
    int n;
    F load(const float* p) const {
        return n == Vec::width ? Vec::load(p + j) : Vec::load(p + j, n, Vec::set(0.0f));
    }
    void store(float* p, F v) const {
        if (n == Vec::width)
            Vec::store(p + j, v);
        else
            Vec::store(p + j, v, n);
    }
    void code(std::uint8_t* p, F h, F steps) const {
        // Clamped before it is rounded, because the bounds are whole numbers. NaN becomes 127.
        const F t = Vec::max(Vec::min(h * steps, Vec::set(127.0f)), Vec::set(-127.0f));
        const F q = Vec::round(t) + Vec::set(128.0f);
        if (n == Vec::width) return Vec::store_bytes(p + j, q);
        std::uint8_t all[Vec::width];
        Vec::store_bytes(all, q);
        for (int i = 0; i < n; ++i) p[j + i] = all[i];
    }
};

template <class Each>
static inline void each_span(i64 count, Each each) {
    i64 j = 0;
    for (; j + Vec::width <= count; j += Vec::width) each(Span{j, Vec::width});
    if (j < count) each(Span{j, static_cast<int>(count - j)});
}

template <Kind kind>
static void advance(const CellStep& s) {
    const F reach = Vec::set(s.reach), steps = Vec::set(s.steps);
    each_span(s.hidden, [&](const Span& at) {
        const auto x = [&](int gate) { return at.load(s.gates + gate * s.hidden); };
        const auto p = [&](int gate) { return at.load(s.products + gate * s.hidden) * reach; };
        F h;
        if constexpr (kind == Kind::lstm) {
            const F i = sigmoid<Vec>(x(0) + p(0)), f = sigmoid<Vec>(x(1) + p(1)), g = tanh<Vec>(x(2) + p(2));
            const F c = f * at.load(s.c) + i * g;
            at.store(s.c, c);
            h = sigmoid<Vec>(x(3) + p(3)) * tanh<Vec>(c);
        } else if constexpr (kind == Kind::gru) {
            F inner = p(2);
            if (s.bias != nullptr) inner = inner + at.load(s.bias);
            const F n = tanh<Vec>(x(2) + sigmoid<Vec>(x(0) + p(0)) * inner);
            h = n + sigmoid<Vec>(x(1) + p(1)) * (at.load(s.before) - n);
        } else if constexpr (kind == Kind::rnn_tanh) {
            h = tanh<Vec>(x(0) + p(0));
        } else {
            h = Vec::max(Vec::set(0.0f), x(0) + p(0));  // NaN stays NaN
        }
        at.store(s.after, h);
        if (s.codes != nullptr) at.code(s.codes, h, steps);
    });
}

static void code(const float* h, i64 hidden, float steps, std::uint8_t* codes) {
    each_span(hidden, [&](const Span& at) { at.code(codes, at.load(h), Vec::set(steps)); });
}

}  // namespace

extern const RecurrenceKernels recurrence_kernels = {advance<Kind::lstm>, advance<Kind::gru>, advance<Kind::rnn_tanh>,
                                                     advance<Kind::rnn_relu>, code};

}  // namespace quantflow::host::QF_ISA_NAMESPACE
