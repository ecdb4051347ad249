// What happens to the sums of an int8 step: the checks of its operands, and the constants of its epilogue.
#pragma once

#include <optional>
#include <vector>

#include "int8_packing.hpp"

namespace quantflow::host::int8 {

// Throws Unsupported.
void require(bool holds, const char* what);
void check_operands(const Weights&, const Tensor& x, const Tensor* residual, const Tensor& y, const Terms&);
bool all_are(bool (*has_layout)(const Tensor&), const Tensor& x, const Tensor* residual, const Tensor& y,
             const Terms&);

// |q - zero_point| * |w| summed `steps` times must fit int32. Throws where it might not.
void check_reduction(i64 steps, std::int32_t zero_point, i64 largest_weight);

inline bool is_real(const Tensor* residual) { return residual != nullptr && !residual->q; }

// A pointer that reaches `first` at element `index`. It may lie outside what `first` belongs to.
inline std::int32_t* reaching(std::int32_t* first, i64 index) {
    return reinterpret_cast<std::int32_t*>(reinterpret_cast<std::uintptr_t>(first) -
                                           static_cast<std::uintptr_t>(index) * sizeof *first);
}

// Sums that a block of a step keeps of the products before its own, in the L1 cache.
constexpr i64 kSumsBytes = 32 * 1024;

// Everything but scale, bias and the addresses.
Int8Output output_of(const Tensor* residual, const Epilogue&, const Tensor& y, i64 row, const Tensor* rest = nullptr);

// Per-channel constants at their padded positions; position(channel) gives them.
struct ChannelConstants {
    Aligned<float> scale, bias, code_scale, code_bias, code_scale_before[kMostBefore];
    Aligned<std::int32_t> start;
    template <typename Position>
    ChannelConstants(const Weights& w, const QParams& x, const Aligned<std::int32_t>& sums, bool is_centered,
                     const Position& position)
        : scale(sums.size()), bias(sums.size()), start(sums.size()) {
        for (i64 c = 0; c < w.dims[0]; ++c) {
            const i64 at = position(c);
            scale[at] = w.scale[w.scales == 1 ? 0 : c] * x.scale;
            if (w.bias != nullptr) bias[at] = w.bias[c];
        }
        if (!is_centered)
            for (i64 i = 0; i < sums.size(); ++i)
                start[i] = static_cast<std::int32_t>(0u - static_cast<std::uint32_t>(x.zero_point) *
                                                              static_cast<std::uint32_t>(sums[i]));
    }

    // Has `o` read them, and those of the products before; `steps`: of the reduction. `needs_reals`: something is added
    // to, or made of, the result in f32.
    void bind(Int8Output& o, i64 steps, const QParams& x, const std::optional<QParams>& y, bool needs_reals,
              const std::vector<const ChannelConstants*>& before);
};

// Has `o` write to and read from where these lie now.
void bind_output(Int8Output& o, const std::optional<Tensor>& residual, const Tensor& y,
                 const std::optional<Tensor>& rest = std::nullopt);

}  // namespace quantflow::host::int8
