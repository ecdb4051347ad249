// What the program says about a section's values before anything is lowered: who reads them, and how they are stored.
#pragma once

#include <optional>
#include <string>

#include "../lower.hpp"

namespace quantflow::lowering {

// "softmax" of "softmax.int", and "int".
std::string base_name(const std::string& target);
std::string overload_name(const std::string& target);

// How a backend stores codes.
struct StoredAs {
    DType dtype;
    QParams q;
    std::int32_t shift;  // stored code = program's code + shift
    bool operator==(const StoredAs& o) const { return dtype == o.dtype && q == o.q; }
};

// How a result is written: as plain f32, as codes, or as codes that stand for a float (`is_real`).
struct Form {
    DType dtype = DType::f32;
    std::optional<QParams> q;
    bool is_real = false;
};

class Graph {
public:
    Graph(const Program& program, const Section& section, bool stores_unsigned)
        : program_(program), section_(section), stores_unsigned_(stores_unsigned) {}

    const Node& node(int index) const { return program_.nodes[static_cast<std::size_t>(index)]; }
    const Value& value(int index) const { return program_.values[static_cast<std::size_t>(index)]; }
    const Section& section() const { return section_; }
    bool is_output(int value) const;
    bool is_inside(int node) const { return node >= section_.first && node < section_.last; }
    // The one node that reads a value; -1: there are more, or some outside.
    int only_user(int value) const;
    // Whether a convolution reads the value (then channels_last is the layout to produce).
    bool feeds_conv(int value) const;

    StoredAs stored_as(int value) const;
    // Whether codes go from step to step as the backend stores them: only where that doesn't depend on the value.
    bool hands_on_stored() const { return section_.is_step && stores_unsigned_; }
    // Where all that a float value's readers do, past moves, is quantize it to the same codes, it is written as these.
    Form form_of(int value) const;

private:
    const Program& program_;
    const Section& section_;
    const bool stores_unsigned_;

    // `found`: the codes so far. False: some reader needs the float, or readers don't agree.
    bool collect_codes(int value, std::optional<StoredAs>& found) const;
};

}  // namespace quantflow::lowering
