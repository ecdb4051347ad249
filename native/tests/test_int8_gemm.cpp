// int8 linear, convolution and matmul against naive loops, for every instruction set this CPU has, for the code that
// AVX512-VNNI runs, on plain vectors of its length, and for that of AMX, on emulated tiles (emulated_amx.cpp).
#pragma GCC diagnostic ignored "-Wpsabi"  // of 64-byte vectors, none of which crosses a call
#define QF_ISA_NAMESPACE isa_portable16
#define QF_INT8_LANES 16
#include "../host/int8_gemm_isa.cpp"

#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>

#include "../host/int8_gemm_isa.hpp"
#include "../host/isa.hpp"
#include "../host/steps.hpp"
#include "../src/activation_formulas.hpp"

namespace quantflow::host::isa_emulated_amx {
extern const Int8Kernels int8_kernels;
}

using namespace quantflow;
using host::StepPtr;
using i64 = std::int64_t;

namespace {

std::mt19937 random_bits(7);
int failures = 0;
i64 checked = 0;

i64 pick(i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(random_bits); }
float pick_real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }

// A tensor in memory of exactly its size, so that the address sanitizer sees every byte beyond.
struct Buffer {
    std::unique_ptr<std::byte[]> memory;
    std::byte* base = nullptr;
    Tensor tensor;

    Buffer(DType dtype, std::vector<i64> dims, std::vector<i64> strides, std::optional<QParams> q, i64 count = -1) {
        tensor.dtype = dtype;
        tensor.dims = std::move(dims);
        tensor.strides = std::move(strides);
        tensor.q = q;
        if (count < 0) count = tensor.count();
        memory.reset(new std::byte[static_cast<std::size_t>(count * size_of(dtype))]);
        base = memory.get();
        tensor.place = Place{&base, 0};
        if (dtype == DType::u8)
            for (i64 i = 0; i < count; ++i) codes()[i] = static_cast<std::uint8_t>(pick(q->qmin, q->qmax));
    }
    std::uint8_t* codes() const { return reinterpret_cast<std::uint8_t*>(base); }
    float* reals() const { return reinterpret_cast<float*>(base); }
};

bool is_transcendental(Activation a) {
    for (Activation exact : {Activation::none, Activation::relu, Activation::hardtanh, Activation::hardswish,
                             Activation::hardsigmoid, Activation::leaky_relu})
        if (a == exact) return false;
    return true;
}

void fail(const std::string& what, double got, double wanted) {
    if (++failures <= 20) std::printf("  FAILED %s: got %.9g, wanted %.9g\n", what.c_str(), got, wanted);
}

// The rule of the design: equal, or one code apart within 1e-3 codes (transcendental: 1e-2) of a tie.
void check_result(const std::string& what, const Buffer& y, i64 at, float r, const Epilogue& e) {
    ++checked;
    const double real = exact_activation(e, r);
    if (!y.tensor.q) {
        const double got = y.reals()[at];
        // 1 + erf(x) cancels in float32, in PyTorch too: the error is relative to r.
        const double allowed = 1e-6 * std::fabs(real) + 2.5e-7 * std::fabs(double(r));
        const bool same = std::isnan(real) ? std::isnan(got) : got == real || std::fabs(got - real) <= allowed;
        if (!same) fail(what, got, real);
        return;
    }
    const QParams& q = *y.tensor.q;
    const int got = y.codes()[at];
    const double v = real / q.scale + q.zero_point;
    double wanted = std::isnan(v) ? q.qmax : std::min(std::max(std::nearbyint(v), double(q.qmin)), double(q.qmax));
    if (got == wanted) return;
    const double margin = is_transcendental(e.kind) ? 1e-2 : 1e-3;
    const double tie = std::fabs(v - std::floor(v) - 0.5);
    if (std::fabs(got - wanted) > 1 || !(tie <= margin) || got < q.qmin || got > q.qmax) fail(what, got, v);
}

// joint: what AVX2 multiplies two quads at once of, up to where 16 bits end.
enum class Codes { random, low, extreme, joint, largest };  // largest: sums as far from 0 as there are

struct Case {
    std::vector<i64> in, kernel, stride, padding, dilation;  // spatial; empty: linear
    i64 batch = 1, in_channels = 1, out_channels = 1, groups = 1;
    Epilogue epilogue;
    bool has_residual = false, is_real_residual = false, in_place = false, has_bias = true, per_tensor = false, is_float = false;
    int zero_point = 128, residual_zero = 117;
    Codes codes = Codes::random;
    int threads = 1;
    float bias_at_0 = 0;  // NaN or infinite, to reach the saturation rules
};

std::string text_of(const Case& c) {
    std::string s = "batch " + std::to_string(c.batch) + " " + std::to_string(c.in_channels) + "->" +
                    std::to_string(c.out_channels) + " groups " + std::to_string(c.groups);
    for (std::size_t i = 0; i < c.in.size(); ++i)
        s += " [" + std::to_string(c.in[i]) + " k" + std::to_string(c.kernel[i]) + " s" + std::to_string(c.stride[i]) +
             " p" + std::to_string(c.padding[i]) + " d" + std::to_string(c.dilation[i]) + "]";
    return s + " epilogue " + std::to_string(int(c.epilogue.kind)) + " zero " + std::to_string(c.zero_point) +
           (c.has_residual ? c.is_real_residual ? " f32 residual" : " residual " + std::to_string(c.residual_zero)
                           : "") +
           (c.is_float ? " f32" : "");
}

void run_case(const Case& c) {
    const bool is_linear = c.in.empty();
    const std::size_t spatial = c.in.size();
    const i64 own_in = c.in_channels / c.groups, own_out = c.out_channels / c.groups;
    std::vector<i64> xd{c.batch, c.in_channels}, yd{c.batch, c.out_channels}, wd{c.out_channels, own_in};
    for (std::size_t i = 0; i < spatial; ++i) {
        xd.push_back(c.in[i]);
        wd.push_back(c.kernel[i]);
        const i64 span = c.in[i] + 2 * c.padding[i] - c.dilation[i] * (c.kernel[i] - 1) - 1;
        yd.push_back(span < 0 ? 0 : span / c.stride[i] + 1);
    }
    const auto strides = [&](const std::vector<i64>& d) { return is_linear ? row_major(d) : channels_last(d); };

    QParams xq{0.02f, c.zero_point, 0, 255};
    if (c.codes == Codes::low || c.codes == Codes::joint) {
        xq.qmin = c.zero_point;
        xq.qmax = std::min(255, c.zero_point + 127);
    }
    Buffer x(DType::u8, xd, strides(xd), xq);
    if (c.codes == Codes::extreme)
        for (i64 i = 0; i < x.tensor.count(); ++i) x.codes()[i] = pick(0, 3) ? 255 : 0;
    if (c.codes == Codes::largest)
        for (i64 i = 0; i < x.tensor.count(); ++i) x.codes()[i] = c.zero_point < 128 ? 255 : 0;
    if (c.codes == Codes::joint)
        for (i64 i = 0; i < x.tensor.count(); ++i)
            if (pick(0, 3)) x.codes()[i] = static_cast<std::uint8_t>(xq.qmax);
    // Of joint weights: four add up to what 16 bits just hold or just don't, or most to less.
    const bool is_bound = pick(0, 1), is_beyond = pick(0, 1), is_negative = pick(0, 1);
    i64 taps = 1;
    for (std::size_t i = 0; i < spatial; ++i) taps *= c.kernel[i];
    std::unique_ptr<std::int8_t[]> w(new std::int8_t[static_cast<std::size_t>(c.out_channels * own_in * taps)]);
    for (i64 i = 0; i < c.out_channels * own_in * taps; ++i)
        w[i] = static_cast<std::int8_t>(c.codes == Codes::extreme ? (pick(0, 3) ? 127 : -127) : pick(-127, 127));
    if (c.codes == Codes::largest)
        for (i64 i = 0; i < c.out_channels * own_in * taps; ++i) w[i] = is_negative ? -127 : 127;
    if (c.codes == Codes::joint)
        for (i64 i = 0; i < c.out_channels * own_in * taps; ++i)
            if (is_bound)
                w[i] = static_cast<std::int8_t>((is_negative ? -1 : 1) * (64 + (is_beyond ? 1 : i % 2)));
            else if (pick(0, 400))
                w[i] = static_cast<std::int8_t>(pick(-50, 50));
    const i64 scales = c.per_tensor ? 1 : c.out_channels;
    std::vector<float> scale(static_cast<std::size_t>(scales)), bias(static_cast<std::size_t>(c.out_channels));
    for (auto& s : scale) s = pick_real(0.001f, 0.01f);
    for (auto& b : bias) b = pick_real(-2, 2);
    if (c.out_channels > 0 && c.bias_at_0 != 0) bias[0] = c.bias_at_0;
    const double spread = 0.02 * 0.006 * 70 * 70 * std::sqrt(double(std::max<i64>(1, own_in * taps)));
    const bool squashes = c.epilogue.kind == Activation::sigmoid || c.epilogue.kind == Activation::tanh ||
                          c.epilogue.kind == Activation::hardsigmoid;
    const QParams yq{squashes ? 0.0079f : float(spread / 60), int(pick(0, 2)) * 64, 0, int(pick(0, 3)) ? 255 : 200};
    Buffer y(c.is_float ? DType::f32 : DType::u8, yd, strides(yd),
             c.is_float ? std::nullopt : std::optional<QParams>(yq));
    const QParams rq{c.in_place ? float(spread / 50) : 0.037f, c.residual_zero, 0, 255};
    Buffer separate(DType::u8, yd, strides(yd), rq);
    Buffer reals(DType::f32, yd, strides(yd), std::nullopt);
    for (i64 i = 0; i < reals.tensor.count(); ++i) reals.reals()[i] = pick_real(-3, 3);
    Tensor residual = c.is_real_residual ? reals.tensor : separate.tensor;
    if (c.in_place) {
        std::memcpy(y.base, separate.base, static_cast<std::size_t>(y.tensor.count()));
        residual.place = y.tensor.place;
    }

    const Weights weights{w.get(), wd, scale.data(), scales, c.has_bias ? bias.data() : nullptr};
    ThreadPool pool(c.threads);
    const Tensor* r = c.has_residual ? &residual : nullptr;
    const ConvGeometry geometry{c.stride, c.padding, c.dilation, c.groups};
    StepPtr step = is_linear ? host::make_linear(pool, weights, x.tensor, r, c.epilogue, y.tensor)
                             : host::make_conv(pool, weights, geometry, x.tensor, r, c.epilogue, y.tensor);
    step->run();
    if (!c.in_place) step->run();  // a step runs many times

    const std::string text = text_of(c);
    std::vector<i64> out(yd.begin() + 2, yd.end());
    i64 pixels = 1;
    for (i64 o : out) pixels *= o;
    for (i64 image = 0; image < c.batch; ++image)
        for (i64 pixel = 0; pixel < pixels; ++pixel) {
            i64 o[3] = {0, 0, 0}, rest = pixel;
            for (std::size_t i = spatial; i-- > 0; rest /= out[i]) o[i] = rest % out[i];
            for (i64 n = 0; n < c.out_channels; ++n) {
                const i64 group = n / own_out;
                i64 acc = 0;
                for (i64 tap = 0; tap < taps; ++tap) {
                    i64 t = tap, position[3] = {0, 0, 0};
                    bool inside = true;
                    for (std::size_t i = spatial; i-- > 0; t /= c.kernel[i]) {
                        position[i] = o[i] * c.stride[i] - c.padding[i] + t % c.kernel[i] * c.dilation[i];
                        inside = inside && position[i] >= 0 && position[i] < c.in[i];
                    }
                    if (!inside) continue;
                    i64 base = image;
                    for (std::size_t i = 0; i < spatial; ++i) base = base * c.in[i] + position[i];
                    base = base * c.in_channels + group * own_in;
                    for (i64 k = 0; k < own_in; ++k)
                        acc += (i64(x.codes()[base + k]) - c.zero_point) * w[(n * own_in + k) * taps + tap];
                }
                const float s = scale[static_cast<std::size_t>(c.per_tensor ? 0 : n)] * xq.scale;
                volatile float real = float(acc) * s;
                if (c.has_bias) real = real + bias[static_cast<std::size_t>(n)];
                const i64 index = (image * pixels + pixel) * c.out_channels + n;
                if (r != nullptr) {
                    volatile float added = float(int(separate.codes()[index]) - rq.zero_point) * rq.scale;
                    real = real + (c.is_real_residual ? reals.reals()[index] : added);
                }
                check_result(text, y, index, real, c.epilogue);
            }
        }
}

Epilogue pick_epilogue() {
    Epilogue e{static_cast<Activation>(pick(0, kActivations - 1)), 0, 0};
    if (e.kind == Activation::hardtanh) e.a = -0.5f, e.b = 6;
    if (e.kind == Activation::leaky_relu) e.a = 0.1f;
    return e;
}

void vary(Case& c) {
    c.epilogue = pick_epilogue();
    c.has_residual = pick(0, 2) == 0;
    c.is_float = pick(0, 4) == 0;
    c.is_real_residual = c.has_residual && pick(0, 2) == 0;
    c.in_place = c.has_residual && !c.is_real_residual && !c.is_float && pick(0, 1);
    c.has_bias = pick(0, 3) != 0;
    c.per_tensor = pick(0, 3) == 0;
    const int zeros[] = {0, 128, 255, 37};
    c.zero_point = zeros[pick(0, 3)];
    c.residual_zero = pick(0, 1) ? 0 : 117;
    c.codes = static_cast<Codes>(pick(0, 3));
    c.threads = int(pick(1, 3));
}

void test_linear() {
    for (i64 m : {0, 1, 2, 5, 6, 7, 13, 50})
        for (i64 k : {0, 1, 3, 4, 5, 31, 64, 70, 257})
            for (i64 n : {0, 1, 3, 8, 9, 16, 17, 33, 64, 100}) {
                Case c;
                c.batch = m;
                c.in_channels = k;
                c.out_channels = n;
                vary(c);
                run_case(c);
            }
    for (i64 k : {1500, 2048, 4096, 5000}) {
        Case c;
        c.batch = 9;
        c.in_channels = k;
        c.out_channels = 40;
        for (Codes codes : {Codes::random, Codes::low, Codes::extreme, Codes::joint}) {
            vary(c);
            c.codes = codes;
            run_case(c);
        }
    }
    // Weights beyond a block that stays in the L2 cache; rows and channels end within a tile.
    for (i64 k : {2048, 2112}) {
        Case c;
        c.batch = 37;
        c.in_channels = k;
        c.out_channels = 820;
        vary(c);
        run_case(c);
    }
}

void test_activations() {
    for (int kind = 0; kind < kActivations; ++kind)
        for (bool is_float : {false, true})
            for (int residuals = 0; residuals < 3; ++residuals) {
                Case c;
                c.batch = 40;
                c.in_channels = 24;
                c.out_channels = 99;
                c.epilogue = {static_cast<Activation>(kind), kind == 2 ? -1.0f : 0.05f, 6.0f};
                c.is_float = is_float;
                c.has_residual = residuals > 0;
                c.is_real_residual = residuals > 1;
                run_case(c);
            }
}

void test_not_finite() {
    const float infinity = std::numeric_limits<float>::infinity();
    for (int kind : {0, 1, 2, 3, 9})
        for (float bias : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
            Case c;
            c.batch = 7;
            c.in_channels = 20;
            c.out_channels = 67;
            c.epilogue = {static_cast<Activation>(kind), kind == 2 ? -1.0f : 0.05f, 6.0f};
            c.bias_at_0 = bias;
            run_case(c);
        }
}

void test_longest_reduction() {
    for (int zero : {0, 128}) {
        Case c;
        c.batch = 3;
        c.zero_point = zero;
        c.out_channels = 2;
        c.in_channels = (std::numeric_limits<std::int32_t>::max)() / (127 * (zero == 0 ? 255 : 128));
        c.codes = Codes::extreme;
        run_case(c);
        ++c.in_channels;
        bool threw = false;
        try {
            run_case(c);
        } catch (const Error&) {
            threw = true;
        }
        if (!threw) fail("a reduction too long for int32 was accepted", 0, 1);
    }
}

// Threads decide by which products a convolution is computed, and must not by what it gives.
void test_any_threads() {
    for (int again = 0; again < 12; ++again) {
        const i64 in = 32 * pick(1, 3), out = pick(24, 70), size = pick(13, 30);
        const QParams xq{0.03f, int(pick(0, 255)), 0, 255}, yq{0.05f, 120, 0, 255};
        const std::vector<i64> xd{1, in, size, size}, yd{1, out, size, size};
        Buffer x(DType::u8, xd, channels_last(xd), xq), y(DType::u8, yd, channels_last(yd), yq);
        Buffer other(DType::u8, yd, channels_last(yd), yq);
        std::vector<std::int8_t> w(static_cast<std::size_t>(9 * in * out));
        for (auto& v : w) v = static_cast<std::int8_t>(pick(-127, 127));
        std::vector<float> scale(static_cast<std::size_t>(out)), bias(scale.size());
        // Of 2048 sums one lies halfway between codes, but for the rounding of scales.
        for (auto& v : scale) v = 0.05f / (0.03f * 2048);
        for (auto& v : bias) v = float(pick(-3, 3)) * 0.05f;
        const Weights weights{w.data(), {out, in, 3, 3}, scale.data(), out, bias.data()};
        const ConvGeometry geometry{{1, 1}, {1, 1}, {1, 1}, 1};
        ThreadPool one(1), many(16);
        host::make_conv(one, weights, geometry, x.tensor, nullptr, Epilogue{}, y.tensor)->run();
        host::make_conv(many, weights, geometry, x.tensor, nullptr, Epilogue{}, other.tensor)->run();
        for (i64 i = 0; i < y.tensor.count(); ++i, ++checked)
            if (y.codes()[i] != other.codes()[i]) fail("16 threads", other.codes()[i], y.codes()[i]);
    }
}

// Around what 64 times a sum of Winograd's larger tiles may be: 2^31 lies between 112 and 128 channels.
void test_largest_sums() {
    for (int zero : {0, 255})
        for (i64 channels : {64, 96, 112, 128, 160})
            for (int again = 0; again < 2; ++again) {
                Case c;
                c.in = {22, 19};
                c.kernel = {3, 3};
                c.stride = c.dilation = c.padding = {1, 1};
                c.zero_point = zero;
                c.in_channels = channels;
                c.out_channels = 24;
                c.codes = Codes::largest;
                c.is_float = true;
                run_case(c);
            }
}

void test_convolutions(int count, std::function<void(Case&)> set_channels) {
    for (int i = 0; i < count; ++i) {
        Case c;
        const int spatial = i % 3 == 0 ? int(pick(1, 3)) : 2;
        for (int d = 0; d < spatial; ++d) {
            c.in.push_back(pick(1, spatial == 3 ? 6 : 11));
            c.kernel.push_back(pick(1, pick(0, 4) ? 3 : 5));
            c.stride.push_back(pick(1, pick(0, 2) ? 2 : 3));
            c.dilation.push_back(pick(0, 3) ? 1 : 2);
            c.padding.push_back(pick(0, 5) ? pick(0, 2) : c.kernel.back() + 1);
        }
        c.batch = pick(0, 8) ? pick(1, 2) : pick(0, 3);
        set_channels(c);
        vary(c);
        run_case(c);
    }
}

// The shapes that networks have, with every code range.
void test_usual_convolutions() {
    const auto conv = [](i64 size, i64 in, i64 out, i64 kernel, i64 stride, i64 groups = 1) {
        for (Codes codes : {Codes::random, Codes::low, Codes::extreme, Codes::joint})
            for (int zero : {0, 128}) {
                Case c;
                vary(c);
                c.in = {size, size};
                c.kernel = {kernel, kernel};
                c.stride = {stride, stride};
                c.padding = {kernel / 2, kernel / 2};
                c.dilation = {1, 1};
                c.in_channels = in;
                c.out_channels = out;
                c.groups = groups;
                c.codes = codes;
                c.zero_point = zero;
                run_case(c);
            }
    };
    conv(30, 3, 64, 7, 2);
    conv(28, 3, 32, 3, 2);
    conv(14, 64, 64, 3, 1);
    conv(7, 200, 72, 3, 1);
    conv(7, 64, 160, 3, 1);
    conv(13, 64, 72, 3, 2);
    conv(9, 33, 20, 3, 1);
    conv(14, 64, 96, 1, 1);
    conv(14, 64, 96, 1, 2);
    conv(13, 32, 32, 3, 1, 32);
    conv(13, 72, 72, 5, 2, 72);
    conv(7, 960, 960, 3, 1, 960);
    conv(14, 128, 128, 3, 1, 32);
    conv(1, 96, 24, 1, 1);
}

// A weight, and the memory it points at.
struct OwnWeights {
    std::vector<std::int8_t> codes;
    std::vector<float> scale, bias;
    Weights weights;
    OwnWeights(const std::vector<i64>& dims, bool has_bias) : scale(pick(0, 1) ? 1 : dims[0]), bias(dims[0]) {
        i64 count = 1;
        for (i64 d : dims) count *= d;
        for (i64 i = 0; i < count; ++i) codes.push_back(static_cast<std::int8_t>(pick(-127, 127)));
        for (float& s : scale) s = pick_real(0.001f, 0.01f);
        for (float& b : bias) b = pick_real(-2, 2);
        weights = {codes.data(), dims, scale.data(), i64(scale.size()), has_bias ? bias.data() : nullptr};
    }
};

// Products summed in one step, and the rest of its codes, against the steps one after another.
void run_terms(const Case& c, int products, bool wants_rest) {
    const bool is_linear = c.in.empty();
    std::vector<i64> xd{c.batch, c.in_channels}, yd{c.batch, c.out_channels}, wd{c.out_channels, c.in_channels / c.groups};
    for (std::size_t i = 0; i < c.in.size(); ++i) {
        const i64 span = c.in[i] + 2 * c.padding[i] - c.dilation[i] * (c.kernel[i] - 1) - 1;
        xd.push_back(c.in[i]);
        wd.push_back(c.kernel[i]);
        yd.push_back(span < 0 ? 0 : span / c.stride[i] + 1);
    }
    const auto buffer = [&](DType dtype, const std::vector<i64>& d, std::optional<QParams> q) {
        return std::make_unique<Buffer>(dtype, d, is_linear ? row_major(d) : channels_last(d), q);
    };
    ThreadPool pool(c.threads);
    const ConvGeometry geometry{c.stride, c.padding, c.dilation, c.groups};
    const auto make = [&](const Weights& w, const Tensor& x, const Tensor* residual, const Epilogue& e, const Tensor& y,
                          const Terms& terms) {
        return is_linear ? host::make_linear(pool, w, x, residual, e, y, terms)
                         : host::make_conv(pool, w, geometry, x, residual, e, y, terms);
    };
    std::vector<std::unique_ptr<Buffer>> xs, sums;
    std::vector<std::unique_ptr<OwnWeights>> weights;
    Terms terms;
    const auto first = buffer(DType::u8, yd, QParams{0.037f, 117, 0, 255});
    const auto reals = buffer(DType::f32, yd, std::nullopt);
    for (i64 i = 0; i < reals->tensor.count(); ++i) reals->reals()[i] = pick_real(-3, 3);
    const Tensor* residual = !c.has_residual ? nullptr : c.is_real_residual ? &reals->tensor : &first->tensor;
    const Tensor* before = residual;
    for (int i = 0; i <= products; ++i) {
        const int zeros[] = {0, 128, 255, 37};
        xs.push_back(buffer(DType::u8, xd, QParams{pick_real(0.01f, 0.03f), zeros[pick(0, 3)], 0, 255}));
        weights.push_back(std::make_unique<OwnWeights>(wd, pick(0, 1)));
        sums.push_back(buffer(DType::f32, yd, std::nullopt));
        const bool is_last = i == products;
        make(weights.back()->weights, xs.back()->tensor, before, is_last ? c.epilogue : Epilogue{}, sums.back()->tensor,
             {})->run();
        before = &sums.back()->tensor;
        if (!is_last) terms.products.push_back({weights.back()->weights, xs.back()->tensor});
    }
    const QParams yq{0.5f, int(pick(0, 2)) * 64, 0, int(pick(0, 3)) ? 255 : 200}, rq{0.5f / 254, 128, 1, 255};
    const auto y = c.is_float ? buffer(DType::f32, yd, std::nullopt) : buffer(DType::u8, yd, yq);
    const auto rest = buffer(DType::u8, yd, rq);
    if (wants_rest) terms.rest = &rest->tensor;
    const StepPtr step = make(weights.back()->weights, xs.back()->tensor, residual, c.epilogue, y->tensor, terms);
    step->run();
    step->run();
    const std::string text = text_of(c) + " in " + std::to_string(products) + " more products";
    for (i64 i = 0; i < y->tensor.count(); ++i) {
        const float r = sums.back()->reals()[i];
        check_result(text, *y, i, r, {});
        if (!wants_rest) continue;
        volatile float stands_for = float(int(y->codes()[i]) - yq.zero_point) * yq.scale;
        volatile float left = r - stands_for;
        check_result(text + ", rest", *rest, i, left, {});
    }
}

void test_terms() {
    for (int i = 0; i < 220; ++i) {
        Case c;
        const int shape = i % 8;
        const i64 kernel = shape == 0 ? 0 : shape < 3 ? 1 : shape == 6 ? 5 : 3;
        c.batch = shape == 0 ? pick(0, 70) : pick(1, 2);
        c.in_channels = shape == 3 ? 3 : pick(0, 2) == 0 ? 64 : pick(1, 130);
        c.out_channels = pick(0, 2) == 0 ? 96 : pick(1, 150);
        if (shape > 4) c.groups = c.out_channels = c.in_channels;
        if (shape == 4) c.groups = 3, c.in_channels = 3 * pick(1, 12), c.out_channels = 3 * pick(1, 40);
        for (int d = 0; kernel > 0 && d < 2; ++d) {
            c.in.push_back(pick(1, 25));
            c.kernel.push_back(kernel);
            c.stride.push_back(pick(1, 2));
            c.padding.push_back(kernel == 1 ? 0 : pick(0, kernel / 2));
            c.dilation.push_back(shape == 7 ? 2 : 1);
        }
        vary(c);
        // Of larger results one code is too coarse to compare the steps' functions with.
        if (is_transcendental(c.epilogue.kind)) c.epilogue = {};
        run_terms(c, int(pick(0, 2)), !c.is_float && pick(0, 3) != 0);
    }
}

void test_matmul() {
    for (int i = 0; i < 150; ++i) {
        const i64 b0 = pick(1, 3), b1 = pick(1, 2), m = pick(0, 20), k = pick(0, 5) ? pick(1, 70) : pick(0, 600);
        const i64 n = pick(0, 40);
        const int zeros[] = {128, 0, 255, 91};
        const QParams aq{0.02f, zeros[pick(0, 3)], 0, 255}, bq{0.03f, zeros[pick(0, 3)], 0, 255};
        const bool is_float = pick(0, 1);
        // Strides of a permuted tensor, or a batch dimension that repeats.
        const auto operand = [&](i64 rows, i64 columns, const QParams& q) {
            const std::vector<i64> dims{b0, b1, rows, columns};
            std::vector<i64> strides;
            i64 count = b0 * b1 * rows * columns;
            switch (pick(0, 3)) {
                case 0: strides = row_major(dims); break;
                case 1: strides = {b1 * rows * columns, rows * columns, 1, rows}; break;
                case 2: strides = {rows * b1 * columns, columns, b1 * columns, 1}; break;
                default: strides = {0, rows * columns, columns, 1}; count = b1 * rows * columns; break;
            }
            return Buffer(DType::u8, dims, strides, q, count);
        };
        Buffer a = operand(m, k, aq), b = operand(k, n, bq);
        a.tensor.place.base = &a.base;
        b.tensor.place.base = &b.base;
        const std::vector<i64> yd{b0, b1, m, n};
        Buffer y(is_float ? DType::f32 : DType::u8, yd, row_major(yd),
                 is_float ? std::nullopt : std::optional<QParams>(QParams{0.6f, 100, 0, 255}));
        ThreadPool pool(int(pick(1, 3)));
        StepPtr step = host::make_int8_matmul(pool, a.tensor, b.tensor, y.tensor);
        step->run();
        for (i64 p = 0; p < b0; ++p)
            for (i64 q = 0; q < b1; ++q)
                for (i64 r = 0; r < m; ++r)
                    for (i64 c = 0; c < n; ++c) {
                        i64 acc = 0;
                        const auto& sa = a.tensor.strides;
                        const auto& sb = b.tensor.strides;
                        for (i64 t = 0; t < k; ++t)
                            acc += (i64(a.codes()[p * sa[0] + q * sa[1] + r * sa[2] + t * sa[3]]) - aq.zero_point) *
                                   (i64(b.codes()[p * sb[0] + q * sb[1] + t * sb[2] + c * sb[3]]) - bq.zero_point);
                        const float real = float(acc) * float(double(aq.scale) * bq.scale);
                        check_result("matmul", y, ((p * b1 + q) * m + r) * n + c, real, Epilogue{});
                    }
    }
}

void group(const char* name, const std::function<void()>& test) {
    const int before = failures;
    checked = 0;
    test();
    std::printf("  %-28s %9lld values  %s\n", name, static_cast<long long>(checked),
                failures == before ? "ok" : "FAILED");
}

}  // namespace

int main() {
    std::vector<const host::Int8Kernels*> all{&host::isa_generic::int8_kernels, &host::isa_portable16::int8_kernels};
    const Isa best = best_isa();
    if (best >= Isa::avx2) all.push_back(&host::isa_avx2::int8_kernels);
    if (best == Isa::avx_vnni) all.push_back(&host::isa_avx_vnni::int8_kernels);
    if (best >= Isa::avx512_vnni) all.push_back(&host::isa_avx512_vnni::int8_kernels);
    if (best >= Isa::avx512_vnni) all.push_back(&host::isa_emulated_amx::int8_kernels);
    if (best == Isa::amx_int8) all.push_back(&host::isa_amx_int8::int8_kernels);
    host::int8_kernels_beside() = nullptr;
    for (const host::Int8Kernels* kernels : all) {
        host::int8_kernels_in_use() = kernels;
        random_bits.seed(7);
        std::printf("%s, %d lanes%s\n", kernels->name, kernels->lanes,
                    kernels == &host::isa_emulated_amx::int8_kernels ? ", emulated tiles" : "");
        group("linear", test_linear);
        group("activations", test_activations);
        group("NaN and infinities", test_not_finite);
        group("longest reduction", test_longest_reduction);
        group("largest sums of 3x3", test_largest_sums);
        group("any number of threads", test_any_threads);
        group("convolutions", [] {
            test_convolutions(250, [](Case& c) {
                c.in_channels = pick(1, 40);
                c.out_channels = pick(1, 40);
            });
        });
        group("grouped convolutions", [] {
            test_convolutions(150, [](Case& c) {
                c.groups = pick(1, 9);
                c.in_channels = c.groups * pick(1, 9);
                c.out_channels = c.groups * pick(1, 9);
            });
        });
        group("groups of some channels", [] {
            test_convolutions(80, [](Case& c) {
                const i64 widths[] = {4, 8, 12, 16, 24, 32, pick(1, 40)};
                const i64 own_in = widths[pick(0, 6)], own_out = pick(0, 1) ? own_in : pick(1, 40);
                c.groups = pick(2, pick(0, 3) ? 6 : 33);
                c.in_channels = c.groups * own_in;
                c.out_channels = c.groups * own_out;
            });
        });
        group("depthwise convolutions", [] {
            test_convolutions(200, [](Case& c) { c.groups = c.in_channels = c.out_channels = pick(1, 150); });
        });
        group("depthwise 3x3 and 5x5", [] {
            test_convolutions(150, [](Case& c) {
                const i64 size = 3 + 2 * pick(0, 1);
                c.kernel = {size, size};
                // Lines above 64 KiB, too, and of fewer columns than a window has.
                c.in = {pick(1, 9), pick(0, 9) == 0 ? 600 : pick(1, 24)};
                c.stride = {pick(1, 3), pick(1, 2)};
                c.padding = {pick(size - 3, size - 1), pick(size - 3, size + 1)};
                c.dilation = {pick(1, 2), 1};
                c.groups = c.in_channels = c.out_channels = pick(0, 3) == 0 ? 64 * pick(1, 2) : pick(1, 150);
            });
        });
        group("usual convolutions", test_usual_convolutions);
        group("3x3 convolutions", [] {
            test_convolutions(80, [](Case& c) {
                const i64 most = pick(0, 1) == 0 ? 17 : 33;
                c.in = {pick(6, most), pick(6, most)};
                c.kernel = {3, 3};
                c.stride = c.dilation = {1, 1};
                c.padding = {pick(0, 4), pick(0, 4)};
                c.in_channels = 16 * pick(2, 6);
                c.out_channels = pick(24, 90);
            });
        });
        group("products in one step", test_terms);
        group("matmul", test_matmul);
    }
    if (failures > 0) std::printf("%d values FAILED\n", failures);
    return failures > 0;
}
