// What is known of integers and flags before anything runs: positions count up, and comparing them may decide nothing
// else than "all of them".
#pragma once

#include <optional>
#include <unordered_map>

#include "../backend.hpp"
#include "../program.hpp"
#include "layout.hpp"

namespace quantflow::lowering {

// The integer at coordinates o is start + sum of o[d] * steps[d].
struct Counting {
    std::int64_t start = 0;
    Dims steps;
    std::int64_t least(const Dims& dims) const;
    std::int64_t most(const Dims& dims) const;
};

class Foreknown {
public:
    // Element i of the buffer is start + i * step.
    void counts(int buffer, std::int64_t start, std::int64_t step) { lines_[buffer] = Line{start, step}; }
    // Every element of the buffer is `flag`.
    void is_all(int buffer, bool flag) { flags_[buffer] = flag; }
    // Looked at when it is asked about.
    void holds(int buffer, const Stored& stored) { stored_[buffer] = &stored; }

    // Null: it is something else, or not known.
    std::optional<Counting> counting(const View& v);
    std::optional<bool> flag(const View& v);
    // The one result of comparing any element of one with any of the other.
    static std::optional<bool> compared(Binary op, const Counting& a, const Dims& a_dims, const Counting& b,
                                        const Dims& b_dims);

private:
    struct Line {
        std::int64_t start, step;
    };
    std::unordered_map<int, std::optional<Line>> lines_;
    std::unordered_map<int, std::optional<bool>> flags_;
    std::unordered_map<int, const Stored*> stored_;
};

}  // namespace quantflow::lowering
