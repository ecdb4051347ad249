// What a node's step computes besides the node. A node may steer later ones in four ways, all decided here, from the
// graph, when the first node of such a group is lowered:
//  * an activation, a sum with an earlier value, or quantize and the rest that it leaves over, that follows it, past moves
//    for a sum: its own step computes them, and the walk skips them (`is_absorbed`);
//  * attention written out as separate nodes: the first product's step computes all of them, too;
//  * zeros around an image: the convolution that reads it pads (`border_of`);
//  * a product that the next node adds to its own of the same shapes: the next node's step computes it, too
//    (`take_products`).
#pragma once

#include <initializer_list>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "graph.hpp"
#include "layout.hpp"

namespace quantflow::lowering {

// Zeros around an image, per spatial dimension.
struct Border {
    Dims before, after;
    bool operator==(const Border& o) const { return before == o.before && after == o.after; }
};

// A product whose step is not made yet: the next node adds it to its own.
struct HeldProduct {
    const Node* node;
    View x;
    std::optional<View> residual;
};

// The two values that a float one is written as: its codes, and those of what they leave over.
struct TwoTerms {
    int codes, rest;
    StoredAs first, second;
};

// What a sum adds to a value.
struct Sum {
    int node, other, output;
};

class Fusion {
public:
    Fusion(const Graph& graph, bool takes_terms, std::size_t nodes)
        : graph_(graph), takes_terms_(takes_terms), absorbed_(nodes, false) {}

    // Some earlier node's step computes these.
    template <typename Nodes>
    void absorb(const Nodes& nodes) {
        for (int node : nodes) absorbed_[static_cast<std::size_t>(node)] = true;
    }
    bool is_absorbed(int node) const { return absorbed_[static_cast<std::size_t>(node)]; }

    // Absorbs the activation that alone reads a float value into `epilogue`; returns the value that is then defined.
    int absorb_activation(int value, Epilogue& epilogue);
    // Where all that reads a float value is quantize and x - dequantize(quantize(x)), itself only quantized: absorbs
    // these.
    std::optional<TwoTerms> absorb_two_terms(int value);
    // The sum of two float values, one of which is `value` that nothing else reads: the caller absorbs it where the other
    // one is there by now and of the same shape.
    std::optional<Sum> sum_after(int value) const;
    // Absorbs a quantize of a float value that others read as a float; returns its codes, -1: there is none.
    int absorb_codes(int value);

    // Whether the one reader of a padded value, as it is or quantized, is a convolution; it then pads `inside` itself.
    bool leave_border(int value, const Dims& inside, const Dims& before, const Dims& padded);
    // Null: none was left to the convolution that reads the value.
    const Border* border_of(int value) const;

    // Whether the next node adds this one's float result, which nothing else reads, to a product of weights and
    // geometry of the same shapes. The operands' shapes are the caller's to compare.
    bool is_added_next(int node) const;
    // From one node to the next, in order.
    void hold(std::vector<HeldProduct> products) { held_ = std::move(products); }
    std::vector<HeldProduct> take_products() { return std::exchange(held_, {}); }

private:
    const Graph& graph_;
    const bool takes_terms_;
    std::vector<bool> absorbed_;
    std::unordered_map<int, Border> borders_;  // by the value that the convolution reads
    std::vector<HeldProduct> held_;
};

}  // namespace quantflow::lowering
