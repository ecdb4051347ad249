// Elementwise kernels against loops in float or double, on all layouts, in place, and with nasty values.
#include "../host/steps.hpp"
#include "../src/activation_formulas.hpp"
#include "check.hpp"

using namespace check;

namespace {

ThreadPool* pool = nullptr;

Dims random_dims() {
    static const std::vector<Dims> shapes = {
        {},
        {0},
        {1},
        {7},
        {8},
        {31},
        {33},
        {129},
        {5000},
        {2, 0, 3},
        {1, 1, 1},
        {3, 5},
        {17, 33},
        {64, 64},
        {2, 3, 224},
        {2, 3, 9, 7},
        {1, 64, 5, 5},
        {2, 16, 16, 16},
        {2, 17, 3, 19},
        {1, 40, 30, 30},
        {2, 4, 3, 2, 5},
        {1, 2, 3, 130},
    };
    return shapes[static_cast<std::size_t>(pick(0, static_cast<Int>(shapes.size()) - 1))];
}

std::string shown(const char* what, const Tensor& x, const Tensor& y) {
    std::string s = what;
    const auto add = [&](const Tensor& t) {
        s += std::string(" ") + name_of(t.dtype) + (t.q ? "q (" : " (");
        for (std::size_t d = 0; d < t.dims.size(); ++d)
            s += std::to_string(t.dims[d]) + ":" + std::to_string(t.strides[d]) + " ";
        s += ")";
    };
    add(x);
    add(y);
    return s;
}

Epilogue random_epilogue() {
    if (pick(0, 1) == 0) return {};
    Epilogue e{static_cast<Activation>(pick(0, kActivations - 1)), 0, 0};
    if (e.kind == Activation::hardtanh) e.a = uniform(-2, 0), e.b = uniform(0, 3);
    if (e.kind == Activation::leaky_relu) e.a = 0.1f;
    return e;
}

bool is_smooth(const Epilogue& e) {
    return e.kind != Activation::none && e.kind != Activation::relu && e.kind != Activation::hardtanh &&
           e.kind != Activation::leaky_relu;
}

// Reads and writes of nothing else: what y's memory holds between its elements stays as it was.
void expect_gaps(const std::string& what, Value& y, const std::vector<std::byte>& before) {
    std::vector<bool> written(static_cast<std::size_t>(y.bytes()));
    const Tensor& t = y;
    each_index(t.dims, [&](const Dims& i) {
        for (Int b = 0; b < size_of(t.dtype); ++b)
            written[static_cast<std::size_t>(offset_of(t, i) * size_of(t.dtype) + b)] = true;
    });
    for (std::size_t i = 0; i < written.size(); ++i)
        if (!written[i] && before[i] != y.data()[i]) return fail(what + ": wrote between elements");
}

void test_copy_of_reals() {
    for (int round = 0; round < 800; ++round) {
        const Dims dims = random_dims();
        Value x = random_real(dims, strides_of(dims, random_layout()), pick(0, 1), 4, true);
        Value y = random_real(dims, strides_of(dims, random_layout()), pick(0, 1));
        const auto before = y.snapshot();
        auto step = host::make_copy(*pool, x, y);
        step->run();
        const std::string what = shown(step->kernel().c_str(), x, y);
        each_index(dims, [&](const Dims& i) {
            const float r = real(x, i);
            // The reference's own float division: no code may differ.
            expect(what, y, i, r, y.tensor().q ? 1e-4 : 0, 0);
        });
        expect_gaps(what, y, before);
    }
    end_group("copy of reals");

    // Exactly the reference: round half to even of a float division.
    for (int round = 0; round < 60; ++round) {
        const Int n = pick(1, 600);
        Value x(DType::f32, {n}, {1});
        x.randomize(300);
        for (Int i = 0; i < n; ++i)
            if (pick(0, 1)) x.put(x.data() + 4 * i, (static_cast<float>(pick(-300, 300)) + 0.5f) * 0.25f);
        QParams q = random_q(pick(0, 1) ? 0.25f : 0);
        Value y(DType::u8, {n}, {1}, q);
        host::make_copy(*pool, x, y)->run();
        for (Int i = 0; i < n; ++i) {
            const float steps = std::nearbyint(real(x, {i}) / q.scale) + static_cast<float>(q.zero_point);
            const double wanted = std::clamp<double>(steps, q.qmin, q.qmax);
            ++values;
            if (raw(y, {i}) != wanted) fail("quantize is not the reference's");
        }
    }
    end_group("quantize, exactly");
}

void test_signed_codes() {
    for (int round = 0; round < 300; ++round) {
        const Dims dims = random_dims();
        const QParams q{0.03f, static_cast<std::int32_t>(pick(-128, 127)), -128, 127};
        Value s(DType::s8, dims, strides_of(dims, random_layout()), q);
        s.randomize();
        QParams moved = q;
        moved.zero_point += 128;
        moved.qmin = 0;
        moved.qmax = 255;
        Value u(DType::u8, dims, strides_of(dims, random_layout()), moved);
        host::make_copy(*pool, s, u)->run();
        Value back(DType::s8, dims, strides_of(dims, random_layout()), q);
        host::make_copy(*pool, u, back)->run();
        Value f(DType::f32, dims, strides_of(dims, random_layout()));
        host::make_copy(*pool, s, f)->run();
        Value again(DType::s8, dims, strides_of(dims, random_layout()), q);
        host::make_copy(*pool, f, again)->run();
        each_index(dims, [&](const Dims& i) {
            values += 4;
            if (raw(u, i) != raw(s, i) + 128) fail("s8 to u8");
            if (raw(back, i) != raw(s, i)) fail("u8 to s8");
            if (real(f, i) != real(s, i)) fail("s8 to f32");
            if (raw(again, i) != raw(s, i)) fail("f32 to s8");
        });
    }
    end_group("signed codes");
}

void test_moves() {
    const DType types[] = {DType::f32, DType::u8, DType::s8, DType::s32, DType::s64, DType::b8};
    for (int round = 0; round < 800; ++round) {
        const Dims dims = random_dims();
        const DType from = types[pick(0, 5)], to = pick(0, 1) ? from : types[pick(0, 5)];
        Value x(from, dims, strides_of(dims, random_layout()));
        x.randomize();
        Value y(to, dims, strides_of(dims, random_layout()));
        const auto before = y.snapshot();
        auto step = host::make_copy(*pool, x, y);
        step->run();
        const std::string what = shown(step->kernel().c_str(), x, y);
        each_index(dims, [&](const Dims& i) {
            double wanted = raw(x, i);
            if (to == DType::b8) wanted = wanted != 0;
            if (to != DType::f32) wanted = std::trunc(wanted);
            if (to == DType::u8) wanted = static_cast<std::uint8_t>(static_cast<Int>(wanted));
            if (to == DType::s8) wanted = static_cast<std::int8_t>(static_cast<Int>(wanted));
            ++values;
            if (raw(y, i) != wanted) fail(what);
        });
        expect_gaps(what, y, before);
    }
    // Repeated elements, a slice of y, channel shuffle, heads.
    for (DType type : types)
        for (Int n : {1, 5, 16, 40}) {
            Value x(type, {3, 1, n}, {n, n, 1});
            x.randomize();
            Value y(type, {3, 4, n}, {4 * n, n, 1});
            const Tensor wide = x.repeated({3, 4, n});
            host::make_copy(*pool, wide, y)->run();
            each_index({3, 4, n}, [&](const Dims& i) {
                ++values;
                if (raw(y, i) != raw(wide, i)) fail("repeated elements");
            });
            Value lone(type, {1}, {1});
            lone.randomize();
            const Tensor everywhere = lone.repeated({n});
            Value filled(type, {n}, {1});
            host::make_copy(*pool, everywhere, filled)->run();
            each_index({n}, [&](const Dims& i) {
                ++values;
                if (raw(filled, i) != raw(everywhere, i)) fail("one element everywhere");
            });
            for (Int groups : {2, 3, 4}) {
                const Dims dims{50, groups, n};
                Value a(type, dims, {groups * n, n, 1}), b(type, dims, {groups * n, 1, groups});
                a.randomize();
                host::make_copy(*pool, a, b)->run();
                each_index(dims, [&](const Dims& i) {
                    ++values;
                    if (raw(a, i) != raw(b, i)) fail("channel shuffle");
                });
            }
        }
    end_group("moves and conversions");

    Value f(DType::f32, {6}, {1}), l(DType::s64, {6}, {1}), b(DType::b8, {6}, {1});
    const float nasty[] = {NAN, INFINITY, -INFINITY, -1.9f, 2.9f, -0.0f};
    std::memcpy(f.data(), nasty, sizeof nasty);
    host::make_copy(*pool, f, l)->run();
    host::make_copy(*pool, f, b)->run();
    if (raw(l, {3}) != -1 || raw(l, {4}) != 2 || raw(l, {5}) != 0) fail("f32 to s64");
    if (raw(b, {0}) != 1 || raw(b, {5}) != 0) fail("f32 to b8");
}

void test_fill() {
    const DType types[] = {DType::f32, DType::u8, DType::s8, DType::s32, DType::s64, DType::b8};
    for (int round = 0; round < 300; ++round) {
        const Dims dims = random_dims();
        const DType type = types[pick(0, 5)];
        Value y(type, dims, strides_of(dims, random_layout()));
        const auto before = y.snapshot();
        const double value = static_cast<double>(pick(0, 1) ? pick(0, 100) : 0);
        host::make_fill(*pool, value, y)->run();
        each_index(dims, [&](const Dims& i) {
            ++values;
            if (raw(y, i) != (type == DType::b8 ? static_cast<double>(value != 0) : value)) fail("fill");
        });
        expect_gaps("fill", y, before);
        Value codes(DType::u8, dims, strides_of(dims, random_layout()), random_q());
        host::make_fill(*pool, 0.3, codes)->run();
        each_index(dims, [&](const Dims& i) { expect("fill codes", codes, i, 0.3f); });
    }
    end_group("fill");
}

void test_binary_of_reals() {
    for (int round = 0; round < 2500; ++round) {
        const Dims dims = random_dims();
        const Layout layout = random_layout();
        const bool all_codes = pick(0, 2) == 0, same = pick(0, 2) != 0;
        const Dims strides = strides_of(dims, layout);
        // One operand may repeat along some dimensions.
        const bool has_b = pick(0, 1), broadcast_first = pick(0, 1);
        Dims small = dims;
        for (Int& d : small)
            if (has_b && pick(0, 1)) d = std::min<Int>(d, 1);
        const Dims dims_a = broadcast_first ? small : dims, dims_b = broadcast_first ? dims : small;
        const auto layout_of = [&](const Dims& d) {
            return d == dims && same ? strides : strides_of(d, random_layout());
        };
        Value a = random_real(dims_a, layout_of(dims_a), all_codes || pick(0, 1));
        Value b = random_real(dims_b, layout_of(dims_b), all_codes || pick(0, 1));
        const Tensor ta = a.repeated(dims), tb = b.repeated(dims);
        const auto op = static_cast<Binary>(pick(0, 13));
        const bool compares = op >= Binary::eq;
        const Epilogue e = compares ? Epilogue{} : random_epilogue();
        Value y = compares ? Value(DType::b8, dims, strides) : random_real(dims, strides, all_codes || pick(0, 1));
        const auto before = y.snapshot();
        auto step = host::make_binary(*pool, op, ta, tb, e, y);
        step->run();
        const std::string what = shown(step->kernel().c_str(), ta, tb) + shown(" to", y, y);
        each_index(dims, [&](const Dims& i) {
            const float p = real(ta, i), q = real(tb, i);
            float r = 0;
            switch (op) {
                case Binary::add: r = p + q; break;
                case Binary::sub: r = p - q; break;
                case Binary::mul: r = p * q; break;
                case Binary::div: r = p / q; break;
                case Binary::maximum: r = std::max(p, q); break;
                case Binary::minimum: r = std::min(p, q); break;
                case Binary::eq: r = p == q; break;
                case Binary::ne: r = p != q; break;
                case Binary::lt: r = p < q; break;
                case Binary::le: r = p <= q; break;
                case Binary::gt: r = p > q; break;
                case Binary::ge: r = p >= q; break;
                case Binary::logical_and: r = p != 0 && q != 0; break;
                case Binary::logical_or: r = p != 0 || q != 0; break;
            }
            const double wanted = exact_activation(e, static_cast<double>(r));
            // 1 + erf cancels in float, in torch too.
            const bool is_exact = e.kind != Activation::leaky_relu;
            expect(what, y, i, wanted, is_smooth(e) ? 1e-2 : 1e-3, is_smooth(e) ? 3e-6 : is_exact ? 0 : 1e-6,
                   is_smooth(e) ? std::abs(r) : 0);
        });
        expect_gaps(what, y, before);
    }
    end_group("binary of reals");

    // Extreme ratios of scales, where folding the scales would round too much.
    for (int round = 0; round < 400; ++round) {
        const Int n = pick(1, 300);
        Value a(DType::u8, {n}, {1}, random_q(std::exp(uniform(-12, 12)))),
            b(DType::u8, {n}, {1}, random_q(std::exp(uniform(-12, 12))));
        Value y(DType::u8, {n}, {1}, random_q(std::exp(uniform(-12, 12))));
        a.randomize();
        b.randomize();
        const Binary op = pick(0, 2) == 0 ? Binary::mul : pick(0, 1) ? Binary::add : Binary::sub;
        host::make_binary(*pool, op, a, b, {}, y)->run();
        each_index({n}, [&](const Dims& i) {
            const float p = real(a, i), q = real(b, i);
            expect("extreme scales", y, i, op == Binary::mul ? p * q : op == Binary::add ? p + q : p - q);
        });
    }
    // In place, and NaN.
    for (int round = 0; round < 100; ++round) {
        const Int n = pick(1, 3000);
        Value a = random_real({n}, {1}, pick(0, 1)), b = random_real({n}, {1}, pick(0, 1));
        Value kept(a.tensor().dtype, {n}, {1}, a.tensor().q);
        std::memcpy(kept.data(), a.data(), static_cast<std::size_t>(a.bytes()));
        host::make_binary(*pool, Binary::add, a, b, {Activation::relu, 0, 0}, a)->run();
        each_index(
            {n}, [&](const Dims& i) { expect("in place", a, i, std::max(0.0f, real(kept, i) + real(b, i)), 1e-3, 0); });
        Value x(DType::f32, {n}, {1}), z = random_real({n}, {1}, true);
        x.randomize(4, true);
        for (const Epilogue& e : {Epilogue{}, Epilogue{Activation::relu, 0, 0}, Epilogue{Activation::hardtanh, -1, 1}})
            for (Binary op : {Binary::add, Binary::maximum, Binary::minimum}) {
                Value codes = random_real({n}, {1}, true), floats = random_real({n}, {1}, false);
                host::make_binary(*pool, op, x, z, e, codes)->run();
                host::make_binary(*pool, op, z, x, e, floats)->run();
                each_index({n}, [&](const Dims& i) {
                    const float p = real(x, i), q = real(z, i);
                    float r = p + q;
                    if (op != Binary::add)
                        r = std::isnan(p) ? p : op == Binary::maximum ? std::max(p, q) : std::min(p, q);
                    expect("NaN to codes", codes, i, exact_activation(e, r));
                    expect("NaN to floats", floats, i, exact_activation(e, r), 0, 0);
                });
            }
    }
    end_group("binary, extremes");
}

void test_binary_of_integers() {
    const DType types[] = {DType::s64, DType::s32, DType::b8, DType::u8};
    for (int round = 0; round < 600; ++round) {
        const Dims dims = random_dims();
        const DType type = types[pick(0, 3)];
        Value a(type, dims, strides_of(dims, random_layout())), b(type, Dims(dims.size(), 1), Dims(dims.size(), 1));
        a.randomize();
        b.randomize();
        const bool repeats = pick(0, 1) && std::find(dims.begin(), dims.end(), 0) == dims.end();
        Value full(type, dims, strides_of(dims, random_layout()));
        full.randomize();
        const Tensor tb = repeats ? b.repeated(dims) : full.tensor();
        auto op = static_cast<Binary>(pick(0, 13));
        if (op == Binary::div) op = Binary::eq;
        const bool compares = op >= Binary::eq;
        if (type == DType::b8 && !compares) op = Binary::logical_and;
        const bool to_b8 = op >= Binary::eq;
        Value y(to_b8 ? DType::b8 : type, dims, strides_of(dims, random_layout()));
        host::make_binary(*pool, op, a, tb, {}, y)->run();
        each_index(dims, [&](const Dims& i) {
            const double p = raw(a, i), q = raw(tb, i);
            double r = 0;
            switch (op) {
                case Binary::add: r = p + q; break;
                case Binary::sub: r = p - q; break;
                case Binary::mul: r = p * q; break;
                case Binary::maximum: r = std::max(p, q); break;
                case Binary::minimum: r = std::min(p, q); break;
                case Binary::eq: r = p == q; break;
                case Binary::ne: r = p != q; break;
                case Binary::lt: r = p < q; break;
                case Binary::le: r = p <= q; break;
                case Binary::gt: r = p > q; break;
                case Binary::ge: r = p >= q; break;
                case Binary::logical_and: r = p != 0 && q != 0; break;
                default: r = p != 0 || q != 0; break;
            }
            if (type == DType::u8 && !to_b8) r = static_cast<std::uint8_t>(static_cast<Int>(r));
            ++values;
            if (raw(y, i) != r) fail(shown("integers", a, y));
        });
    }
    Value m(DType::b8, {70}, {1}), n(DType::b8, {70}, {1});
    m.randomize();
    host::make_unary(*pool, Unary::logical_not, 0, 0, {}, m, n)->run();
    for (Int i = 0; i < 70; ++i)
        if (raw(n, {i}) != 1 - raw(m, {i})) fail("logical_not");
    end_group("integers and b8");
}

void test_unary() {
    for (int round = 0; round < 2000; ++round) {
        const Dims dims = random_dims();
        const Dims strides = strides_of(dims, random_layout());
        auto op = pick(0, 1) ? Unary::activation : static_cast<Unary>(pick(0, 14));
        if (op == Unary::logical_not) op = Unary::neg;
        Epilogue e = op == Unary::activation || pick(0, 3) == 0 ? random_epilogue() : Epilogue{};
        const float exponents[] = {2, 3, 0.5f, 1.7f, -1};
        float a = op == Unary::power ? exponents[pick(0, 4)] : uniform(-2, 2), b = uniform(-1, 1);
        Value x = random_real(dims, strides, pick(0, 1), 6);
        Value y = random_real(dims, pick(0, 1) ? strides : strides_of(dims, random_layout()), pick(0, 1));
        const auto before = y.snapshot();
        auto step = host::make_unary(*pool, op, a, b, e, x, y);
        step->run();
        const std::string what = shown((step->kernel() + " " + std::to_string(static_cast<int>(op)) + "," +
                                        std::to_string(static_cast<int>(e.kind))).c_str(), x, y);
        each_index(dims, [&](const Dims& i) {
            const float given = real(x, i);
            double v = static_cast<double>(given), size = 0;
            switch (op) {
                case Unary::affine:
                    size = std::abs(a * v) + std::abs(static_cast<double>(b));
                    v = static_cast<double>(a) * v + static_cast<double>(b);
                    break;
                case Unary::exp: v = std::exp(v); break;
                case Unary::log: v = std::log(v); break;
                case Unary::sqrt: v = std::sqrt(v); break;
                case Unary::rsqrt: v = 1 / std::sqrt(v); break;
                case Unary::neg: v = -v; break;
                case Unary::abs: v = std::abs(v); break;
                case Unary::erf: v = std::erf(v); break;
                case Unary::reciprocal: v = 1 / v; break;
                case Unary::sin: v = std::sin(v); break;
                case Unary::cos: v = std::cos(v); break;
                case Unary::floor: v = std::floor(v); break;
                case Unary::power: v = std::pow(v, static_cast<double>(a)); break;
                default: break;
            }
            const double r = exact_activation(e, v);
            const bool is_hard = op == Unary::activation || op == Unary::neg || op == Unary::abs || op == Unary::affine;
            expect(what, y, i, r, is_hard && !is_smooth(e) ? 1e-3 : 1e-2, 2e-6,
                   std::max(size, is_smooth(e) ? std::abs(v) : 0.0));
        });
        expect_gaps(what, y, before);
    }
    end_group("unary");

    // The accuracy of the functions that are ours, over their range; gelu's errors count against |x|.
    const Int n = 100000;
    Value x(DType::f32, {n}, {1}), y(DType::f32, {n}, {1});
    for (Int i = 0; i < n; ++i) {
        const float magnitude = std::exp(uniform(-12, 4.4f));
        x.put(x.data() + 4 * i, pick(0, 1) ? magnitude : -magnitude);
    }
    for (int k = 0; k < kActivations; ++k) {
        const auto kind = static_cast<Activation>(k);
        const Epilogue e{kind, 0, 0};
        if (!is_smooth(e)) continue;
        host::make_unary(*pool, Unary::activation, 0, 0, e, x, y)->run();
        const bool cancels = kind == Activation::gelu || kind == Activation::gelu_tanh;
        for (Int i = 0; i < n; ++i) {
            const double v = static_cast<double>(real(x, {i}));
            expect("accuracy of activation " + std::to_string(static_cast<int>(kind)) + " of " + std::to_string(v), y,
                   {i}, exact_activation(e, v), 0, 1e-6, cancels ? std::abs(v) : 0);
        }
    }
    for (Unary op : {Unary::exp, Unary::erf}) {
        host::make_unary(*pool, op, 0, 0, {}, x, y)->run();
        for (Int i = 0; i < n; ++i) {
            const double v = static_cast<double>(real(x, {i}));
            expect("accuracy of exp or erf", y, {i}, op == Unary::exp ? std::exp(v) : std::erf(v), 0, 1e-6);
        }
    }
    x.randomize(4, true);
    for (int kind = 0; kind < kActivations; ++kind) {
        const Epilogue e{static_cast<Activation>(kind), kind == static_cast<int>(Activation::leaky_relu) ? 0.1f : -1.0f, 1};
        Value codes(DType::u8, {n}, {1}, random_q());
        host::make_unary(*pool, Unary::activation, 0, 0, e, x, codes)->run();
        host::make_unary(*pool, Unary::activation, 0, 0, e, x, y)->run();
        for (Int i = 0; i < n; ++i) {
            const double v = static_cast<double>(real(x, {i}));
            double r = exact_activation(e, v);
            if (std::abs(r) > 3.4e38) r = r > 0 ? INFINITY : -INFINITY;
            // x**3 of the largest floats is Inf: tanh of it is 1 all the same. -Inf times 0 is NaN, as in torch.
            expect("special values of activation " + std::to_string(kind) + " of " + std::to_string(v), y, {i}, r, 0,
                   2e-6, std::min(std::abs(v), 1e30));
            expect("special values, codes", codes, {i}, r, 1e-2);
        }
    }
    end_group("functions, accuracy");
}

void test_where() {
    const DType types[] = {DType::f32, DType::u8, DType::s64, DType::b8};
    for (int round = 0; round < 500; ++round) {
        const Dims dims = random_dims();
        const DType type = types[pick(0, 3)];
        const auto any = [&](DType t) {
            Dims small = dims;
            for (Int& d : small)
                if (pick(0, 2) == 0) d = std::min<Int>(d, 1);
            return Value(t, small, strides_of(small, random_layout()));
        };
        Value c = any(DType::b8), a = any(type), b = any(type);
        c.randomize();
        a.randomize();
        b.randomize();
        const Tensor tc = c.repeated(dims), ta = a.repeated(dims), tb = b.repeated(dims);
        Value y(type, dims, strides_of(dims, random_layout()));
        host::make_where(*pool, tc, ta, tb, y)->run();
        each_index(dims, [&](const Dims& i) {
            ++values;
            if (raw(y, i) != (raw(tc, i) != 0 ? raw(ta, i) : raw(tb, i))) fail(shown("where", ta, y));
        });
    }
    end_group("where");
}

void test_channel_affine() {
    for (int round = 0; round < 800; ++round) {
        const Dims dims = random_dims();
        if (dims.empty()) continue;
        const int axis = static_cast<int>(pick(0, static_cast<Int>(dims.size()) - 1));
        const Int channels = dims[static_cast<std::size_t>(axis)];
        Value scale(DType::f32, {channels}, {1}), shift(DType::f32, {channels}, {1});
        scale.randomize(2);
        shift.randomize(2);
        const Dims strides = strides_of(dims, random_layout());
        Value x = random_real(dims, strides, pick(0, 1));
        Value y = random_real(dims, pick(0, 2) ? strides : strides_of(dims, random_layout()), pick(0, 1));
        const auto before = y.snapshot();
        const Epilogue e = random_epilogue();
        auto step = host::make_channel_affine(*pool, x, axis, scale, shift, e, y);
        step->run();
        const std::string what = shown(step->kernel().c_str(), x, y);
        each_index(dims, [&](const Dims& i) {
            const Dims c{i[static_cast<std::size_t>(axis)]};
            const double product = static_cast<double>(real(x, i)) * static_cast<double>(real(scale, c));
            const double v = product + static_cast<double>(real(shift, c));
            expect(what, y, i, exact_activation(e, v), is_smooth(e) ? 1e-2 : 1e-3, 1e-6,
                   std::abs(product) + std::abs(v) + std::abs(static_cast<double>(real(shift, c))));
        });
        expect_gaps(what, y, before);
    }
    end_group("channel_affine");
}

void test_refusals() {
    const auto refused = [](const char* what, const std::function<void()>& f) {
        try {
            f();
            fail(std::string(what) + " was not refused");
        } catch (const Unsupported&) {
            ++values;
        }
    };
    Value f(DType::f32, {4}, {1}), s(DType::s64, {4}, {1}), b(DType::b8, {4}, {1}), q(DType::u8, {4}, {1}, QParams{});
    refused("codes to s64", [&] { host::make_copy(*pool, q, s); });
    refused("f32 + s64", [&] { host::make_binary(*pool, Binary::add, f, s, {}, f); });
    refused("s64 / s64", [&] { host::make_binary(*pool, Binary::div, s, s, {}, s); });
    refused("b8 + b8", [&] { host::make_binary(*pool, Binary::add, b, b, {}, b); });
    refused("exp of s64", [&] { host::make_unary(*pool, Unary::exp, 0, 0, {}, s, f); });
    refused("where by f32", [&] { host::make_where(*pool, f, f, f, f); });
    end_group("refusals");
}

int run() {
    for (int threads : {1, 3}) {
        ThreadPool threads_of_test(threads);
        pool = &threads_of_test;
        random_bits.seed(static_cast<unsigned>(threads));
        test_copy_of_reals();
        test_signed_codes();
        test_moves();
        test_fill();
        test_binary_of_reals();
        test_binary_of_integers();
        test_unary();
        test_where();
        test_channel_affine();
        test_refusals();
    }
    if (failures > 0) std::printf("%d FAILURES\n", failures);
    return failures > 0;
}

}  // namespace

int main() { return run_for_every_isa(run); }
