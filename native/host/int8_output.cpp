#include "int8_output.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantflow::host::int8 {

static_assert(Terms::kMost == kMostBefore);

void require(bool holds, const char* what) {
    if (!holds) throw Unsupported(std::string("host int8 kernel: ") + what);
}

void check_operands(const Weights& w, const Tensor& x, const Tensor* residual, const Tensor& y, const Terms& terms) {
    require(x.dtype == DType::u8 && x.q.has_value(), "x must be u8 codes");
    require(terms.products.size() <= Terms::kMost, "at most two further products");
    for (const Product& p : terms.products)
        require(p.x.dtype == DType::u8 && p.x.q && p.x.dims == x.dims && p.weights.dims == w.dims &&
                    (p.weights.scales == 1 || p.weights.scales == w.dims[0]),
                "a further product must have the shapes of the step's own");
    require(terms.rest == nullptr ||
                (terms.rest->dtype == DType::u8 && terms.rest->q && y.q && terms.rest->dims == y.dims),
            "what is left over must be u8 codes beside u8 codes");
    require((y.dtype == DType::u8 && y.q.has_value()) || (y.dtype == DType::f32 && !y.q.has_value()),
            "y must be u8 codes or f32");
    require(residual == nullptr || residual->dtype == (residual->q ? DType::u8 : DType::f32),
            "the residual must be u8 codes or f32");
    require(w.scales == 1 || w.scales == w.dims[0], "one weight scale, or one per output channel");
}

bool all_are(bool (*has_layout)(const Tensor&), const Tensor& x, const Tensor* residual, const Tensor& y,
             const Terms& terms) {
    for (const Product& p : terms.products)
        if (!has_layout(p.x)) return false;
    return has_layout(x) && has_layout(y) && (residual == nullptr || has_layout(*residual)) &&
           (terms.rest == nullptr || has_layout(*terms.rest));
}

void check_reduction(i64 steps, std::int32_t zero_point, i64 largest_weight) {
    const i64 largest = std::max<i64>(zero_point, 255 - zero_point);
    const i64 limit = std::numeric_limits<std::int32_t>::max() / (largest * largest_weight);
    if (steps > limit)
        throw Error("a sum of " + std::to_string(steps) + " products of codes does not fit 32 bits; at most " +
                    std::to_string(limit) + " with zero point " + std::to_string(zero_point));
}

Int8Output output_of(const Tensor* residual, const Epilogue& epilogue, const Tensor& y, i64 row,
                     const Tensor* rest) {
    Int8Output o;
    o.row = row;
    if (rest != nullptr) {
        o.rest_inverse_scale = 1.0f / rest->q->scale;
        o.rest_zero = rest->q->zero_point;
        o.rest_low = static_cast<float>(rest->q->qmin - rest->q->zero_point);
        o.rest_high = static_cast<float>(rest->q->qmax - rest->q->zero_point);
    }
    o.is_float = !y.q.has_value();
    o.activation = static_cast<int>(epilogue.kind);
    o.a = epilogue.a;
    o.b = epilogue.b;
    if (residual != nullptr && residual->q) {
        o.residual_scale = residual->q->scale;
        o.residual_zero = residual->q->zero_point;
    }
    if (!o.is_float) {
        o.step = y.q->scale;
        o.inverse_scale = 1.0f / y.q->scale;
        o.zero = y.q->zero_point;
        o.low = static_cast<float>(y.q->qmin - y.q->zero_point);
        o.high = static_cast<float>(y.q->qmax - y.q->zero_point);
        // On codes ReLU is the lower bound of the clamp; what they leave over is that of the real result.
        if (epilogue.kind == Activation::relu && o.low <= 0 && rest == nullptr) {
            o.low = std::min(0.0f, o.high);
            o.activation = kInt8None;
        }
    }
    return o;
}

void ChannelConstants::bind(Int8Output& o, i64 steps, const QParams& x, const std::optional<QParams>& y,
                            bool needs_reals, const std::vector<const ChannelConstants*>& before) {
    o.scale = scale.data();
    o.bias = bias.data();
    o.befores = static_cast<int>(before.size());
    for (std::size_t b = 0; b < before.size(); ++b) {
        o.before[b].scale = before[b]->scale.data();
        o.before[b].bias = before[b]->bias.data();
    }
    const bool clamps = o.activation == kInt8None || o.activation == kInt8Hardtanh;
    const bool is_gelu = o.activation == kInt8Gelu && before.empty() && o.residual_scale == 0;
    if (o.is_float || !(clamps || is_gelu) || needs_reals) return;
    code_scale = Aligned<float>(scale.size());
    code_bias = Aligned<float>(scale.size());
    const double y_scale = y->scale, residual_step = o.residual_scale / y_scale;
    // Of any zero point's, since products before may have others.
    const double largest = (before.empty() ? std::max(x.zero_point, 255 - x.zero_point) : 255) * 127.0 * steps;
    bool fits = true;  // beyond that rounding to an integer would overflow; false for NaN
    for (std::size_t b = 0; b < before.size(); ++b) code_scale_before[b] = Aligned<float>(scale.size());
    for (i64 i = 0; i < scale.size(); ++i) {
        code_scale[i] = static_cast<float>(scale[i] / y_scale);
        double all_bias = bias[i], reach = largest * code_scale[i];
        for (std::size_t b = 0; b < before.size(); ++b) {
            code_scale_before[b][i] = static_cast<float>(before[b]->scale[i] / y_scale);
            all_bias += before[b]->bias[i];
            reach += largest * code_scale_before[b][i];
        }
        code_bias[i] = static_cast<float>(all_bias / y_scale);
        fits = fits && reach + std::fabs(code_bias[i]) + 255 * residual_step < 1 << 30;
    }
    if (!fits) return;
    const auto code = [&](float bound) {
        const float steps_from_zero = std::nearbyint(bound / y->scale);
        return static_cast<u8>(std::min(std::max(steps_from_zero, o.low), o.high) + static_cast<float>(o.zero));
    };
    const bool is_hardtanh = o.activation == kInt8Hardtanh;
    o.low_code = is_hardtanh ? code(o.a) : static_cast<u8>(o.low + static_cast<float>(o.zero));
    o.high_code = is_hardtanh ? code(o.b) : static_cast<u8>(o.high + static_cast<float>(o.zero));
    o.code_scale = code_scale.data();
    o.code_bias = code_bias.data();
    o.residual_step = static_cast<float>(residual_step);
    for (std::size_t b = 0; b < before.size(); ++b) o.before[b].code_scale = code_scale_before[b].data();
    o.is_linear = clamps;
    o.is_gelu_in_steps = is_gelu;
}

void bind_output(Int8Output& o, const std::optional<Tensor>& residual, const Tensor& y,
                 const std::optional<Tensor>& rest) {
    o.y = y.place.get();
    if (rest) o.rest = rest->data<u8>();
    if (!residual) return;
    if (residual->q)
        o.residual = residual->data<const u8>();
    else
        o.real_residual = residual->data<const float>();
}

}  // namespace quantflow::host::int8
