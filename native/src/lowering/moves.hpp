// Moves of a value looked at before they are lowered, so that what makes it, or joins its dimensions, does so in the
// order of rows in memory that its reader wants.
#pragma once

#include <optional>
#include <vector>

#include "context.hpp"

namespace quantflow::lowering {

// A tensor as the order of its elements: those of `view`, row by row, in `dims`. So dimensions that lie apart in memory
// are joined without a copy, for as long as nothing computes on them.
struct Moved {
    View view;
    Dims dims;
    // With one stride for each of `dims`; nullopt: that takes a copy.
    std::optional<View> plain() const;
};

// What a reshape, permute or transpose makes of the tensor; nullopt: the node is none, takes sizes that are not known,
// or cuts across the tensor's dimensions.
std::optional<Moved> moved(Context& c, const Node& n, const Moved& x);

// Strides of `dims`, in which the rows of a dense x, its last dimension, have another length and stay in the order in
// which they lie in memory; nullopt: x's rows have gaps in or between them.
std::optional<Dims> rows_as_they_lie(const View& x, const Dims& dims);

// A value that, past moves, nothing but a sum with an earlier value of the same layout reads.
struct MovedSum {
    View other;              // the earlier value
    View result;             // the sum, seen as its readers do
    int output;              // its value
    std::vector<int> nodes;  // what is not lowered any more
};

// `y`: the value, as its step would write it.
std::optional<MovedSum> sum_past_moves(Context& c, int value, const View& y);

// Defines what a reshape of x to `dims` becomes without a copy where what alone reads it parts the joined dimensions
// again: moves, which are done here, or a linear, which takes rows one by one. False: that is not so.
bool joined_apart(Context& c, const Node& n, const View& x, const Dims& dims);

}  // namespace quantflow::lowering
