// The cost model never changes a result: every cut of every step, by whatever rates and on whichever of two instruction
// sets' kernels, gives the same bytes. And rates are held near the built-in ones, whatever was measured or read from a file.
#include <cmath>
#include <functional>

#include "../host/int8_steps.hpp"
#include "../host/isa.hpp"
#include "../host/rates.hpp"
#include "check.hpp"

using namespace check;
using namespace quantflow::host;
using namespace quantflow::host::int8;

namespace quantflow::host::isa_emulated_amx {
extern const Int8Kernels int8_kernels;
}

namespace {

struct Layer {
    Dims x, w, y;  // linears have two dimensions
    Int stride = 1, groups = 1;
    bool has_residual = false, is_float = false;
};

const Layer kLayers[] = {
    {{37, 130}, {70, 130}, {37, 70}},
    {{300, 256}, {200, 256}, {300, 200}, 1, 1, true},
    {{1, 512}, {1000, 512}, {1, 1000}, 1, 1, false, true},
    {{2, 32, 20, 20}, {64, 32, 3, 3}, {2, 64, 20, 20}, 1, 1, true},
    {{1, 3, 33, 31}, {40, 3, 3, 3}, {1, 40, 17, 16}, 2},
    {{1, 96, 14, 14}, {96, 24, 3, 3}, {1, 96, 14, 14}, 1, 4},
    {{1, 64, 28, 28}, {128, 64, 1, 1}, {1, 128, 14, 14}, 2},
};

std::vector<std::byte> bytes_of(const Layer& layer, ThreadPool& pool, std::shared_ptr<const Decision>* decision,
                                std::string* kernel = nullptr) {
    std::mt19937 bits(3);
    std::vector<std::byte> memory[3];
    std::byte* bases[3];
    const auto tensor = [&](int at, const Dims& dims, bool is_float) {
        Tensor t;
        t.dtype = is_float ? DType::f32 : DType::u8;
        t.dims = dims;
        t.strides = dims.size() == 2 ? row_major(dims) : channels_last(dims);
        if (!is_float) t.q = QParams{0.02f, 120, 0, 255};
        memory[at].resize(static_cast<std::size_t>(t.count() * size_of(t.dtype)));
        for (auto& byte : memory[at]) byte = static_cast<std::byte>(bits());
        bases[at] = memory[at].data();
        t.place = Place{&bases[at], 0};
        return t;
    };
    const Tensor x = tensor(0, layer.x, false), residual = tensor(1, layer.y, false);
    const Tensor y = tensor(2, layer.y, layer.is_float);
    Int count = 1;
    for (Int d : layer.w) count *= d;
    std::vector<std::int8_t> codes(static_cast<std::size_t>(count));
    for (auto& code : codes) code = static_cast<std::int8_t>(static_cast<int>(bits() % 255) - 127);
    const float scale = 0.003f;
    const Weights w{codes.data(), layer.w, &scale, 1, nullptr};
    const Tensor* r = layer.has_residual ? &residual : nullptr;
    const Epilogue relu{Activation::relu, 0, 0};
    take_decision();
    const Int half = layer.w.size() == 4 ? layer.w[2] / 2 : 0;
    StepPtr step = layer.x.size() == 2
                       ? make_linear(pool, w, x, r, relu, y)
                       : make_conv(pool, w, {{layer.stride, layer.stride}, {half, half}, {1, 1}, layer.groups}, x, r, relu, y);
    *decision = take_decision();
    if (kernel != nullptr) *kernel = step->kernel();
    step->run();
    return memory[2];
}

Rates any_rates(const Int8Kernels& kernels) {
    Rates r = built_in_rates(kernels);
#define QF_RATE(name) r.name *= std::exp(uniform(-5, 5));
    QF_RATES(QF_RATE)
#undef QF_RATE
    return r;
}

void check_bounds(const Int8Kernels& kernels, const char* what) {
    const Rates r = rates_of(kernels), usual = built_in_rates(kernels);
#define QF_RATE(name)                                                                                    \
    ++values;                                                                                            \
    if (!(r.name >= usual.name / kMostApart * 0.999 && r.name <= usual.name * kMostApart * 1.001))       \
        fail(std::string(what) + ": " #name " is " + std::to_string(r.name));
    QF_RATES(QF_RATE)
#undef QF_RATE
}

void check_ways(const Int8Kernels& kernels, int threads) {
    ThreadPool pool(threads);
    for (const Layer& layer : kLayers) {
        forget_rates();
        std::shared_ptr<const Decision> decision;
        const auto expected = bytes_of(layer, pool, &decision);
        const auto compare = [&](const char* what) {
            ++values;
            if (bytes_of(layer, pool, &decision) != expected) fail(std::string(kernels.name) + ": " + what);
        };
        for (int i = 0; i < 4; ++i) {
            set_rates(any_rates(kernels));
            check_bounds(kernels, "set");
            compare("other rates");
        }
        if (!decision) continue;  // Winograd's
        if (decision->ways.size() != 1 || decision->is_measured) fail("one way outside of a trial");
        Trial trial;
        trial.most = 6;
        trial.margin = 1e9;
        for (trial.rank = 0; trial.rank < trial.most; ++trial.rank) {
            const InTrial now(trial);
            compare("another cut");
            for (std::size_t i = 1; i < decision->ways.size(); ++i)
                if (decision->ways[i].predicted_ms < decision->ways[i - 1].predicted_ms) fail("ways are not in order");
        }
        const std::vector<Way> ways = decision->ways;
        trial = Trial{};
        {
            const InTrial now(trial);
            compare("no margin");
            if (decision->ways.size() != 1) fail("a way beyond the margin is tried");
        }
        keep_way(ways.back());
        compare("a kept way");
        if (!(decision->ways[0] == ways.back()) || !decision->is_measured) fail("a kept way is not taken");
        for (Way wrong : {Way{0, 0, 0, {}}, Way{-1, 1, 0, {}}, Way{1 << 30, 1 << 30, 0, {}}, Way{7, 1000, 0, {}}}) {
            wrong.shape = decision->shape;
            keep_way(wrong);
            compare("a way that there is not");
            if (decision->is_measured) fail("a way that there is not is taken");
        }
        forget_way(decision->shape);
    }
    forget_rates();
}

// Those that are cheap are taken, whichever they are, where the weights are small.
void check_either(const Int8Kernels& own, const Int8Kernels& beside) {
    int8_kernels_in_use() = &own;
    ThreadPool pool(2);
    int others = 0;
    const auto cost = [](const Int8Kernels& kernels, double factor) {
        Rates r = built_in_rates(kernels);
#define QF_RATE(name) r.name *= factor;
        QF_RATES(QF_RATE)
#undef QF_RATE
        set_rates(r);
    };
    for (const Layer& layer : kLayers) {
        std::shared_ptr<const Decision> decision;
        int8_kernels_beside() = nullptr;
        const auto expected = bytes_of(layer, pool, &decision);
        if (!decision) continue;  // Winograd's
        int8_kernels_beside() = &beside;
        const bool is_large = layer.w[0] * layer.w[1] > 64 * 1024;
        for (const bool wants_beside : {false, true}) {
            cost(own, wants_beside ? kMostApart : 1 / kMostApart);
            cost(beside, wants_beside ? 1 / kMostApart : kMostApart);
            const Int8Kernels& wanted = wants_beside && !is_large ? beside : own;
            std::string kernel;
            ++values;
            if (bytes_of(layer, pool, &decision, &kernel) != expected) fail("either kernels");
            if (kernel != tile_name(wanted, "igemm")) fail(kernel + " where " + wanted.name + " is cheap");
            if (decision->shape.find(wanted.name) == std::string::npos) fail("the decision is the other kernels'");
        }
        // What a race finds faster is taken, whatever is predicted: the others' best way is its last.
        Rates same = built_in_rates(own);
        set_rates(same);
        same.kernels = &beside;
        set_rates(same);
        Trial trial;
        trial.most = 3;
        trial.margin = 1e9;
        bytes_of(layer, pool, &decision);
        const std::string first = decision->shape;
        std::vector<Way> ways;
        for (trial.rank = 0; trial.rank < 4; ++trial.rank) {
            const InTrial now(trial);
            std::string kernel;
            ++values;
            if (bytes_of(layer, pool, &decision, &kernel) != expected) fail("either kernels in a trial");
            if (decision->shape != first) fail("a trial's decision is another shape's");
            ways = decision->ways;
            if (decision->taken != std::min(trial.rank, ways.size() - 1)) fail("another way than the trial's");
            const std::string& shape = ways[decision->taken].shape;
            if (kernel != tile_name(shape.find(own.name) != std::string::npos ? own : beside, "igemm")) fail(kernel);
        }
        const Way last = ways.back();
        if (is_large && last.shape != first) fail("others are tried for large weights");
        if (last.shape == first) continue;
        ++others;
        keep_way(last);
        bytes_of(layer, pool, &decision);
        if (!(decision->ways[0] == last) || !decision->is_measured) fail("others that were faster are not taken");
        forget_way(last.shape);
    }
    if (others == 0) fail("the others are never tried");
    int8_kernels_beside() = nullptr;
    forget_rates();
}

}  // namespace

int main() {
    const Int8Kernels* const found_in_use = int8_kernels_in_use();
    int8_kernels_beside() = nullptr;
    const Caches& found = caches();
    std::printf("caches: %lld and %lld bytes (%s)\n", static_cast<long long>(found.l1), static_cast<long long>(found.l2),
                found.source);
    for (const Isa isa : {Isa::generic, Isa::avx2, Isa::avx_vnni, Isa::avx512_vnni}) {
        // As QUANTFLOW_ISA decides: one that this CPU lacks is not tried.
        if (isa > best_isa() || (isa == Isa::avx_vnni && best_isa() == Isa::avx512_vnni)) continue;
        const Int8Kernels* tried[] = {&isa_generic::int8_kernels, &isa_avx2::int8_kernels, &isa_avx_vnni::int8_kernels,
                                      &isa_avx512_vnni::int8_kernels};
        int8_kernels_in_use() = tried[static_cast<int>(isa)];
        for (int threads : {1, 3}) check_ways(*int8_kernels_in_use(), threads);
        std::printf("%s: ", name_of(isa));
        end_group("cuts");
    }
    if (best_isa() >= Isa::avx2) check_either(isa_generic::int8_kernels, isa_avx2::int8_kernels);
    if (best_isa() >= Isa::avx512_vnni) check_either(isa_emulated_amx::int8_kernels, isa_avx512_vnni::int8_kernels);
    end_group("either kernels");
    int8_kernels_in_use() = found_in_use;
    const Int8Kernels& kernels = *int8_kernels_in_use();
    Rates wrong = built_in_rates(kernels);
    for (double value : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
        wrong.finishing = value;
        ++values;
        try {
            set_rates(wrong);
            fail("a rate that is no positive number is taken");
        } catch (const Error&) {
        }
    }
    if (best_isa() != Isa::generic) {
        for (const Rates& measured : measure_rates({&kernels, &isa_avx2::int8_kernels}, 2)) set_rates(measured);
        check_bounds(kernels, "measured");
        check_bounds(isa_avx2::int8_kernels, "measured beside");
        if (!rates_of(kernels).is_measured) fail("measured rates are not in use");
        if (rates_of(isa_generic::int8_kernels).is_measured) fail("rates are taken for other kernels");
    }
    end_group("rates");
    return failures == 0 ? 0 : 1;
}
