// Every kernel of the SYCL backend against a naive loop in double.
// P=<prefix of an environment with onednn and onednn-devel>
// g++ -std=c++17 -O2 native/tests/test_sycl.cpp -ldl -pthread -o test_sycl
// ./test_sycl [LIBRARY [cpu|gpu]]        LIBRARY: ./libquantflow_sycl.so
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <thread>

#include "../src/activation_formulas.hpp"
#include "../src/backend.hpp"
#include "../sycl/sycl_backend.hpp"

using namespace quantflow;

namespace {

using Dims = std::vector<std::int64_t>;
using Clock = std::chrono::steady_clock;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
// Allowed distance from a tie, in codes.
constexpr double kPlain = 1e-3, kTranscendental = 1e-2;

std::unique_ptr<Backend> device;
bool is_exact = false;  // full-range int8 products in oneDNN
int failures = 0, checks = 0;
std::mt19937 generator(20240607);

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

bool expect(bool holds, const std::string& what) {
    ++checks;
    if (!holds && ++failures <= 40) std::printf("  FAILED: %s\n", what.c_str());
    return holds;
}

std::string text_of(const Dims& dims) {
    std::string text = "(";
    for (auto d : dims) text += std::to_string(d) + ",";
    return text + ")";
}

// ------------------------------------------------------------------------------------------------ tensors

constexpr std::size_t kGuard = 64;

// A tensor in the device's memory, between guard bytes, with a copy of its bytes here.
struct Value {
    Tensor t;
    std::vector<std::byte> bytes;
    std::byte* memory = nullptr;
    std::byte* base = nullptr;

    Value(DType dtype, Dims dims, Dims strides = {}, std::optional<QParams> q = {}) {
        t.dtype = dtype;
        t.strides = strides.empty() ? row_major(dims) : std::move(strides);
        t.dims = std::move(dims);
        t.q = q;
        std::int64_t last = 0;
        for (std::size_t i = 0; i < t.dims.size(); ++i) last += (t.dims[i] - 1) * t.strides[i];
        const std::size_t size = t.count() == 0 ? 0 : static_cast<std::size_t>((last + 1) * size_of(dtype));
        bytes.assign(size, std::byte{0});
        memory = static_cast<std::byte*>(device->allocate(size + 2 * kGuard));
        base = memory;
        t.place = {&base, static_cast<std::int64_t>(kGuard)};
    }
    Value(const Value&) = delete;
    ~Value() { device->release(memory); }

    template <typename T>
    T* data() {
        return reinterpret_cast<T*>(bytes.data());
    }
    std::int64_t offset(const Dims& at) const {
        std::int64_t i = 0;
        for (std::size_t d = 0; d < at.size(); ++d) i += at[d] * t.strides[d];
        return i;
    }
    double raw(std::int64_t i) {
        switch (t.dtype) {
            case DType::f32: return data<float>()[i];
            case DType::u8: return data<std::uint8_t>()[i];
            case DType::s8: return data<std::int8_t>()[i];
            case DType::s32: return data<std::int32_t>()[i];
            case DType::s64: return static_cast<double>(data<std::int64_t>()[i]);
            default: return data<std::uint8_t>()[i] != 0;
        }
    }
    double get(const Dims& at) {  // real
        const double v = raw(offset(at));
        return t.q ? (v - t.q->zero_point) * t.q->scale : v;
    }
    void set(std::int64_t i, double v) {
        switch (t.dtype) {
            case DType::f32: data<float>()[i] = static_cast<float>(v); break;
            case DType::s32: data<std::int32_t>()[i] = static_cast<std::int32_t>(v); break;
            case DType::s64: data<std::int64_t>()[i] = static_cast<std::int64_t>(v); break;
            case DType::s8: data<std::int8_t>()[i] = static_cast<std::int8_t>(v); break;
            default: data<std::uint8_t>()[i] = static_cast<std::uint8_t>(v); break;
        }
    }
    std::size_t elements() const { return bytes.size() / static_cast<std::size_t>(size_of(t.dtype)); }

    Value& fill(const std::function<double()>& next) {
        for (std::size_t i = 0; i < elements(); ++i) set(static_cast<std::int64_t>(i), next());
        return *this;
    }
    // Codes over the whole range, or reals.
    Value& random(float low = -3, float high = 3) {
        if (t.q) return fill([this] { return uniform(t.q->qmin, t.q->qmax); });
        if (t.dtype == DType::b8) return fill([] { return uniform(0, 1); });
        if (t.dtype == DType::f32) return fill([=] { return real(low, high); });
        return fill([] { return uniform(-100, 100); });
    }
    Value& up() {
        std::vector<std::byte> all(bytes.size() + 2 * kGuard, std::byte{0xA5});
        std::copy(bytes.begin(), bytes.end(), all.begin() + kGuard);
        device->copy(base, all.data(), all.size());
        return *this;
    }
    Value& down(const std::string& what) {
        std::vector<std::byte> all(bytes.size() + 2 * kGuard);
        device->copy(all.data(), base, all.size());
        device->wait();
        std::copy(all.begin() + kGuard, all.end() - kGuard, bytes.begin());
        bool intact = true;
        for (std::size_t i = 0; i < kGuard; ++i)
            intact = intact && all[i] == std::byte{0xA5} && all[all.size() - 1 - i] == std::byte{0xA5};
        expect(intact, what + ": wrote outside its tensor");
        return *this;
    }
};

QParams codes_u8(float scale, int zero_point, int qmax = 255) { return {scale, zero_point, 0, qmax}; }
QParams codes_s8(float scale, int zero_point = 0) { return {scale, zero_point, -128, 127}; }

// Every index of `dims`, in row-major order.
void each(const Dims& dims, const std::function<void(const Dims&)>& f) {
    for (auto d : dims)
        if (d == 0) return;
    Dims at(dims.size(), 0);
    for (;;) {
        f(at);
        std::size_t d = dims.size();
        while (d > 0 && ++at[d - 1] == dims[d - 1]) at[--d] = 0;
        if (d == 0) return;
    }
}

Dims transposed(const Dims& dims) {  // strides of a tensor whose first dimension varies fastest
    Dims strides(dims.size());
    std::int64_t step = 1;
    for (std::size_t i = 0; i < dims.size(); ++i) {
        strides[i] = step;
        step *= dims[i];
    }
    return strides;
}

// y against want(index): reals are coded by the formula.
void compare(const std::string& what, Value& y, const std::function<double(const Dims&)>& want, double tolerance,
             double relative = 2e-5, double absolute = 2e-6) {
    y.down(what);
    std::string first;
    int wrong = 0;
    each(y.t.dims, [&](const Dims& at) {
        const double w = want(at), got = y.raw(y.offset(at));
        bool ok;
        if (y.t.q) {
            const QParams& q = *y.t.q;
            const double v = w / q.scale + q.zero_point;
            const double limited = std::isnan(v) ? q.qmax : std::min<double>(std::max<double>(v, q.qmin), q.qmax);
            ok = std::fabs(got - limited) <= 0.5 + tolerance && got >= q.qmin && got <= q.qmax;
        } else if (std::isnan(w) || std::isinf(w)) {
            ok = std::isnan(w) ? std::isnan(got) : got == w;
        } else {
            ok = y.t.dtype == DType::f32 ? std::fabs(got - w) <= absolute + relative * std::fabs(w) : got == w;
        }
        if (!ok && wrong++ == 0) first = text_of(at) + " is " + std::to_string(got) + ", real " + std::to_string(w);
    });
    expect(wrong == 0, what + " " + text_of(y.t.dims) + ": " + std::to_string(wrong) + " wrong, first " + first);
}

std::string run(const std::unique_ptr<Step>& step) {
    step->run();
    device->wait();
    return step->kernel();
}

const std::vector<Epilogue> kEpilogues = [] {
    std::vector<Epilogue> all;
    for (int kind = 0; kind < kActivations; ++kind) all.push_back({static_cast<Activation>(kind)});
    all[static_cast<std::size_t>(Activation::hardtanh)].b = 6;
    all[static_cast<std::size_t>(Activation::leaky_relu)].a = 0.125f;
    return all;
}();

double tolerance_of(const Epilogue& e) {
    switch (e.kind) {
        case Activation::none:
        case Activation::relu:
        case Activation::hardtanh:
        case Activation::leaky_relu: return kPlain;
        default: return kTranscendental;
    }
}

void group(const char* name, const std::function<void()>& body) {
    const int before = failures, checked = checks;
    const auto start = Clock::now();
    try {
        body();
    } catch (const std::exception& e) {
        expect(false, std::string("exception: ") + e.what());
    }
    std::printf("%-16s %5d checks, %2d failed, %.1f s\n", name, checks - checked, failures - before,
                seconds_since(start));
    std::fflush(stdout);
}

// ------------------------------------------------------------------------------------------------ groups

void test_copy() {
    const std::vector<std::pair<Dims, Dims>> layouts = {
        {{0}, {}},          {{1}, {}},           {{7}, {}},         {{1000}, {}},          {{3, 0, 5}, {}},
        {{5, 17}, {1, 5}},  {{2, 3, 9, 11}, {}}, {{2, 3, 9, 11}, channels_last({2, 3, 9, 11})},
        {{2, 5, 3, 4, 7}, transposed({2, 5, 3, 4, 7})}, {{2, 3, 2, 3, 2, 17}, transposed({2, 3, 2, 3, 2, 17})},
        {{33, 20}, {40, 2}}, {{1, 1, 1}, {}},
    };
    const std::vector<std::pair<DType, std::optional<QParams>>> forms = {
        {DType::f32, {}},
        {DType::u8, codes_u8(0.02f, 128)},
        {DType::u8, codes_u8(0.031f, 3, 127)},
        {DType::s8, codes_s8(0.025f)},
        {DType::s8, codes_s8(0.02f, -7)},
    };
    for (const auto& [dims, strides] : layouts)
        for (const auto& [tx, qx] : forms)
            for (const auto& [ty, qy] : forms) {
                Value x(tx, dims, {}, qx), y(ty, dims, strides, qy);
                x.random(-4, 4);
                if (tx == DType::f32 && x.elements() > 6) {
                    x.set(0, kNaN);
                    x.set(1, kInf);
                    x.set(2, -kInf);
                    x.set(3, 1e30);
                    x.set(4, -0.0);
                    x.set(5, 0.01);
                }
                x.up();
                y.up();
                const auto name = run(device->copy(x.t, y.t));
                const bool moves = tx == ty && qx == qy;
                compare("copy " + name, y, [&](const Dims& at) { return x.get(at); }, moves ? 0 : kPlain);
                // The other way round: strided reads.
                Value z(tx, dims, {}, qx);
                if (moves) {
                    z.up();
                    run(device->copy(y.t, z.t));
                    compare("copy back", z, [&](const Dims& at) { return x.get(at); }, 0);
                }
            }
    for (const DType tx : {DType::f32, DType::s32, DType::s64, DType::b8, DType::u8})
        for (const DType ty : {DType::f32, DType::s32, DType::s64, DType::b8}) {
            Value x(tx, {13, 5}, {1, 13}), y(ty, {13, 5});
            tx == DType::u8 ? x.fill([] { return uniform(0, 255); }) : x.random(-50, 50);
            x.up();
            y.up();
            run(device->copy(x.t, y.t));
            compare("cast", y, [&](const Dims& at) {
                const double v = x.get(at);
                return ty == DType::b8 ? v != 0 : ty == DType::f32 ? v : std::trunc(v);
            }, 0);
        }
    // Broadcast by stride 0, and the largest s64, which no float holds.
    Value x(DType::s64, {1, 4}), y(DType::s64, {3, 4});
    for (int i = 0; i < 4; ++i) x.data<std::int64_t>()[i] = std::numeric_limits<std::int64_t>::max() - i;
    x.up();
    y.up();
    Tensor wide = x.t;
    wide.dims = {3, 4};
    wide.strides = {0, 1};
    run(device->copy(wide, y.t));
    y.down("s64");
    for (int i = 0; i < 12; ++i)
        expect(y.data<std::int64_t>()[i] == std::numeric_limits<std::int64_t>::max() - i % 4, "s64 is moved exactly");
}

void test_fill() {
    const auto check = [](DType dtype, std::optional<QParams> q, double value, double want) {
        for (const Dims& strides : {Dims{}, Dims{1, 5}, Dims{14, 2}}) {
            Value y(dtype, {5, 7}, strides, q);
            y.up();
            run(device->fill(value, y.t));
            compare("fill", y, [&](const Dims&) { return want; }, 0);
        }
    };
    check(DType::f32, {}, 1.5, 1.5);
    check(DType::f32, {}, -kInf, -kInf);
    check(DType::s32, {}, -7, -7);
    check(DType::s64, {}, 1e12, 1e12);
    check(DType::b8, {}, 2, 1);
    check(DType::u8, codes_u8(0.5f, 10), 0, 0);
    check(DType::s8, codes_s8(0.5f, -3), -200, -62.5);
}

double binary(Binary op, double a, double b) {
    switch (op) {
        case Binary::add: return a + b;
        case Binary::sub: return a - b;
        case Binary::mul: return a * b;
        case Binary::div: return a / b;
        case Binary::maximum: return std::isnan(a) || a > b ? a : b;
        case Binary::minimum: return std::isnan(a) || a < b ? a : b;
        case Binary::eq: return a == b;
        case Binary::ne: return a != b;
        case Binary::lt: return a < b;
        case Binary::le: return a <= b;
        case Binary::gt: return a > b;
        case Binary::ge: return a >= b;
        case Binary::logical_and: return a != 0 && b != 0;
        default: return a != 0 || b != 0;
    }
}

void test_binary() {
    struct Layout {
        Dims dims, a, b, y;
    };
    const std::vector<Layout> layouts = {
        {{4, 37}, {37, 1}, {37, 1}, {37, 1}},
        {{4, 37}, {37, 1}, {0, 1}, {37, 1}},
        {{4, 37}, {37, 1}, {1, 0}, {37, 1}},
        {{4, 37}, {0, 0}, {1, 4}, {37, 1}},
        {{2, 19, 5, 3}, channels_last({2, 19, 5, 3}), {19, 1, 0, 0}, channels_last({2, 19, 5, 3})},
        {{2, 3, 16, 17}, row_major({2, 3, 16, 17}), channels_last({2, 3, 16, 17}), row_major({2, 3, 16, 17})},
        {{0, 5}, {5, 1}, {5, 1}, {5, 1}},
        {{1}, {1}, {1}, {1}},
    };
    for (const auto& l : layouts)
        for (int o = 0; o <= static_cast<int>(Binary::logical_or); ++o) {
            const auto op = static_cast<Binary>(o);
            const bool compares = op >= Binary::eq;
            for (int form = 0; form < 4; ++form) {
                std::optional<QParams> qa, qb, qy;
                if (form == 1 || form == 2) qa = codes_s8(0.03f);
                if (form == 1 || form == 3) qb = codes_u8(0.02f, 100);
                if (!compares && form != 2) qy = form == 0 ? codes_s8(0.05f, 3) : codes_u8(0.04f, 128);
                Value a(qa ? DType::s8 : DType::f32, l.dims, l.a, qa), b(qb ? DType::u8 : DType::f32, l.dims, l.b, qb);
                Value y(compares ? DType::b8 : qy ? (form == 0 ? DType::s8 : DType::u8) : DType::f32, l.dims, l.y, qy);
                a.random();
                b.random(0.2f, 3);
                if (form == 0 && a.elements() > 4 && !compares) {
                    a.set(0, kNaN);
                    a.set(1, kInf);
                    a.set(2, -kInf);
                }
                if (compares && a.elements() > 4 && !qa && !qb) a.set(3, b.raw(0));
                a.up();
                b.up();
                y.up();
                Epilogue e;
                if (o % 3 == 0 && !compares) e = {Activation::relu};
                const auto name = run(device->binary(op, a.t, b.t, e, y.t));
                const double slack = op == Binary::div ? 2e-3 : kPlain;
                compare("binary " + std::to_string(o) + " " + name, y, [&](const Dims& at) {
                    return exact_activation(e, binary(op, a.get(at), b.get(at)));
                }, slack, 1e-4);
            }
            for (const DType type : {DType::s32, DType::s64, DType::b8, DType::u8}) {
                const bool is_offered = compares || (type != DType::b8 && op != Binary::div);
                Value a(type, l.dims, l.a), b(type, l.dims, l.b);
                Value y(compares ? DType::b8 : type, l.dims, l.y);
                const auto next = [&]() -> double { return type == DType::b8 ? uniform(0, 1) : uniform(0, 5); };
                a.fill(next).up();
                b.fill(next).up();
                y.up();
                if (!is_offered) {
                    bool refused = y.t.count() == 0;
                    try {
                        device->binary(op, a.t, b.t, {}, y.t);
                    } catch (const Unsupported&) {
                        refused = true;
                    }
                    expect(refused, "binary refuses what it does not offer");
                    continue;
                }
                run(device->binary(op, a.t, b.t, {}, y.t));
                compare("integer binary " + std::to_string(o), y, [&](const Dims& at) {
                    const double r = binary(op, a.get(at), b.get(at));
                    return type == DType::u8 && !compares ? static_cast<double>(static_cast<std::uint8_t>(static_cast<int>(r))) : r;
                }, 0);
            }
        }
    // Every epilogue.
    for (const auto& e : kEpilogues) {
        Value a(DType::f32, {301}), b(DType::f32, {301}), y(DType::f32, {301});
        a.random(-6, 6).up();
        b.random(-1, 1).up();
        y.up();
        run(device->binary(Binary::add, a.t, b.t, e, y.t));
        compare("binary epilogue", y, [&](const Dims& at) { return exact_activation(e, static_cast<float>(a.get(at) + b.get(at))); },
                0, 2e-6, 1e-6);
    }
}

void test_unary() {
    const auto f = [](Unary op, float a, float b, double r) {
        switch (op) {
            case Unary::affine: return a * r + b;
            case Unary::exp: return std::exp(r);
            case Unary::log: return std::log(r);
            case Unary::sqrt: return std::sqrt(r);
            case Unary::rsqrt: return 1 / std::sqrt(r);
            case Unary::neg: return -r;
            case Unary::abs: return std::fabs(r);
            case Unary::erf: return std::erf(r);
            case Unary::reciprocal: return 1 / r;
            case Unary::sin: return std::sin(r);
            case Unary::cos: return std::cos(r);
            case Unary::floor: return std::floor(r);
            case Unary::power: return std::pow(r, static_cast<double>(a));
            default: return r;
        }
    };
    for (int o = 0; o <= static_cast<int>(Unary::power); ++o) {
        const auto op = static_cast<Unary>(o);
        if (op == Unary::logical_not) continue;
        const bool is_positive = op == Unary::log || op == Unary::sqrt || op == Unary::rsqrt || op == Unary::power ||
                                 op == Unary::reciprocal;
        for (int form = 0; form < 4; ++form) {
            std::optional<QParams> qx, qy;
            if (form & 1) qx = codes_u8(0.0234375f, is_positive ? 0 : 128);
            if (form & 2) qy = codes_s8(0.021f, -4);
            Value x(qx ? DType::u8 : DType::f32, {3, 5, 67}, {}, qx);
            Value y(qy ? DType::s8 : DType::f32, {3, 5, 67}, form == 3 ? transposed({3, 5, 67}) : Dims{}, qy);
            x.random(is_positive ? 0.01f : -3, 3);
            if (qx && is_positive) x.fill([] { return uniform(1, 255); });
            if (!qx && qy) x.set(0, kNaN);
            x.up();
            y.up();
            const Epilogue e = op == Unary::activation ? kEpilogues[5] : Epilogue{};
            run(device->unary(op, 1.5f, 0.25f, e, x.t, y.t));
            compare("unary " + std::to_string(o), y,
                    [&](const Dims& at) { return exact_activation(e, f(op, 1.5f, 0.25f, x.get(at))); }, kTranscendental, 1e-5,
                    1e-6);
        }
    }
    for (const auto& e : kEpilogues)
        for (const bool coded : {false, true}) {
            std::optional<QParams> qx, qy;
            if (coded) qx = codes_s8(0.05f), qy = codes_u8(0.03f, 20);
            Value x(coded ? DType::s8 : DType::f32, {700}, {}, qx), y(coded ? DType::u8 : DType::f32, {700}, {}, qy);
            x.random(-6, 6).up();
            y.up();
            run(device->unary(Unary::activation, 0, 0, e, x.t, y.t));
            compare("activation", y, [&](const Dims& at) { return exact_activation(e, x.get(at)); }, kTranscendental, 2e-6, 1e-6);
        }
    Value x(DType::f32, {6}), y(DType::f32, {6});
    const float nasty[6] = {1e6f, -12345.678f, 0, 1e-30f, -0.0f, 3e7f};
    std::copy(nasty, nasty + 6, x.data<float>());
    x.up();
    y.up();
    run(device->unary(Unary::sin, 0, 0, {}, x.t, y.t));
    compare("sin of large arguments", y, [&](const Dims& at) { return std::sin(x.get(at)); }, 0, 1e-5, 1e-6);
    Value b(DType::b8, {9}), n(DType::b8, {9});
    b.random().up();
    n.up();
    run(device->unary(Unary::logical_not, 0, 0, {}, b.t, n.t));
    compare("logical_not", n, [&](const Dims& at) { return b.get(at) == 0; }, 0);
}

void test_where() {
    const Dims dims = {3, 4, 33};
    for (const DType type : {DType::f32, DType::s64, DType::b8, DType::u8}) {
        std::optional<QParams> q;
        if (type == DType::u8) q = codes_u8(0.1f, 7);
        Value c(DType::b8, dims, {0, 33, 1}), a(type, dims, {}, q), b(type, dims, transposed(dims), q), y(type, dims, {}, q);
        c.random().up();
        a.random().up();
        b.random().up();
        y.up();
        run(device->where(c.t, a.t, b.t, y.t));
        compare("where", y, [&](const Dims& at) { return c.get(at) != 0 ? a.get(at) : b.get(at); }, 0);
    }
}

void test_channel_affine() {
    const Dims dims = {2, 21, 3, 5};
    for (const int axis : {1, -1, 0})
        for (const bool last : {false, true})
            for (const bool coded : {false, true}) {
                std::optional<QParams> q, qy;
                if (coded) q = codes_s8(0.05f, 2), qy = codes_u8(0.06f, 60);
                const auto strides = last ? channels_last(dims) : row_major(dims);
                Value x(coded ? DType::s8 : DType::f32, dims, strides, q), y(coded ? DType::u8 : DType::f32, dims, strides, qy);
                const std::size_t at_axis = axis < 0 ? dims.size() - 1 : static_cast<std::size_t>(axis);
                Value s(DType::f32, {dims[at_axis]}), b(DType::f32, {dims[at_axis]});
                x.random().up();
                s.random().up();
                b.random().up();
                y.up();
                const Epilogue e{Activation::leaky_relu, 0.1f};
                run(device->channel_affine(x.t, axis, s.t, b.t, e, y.t));
                compare("channel_affine", y, [&](const Dims& at) {
                    return exact_activation(e, x.get(at) * s.get({at[at_axis]}) + b.get({at[at_axis]}));
                }, kPlain, 2e-5, 1e-5);
            }
}

void test_gather() {
    for (const bool coded : {false, true})
        for (const bool recoded : {false, true}) {
            std::optional<QParams> qt, qy;
            if (coded) qt = codes_s8(0.05f, 2);
            if (recoded) qy = codes_u8(0.06f, 60);
            Value table(coded ? DType::s8 : DType::f32, {11, 35}, {}, qt), index(DType::s64, {2, 3});
            Value y(recoded ? DType::u8 : DType::f32, {2, 3, 35}, {}, qy);
            table.random().up();
            index.fill([] { return uniform(0, 10); }).up();
            y.up();
            const auto step = device->gather(table.t, index.t, y.t);
            run(step);
            compare("gather", y, [&](const Dims& at) {
                return table.get({static_cast<std::int64_t>(index.get({at[0], at[1]})), at[2]});
            }, kPlain);
            for (const int bad : {-1, 11}) {
                index.set(4, bad);
                index.up();
                std::string message;
                try {
                    run(step);
                } catch (const Error& e) {
                    message = e.what();
                }
                expect(message.find(std::to_string(bad)) != std::string::npos, "a bad index is named: " + message);
            }
            index.set(4, 0);
            index.up();
            run(step);  // and forgotten
        }
}

void test_pool() {
    struct Case {
        Dims dims, kernel, stride, padding, dilation, out;
        bool include_pad;
        std::int64_t divisor;
        bool adaptive;
    };
    const std::vector<Case> cases = {
        {{2, 19, 11, 9}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, {6, 5}, true, 0, false},
        {{2, 3, 11, 9}, {3, 2}, {2, 1}, {1, 1}, {1, 1}, {6, 10}, false, 0, false},
        {{1, 64, 7, 7}, {7, 7}, {1, 1}, {0, 0}, {1, 1}, {1, 1}, true, 0, false},
        {{1, 16, 7, 7}, {2, 2}, {2, 2}, {0, 0}, {1, 1}, {4, 4}, true, 0, false},  // ceil_mode
        {{1, 8, 6, 6}, {2, 2}, {2, 2}, {0, 0}, {1, 1}, {3, 3}, true, 7, false},
        {{1, 8, 13, 13}, {3, 3}, {1, 1}, {1, 1}, {2, 2}, {11, 11}, true, 0, false},
        {{2, 5, 10, 7}, {}, {}, {}, {}, {3, 4}, true, 0, true},
        {{2, 17, 3, 3}, {}, {}, {}, {}, {5, 1}, true, 0, true},
        {{2, 9, 21}, {4}, {3}, {2}, {1}, {8}, true, 0, false},
        {{1, 9, 5, 6, 7}, {2, 3, 3}, {2, 1, 2}, {1, 1, 0}, {1, 1, 1}, {3, 6, 3}, false, 0, false},
        {{0, 4, 5, 5}, {2, 2}, {2, 2}, {0, 0}, {1, 1}, {2, 2}, true, 0, false},
    };
    for (const auto& c : cases)
        for (const bool last : {true, false})
            for (const bool is_max : {true, false})
                for (int form = 0; form < 3; ++form) {
                    if (is_max && c.adaptive) continue;
                    if (!is_max && !c.dilation.empty() && c.dilation[0] > 1) continue;
                    Dims out = {c.dims[0], c.dims[1]};
                    out.insert(out.end(), c.out.begin(), c.out.end());
                    std::optional<QParams> qx, qy;
                    if (form == 1) qx = qy = codes_u8(0.04f, 77);
                    if (form == 2) qx = qy = codes_s8(0.04f);
                    if (form == 2 && !is_max) qy = codes_s8(0.033f, 9);
                    const DType type = form == 0 ? DType::f32 : form == 1 ? DType::u8 : DType::s8;
                    Value x(type, c.dims, last ? channels_last(c.dims) : row_major(c.dims), qx);
                    Value y(type, out, last ? channels_last(out) : row_major(out), qy);
                    x.random();
                    if (form == 0 && is_max && x.elements() > 3) x.set(2, kNaN);
                    x.up();
                    y.up();
                    PoolGeometry g{c.kernel, c.stride, c.padding, c.dilation, is_max, c.include_pad, c.divisor, c.adaptive};
                    run(device->pool(g, x.t, y.t));
                    const std::size_t n = c.out.size();
                    compare(is_max ? "max pool" : "average pool", y, [&](const Dims& at) {
                        double sum = 0, high = -kInf;
                        bool has_nan = false;
                        std::int64_t size = 1, count = 0;
                        Dims extent;
                        std::vector<Dims> taps(n);
                        for (std::size_t d = 0; d < n; ++d) {
                            const auto in = c.dims[2 + d], o = at[2 + d];
                            if (c.adaptive) {
                                const auto from = o * in / c.out[d], to = ((o + 1) * in + c.out[d] - 1) / c.out[d];
                                for (auto i = from; i < to; ++i) taps[d].push_back(i);
                                size *= to - from;
                                continue;
                            }
                            const auto from = o * c.stride[d] - c.padding[d];
                            size *= std::min(from + c.kernel[d], in + c.padding[d]) - from;
                            for (std::int64_t k = 0; k < c.kernel[d]; ++k) {
                                const auto i = from + k * c.dilation[d];
                                if (i >= 0 && i < in) taps[d].push_back(i);
                            }
                        }
                        for (const auto& t : taps) extent.push_back(static_cast<std::int64_t>(t.size()));
                        each(extent, [&](const Dims& k) {
                            Dims from = {at[0], at[1]};
                            for (std::size_t d = 0; d < n; ++d) from.push_back(taps[d][static_cast<std::size_t>(k[d])]);
                            const double v = x.get(from);
                            has_nan = has_nan || std::isnan(v);
                            sum += v;
                            high = std::max(high, v);
                            ++count;
                        });
                        if (is_max) return has_nan ? static_cast<double>(kNaN) : high;
                        return sum / static_cast<double>(c.divisor != 0 ? c.divisor : c.include_pad ? size : count);
                    }, is_max ? 0 : kPlain);
                }
    // The largest window of codes: exact.
    Value x(DType::u8, {1, 32, 300, 300}, channels_last({1, 32, 300, 300}), codes_u8(1, 0)), y(DType::f32, {1, 32, 1, 1});
    double sum[32] = {};
    x.random().up();
    y.up();
    each({32, 300, 300}, [&](const Dims& at) { sum[at[0]] += x.get({0, at[0], at[1], at[2]}); });
    PoolGeometry g;
    g.is_max = false;
    g.is_adaptive = true;
    run(device->pool(g, x.t, y.t));
    compare("global average", y, [&](const Dims& at) { return static_cast<float>(sum[at[1]] / 90000.0); }, 0, 1.2e-7, 0);
}

void test_reduce() {
    struct Case {
        Dims dims;
        std::vector<int> axes;
        bool last;
    };
    const std::vector<Case> cases = {
        {{3, 50}, {1}, false},      {{3, 50}, {0}, false},          {{50, 3}, {0}, false},   {{4, 64, 7, 7}, {2, 3}, true},
        {{4, 5, 7, 7}, {2, 3}, false}, {{4, 20, 3, 5}, {0, 2}, true}, {{4, 20, 3, 5}, {-1}, true}, {{7}, {0}, false},
        {{2, 3, 4, 5, 6}, {0, 2, 4}, false}, {{1, 1}, {1}, false},  {{0, 3}, {1}, false},    {{5, 1000}, {0, 1}, false},
        {{17, 33}, {}, false},
    };
    for (const auto& c : cases)
        for (const Reduction op : {Reduction::sum, Reduction::mean, Reduction::max, Reduction::min})
            for (int form = 0; form < 3; ++form) {
                Dims out = c.dims;
                std::vector<bool> is_reduced(c.dims.size());
                std::int64_t n = 1;
                for (int a : c.axes) {
                    const auto at = static_cast<std::size_t>(a < 0 ? a + static_cast<int>(c.dims.size()) : a);
                    n *= c.dims[at];
                    out[at] = 1;
                    is_reduced[at] = true;
                }
                std::optional<QParams> qx, qy;
                if (form == 1) qx = codes_u8(0.02f, 100), qy = codes_s8(op == Reduction::sum ? 1.0f : 0.03f, 4);
                if (form == 2) qx = codes_s8(0.02f);
                Value x(form == 0 ? DType::f32 : form == 1 ? DType::u8 : DType::s8, c.dims,
                        c.last ? channels_last(c.dims) : row_major(c.dims), qx);
                Value y(form == 1 ? DType::s8 : DType::f32, out, c.last ? channels_last(out) : row_major(out), qy);
                x.random();
                if (form == 0 && op >= Reduction::max && x.elements() > 5) x.set(4, kNaN);
                x.up();
                y.up();
                const auto name = run(device->reduce(op, x.t, c.axes, y.t));
                compare("reduce " + name, y, [&](const Dims& at) {
                    double sum = 0, high = -kInf, low = kInf;
                    bool has_nan = false;
                    Dims extent(c.dims.size(), 1);
                    for (std::size_t d = 0; d < extent.size(); ++d)
                        if (is_reduced[d]) extent[d] = c.dims[d];
                    each(extent, [&](const Dims& r) {
                        Dims from = at;
                        for (std::size_t d = 0; d < from.size(); ++d) from[d] += r[d];
                        const double v = x.get(from);
                        has_nan = has_nan || std::isnan(v);
                        sum += v;
                        high = std::max(high, v);
                        low = std::min(low, v);
                    });
                    if (op >= Reduction::max && has_nan) return static_cast<double>(kNaN);
                    return op == Reduction::sum    ? sum
                           : op == Reduction::mean ? sum / static_cast<double>(n)
                           : op == Reduction::max  ? high
                                                   : low;
                }, kPlain, 1e-6, 1e-5);
            }
    // A long float sum, and a sum of codes beyond 2**31.
    Value x(DType::f32, {1 << 20}), y(DType::f32, {1});
    double sum = 0;
    x.random(0, 1).up();
    y.up();
    for (std::int64_t i = 0; i < 1 << 20; ++i) sum += x.raw(i);
    run(device->reduce(Reduction::sum, x.t, {0}, y.t));
    compare("long sum", y, [&](const Dims&) { return sum; }, 0, 2e-7, 0);
    Value q(DType::u8, {9000000}, {}, codes_u8(1, 0));
    q.fill([] { return 255; }).up();
    run(device->reduce(Reduction::sum, q.t, {0}, y.t));
    compare("sum beyond 2**31", y, [&](const Dims&) { return 255.0 * 9000000; }, 0, 1e-7, 0);
    run(device->reduce(Reduction::mean, q.t, {0}, y.t));
    compare("mean of many", y, [&](const Dims&) { return 255.0; }, 0, 2.4e-7, 0);
}

void test_rows() {
    for (const Dims& dims : {Dims{3, 100}, Dims{2, 5, 1}, Dims{4, 17, 6}, Dims{1, 2000}, Dims{0, 4}, Dims{7}, Dims{2, 3, 4, 50}})
        for (int form = 0; form < 3; ++form)
            for (int axis = 0; axis < static_cast<int>(dims.size()); ++axis) {
                std::optional<QParams> qx, qy;
                if (form > 0) qx = codes_s8(0.1f, 5);
                if (form > 1) qy = codes_u8(1 / 255.0f, 0);
                Value x(qx ? DType::s8 : DType::f32, dims, {}, qx);
                Value y(qy ? DType::u8 : DType::f32, dims, form == 1 ? transposed(dims) : Dims{}, qy);
                x.random(-20, 20).up();
                y.up();
                run(device->softmax(x.t, axis, y.t));
                const auto at_axis = static_cast<std::size_t>(axis);
                compare("softmax", y, [&](const Dims& at) {
                    double high = -kInf, sum = 0;
                    Dims from = at;
                    for (from[at_axis] = 0; from[at_axis] < dims[at_axis]; ++from[at_axis]) high = std::max(high, x.get(from));
                    for (from[at_axis] = 0; from[at_axis] < dims[at_axis]; ++from[at_axis]) sum += std::exp(x.get(from) - high);
                    return std::exp(x.get(at) - high) / sum;
                }, kTranscendental, 1e-5, 1e-7);
            }
    for (const Dims& dims : {Dims{3, 100}, Dims{2, 5, 1}, Dims{4, 3, 384}, Dims{0, 4}, Dims{7}})
        for (int form = 0; form < 8; ++form) {
            const bool is_rms = (form & 1) != 0;
            std::optional<QParams> qx, qy;
            if (form & 2) qx = codes_u8(0.02f, 90);
            if (form & 4) qy = codes_s8(0.03f, -2);
            Value x(qx ? DType::u8 : DType::f32, dims, {}, qx), y(qy ? DType::s8 : DType::f32, dims, {}, qy);
            Value g(DType::f32, {dims.back()}), b(DType::f32, {dims.back()});
            x.random(95, 105).up();
            g.random().up();
            b.random().up();
            y.up();
            const bool plain = form == 0;
            run(device->layer_norm(x.t, plain ? nullptr : &g.t, plain || is_rms ? nullptr : &b.t, 1e-5f, is_rms, y.t));
            compare("layer_norm", y, [&](const Dims& at) {
                double mean = 0, square = 0;
                Dims from = at;
                const auto n = static_cast<double>(dims.back());
                for (from.back() = 0; from.back() < dims.back(); ++from.back()) mean += x.get(from) / n;
                if (is_rms) mean = 0;
                for (from.back() = 0; from.back() < dims.back(); ++from.back()) square += std::pow(x.get(from) - mean, 2) / n;
                double v = (x.get(at) - mean) / std::sqrt(square + 1e-5);
                if (!plain) v *= g.get({at.back()});
                if (!plain && !is_rms) v += b.get({at.back()});
                return v;
            }, kTranscendental, 2e-5, 5e-5);
        }
}

void test_upsample() {
    for (const bool last : {true, false})
        for (const std::int64_t channels : {3, 24}) {
            const Dims in = {2, channels, 5, 7}, out = {2, channels, 13, 9};
            const auto layout = [&](const Dims& d) { return last ? channels_last(d) : row_major(d); };
            const std::vector<double> scales = {5.0 / 13, 7.0 / 9};
            for (int form = 0; form < 3; ++form) {
                std::optional<QParams> q, qy;
                if (form > 0) q = qy = codes_s8(0.03f, 1);
                if (form > 1) qy = codes_u8(0.04f, 100);
                Value x(q ? DType::s8 : DType::f32, in, layout(in), q);
                Value y(form == 0 ? DType::f32 : form == 1 ? DType::s8 : DType::u8, out, layout(out), qy);
                x.random().up();
                y.up();
                if (form < 2) {
                    run(device->upsample(Interpolation::nearest, false, scales, x.t, y.t));
                    compare("nearest", y, [&](const Dims& at) {
                        const auto row = [&](std::size_t d) {
                            const auto i = static_cast<std::int64_t>(std::floor(
                                static_cast<float>(at[2 + d]) * static_cast<float>(scales[d])));
                            return std::min(i, in[2 + d] - 1);
                        };
                        return x.get({at[0], at[1], row(0), row(1)});
                    }, 0);
                }
                for (const bool align : {false, true}) {
                    const std::vector<double> steps = align ? std::vector<double>{4.0 / 12, 6.0 / 8} : scales;
                    run(device->upsample(Interpolation::bilinear, align, steps, x.t, y.t));
                    compare("bilinear", y, [&](const Dims& at) {
                        double sum = 0;
                        double weight[2];
                        std::int64_t low[2];
                        for (std::size_t d = 0; d < 2; ++d) {
                            const double i = static_cast<double>(at[2 + d]);
                            const double from = align ? steps[d] * i : std::max(steps[d] * (i + 0.5) - 0.5, 0.0);
                            low[d] = std::min<std::int64_t>(static_cast<std::int64_t>(from + 1e-6), in[2 + d] - 1);
                            weight[d] = from - static_cast<double>(low[d]);
                        }
                        for (int h = 0; h < 2; ++h)
                            for (int w = 0; w < 2; ++w)
                                sum += (h ? weight[0] : 1 - weight[0]) * (w ? weight[1] : 1 - weight[1]) *
                                       x.get({at[0], at[1], std::min(low[0] + h, in[2] - 1), std::min(low[1] + w, in[3] - 1)});
                        return sum;
                    }, 2e-3, 1e-5, 1e-5);
                }
            }
        }
    const Dims in = {1, 16, 4}, out = {1, 16, 9}, in3 = {1, 3, 2, 3, 4}, out3 = {1, 3, 4, 6, 9};
    Value x(DType::f32, in), y(DType::f32, out), x3(DType::f32, in3), y3(DType::f32, out3);
    x.random().up();
    x3.random().up();
    y.up();
    y3.up();
    run(device->upsample(Interpolation::nearest, false, {4.0 / 9}, x.t, y.t));
    compare("nearest 1-D", y, [&](const Dims& at) { return x.get({0, at[1], at[2] * 4 / 9}); }, 0);
    run(device->upsample(Interpolation::nearest, false, {0.5, 0.5, 4.0 / 9}, x3.t, y3.t));
    compare("nearest 3-D", y3, [&](const Dims& at) { return x3.get({0, at[1], at[2] / 2, at[3] / 2, at[4] * 4 / 9}); }, 0);
}

// ------------------------------------------------------------------------------------------------ integer sums

struct WeightData {
    std::vector<std::int8_t> codes;
    std::vector<float> scale, bias;
    Weights w;
};

// Codes whose sums are exact on any CPU: x in [0, 127] of u8, or small even weights for s8.
WeightData make_weights(const Dims& dims, bool per_channel, bool with_bias, bool small) {
    WeightData d;
    std::int64_t n = 1;
    for (auto v : dims) n *= v;
    d.codes.resize(static_cast<std::size_t>(n));
    for (auto& c : d.codes) c = static_cast<std::int8_t>(small ? 2 * uniform(-31, 31) : uniform(-127, 127));
    d.scale.resize(static_cast<std::size_t>(per_channel ? dims[0] : 1));
    for (auto& s : d.scale) s = real(0.001f, 0.01f);
    d.bias.resize(static_cast<std::size_t>(dims[0]));
    for (auto& b : d.bias) b = real(-2, 2);
    d.w = {d.codes.data(), dims, d.scale.data(), static_cast<std::int64_t>(d.scale.size()),
           with_bias ? d.bias.data() : nullptr};
    return d;
}

struct ConvCase {
    Dims in;  // batch, channels, spatial
    std::int64_t out;
    Dims kernel, stride, padding, dilation;
    std::int64_t groups;
};

std::string text_of(const ConvCase& c) {
    return text_of(c.in) + " to " + std::to_string(c.out) + " kernel " + text_of(c.kernel) + " stride " +
           text_of(c.stride) + " padding " + text_of(c.padding) + " dilation " + text_of(c.dilation) + " groups " +
           std::to_string(c.groups);
}

enum class Extra { none, in_place, apart };

std::map<std::string, int> kernels_seen;

// One convolution, or a linear (kernel {} and no spatial dimensions), against a naive sum.
void check_conv(const ConvCase& c, DType tx, int zero_point, const Epilogue& e, Extra extra, std::optional<QParams> qy,
                DType ty, bool full_range, bool x_row_major = false) {
    const std::size_t n = c.kernel.size();
    const bool is_linear = n == 0;
    const QParams qx = tx == DType::u8 ? codes_u8(0.02f, zero_point) : codes_s8(0.02f, zero_point);
    Dims out = c.in;
    out[is_linear ? out.size() - 1 : 1] = c.out;
    for (std::size_t d = 0; d < n; ++d)
        out[2 + d] = (c.in[2 + d] + 2 * c.padding[d] - c.dilation[d] * (c.kernel[d] - 1) - 1) / c.stride[d] + 1;
    const auto layout = [&](const Dims& d) { return is_linear || d.size() < 3 ? row_major(d) : channels_last(d); };
    Dims weight_dims = {c.out, is_linear ? c.in.back() : c.in[1] / c.groups};
    weight_dims.insert(weight_dims.end(), c.kernel.begin(), c.kernel.end());
    const bool any_code = is_exact || full_range;
    const WeightData w = make_weights(weight_dims, uniform(0, 3) != 0, uniform(0, 3) != 0, !any_code && tx == DType::s8);
    Value x(tx, c.in, x_row_major ? row_major(c.in) : layout(c.in), qx), y(ty, out, layout(out), qy);
    x.fill([&] { return tx == DType::s8 ? uniform(-128, 127) : any_code ? uniform(0, 255) : uniform(0, 127); }).up();
    std::unique_ptr<Value> apart;
    Tensor residual;
    std::vector<double> added(y.elements());
    if (extra == Extra::in_place) {
        residual = y.t;
        residual.q = ty == DType::u8 ? codes_u8(0.07f, 11) : codes_s8(0.07f, 3);
        y.fill([&] { return ty == DType::u8 ? uniform(0, 255) : uniform(-128, 127); });
        for (std::size_t i = 0; i < added.size(); ++i)
            added[i] = (y.raw(static_cast<std::int64_t>(i)) - residual.q->zero_point) * residual.q->scale;
    } else if (extra == Extra::apart) {
        apart = std::make_unique<Value>(DType::s8, out, layout(out), codes_s8(0.05f, -9));
        apart->random().up();
        residual = apart->t;
        for (std::size_t i = 0; i < added.size(); ++i)
            added[i] = (apart->raw(static_cast<std::int64_t>(i)) - residual.q->zero_point) * residual.q->scale;
    }
    y.up();
    const ConvGeometry g{c.stride, c.padding, c.dilation, c.groups};
    const Tensor* r = extra == Extra::none ? nullptr : &residual;
    std::string what = text_of(c) + (tx == DType::u8 ? " u8" : " s8") + " epilogue " +
                       std::to_string(static_cast<int>(e.kind)) + " extra " + std::to_string(static_cast<int>(extra));
    std::unique_ptr<Step> step;
    try {
        step = is_linear ? device->linear(w.w, x.t, r, e, y.t) : device->conv(w.w, g, x.t, r, e, y.t);
        what = step->kernel() + " " + what;
        if (extra != Extra::in_place) run(step);
        run(step);
    } catch (const std::exception& error) {
        expect(false, what + ": " + error.what());
        return;
    }
    ++kernels_seen[step->kernel()];
    const std::int64_t per_group = weight_dims[1], out_per_group = c.out / c.groups;
    compare(what, y, [&](const Dims& at) {
        const std::int64_t o = at[is_linear ? at.size() - 1 : 1];
        std::int64_t acc = 0;
        Dims taps = c.kernel;
        taps.push_back(per_group);
        std::int64_t tap_count = 1;
        for (auto k : c.kernel) tap_count *= k;
        std::int64_t tap = -1;
        each(taps, [&](const Dims& k) {
            const std::int64_t i = k.back();
            if (i == 0) ++tap;
            Dims from = at;
            if (is_linear) {
                from.back() = i;
            } else {
                from[1] = o / out_per_group * per_group + i;
                for (std::size_t d = 0; d < n; ++d) {
                    from[2 + d] = at[2 + d] * c.stride[d] - c.padding[d] + k[d] * c.dilation[d];
                    if (from[2 + d] < 0 || from[2 + d] >= c.in[2 + d]) return;
                }
            }
            acc += (static_cast<std::int64_t>(x.raw(x.offset(from))) - zero_point) *
                   w.codes[static_cast<std::size_t>((o * per_group + i) * tap_count + tap)];
        });
        float real = static_cast<float>(acc) * (w.scale[w.scale.size() == 1 ? 0 : static_cast<std::size_t>(o)] * qx.scale);
        if (w.w.bias != nullptr) real += w.bias[static_cast<std::size_t>(o)];
        if (r != nullptr) real += static_cast<float>(added[static_cast<std::size_t>(y.offset(at))]);
        return exact_activation(e, real);
    }, tolerance_of(e), e.kind == Activation::none ? 2e-6 : 1e-4, 2e-5);
}

void check_everywhere(const ConvCase& c, bool full_range) {
    for (const DType tx : {DType::u8, DType::s8}) {
        check_conv(c, tx, 0, {Activation::relu}, Extra::none, codes_u8(0.05f, 0), DType::u8, full_range);
        check_conv(c, tx, tx == DType::u8 ? 61 : -5, {}, Extra::none, codes_s8(0.11f, 4), DType::s8, full_range);
        check_conv(c, tx, 0, {Activation::relu}, Extra::in_place, codes_u8(0.06f, 3), DType::u8, full_range);
        check_conv(c, tx, 7, {}, Extra::apart, codes_s8(0.09f, 0), DType::s8, full_range);
        check_conv(c, tx, 3, {Activation::hardswish}, Extra::apart, {}, DType::f32, full_range);
    }
}

void test_conv() {
    const std::vector<ConvCase> cases = {
        {{1, 3, 17, 15}, 16, {7, 7}, {2, 2}, {3, 3}, {1, 1}, 1},
        {{2, 64, 7, 9}, 64, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1},
        {{1, 33, 9, 9}, 17, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
        {{1, 32, 11, 13}, 48, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 1},
        {{1, 40, 8, 8}, 24, {1, 1}, {2, 2}, {0, 0}, {1, 1}, 1},
        {{2, 24, 9, 8}, 24, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 24},   // depthwise
        {{1, 21, 10, 10}, 21, {5, 5}, {2, 2}, {2, 2}, {1, 1}, 21},
        {{1, 32, 6, 6}, 64, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 4},
        {{1, 12, 6, 6}, 18, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 3},
        {{1, 16, 13, 13}, 16, {3, 3}, {1, 1}, {2, 2}, {2, 2}, 1},
        {{1, 512, 7, 7}, 32, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
        {{2, 16, 30}, 20, {5}, {2}, {2}, {1}, 1},                  // 1-D
        {{1, 8, 5, 6, 7}, 12, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, 1},
        {{1, 1, 4, 4}, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1},
        {{0, 8, 4, 4}, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
    };
    for (const auto& c : cases) check_everywhere(c, false);
    // Geometries that oneDNN's CPU code gets wrong; by our own kernel, whose sums are exact everywhere.
    const bool by_hand = device->name() == "sycl.cpu";
    const std::vector<ConvCase> unsafe = {
        {{1, 16, 5, 5}, 16, {3, 3}, {1, 1}, {3, 3}, {1, 1}, 1},    // padding >= kernel
        {{1, 16, 5, 5}, 24, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 1},
        {{1, 16, 7, 3}, 32, {3, 3}, {2, 2}, {0, 0}, {1, 1}, 1},    // width 1 with stride
        {{1, 16, 7, 5}, 32, {3, 3}, {1, 1}, {0, 0}, {2, 2}, 1},    // width 1 with dilation
        {{1, 20, 4, 4}, 20, {3, 3}, {4, 4}, {1, 1}, {1, 1}, 20},
        {{1, 8, 1, 6, 7}, 12, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, 1},  // depth 1
        {{2, 9, 3}, 10, {3}, {2}, {0}, {1}, 1},
    };
    for (const auto& c : unsafe) check_everywhere(c, by_hand);
    const ConvCase c = {{1, 32, 6, 7}, 40, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1};
    for (const auto& e : kEpilogues)
        for (const bool own : {false, true}) {
            const ConvCase& k = own ? unsafe[1] : c;
            check_conv(k, DType::u8, 0, e, Extra::none, codes_u8(0.03f, 100), DType::u8, own && by_hand);
            check_conv(k, DType::u8, 0, e, Extra::in_place, codes_s8(0.06f, -20), DType::s8, own && by_hand);
            check_conv(k, DType::u8, 5, e, Extra::apart, {}, DType::f32, own && by_hand);
        }
    // Codes that use half of their type.
    check_conv(c, DType::u8, 0, {Activation::relu}, Extra::none, codes_u8(0.02f, 0, 127), DType::u8, false);
    check_conv(c, DType::u8, 0, {}, Extra::none, QParams{0.02f, 3, -60, 60}, DType::s8, false);
    check_conv(c, DType::u8, 0, {}, Extra::none, codes_s8(0.05f), DType::s8, false, true);  // x row-major
}

// Any geometry, among them those that oneDNN's CPU code gets wrong.
void test_random_conv() {
    const char* asked = std::getenv("QUANTFLOW_TEST_CONVS");
    for (int i = asked == nullptr ? 150 : std::atoi(asked); i > 0; --i) {
        const int n = uniform(1, 3);
        ConvCase c;
        c.groups = uniform(0, 3) == 0 ? uniform(2, 20) : 1;
        const bool is_depthwise = c.groups > 1 && uniform(0, 1) == 0;
        const int in = is_depthwise ? 1 : uniform(1, c.groups > 1 ? 9 : 40), out = is_depthwise ? 1 : uniform(1, c.groups > 1 ? 9 : 40);
        c.in = {uniform(1, 2), in * c.groups};
        c.out = out * c.groups;
        for (int d = 0; d < n; ++d) {
            c.kernel.push_back(uniform(1, n == 3 ? 3 : 5));
            c.stride.push_back(uniform(1, 3));
            c.padding.push_back(uniform(0, 3));
            c.dilation.push_back(uniform(1, 3));
            const auto least = std::max<std::int64_t>(1, c.dilation[d] * (c.kernel[d] - 1) + 1 - 2 * c.padding[d]);
            c.in.push_back(least + uniform(0, n == 3 ? 4 : 9));
        }
        const DType tx = uniform(0, 1) ? DType::u8 : DType::s8;
        const auto extra = static_cast<Extra>(uniform(0, 2));
        check_conv(c, tx, uniform(0, 1) ? uniform(-20, 20) & (tx == DType::u8 ? 15 : -1) : 0, {Activation::relu}, extra,
                   codes_u8(0.06f, uniform(0, 9)), DType::u8, false);
    }
}

void test_linear() {
    for (const ConvCase& c : std::vector<ConvCase>{
             {{1, 1}, 1, {}, {}, {}, {}, 1},       {{5, 64}, 32, {}, {}, {}, {}, 1},   {{2, 7, 100}, 33, {}, {}, {}, {}, 1},
             {{3, 1000}, 10, {}, {}, {}, {}, 1},   {{128, 384}, 96, {}, {}, {}, {}, 1}, {{0, 8}, 8, {}, {}, {}, {}, 1},
             {{2, 2, 3, 17}, 5, {}, {}, {}, {}, 1}, {{77}, 19, {}, {}, {}, {}, 1}})
        check_everywhere(c, false);
    check_everywhere({{4, 0}, 6, {}, {}, {}, {}, 1}, true);  // an empty sum
    for (const auto& e : kEpilogues) {
        const ConvCase c = {{6, 48}, 40, {}, {}, {}, {}, 1};
        check_conv(c, DType::u8, 0, e, Extra::none, codes_u8(0.03f, 100), DType::u8, false);
        check_conv(c, DType::u8, 9, e, Extra::apart, {}, DType::f32, false);
    }
    check_conv({{6, 48}, 40, {}, {}, {}, {}, 1}, DType::u8, 0, {}, Extra::none, codes_u8(0.02f, 0, 127), DType::u8, false);
}

void test_matmul() {
    struct Case {
        Dims a, b, sa, sb;
        std::int64_t rows, columns;
    };
    const std::vector<Case> cases = {
        {{5, 17}, {17, 9}, {}, {}, 5, 9},
        {{5, 17}, {17, 9}, {1, 5}, {1, 17}, 5, 9},                                  // both transposed
        {{2, 3, 16, 32}, {2, 3, 32, 16}, {}, {}, 16, 16},
        {{2, 3, 16, 32}, {2, 3, 32, 16}, {1536, 32, 96, 1}, {1536, 32, 1, 96}, 16, 16},  // (batch, row, head, ...)
        {{4, 8, 6}, {4, 6, 7}, {}, {0, 7, 1}, 8, 7},                                // b broadcast
        {{4, 8, 6}, {4, 6, 7}, {0, 6, 1}, {}, 8, 7},                                // a broadcast
        {{3, 4}, {4, 5}, {8, 2}, {10, 2}, 3, 5},                                    // nothing dense
        {{1, 1}, {1, 1}, {}, {}, 1, 1},
        {{0, 4}, {4, 5}, {}, {}, 0, 5},
        {{3, 0}, {0, 5}, {}, {}, 3, 5},
        {{1, 64}, {64, 100}, {}, {}, 1, 100},
    };
    for (const auto& c : cases)
        for (int form = 0; form < 6; ++form) {
            std::optional<QParams> qa, qb, qy;
            DType ta = DType::f32, tb = DType::f32;
            if (form >= 2) {
                ta = form == 2 || form == 3 ? DType::u8 : DType::s8;
                tb = form == 3 || form == 5 ? DType::u8 : DType::s8;
                qa = ta == DType::u8 ? codes_u8(0.02f, form == 3 ? 30 : 0) : codes_s8(0.02f, form == 5 ? 9 : 0);
                qb = tb == DType::u8 ? codes_u8(0.03f, form == 3 ? 0 : 17) : codes_s8(0.03f, form == 4 ? -3 : 0);
            }
            if (form & 1) qy = form == 3 ? codes_u8(0.1f, 128) : codes_s8(0.1f, 5);
            Value a(ta, c.a, c.sa, qa), b(tb, c.b, c.sb, qb);
            Dims out(c.a.begin(), c.a.end() - 2);
            out.push_back(c.rows);
            out.push_back(c.columns);
            Value y(form == 3 ? DType::u8 : qy ? DType::s8 : DType::f32, out, {}, qy);
            a.random();
            b.random();
            if (!is_exact && qa) {
                if (ta == DType::u8) a.fill([] { return uniform(0, 127); });
                b.fill([&] { return tb == DType::s8 ? 2 * uniform(-31, 31) : 2 * uniform(0, 31); });
            }
            // oneDNN codes a NaN by its own rule; ours holds.
            if (form == 1 && a.elements() > 0) a.set(0, kNaN);
            a.up();
            b.up();
            y.up();
            const auto step = device->matmul(a.t, b.t, y.t);
            run(step);
            ++kernels_seen[step->kernel()];
            compare("matmul " + std::to_string(form) + " " + step->kernel() + text_of(c.a) + text_of(c.b), y, [&](const Dims& at) {
                double sum = 0;
                Dims i = at, j = at;
                const std::size_t r = at.size() - 2;
                for (std::int64_t k = 0; k < c.a.back(); ++k) {
                    i[r + 1] = k;
                    j[r] = k;
                    sum += a.get(i) * b.get(j);
                }
                return sum;
            }, kPlain, 2e-6, 3e-5);
        }
}

void test_float_linear() {
    for (const Dims& dims : {Dims{5, 33}, Dims{2, 3, 64}, Dims{1, 1}, Dims{0, 7}, Dims{3, 0}, Dims{16}})
        for (const bool with_bias : {false, true}) {
            Dims out = dims;
            out.back() = 21;
            Value x(DType::f32, dims), w(DType::f32, {21, dims.back()}), b(DType::f32, {21}), y(DType::f32, out);
            x.random().up();
            w.random().up();
            b.random().up();
            y.up();
            const auto step = device->float_linear(x.t, w.t, with_bias ? &b.t : nullptr, y.t);
            run(step);
            run(step);
            compare("float_linear", y, [&](const Dims& at) {
                double sum = with_bias ? b.get({at.back()}) : 0;
                Dims from = at;
                for (std::int64_t k = 0; k < dims.back(); ++k) {
                    from.back() = k;
                    sum += x.get(from) * w.get({at.back(), k});
                }
                return sum;
            }, 0, 2e-6, 3e-5);
        }
}

// (batch, heads, length, width) as it lies after a projection: (batch, length, heads, width).
Dims split_heads(const Dims& d) { return {d[1] * d[2] * d[3], d[3], d[1] * d[3], 1}; }

void test_attention() {
    const std::int64_t B = 2, H = 3, L = 9, S = 13, E = 16, F = 8;
    for (int form = 0; form < 4; ++form)
        for (int masked = 0; masked < 5; ++masked) {
            // f32; codes for q and k; codes everywhere; codes for q and v alone.
            std::optional<QParams> qq, qk, qv, qy;
            if (form > 0) qq = codes_s8(0.03f, form == 3 ? 4 : 0);
            if (form == 1 || form == 2) qk = codes_s8(0.03f);
            if (form >= 2) qv = codes_u8(0.02f, 128);
            if (form >= 2) qy = codes_s8(0.015f, 2);
            const Dims dq = {B, H, L, E}, dk = {B, H, S, E}, dv = {B, H, S, F}, dy = {B, H, L, F};
            Value q(qq ? DType::s8 : DType::f32, dq, split_heads(dq), qq);
            Value k(qk ? DType::s8 : DType::f32, dk, form == 0 ? Dims{} : split_heads(dk), qk);
            Value v(qv ? DType::u8 : DType::f32, dv, split_heads(dv), qv);
            Value y(qy ? DType::s8 : DType::f32, dy, masked & 1 ? split_heads(dy) : Dims{}, qy);
            q.random();
            k.random();
            if (!is_exact && qk) k.fill([] { return 2 * uniform(-31, 31); });
            q.up();
            k.up();
            v.random().up();
            y.up();
            Value reals(DType::f32, {B, 1, 1, S}), flags(DType::b8, {L, S});
            reals.fill([] { return uniform(0, 3) == 0 ? -kInf : real(-1, 1); }).up();
            flags.random();
            for (int j = 0; j < S; ++j) flags.set(2 * S + j, 0);  // a row that sees nothing
            flags.up();
            const bool causal = masked == 3 || masked == 4;
            Tensor mask = masked == 1 || masked == 4 ? reals.t : flags.t;
            mask.dims = {B, H, L, S};
            mask.strides = masked == 1 || masked == 4 ? Dims{S, 0, 0, 1} : Dims{0, 0, S, 1};
            const bool has_mask = masked == 1 || masked == 2 || masked == 4;
            const auto step = device->attention(q.t, k.t, v.t, has_mask ? &mask : nullptr, causal, 0.25f, y.t);
            run(step);
            run(step);
            compare("attention " + std::to_string(form) + " mask " + std::to_string(masked) + " " + step->kernel(), y, [&](const Dims& at) {
                std::vector<double> score(static_cast<std::size_t>(S));
                double high = -kInf, sum = 0, result = 0;
                for (std::int64_t j = 0; j < S; ++j) {
                    double s = 0;
                    for (std::int64_t e = 0; e < E; ++e) s += q.get({at[0], at[1], at[2], e}) * k.get({at[0], at[1], j, e});
                    s *= 0.25;
                    if (masked == 1 || masked == 4) s += reals.get({at[0], 0, 0, j});
                    if (masked == 2 && flags.get({at[2], j}) == 0) s = -kInf;
                    if (causal && j > at[2]) s = -kInf;
                    score[static_cast<std::size_t>(j)] = s;
                    high = std::max(high, s);
                }
                if (high == -kInf) return 0.0;
                for (std::int64_t j = 0; j < S; ++j) {
                    const double p = std::exp(score[static_cast<std::size_t>(j)] - high);
                    sum += p;
                    result += p * v.get({at[0], at[1], j, at[3]});
                }
                return result / sum;
            }, kTranscendental, 1e-5, 2e-5);
        }
}

// ------------------------------------------------------------------------------------------------ the rest

void test_contract() {
    expect(!device->stores_unsigned() && !device->reads_process_memory(), "what the backend says of itself");
    void* memory = device->allocate(0);
    expect(memory != nullptr && reinterpret_cast<std::uintptr_t>(memory) % 64 == 0, "alignment");
    device->release(memory);

    // A place that moves between runs.
    const ConvCase c = {{1, 16, 5, 5}, 16, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1};
    const WeightData w = make_weights({16, 16, 3, 3}, true, true, true);
    const Dims dims = {1, 16, 5, 5};
    Value x(DType::u8, dims, channels_last(dims), codes_u8(0.02f, 0)), y(DType::s8, dims, channels_last(dims), codes_s8(0.05f));
    Value other(DType::u8, dims, channels_last(dims), codes_u8(0.02f, 0)), want(DType::s8, dims, channels_last(dims), codes_s8(0.05f));
    for (Value* v : {&x, &other}) v->fill([] { return uniform(0, 127); }).up();
    y.up();
    want.up();
    const ConvGeometry g{c.stride, c.padding, c.dilation, 1};
    run(device->conv(w.w, g, other.t, nullptr, {}, want.t));
    want.down("moved");
    const auto step = device->conv(w.w, g, x.t, nullptr, {}, y.t);
    run(step);
    std::byte* const first = x.base;
    x.base = other.base;
    run(step);
    x.base = first;
    y.down("moved");
    expect(y.bytes == want.bytes, "a step follows its tensor to another address");

    bool refused = false;
    try {
        Value deep(DType::f32, {2, 3, 2, 3, 2, 3, 2}, transposed({2, 3, 2, 3, 2, 3, 2})), flat(DType::f32, {2, 3, 2, 3, 2, 3, 2});
        Tensor mixed = deep.t;
        std::swap(mixed.strides[1], mixed.strides[5]);
        device->copy(mixed, flat.t);
    } catch (const Unsupported&) {
        refused = true;  // and the type survives the way out of the library
    }
    expect(refused, "7 dimensions are Unsupported");
}

// Several threads, one backend, on cores that have other work: steps of several kernels that share scratch memory stay whole
// and in order.
void test_threads() {
    const Dims d = {1, 4, 40, 16};
    struct Job {
        std::unique_ptr<Value> q, k, v, y;
        std::unique_ptr<Step> step;
        std::vector<std::byte> want;
    };
    std::vector<Job> jobs(4);
    for (auto& job : jobs) {
        for (auto* value : {&job.q, &job.k, &job.v, &job.y}) {
            *value = std::make_unique<Value>(DType::f32, d);
            (*value)->random().up();
        }
        job.step = device->attention(job.q->t, job.k->t, job.v->t, nullptr, true, 0.25f, job.y->t);
        run(job.step);
        job.y->down("threads");
        job.want = job.y->bytes;
    }
    std::atomic<bool> is_over{false};
    std::vector<std::thread> others, threads;
    for (unsigned i = 0; i < 2 * std::thread::hardware_concurrency(); ++i)
        others.emplace_back([&] {
            while (!is_over) {
            }
        });
    std::vector<int> wrong(jobs.size(), 0);
    for (std::size_t i = 0; i < jobs.size(); ++i)
        threads.emplace_back([&, i] {
            std::vector<std::byte> got(jobs[i].want.size());
            for (int round = 0; round < 2000; ++round) {
                jobs[i].step->run();
                device->copy(got.data(), jobs[i].y->base + kGuard, got.size());
                device->wait();
                wrong[i] += got != jobs[i].want;
            }
        });
    for (auto& t : threads) t.join();
    is_over = true;
    for (auto& t : others) t.join();
    for (int w : wrong) expect(w == 0, "results of concurrent threads");
}

template <typename F>
F symbol(void* library, const char* name) {
    const auto found = reinterpret_cast<F>(dlsym(library, name));
    if (found == nullptr) {
        std::printf("the library lacks %s\n", name);
        std::exit(1);
    }
    return found;
}

template <typename F, typename... Args>
std::string text_from(F function, Args... args) {
    std::string text(static_cast<std::size_t>(function(args..., nullptr, 0)), '\0');
    function(args..., text.data(), text.size());
    text.pop_back();
    return text;
}

// First use, cached use, use of a damaged cache.
void test_cache(void* library, const std::string& kind) {
    const auto make = symbol<decltype(&qf_sycl_make_backend)>(library, "qf_sycl_make_backend");
    const auto statistics = symbol<decltype(&qf_sycl_kernel_statistics)>(library, "qf_sycl_kernel_statistics");
    const auto folder = std::filesystem::temp_directory_path() / ("quantflow-test-" + std::to_string(getpid()));
    const auto files = [&] {
        std::map<std::string, std::uintmax_t> sizes;
        for (const auto& entry : std::filesystem::directory_iterator(folder))
            sizes[entry.path().filename()] = entry.file_size();
        return sizes;
    };
    auto use = [&](const char* what) {
        const auto start = Clock::now();
        std::unique_ptr<Backend> other(make(kind.c_str(), folder.c_str(), nullptr, 0));
        std::byte* base = static_cast<std::byte*>(other->allocate(4096));
        Tensor x, y;
        x.dims = y.dims = {1000};
        x.strides = y.strides = {1};
        x.place = {&base, 0};
        y.dtype = DType::u8;
        y.q = codes_u8(0.5f, 3);
        y.place = {&base, 0};
        other->copy(x, y)->run();
        other->fill(1, x)->run();
        other->wait();
        float value = 0;
        other->copy(&value, base + 400, sizeof value);
        other->wait();
        expect(value == 1, std::string(what) + ": kernels work");
        std::printf("  %-14s %6.2f s  %s\n", what, seconds_since(start), text_from(statistics, other.get()).c_str());
        other->release(base);
        return text_from(statistics, other.get());
    };
    use("first use");
    const auto sizes = files();
    expect(!sizes.empty(), "the cache holds files");
    expect(use("cached").find("\"compile_s\": 0.000") != std::string::npos, "nothing is compiled twice");
    const auto damage = [&](const std::function<void(std::string&)>& how) {
        for (const auto& [name, size] : sizes) {
            std::ifstream in(folder / name, std::ios::binary);
            std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
            in.close();
            how(bytes);
            std::ofstream(folder / name, std::ios::binary) << bytes;
        }
    };
    damage([](std::string& bytes) { bytes.resize(bytes.size() / 2); });
    use("cut short");
    expect(files() == sizes, "damaged files are written anew");
    damage([](std::string& bytes) { bytes[bytes.size() / 2] ^= 1; });
    use("one bit wrong");
    damage([](std::string& bytes) { bytes.clear(); });
    use("empty");
    expect(files() == sizes, "empty files are written anew");
    expect(use("again").find("\"compile_s\": 0.000") != std::string::npos, "and serve again");
    std::filesystem::remove_all(folder);
    // A folder that can't be written to costs time only.
    std::unique_ptr<Backend> other(make(kind.c_str(), "/proc/none", nullptr, 0));
    expect(other != nullptr, "an unusable cache folder is no error");
}

void test_interface(void* library) {
    const auto make = symbol<decltype(&qf_sycl_make_backend)>(library, "qf_sycl_make_backend");
    char error[2000] = "";
    expect(make("tpu", nullptr, error, sizeof error) == nullptr && std::strstr(error, "devices found") != nullptr,
           std::string("an unknown device is refused: ") + error);
    const auto devices = text_from(symbol<decltype(&qf_sycl_devices)>(library, "qf_sycl_devices"));
    if (devices.find("\"gpu\"") == std::string::npos)
        expect(make("gpu", nullptr, error, sizeof error) == nullptr && std::strstr(error, "cpu ") != nullptr,
               std::string("an absent device lists the others: ") + error);
    std::printf("  %s\n", error);
    char small[8];
    const auto versions = symbol<decltype(&qf_sycl_versions)>(library, "qf_sycl_versions");
    expect(versions(small, sizeof small) > 8 && small[7] == '\0', "a small buffer is not overrun");
}

// Cost of one step, submitted and waited for, and among many.
void measure() {
    const auto time = [](const char* what, const std::unique_ptr<Step>& step, double bytes) {
        run(step);
        double alone = 1e9, among = 1e9;
        for (int round = 0; round < 5; ++round) {
            auto start = Clock::now();
            for (int i = 0; i < 20; ++i) run(step);
            alone = std::min(alone, seconds_since(start) / 20);
            start = Clock::now();
            for (int i = 0; i < 100; ++i) step->run();
            device->wait();
            among = std::min(among, seconds_since(start) / 100);
        }
        std::printf("  %-34s %8.1f us alone, %8.1f us in a row of 100", what, alone * 1e6, among * 1e6);
        bytes > 0 ? std::printf(", %5.1f GB/s\n", bytes / among * 1e-9) : std::printf("\n");
    };
    const auto big = [&](DType t, const Dims& d, const Dims& s, std::optional<QParams> q) {
        auto v = std::make_unique<Value>(t, d, s, q);
        v->fill([] { return uniform(0, 50); }).up();
        return v;
    };
    const auto q8 = codes_s8(0.05f), other = codes_s8(0.03f, 2);
    {
        auto x = big(DType::f32, {16}, {}, {}), y = big(DType::s8, {16}, {}, q8);
        time("custom kernel, 16 elements", device->copy(x->t, y->t), 0);
        auto a = big(DType::u8, {1, 16}, {}, codes_u8(0.1f, 0)), b = big(DType::s8, {1, 16}, {}, q8);
        const WeightData w = make_weights({16, 16}, true, true, true);
        time("oneDNN primitive, 1x16x16", device->linear(w.w, a->t, nullptr, {}, b->t), 0);
    }
    const double n = 4e6;
    const Dims flat = {4000000};
    auto f = big(DType::f32, flat, {}, {}), g = big(DType::f32, flat, {}, {});
    auto a = big(DType::s8, flat, {}, q8), b = big(DType::s8, flat, {}, other), y = big(DType::s8, flat, {}, codes_s8(0.1f));
    time("memcpy f32, 4 M", device->copy(f->t, g->t), 8 * n);
    time("quantize f32 to s8, 4 M", device->copy(f->t, a->t), 5 * n);
    time("dequantize s8 to f32, 4 M", device->copy(a->t, f->t), 5 * n);
    time("requantize s8, 4 M", device->copy(a->t, b->t), 2 * n);
    time("add codes + relu, 4 M", device->binary(Binary::add, a->t, b->t, {Activation::relu}, y->t), 3 * n);
    time("add f32, 4 M", device->binary(Binary::add, f->t, g->t, {}, g->t), 12 * n);
    time("table s8, 4 M", device->unary(Unary::activation, 0, 0, {Activation::silu}, a->t, y->t), 2 * n);
    time("gelu f32, 4 M", device->unary(Unary::activation, 0, 0, {Activation::gelu}, f->t, g->t), 8 * n);
    {
        const Dims d = {1, 3, 224, 224};
        auto x = big(DType::f32, d, {}, {}), z = big(DType::s8, d, channels_last(d), q8);
        time("quantize image to channels_last", device->copy(x->t, z->t), 5 * 3 * 224 * 224.0);
    }
    {
        const Dims d = {1, 64, 112, 112}, o = {1, 64, 56, 56}, l = {1, 2048, 7, 7}, p = {1, 2048, 1, 1};
        auto x = big(DType::u8, d, channels_last(d), codes_u8(0.1f, 0)), z = big(DType::u8, o, channels_last(o), codes_u8(0.1f, 0));
        time("max pool 3x3, 112 to 56", device->pool({{3, 3}, {2, 2}, {1, 1}, {1, 1}}, x->t, z->t), 1e6);
        auto m = big(DType::u8, l, channels_last(l), codes_u8(0.1f, 0)), k = big(DType::s8, p, channels_last(p), q8);
        PoolGeometry geometry;
        geometry.is_max = false;
        geometry.is_adaptive = true;
        time("global average pool 2048x7x7", device->pool(geometry, m->t, k->t), 1e5);
        time("mean over (2, 3), 2048x7x7", device->reduce(Reduction::mean, m->t, {2, 3}, k->t), 1e5);
    }
    {
        auto x = big(DType::f32, {128, 384}, {}, {}), z = big(DType::f32, {128, 384}, {}, {}), w = big(DType::f32, {384}, {}, {});
        auto s = big(DType::f32, {12, 128, 128}, {}, {}), e = big(DType::s8, {128, 384}, {}, q8);
        time("layer_norm 128x384 f32", device->layer_norm(x->t, &w->t, &w->t, 1e-5f, false, z->t), 2e5 * 2);
        time("layer_norm 128x384 s8 to s8", device->layer_norm(e->t, &w->t, &w->t, 1e-5f, false, e->t), 1e5);
        time("softmax 12x128x128 f32", device->softmax(s->t, 2, s->t), 1.5e6);
        const Dims h = {1, 12, 128, 32};
        auto q = big(DType::s8, h, split_heads(h), q8), v = big(DType::s8, h, split_heads(h), q8);
        time("attention 12x128x32 s8", device->attention(q->t, q->t, v->t, nullptr, false, 0.2f, v->t), 0);
    }
    {
        const Dims d = {1, 64, 56, 56};
        auto x = big(DType::u8, d, channels_last(d), codes_u8(0.1f, 0)), z = big(DType::u8, d, channels_last(d), codes_u8(0.1f, 0));
        const WeightData w = make_weights({64, 64, 3, 3}, true, true, true);
        const auto step = device->conv(w.w, {{1, 1}, {1, 1}, {1, 1}, 1}, x->t, nullptr, {Activation::relu}, z->t);
        time(("conv 64, 3x3, 56x56: " + step->kernel()).c_str(), step, 0);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::string path = argc > 1 ? argv[1] : "./libquantflow_sycl.so", kind = argc > 2 ? argv[2] : "cpu";
    // As the main library opens it: nothing of it is visible here but what dlsym finds.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::printf("%s\n", dlerror());
        return 1;
    }
    std::printf("devices: %s\n", text_from(symbol<decltype(&qf_sycl_devices)>(library, "qf_sycl_devices")).c_str());
    std::printf("versions: %s\n", text_from(symbol<decltype(&qf_sycl_versions)>(library, "qf_sycl_versions")).c_str());
    char error[4000] = "";
    const char* cache = std::getenv("QUANTFLOW_TEST_CACHE");
    const auto start = Clock::now();
    device.reset(symbol<decltype(&qf_sycl_make_backend)>(library, "qf_sycl_make_backend")(kind.c_str(), cache, error, sizeof error));
    if (!device) {
        std::printf("%s\n", error);
        return 1;
    }
    is_exact = symbol<decltype(&qf_sycl_exact_int8)>(library, "qf_sycl_exact_int8")(kind.c_str()) != 0;
    std::printf("%s made in %.2f s, int8 sums %s\n", device->name().c_str(), seconds_since(start),
                is_exact ? "exact" : "not exact on this CPU: tested with codes of 7 bits");
    const std::string only = argc > 3 ? argv[3] : "";
    const auto wanted = [&](const char* name, const std::function<void()>& body) {
        if (only.empty() || only == name) group(name, body);
    };
    wanted("interface", [&] { test_interface(library); });
    wanted("contract", test_contract);
    wanted("copy", test_copy);
    wanted("fill", test_fill);
    wanted("binary", test_binary);
    wanted("unary", test_unary);
    wanted("where", test_where);
    wanted("channel_affine", test_channel_affine);
    wanted("gather", test_gather);
    wanted("pool", test_pool);
    wanted("reduce", test_reduce);
    wanted("rows", test_rows);
    wanted("upsample", test_upsample);
    wanted("conv", test_conv);
    wanted("random conv", test_random_conv);
    wanted("linear", test_linear);
    wanted("matmul", test_matmul);
    wanted("float_linear", test_float_linear);
    wanted("attention", test_attention);
    wanted("threads", test_threads);
    if (only.empty() || only == "cache") group("cache", [&] { test_cache(library, kind); });
    if (only == "measure") measure();
    for (const auto& [name, count] : kernels_seen) std::printf("  %4d  %s\n", count, name.c_str());
    std::printf("%s\n", text_from(symbol<decltype(&qf_sycl_kernel_statistics)>(library, "qf_sycl_kernel_statistics"),
                                  static_cast<const Backend*>(device.get())).c_str());
    device.reset();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
