#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>

#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

using Found = std::optional<Epilogue>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Read from the program alone: an activation is fused before its own node is reached.
float bound(const Node& n, std::size_t position, const char* name, double fallback) {
    const Arg* a = nullptr;
    if (position < n.args.size()) {
        a = &n.args[position];
    } else if (const auto it = n.kwargs.find(name); it != n.kwargs.end()) {
        a = &it->second;
    }
    if (a == nullptr || a->is_none()) return static_cast<float>(fallback);
    if (const auto* i = a->as<std::int64_t>()) return static_cast<float>(static_cast<double>(*i));
    if (const auto* d = a->as<double>()) return static_cast<float>(*d);
    throw Unsupported("a bound is no number");
}

// No bound that is NaN: then every result is.
Found between(float low, float high) {
    if (std::isnan(low) || std::isnan(high)) return std::nullopt;
    return Epilogue{Activation::hardtanh, low, high};
}
// Bounds that are tensors have overloads of their own.
bool has_number_bounds(const Node& n) { return overload_name(n.target) == "default"; }

template <Activation kind>
Found simple(const Node&) {
    return Epilogue{kind};
}
Found relu6(const Node&) { return between(0, 6); }
Found hardtanh(const Node& n) { return between(bound(n, 1, "min_val", -1), bound(n, 2, "max_val", 1)); }
Found leaky_relu(const Node& n) { return Epilogue{Activation::leaky_relu, bound(n, 1, "negative_slope", 0.01)}; }

Found clamp(const Node& n) {
    if (!has_number_bounds(n)) return std::nullopt;
    const float low = bound(n, 1, "min", -kInfinity), high = bound(n, 2, "max", kInfinity);
    if (low == static_cast<float>(-kInfinity) && high == static_cast<float>(kInfinity)) return std::nullopt;  // no bound
    return between(low, high);
}
Found clamp_min(const Node& n) {
    if (!has_number_bounds(n)) return std::nullopt;
    return between(bound(n, 1, "min", -kInfinity), static_cast<float>(kInfinity));
}
Found clamp_max(const Node& n) {
    if (!has_number_bounds(n)) return std::nullopt;
    return between(static_cast<float>(-kInfinity), bound(n, 1, "max", kInfinity));
}

Found gelu(const Node& n) {
    const auto it = n.kwargs.find("approximate");
    const Arg* a = n.args.size() > 1 ? &n.args[1] : it == n.kwargs.end() ? nullptr : &it->second;
    const Word* word = a == nullptr ? nullptr : a->as<Word>();
    return Epilogue{word != nullptr && word->name == "tanh" ? Activation::gelu_tanh : Activation::gelu};
}

void activation(Context& c, const Node& n) {
    const auto found = activation_of(n);
    if (!found) throw Unsupported("an activation with bounds that are no numbers");
    const View x = c.operand(0, "self");
    if (!x.q && x.dtype != DType::f32) throw Unsupported("an activation of integers");
    apply(c, Unary::activation, 0, 0, *found, c.spread_out(x), n.output);
}

// With one slope, which the program holds: a leaky ReLU.
void prelu(Context& c, const Node& n) {
    const View x = c.real_operand(0, "self");
    const Arg* a = c.argument(1, "weight");
    const TensorRef* ref = a == nullptr ? nullptr : a->as<TensorRef>();
    const Stored* stored = ref == nullptr ? nullptr : &c.program.tensors.at(ref->name);
    if (stored == nullptr || stored->data == nullptr || stored->dtype != DType::f32 || stored->count() != 1)
        throw Unsupported("a PReLU whose slope is not one constant float32");
    float slope = 0;
    std::memcpy(&slope, stored->data, sizeof slope);
    apply(c, Unary::activation, 0, 0, Epilogue{Activation::leaky_relu, slope}, c.spread_out(x), n.output);
}

}  // namespace

const OpRows& activation_ops() {
    static const OpRows rows = [] {
        OpRows made = {
            {"relu6", activation, Role::none, relu6},
            {"hardtanh", activation, Role::none, hardtanh},
            {"clamp", activation, Role::none, clamp},
            {"clamp_min", activation, Role::none, clamp_min},
            {"clamp_max", activation, Role::none, clamp_max},
            {"leaky_relu", activation, Role::none, leaky_relu},
            {"gelu", activation, Role::none, gelu},
            {"prelu", prelu},
        };
        const auto add = [&made](const char* aten, Found (*found)(const Node&)) {
            const bool reads_arguments = std::any_of(made.begin(), made.end(), [aten](const OpRow& row) {
                return std::string_view(row.name) == aten;
            });
            if (!reads_arguments) made.push_back({aten, activation, Role::none, found});
        };
#define QF_ROW(name, Name, aten, ...) add(aten, simple<Activation::name>);
        QF_ACTIVATIONS(QF_ROW)
#undef QF_ROW
        return made;
    }();
    return rows;
}

}  // namespace quantflow::lowering
