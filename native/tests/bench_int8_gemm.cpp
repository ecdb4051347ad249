// Speed of int8 layers at batch 1: GMAC/s of ResNet-50's distinct convolutions, the whole chain of 53, MobileNetV2's
// depthwise layers, others. Inputs after ReLU (codes from the zero point up), or all codes if asked.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "../host/isa.hpp"
#include "../host/steps.hpp"

using namespace quantflow;
using i64 = std::int64_t;

namespace {

std::mt19937 random_bits(1);
bool full_range = false;

double now_ms() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

struct Shape {
    const char* name;
    i64 size, in, out, kernel, stride, groups;
    bool has_residual;
    int count;  // in the network
};

// One layer with its own memory.
struct Layer {
    std::unique_ptr<std::byte[]> x, y, residual;
    std::byte *x_base, *y_base, *residual_base;
    std::unique_ptr<std::int8_t[]> w;
    std::vector<float> scale, bias;
    std::unique_ptr<Step> step;
    double macs = 0;

    Layer(ThreadPool& pool, const Shape& s, i64 batch = 1) {
        const i64 out_size = (s.size - 1) / s.stride + 1;
        const bool is_linear = s.kernel == 0;
        const i64 kernel = is_linear ? 1 : s.kernel;
        const std::vector<i64> xd = is_linear ? std::vector<i64>{s.size, s.in}
                                              : std::vector<i64>{batch, s.in, s.size, s.size};
        const std::vector<i64> yd = is_linear ? std::vector<i64>{s.size, s.out}
                                              : std::vector<i64>{batch, s.out, out_size, out_size};
        const auto tensor = [&](const std::vector<i64>& d, std::unique_ptr<std::byte[]>& memory, std::byte*& base) {
            Tensor t;
            t.dtype = DType::u8;
            t.dims = d;
            t.strides = is_linear ? row_major(d) : channels_last(d);
            t.q = QParams{0.02f, 128, 0, 255};
            memory.reset(new std::byte[static_cast<std::size_t>(t.count())]);
            base = memory.get();
            for (i64 i = 0; i < t.count(); ++i)
                base[i] = static_cast<std::byte>(full_range ? random_bits() : 128 + random_bits() % 128);
            t.place = Place{&base, 0};
            return t;
        };
        const Tensor tx = tensor(xd, x, x_base), ty = tensor(yd, y, y_base), tr = tensor(yd, residual, residual_base);
        const i64 own = s.in / s.groups, weights = s.out * own * kernel * kernel;
        w.reset(new std::int8_t[static_cast<std::size_t>(weights)]);
        for (i64 i = 0; i < weights; ++i) w[i] = static_cast<std::int8_t>(static_cast<int>(random_bits() % 255) - 127);
        scale.assign(static_cast<std::size_t>(s.out), 0.002f);
        bias.assign(static_cast<std::size_t>(s.out), 0.1f);
        std::vector<i64> wd{s.out, own};
        if (!is_linear) wd.insert(wd.end(), {kernel, kernel});
        const Weights packed{w.get(), wd, scale.data(), s.out, bias.data()};
        const Epilogue relu{Activation::relu, 0, 0};
        const Tensor* r = s.has_residual ? &tr : nullptr;
        if (is_linear)
            step = host::make_linear(pool, packed, tx, r, Epilogue{}, ty);
        else
            step = host::make_conv(pool, packed, {{s.stride, s.stride}, {kernel / 2, kernel / 2}, {1, 1}, s.groups}, tx,
                                   r, relu, ty);
        macs = static_cast<double>(weights) * (is_linear ? s.size : batch * out_size * out_size);
    }
};

double best_ms(Layer& layer, double budget_ms) {
    layer.step->run();
    double best = 1e30;
    const double start = now_ms();
    do {
        const double a = now_ms();
        layer.step->run();
        best = std::min(best, now_ms() - a);
    } while (now_ms() - start < budget_ms);
    return best;
}

const Shape kResNet50[] = {
    {"stem 7x7/2", 224, 3, 64, 7, 2, 1, false, 1},
    {"1x1 56", 56, 64, 64, 1, 1, 1, false, 1},
    {"3x3 56", 56, 64, 64, 3, 1, 1, false, 3},
    {"1x1 56 +", 56, 64, 256, 1, 1, 1, true, 3},
    {"1x1 56 down", 56, 64, 256, 1, 1, 1, false, 1},
    {"1x1 56", 56, 256, 64, 1, 1, 1, false, 2},
    {"1x1 56", 56, 256, 128, 1, 1, 1, false, 1},
    {"3x3/2 28", 56, 128, 128, 3, 2, 1, false, 1},
    {"1x1 28 +", 28, 128, 512, 1, 1, 1, true, 4},
    {"1x1/2 28 down", 56, 256, 512, 1, 2, 1, false, 1},
    {"1x1 28", 28, 512, 128, 1, 1, 1, false, 3},
    {"3x3 28", 28, 128, 128, 3, 1, 1, false, 3},
    {"1x1 28", 28, 512, 256, 1, 1, 1, false, 1},
    {"3x3/2 14", 28, 256, 256, 3, 2, 1, false, 1},
    {"1x1 14 +", 14, 256, 1024, 1, 1, 1, true, 6},
    {"1x1/2 14 down", 28, 512, 1024, 1, 2, 1, false, 1},
    {"1x1 14", 14, 1024, 256, 1, 1, 1, false, 5},
    {"3x3 14", 14, 256, 256, 3, 1, 1, false, 5},
    {"1x1 14", 14, 1024, 512, 1, 1, 1, false, 1},
    {"3x3/2 7", 14, 512, 512, 3, 2, 1, false, 1},
    {"1x1 7 +", 7, 512, 2048, 1, 1, 1, true, 3},
    {"1x1/2 7 down", 14, 1024, 2048, 1, 2, 1, false, 1},
    {"1x1 7", 7, 2048, 512, 1, 1, 1, false, 2},
    {"3x3 7", 7, 512, 512, 3, 1, 1, false, 2},
};

const Shape kDepthwise[] = {
    {"dw 3x3 112", 112, 32, 32, 3, 1, 32, false, 1},   {"dw 3x3/2 112", 112, 96, 96, 3, 2, 96, false, 1},
    {"dw 3x3 56", 56, 144, 144, 3, 1, 144, false, 1},  {"dw 3x3/2 56", 56, 144, 144, 3, 2, 144, false, 1},
    {"dw 3x3 28", 28, 192, 192, 3, 1, 192, false, 2},  {"dw 3x3/2 28", 28, 192, 192, 3, 2, 192, false, 1},
    {"dw 3x3 14", 14, 384, 384, 3, 1, 384, false, 4},  {"dw 3x3 14", 14, 576, 576, 3, 1, 576, false, 2},
    {"dw 3x3/2 14", 14, 576, 576, 3, 2, 576, false, 1}, {"dw 3x3 7", 7, 960, 960, 3, 1, 960, false, 3},
};

// MobileNetV2's products of few channels.
const Shape kNarrow[] = {
    {"stem 3x3/2", 224, 3, 32, 3, 2, 1, false, 1},  {"1x1 112", 112, 32, 16, 1, 1, 1, false, 1},
    {"1x1 112", 112, 16, 96, 1, 1, 1, false, 1},    {"1x1 56", 56, 96, 24, 1, 1, 1, false, 1},
    {"1x1 56 +", 56, 144, 24, 1, 1, 1, true, 1},    {"1x1 56", 56, 24, 144, 1, 1, 1, false, 2},
    {"1x1 28 +", 28, 192, 32, 1, 1, 1, true, 2},    {"1x1 28", 28, 32, 192, 1, 1, 1, false, 3},
    {"1x1 14 +", 14, 384, 64, 1, 1, 1, true, 3},    {"1x1 14", 14, 64, 384, 1, 1, 1, false, 4},
    {"1x1 14 +", 14, 576, 96, 1, 1, 1, true, 2},    {"1x1 7 +", 7, 960, 160, 1, 1, 1, true, 2},
};

const Shape kOther[] = {
    {"dw 5x5 28", 28, 240, 240, 5, 1, 240, false, 1},
    {"dw 5x5/2 28", 28, 120, 120, 5, 2, 120, false, 1},
    {"RegNetY 56 24", 56, 48, 48, 3, 1, 2, false, 1},
    {"RegNetY 28 24", 28, 120, 120, 3, 1, 5, false, 5},
    {"RegNetY 14 24", 14, 336, 336, 3, 1, 14, false, 16},
    {"RegNetY 7 24", 7, 888, 888, 3, 1, 37, false, 1},
    {"RegNetX 14 16", 14, 160, 160, 3, 1, 10, false, 1},
    {"ResNeXt 56 32x4", 56, 128, 128, 3, 1, 32, false, 1},
    {"ResNeXt 28 32x8", 28, 256, 256, 3, 1, 32, false, 1},
    {"ResNeXt 14 32x16", 14, 512, 512, 3, 1, 32, false, 1},
    {"linear 128", 128, 384, 1536, 0, 1, 1, false, 1},
    {"linear 1", 1, 2048, 1000, 0, 1, 1, false, 1},
};

template <std::size_t N>
void table(const Shape (&shapes)[N], double budget_ms) {
    double total[2] = {0, 0}, macs = 0;
    for (const Shape& s : shapes) {
        double ms[2] = {0, 0}, layer_macs = 0;
        std::string kernel;
        for (int threads = 1; threads <= 2; ++threads) {
            ThreadPool pool(threads);
            Layer layer(pool, s);
            ms[threads - 1] = best_ms(layer, budget_ms);
            layer_macs = layer.macs;
            kernel = layer.step->kernel();
            total[threads - 1] += s.count * ms[threads - 1];
        }
        macs += s.count * layer_macs;
        std::printf("%-16s %4lld->%-4lld x%d  %7.3f MMAC  1: %7.3f ms %6.1f GMAC/s  2: %7.3f ms %6.1f GMAC/s  %s\n",
                    s.name, static_cast<long long>(s.in), static_cast<long long>(s.out), s.count,
                    layer_macs * 1e-6, ms[0],
                    layer_macs / ms[0] * 1e-6, ms[1], layer_macs / ms[1] * 1e-6, kernel.c_str());
    }
    std::printf("sum, each best alone: 1: %.2f ms %.1f GMAC/s  2: %.2f ms %.1f GMAC/s\n\n", total[0],
                macs / total[0] * 1e-6, total[1], macs / total[1] * 1e-6);
}

// All 53 convolutions one after another, each with its own weights and images.
void chain(int threads, double budget_ms) {
    ThreadPool pool(threads);
    std::vector<std::unique_ptr<Layer>> layers;
    double macs = 0;
    for (const Shape& s : kResNet50)
        for (int i = 0; i < s.count; ++i) {
            layers.push_back(std::make_unique<Layer>(pool, s));
            macs += layers.back()->macs;
        }
    std::vector<double> all, least(layers.size(), 1e30);
    const double start = now_ms();
    do {
        double total = 0;
        for (std::size_t i = 0; i < layers.size(); ++i) {
            const double a = now_ms();
            layers[i]->step->run();
            const double ms = now_ms() - a;
            least[i] = std::min(least[i], ms);
            total += ms;
        }
        all.push_back(total);
    } while (now_ms() - start < budget_ms);
    std::sort(all.begin(), all.end());
    double sum = 0;
    for (double ms : least) sum += ms;
    std::printf("ResNet-50 chain, %zu convolutions, %.2f GMAC, %d threads: best %.2f ms (%.1f GMAC/s), median %.2f ms, "
                "sum of each layer's best %.2f ms (%.1f GMAC/s)\n",
                layers.size(), macs * 1e-9, threads, all[0], macs / all[0] * 1e-6, all[all.size() / 2], sum,
                macs / sum * 1e-6);
}

}  // namespace

// Arguments: "full", and any of "chain", "resnet", "depthwise", "narrow", "other"; none: all.
int main(int argc, char** argv) {
    bool chosen = false;
    const auto has = [&](const char* word) {
        for (int i = 1; i < argc; ++i)
            if (std::strcmp(argv[i], word) == 0) return true;
        return false;
    };
    full_range = has("full");
    for (const char* word : {"chain", "resnet", "depthwise", "narrow", "other"}) chosen = chosen || has(word);
    std::printf("%s, %s\n", name_of(best_isa()), full_range ? "codes 0..255" : "codes 128..255, zero point 128");
    if (!chosen || has("chain")) {
        chain(1, 1500);
        chain(2, 1500);
    }
    if (!chosen || has("resnet")) table(kResNet50, 60);
    if (!chosen || has("depthwise")) table(kDepthwise, 40);
    if (!chosen || has("narrow")) table(kNarrow, 40);
    if (!chosen || has("other")) table(kOther, 40);
    return 0;
}
