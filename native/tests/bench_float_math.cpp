// Times of the float kernels: best and median of many runs, in microseconds, and GFLOP/s of the best.
// Usage: bench_float_math [threads = 2]. QUANTFLOW_ISA asks for a lower instruction set.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../host/isa.hpp"
#include "../host/steps.hpp"

using namespace quantflow;
using Int = std::int64_t;

namespace {

struct Value {
    Tensor t;
    std::vector<float> memory;
    std::byte* base;

    explicit Value(std::vector<Int> dims, std::optional<QParams> q = {}) {
        t.dims = std::move(dims);
        t.strides = row_major(t.dims);
        t.dtype = q ? DType::u8 : DType::f32;
        t.q = q;
        static std::mt19937 bits(1);
        std::normal_distribution<float> normal;
        memory.resize(static_cast<std::size_t>(t.count()));
        for (float& x : memory) x = normal(bits);
        base = reinterpret_cast<std::byte*>(memory.data());
        t.place = {&base, 0};
    }
    // Part `i` of a (B, L, parts, H, E) tensor as (B, H, L, E).
    Tensor head_view(Int i) const {
        Tensor v = t;
        const auto& d = t.dims;
        const auto& s = t.strides;
        v.dims = {d[0], d[3], d[1], d[4]};
        v.strides = {s[0], s[3], s[1], s[4]};
        v.place.offset = i * s[2] * size_of(t.dtype);
        return v;
    }
};

void measure(const char* what, Step& step, double flops) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> times;
    const auto begin = Clock::now();
    while (times.size() < 20 || (Clock::now() - begin < std::chrono::milliseconds(700) && times.size() < 5000)) {
        const auto start = Clock::now();
        step.run();
        times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    std::sort(times.begin(), times.end());
    std::printf("%-44s %9.1f %9.1f us %7.1f GFLOP/s  %s\n", what, times.front(), times[times.size() / 2],
                flops / times.front() * 1e-3, step.kernel().c_str());
}

void attention(ThreadPool& pool, const char* what, Int b, Int l, Int h, Int e, bool is_coded, bool is_masked) {
    const std::optional<QParams> q = is_coded ? std::optional<QParams>({0.02f, 128, 0, 255}) : std::nullopt;
    const Value qkv({b, l, 3, h, e}, q), out({b, l, 1, h, e}, q);
    Value mask({b, 1, 1, l});
    std::fill(mask.memory.begin(), mask.memory.end(), 0.0f);
    Tensor m = mask.t;
    m.dims = {b, h, l, l};
    m.strides = {l, 0, 0, 1};
    auto step = host::make_attention(pool, qkv.head_view(0), qkv.head_view(1), qkv.head_view(2),
                                     is_masked ? &m : nullptr, false, 1 / std::sqrt(static_cast<float>(e)),
                                     out.head_view(0));
    measure(what, *step, 4.0 * static_cast<double>(b * h * l * l * e));
}

void linear(ThreadPool& pool, const char* what, Int m, Int k, Int n) {
    const Value x({m, k}), w({n, k}), bias({n}), y({m, n});
    auto step = host::make_float_linear(pool, x.t, w.t, &bias.t, y.t);
    measure(what, *step, 2.0 * static_cast<double>(m * n * k));
}

void matmul(ThreadPool& pool, const char* what, Int b, Int m, Int k, Int n, bool is_turned) {
    const Value x({b, m, k}), w(is_turned ? std::vector<Int>{b, n, k} : std::vector<Int>{b, k, n}), y({b, m, n});
    Tensor right = w.t;
    if (is_turned) {
        std::swap(right.dims[1], right.dims[2]);
        std::swap(right.strides[1], right.strides[2]);
    }
    auto step = host::make_float_matmul(pool, x.t, right, y.t);
    measure(what, *step, 2.0 * static_cast<double>(b * m * n * k));
}

void layer_norm(ThreadPool& pool, const char* what, Int rows, Int n, bool is_coded) {
    const std::optional<QParams> q = is_coded ? std::optional<QParams>({0.02f, 128, 0, 255}) : std::nullopt;
    const Value x({rows, n}, q), gamma({n}), beta({n}), y({rows, n}, q);
    auto step = host::make_layer_norm(pool, x.t, &gamma.t, &beta.t, 1e-5f, false, y.t);
    measure(what, *step, 0);
}

void softmax(ThreadPool& pool, const char* what, std::vector<Int> dims, int axis) {
    const Value x(dims), y(dims);
    auto step = host::make_softmax(pool, x.t, axis, y.t);
    measure(what, *step, 0);
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
    ThreadPool pool(threads);
    std::printf("%s, %d thread(s): best, median\n", name_of(best_isa()), threads);
    attention(pool, "attention 12 x 128 x 32", 1, 128, 12, 32, false, false);
    attention(pool, "attention 12 x 128 x 32, key mask", 1, 128, 12, 32, false, true);
    attention(pool, "attention 12 x 128 x 32, u8", 1, 128, 12, 32, true, false);
    attention(pool, "attention 12 x 197 x 64", 1, 197, 12, 64, false, false);
    attention(pool, "attention 12 x 197 x 64, u8", 1, 197, 12, 64, true, false);
    attention(pool, "attention 8 x 2048 x 64", 1, 2048, 8, 64, false, false);
    linear(pool, "linear 128 x 384 x 1536", 128, 384, 1536);
    linear(pool, "linear 128 x 1536 x 384", 128, 1536, 384);
    linear(pool, "linear 197 x 768 x 768", 197, 768, 768);
    linear(pool, "linear 128 x 1024 x 1024", 128, 1024, 1024);
    linear(pool, "linear 1 x 1280 x 1000", 1, 1280, 1000);
    matmul(pool, "matmul 12 x (128 x 32 x 128), b turned", 12, 128, 32, 128, true);
    matmul(pool, "matmul 12 x (128 x 128 x 32)", 12, 128, 128, 32, false);
    matmul(pool, "matmul 512 x 512 x 512", 1, 512, 512, 512, false);
    layer_norm(pool, "layer_norm 128 x 384", 128, 384, false);
    layer_norm(pool, "layer_norm 128 x 384, u8", 128, 384, true);
    layer_norm(pool, "layer_norm 197 x 768", 197, 768, false);
    softmax(pool, "softmax 12 x 128 x 128", {12, 128, 128}, 2);
    softmax(pool, "softmax 12 x 197 x 197", {12, 197, 197}, 2);
    softmax(pool, "softmax 1 x 21 x 128 x 128, axis 1", {1, 21, 128, 128}, 1);
}
