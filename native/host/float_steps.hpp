// What the float steps share: which part of which tensor a task works on. The arithmetic is in float_math_isa.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "float_math_isa.hpp"
#include "rounding.hpp"
#include "steps.hpp"

namespace quantflow::host::floats {

using Int = std::int64_t;

const FloatKernels& kernels();
// Those that steps built from now on use; tests set them to try other instruction sets' code.
const FloatKernels*& kernels_in_use();
std::string kernel_name(const char* kernel);

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate_floats(Int count);

// Memory of this thread, shared by all steps: valid until the next call.
float* scratch(Int floats);

// Throws Unsupported where `kernel` takes no such tensor.
Real real_of(const Tensor& t, const char* kernel);

// A tensor as the kernels see it: rows and columns along two of its dimensions.
struct Operand {
    Place place;
    Real real;
    Int row_stride = 0, column_stride = 1;

    RealMatrix at(Int element) const {
        return {place.get() + element * real.bytes(), row_stride, column_stride, real};
    }
    // Whether a row is an array of floats.
    bool is_plain() const { return real.coding == Coding::f32 && column_stride == 1; }
};

// All positions of some dimensions, with the offset of each in N tensors. Dimensions that lie densely in all of them
// are joined, and those of size 1 left out.
template <std::size_t N>
class Walk {
public:
    Walk() = default;
    Walk(const std::vector<Int>& dims, const std::array<std::vector<Int>, N>& strides) {
        for (std::size_t i = 0; i < dims.size(); ++i) {
            count_ *= dims[i];
            if (dims[i] == 1) continue;
            Dimension d{dims[i], {}};
            for (std::size_t t = 0; t < N; ++t) d.stride[t] = strides[t][i];
            const auto joins = [&](const Dimension& outer) {
                for (std::size_t t = 0; t < N; ++t)
                    if (outer.stride[t] != d.size * d.stride[t]) return false;
                return true;
            };
            if (!dims_.empty() && joins(dims_.back()))
                dims_.back() = {dims_.back().size * d.size, d.stride};
            else
                dims_.push_back(d);
        }
    }

    struct Dimension {
        Int size;
        std::array<Int, N> stride;
    };

    Int count() const { return count_; }
    const Dimension* innermost() const { return dims_.empty() ? nullptr : &dims_.back(); }
    void drop_innermost() {
        dims_.pop_back();
        count_ = 1;
        for (const Dimension& d : dims_) count_ *= d.size;
    }
    std::array<Int, N> operator[](Int index) const {
        std::array<Int, N> offset{};
        for (std::size_t i = dims_.size(); i-- > 0;) {
            const Dimension& d = dims_[i];
            const Int at = i == 0 ? index : index % d.size;
            index /= d.size;
            for (std::size_t t = 0; t < N; ++t) offset[t] += at * d.stride[t];
        }
        return offset;
    }

private:
    std::vector<Dimension> dims_;
    Int count_ = 1;
};

// `count` positions in parts of about `size`, but enough of them to keep `threads` busy if there is work for it.
struct Parts {
    Int count = 0, size = 1;
    Parts() = default;
    Parts(Int total, Int wanted_size, int threads)
        : size(std::max<Int>(1, std::max(wanted_size, threads == 1 ? total : divide_up(total, Int{8} * threads)))) {
        count = divide_up(total, size);
    }
};

constexpr Int kRowBlock = 192;  // rows of A that stay in the second level cache while panels of B pass by

struct PackedWeight {
    Floats panels;
};

// One packed form of one weight, however many programs and steps use it. The hash of its values guards against a
// weight that was freed and another one put in its place while its packed form is still held.
// `owner`: the weight's own memory, of which `b` is this form.
std::shared_ptr<const PackedWeight> packed_weight(const void* owner, const RealMatrix& b, Int k, Int n);

}  // namespace quantflow::host::floats
