#include "rates.hpp"

#include <cpuid.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <string>

#include "int8_cost.hpp"

namespace quantflow::host::int8 {
namespace {

std::mutex mutex;
std::map<const Int8Kernels*, Rates> in_use;

std::string first_word(const std::string& file) {
    std::string word;
    std::ifstream(file) >> word;
    return word;
}

// "48K", "2M"; 0: not that.
i64 bytes_of(const std::string& text) {
    i64 value = 0;
    std::size_t i = 0;
    for (; i < text.size() && i < 7 && text[i] >= '0' && text[i] <= '9'; ++i) value = 10 * value + (text[i] - '0');
    if (i + 1 != text.size()) return 0;
    return text[i] == 'K' ? value << 10 : text[i] == 'M' ? value << 20 : 0;
}

bool is_plausible(const Caches& c) {
    return c.l1 >= 8 << 10 && c.l1 <= 1 << 20 && c.l2 >= 128 << 10 && c.l2 <= 64 << 20;
}

Caches caches_of_sysfs() {
    Caches found{0, 0, "sysfs"};
    for (int i = 0; i < 8; ++i) {
        const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
        const std::string level = first_word(folder + "level");
        if (level.empty()) break;
        if (first_word(folder + "type") == "Instruction") continue;
        const i64 bytes = bytes_of(first_word(folder + "size"));
        if (level == "1") found.l1 = bytes;
        if (level == "2") found.l2 = bytes;
    }
    return found;
}

// Leaf 4 of Intel's processors, leaf 0x8000001D of AMD's, of the same form.
Caches caches_of_cpuid() {
    Caches found{0, 0, "cpuid"};
    for (const unsigned leaf : {4u, 0x8000001Du})
        for (unsigned i = 0; i < 8 && !is_plausible(found); ++i) {
            unsigned a = 0, b = 0, c = 0, d = 0;
            if (__get_cpuid_count(leaf, i, &a, &b, &c, &d) == 0 || (a & 31u) == 0) break;
            const i64 bytes = static_cast<i64>((b >> 22) + 1) * ((b >> 12 & 1023u) + 1) * ((b & 4095u) + 1) * (c + i64{1});
            if ((a & 31u) == 2) continue;  // of instructions
            if ((a >> 5 & 7u) == 1) found.l1 = bytes;
            if ((a >> 5 & 7u) == 2) found.l2 = bytes;
        }
    return found;
}

}  // namespace

Rates built_in_rates(const Int8Kernels& kernels) {
    const bool has_tiles = kernels.depth > 1;
    // Processors with tile registers have two units for vectors of the full length.
    const bool is_beside = &kernels == int8_kernels_beside();
    Rates r;
    r.kernels = &kernels;
    r.product = r.window_product = has_tiles ? 0.16 : is_beside ? 1.0 : kernels.is_exact ? 1.6 : 2.4;
    r.narrow_product = 0.75;
    r.narrow_window = kernels.is_exact ? 0.6 : 1.1;
    r.fetching_near = r.fetching_far = 1.0 / 16;
    r.finishing = has_tiles ? 0.3 : is_beside ? 0.25 : 0.5;
    r.narrow_finishing = has_tiles ? 0.5 : r.finishing;
    r.passing = 1.0 / 24;
    r.packing = 0.06;
    r.hand_over = kHandOver;
    r.waiting = 0.1;
    return r;
}

Rates rates_of(const Int8Kernels& kernels) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (const auto found = in_use.find(&kernels); found != in_use.end()) return found->second;
    }
    return built_in_rates(kernels);
}

void set_rates(Rates rates) {
    const Rates usual = built_in_rates(*rates.kernels);
    const auto bounded = [](double value, double usual_value, const char* name) {
        if (!(value > 0) || !std::isfinite(value)) throw Error(std::string("rate ") + name + " is no positive number");
        return std::clamp(value, usual_value / kMostApart, usual_value * kMostApart);
    };
#define QF_RATE(name) rates.name = bounded(rates.name, usual.name, #name);
    QF_RATES(QF_RATE)
#undef QF_RATE
    rates.ghz = bounded(rates.ghz, usual.ghz, "ghz");
    rates.is_measured = true;
    std::lock_guard<std::mutex> lock(mutex);
    in_use[rates.kernels] = rates;
}

void forget_rates() {
    std::lock_guard<std::mutex> lock(mutex);
    in_use.clear();
}

const Caches& caches() {
    static const Caches found = [] {
        for (const Caches& each : {caches_of_sysfs(), caches_of_cpuid()})
            if (is_plausible(each)) return each;
        return Caches{};
    }();
    return found;
}

}  // namespace quantflow::host::int8
