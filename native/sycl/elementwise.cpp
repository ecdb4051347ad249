// Steps that compute each element by itself, by custom kernels.
#include <cmath>
#include <cstring>

#include "../src/activation_formulas.hpp"
#include "steps.hpp"

namespace quantflow::xpu {
namespace {

static_assert(kF32 == static_cast<int>(DType::f32) && kU8 == static_cast<int>(DType::u8) &&
              kS8 == static_cast<int>(DType::s8) && kS32 == static_cast<int>(DType::s32) &&
              kS64 == static_cast<int>(DType::s64) && kB8 == static_cast<int>(DType::b8));
static_assert(kEq == static_cast<int>(Binary::eq) && kLogicalOr == static_cast<int>(Binary::logical_or) &&
              kMaximum == static_cast<int>(Binary::maximum) && kGe == static_cast<int>(Binary::ge));
static_assert(kAffine == static_cast<int>(Unary::affine) && kPower == static_cast<int>(Unary::power) &&
              kErf == static_cast<int>(Unary::erf) && kLogicalNot == static_cast<int>(Unary::logical_not));

int bytes_of(const Tensor& t) { return static_cast<int>(size_of(t.dtype)); }

class MemcpyStep final : public Step {
public:
    MemcpyStep(Device& device, const Place& from, const Place& to, std::size_t bytes)
        : device_(device), from_(from), to_(to), bytes_(bytes) {}
    void run() override {
        device_.begin(name_);
        std::byte *from = from_.get(), *to = to_.get();
        if (from != to) device_.queue.memcpy(to, from, bytes_);
    }
    std::string kernel() const override { return name_; }

private:
    Device& device_;
    Place from_, to_;
    std::size_t bytes_;
    std::string name_ = "sycl.memcpy";
};

// The kernels' formulas on the host, for tables.
float compute(Unary op, float a, float b, float r) {
    switch (op) {
        case Unary::affine: return a * r + b;
        case Unary::exp: return std::exp(r);
        case Unary::log: return std::log(r);
        case Unary::sqrt: return std::sqrt(r);
        case Unary::rsqrt: return 1.0f / std::sqrt(r);
        case Unary::neg: return -r;
        case Unary::abs: return std::fabs(r);
        case Unary::erf: return std::erf(r);
        case Unary::reciprocal: return 1.0f / r;
        case Unary::sin: return std::sin(r);
        case Unary::cos: return std::cos(r);
        case Unary::floor: return std::floor(r);
        case Unary::power: return std::pow(r, a);
        default: return r;
    }
}

std::uint8_t quantized(float r, const QParams& q) {
    const float code = std::nearbyint(r / q.scale) + static_cast<float>(q.zero_point);
    const int clamped = !(code < static_cast<float>(q.qmax))  ? q.qmax
                        : code > static_cast<float>(q.qmin) ? static_cast<int>(code)
                                                              : q.qmin;
    return static_cast<std::uint8_t>(clamped);
}

// f of every code of x, in the form of y's elements, by the code's bits.
template <typename F>
Constant make_table(Device& device, const Tensor& x, const Tensor& y, const F& f) {
    float reals[256];
    std::uint8_t codes[256];
    for (int bits = 0; bits < 256; ++bits) {
        const int code = x.dtype == DType::s8 ? static_cast<std::int8_t>(bits) : bits;
        reals[bits] = f(static_cast<float>(code - x.q->zero_point) * x.q->scale);
        if (y.q) codes[bits] = quantized(reals[bits], *y.q);
    }
    return y.q ? device.constant(codes, sizeof codes) : device.constant(reals, sizeof reals);
}

bool is_comparison(Binary op) { return op >= Binary::eq; }

}  // namespace

StepPtr make_copy(Device& device, const Tensor& x, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    const Space space = make_space(y.dims, {&x.strides, &y.strides}, 1);
    const bool moves = are_coded_alike(x, y);
    if (moves && space.unit && space.rank <= 1)
        return std::make_unique<MemcpyStep>(device, x.place, y.place, static_cast<std::size_t>(y.count() * bytes_of(y)));
    if (moves)
        return launch(device, "qf_move", range_of(device, space), x.place, y.place, space, bytes_of(y));
    if (is_real(x) != is_real(y) && (x.q || y.q))
        throw Unsupported("copy: codes become f32 or codes, not plain integers, nor the reverse");
    return launch(device, "qf_convert", range_of(device, space), x.place, y.place, space, value_of(x), value_of(y));
}

StepPtr make_fill(Device& device, double value, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    std::int64_t bits = 0;
    if (y.q) {
        bits = quantized(static_cast<float>(value), *y.q);
    } else if (y.dtype == DType::f32) {
        const auto real = static_cast<float>(value);
        std::memcpy(&bits, &real, sizeof real);
    } else {
        bits = y.dtype == DType::b8 ? value != 0 : static_cast<std::int64_t>(value);
    }
    const Space space = make_space(y.dims, {&y.strides}, 0);
    return launch(device, "qf_fill", range_of(device, space), y.place, space, bytes_of(y), bits);
}

StepPtr make_binary(Device& device, Binary op, const Tensor& a, const Tensor& b, const Epilogue& e, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    const Space space = make_space(y.dims, {&a.strides, &b.strides, &y.strides}, 2);
    const auto code = static_cast<int>(op);
    if (is_real(a) && is_real(b)) {
        if (is_comparison(op) ? y.dtype != DType::b8 : !is_real(y))
            throw Unsupported("binary: reals give f32 or codes, their comparison b8");
        return launch(device, "qf_binary", range_of(device, space), a.place, b.place, y.place, space, code,
                      epilogue_of(e), value_of(a), value_of(b), value_of(y));
    }
    const bool fits = !is_real(a) && !is_real(b) && a.dtype == b.dtype && e.kind == Activation::none &&
                      (is_comparison(op) ? y.dtype == DType::b8
                                         : y.dtype == a.dtype && a.dtype != DType::b8 && op != Binary::div);
    if (!fits) throw Unsupported("binary: integers of one dtype; their quotient and sums of b8 are not offered");
    return launch(device, "qf_binary_integer", range_of(device, space), a.place, b.place, y.place, space, code,
                  static_cast<int>(a.dtype), static_cast<int>(y.dtype));
}

StepPtr make_unary(Device& device, Unary op, float a, float b, const Epilogue& e, const Tensor& x, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    const Space space = make_space(y.dims, {&x.strides, &y.strides}, 1);
    const auto range = range_of(device, space);
    if (op == Unary::logical_not) {
        if (x.dtype != DType::b8 || y.dtype != DType::b8) throw Unsupported("unary: logical_not is for b8");
        std::uint8_t table[256] = {1};
        return launch(device, "qf_lookup", range, x.place, y.place, device.constant(table, sizeof table), space, 1);
    }
    if (!is_real(x) || !is_real(y)) throw Unsupported("unary: x and y are f32 or codes");
    if (x.q) {
        Constant table = make_table(device, x, y, [&](float r) { return real_activation(e, compute(op, a, b, r)); });
        return launch(device, "qf_lookup", range, x.place, y.place, table, space, bytes_of(y));
    }
    if (op == Unary::sin || op == Unary::cos)
        return launch(device, "qf_sincos", range, x.place, y.place, space, static_cast<int>(op == Unary::cos),
                      epilogue_of(e), value_of(x), value_of(y));
    return launch(device, "qf_unary", range, x.place, y.place, space, static_cast<int>(op), a, b, epilogue_of(e),
                  value_of(x), value_of(y));
}

StepPtr make_where(Device& device, const Tensor& cond, const Tensor& a, const Tensor& b, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    if (cond.dtype != DType::b8 || !are_coded_alike(a, y) || !are_coded_alike(b, y))
        throw Unsupported("where: the condition is b8, both choices and the result are coded alike");
    const Space space = make_space(y.dims, {&cond.strides, &a.strides, &b.strides, &y.strides}, 3);
    return launch(device, "qf_where", range_of(device, space), cond.place, a.place, b.place, y.place, space,
                  bytes_of(y));
}

StepPtr make_channel_affine(Device& device, const Tensor& x, int axis, const Tensor& scale, const Tensor& shift,
                            const Epilogue& e, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    Dims along_scale(y.dims.size(), 0), along_shift(y.dims.size(), 0);
    const auto at = static_cast<std::size_t>(axis < 0 ? axis + y.rank() : axis);
    along_scale[at] = scale.strides.at(0);
    along_shift[at] = shift.strides.at(0);
    const Space space = make_space(y.dims, {&x.strides, &along_scale, &along_shift, &y.strides}, 3);
    return launch(device, "qf_channel_affine", range_of(device, space), x.place, scale.place, shift.place, y.place,
                  space, epilogue_of(e), value_of(x), value_of(y));
}

StepPtr make_gather(Device& device, const Tensor& table, const Tensor& index, const Tensor& y) {
    if (y.count() == 0) return std::make_unique<NoStep>();
    if (index.dtype != DType::s64) throw Unsupported("gather: the index is s64");
    Dims of_index = index.strides, of_column(index.strides.size(), 0);
    of_index.push_back(0);
    of_column.push_back(table.strides.at(1));
    const Space space = make_space(y.dims, {&of_index, &of_column, &y.strides}, 2);
    // The kernel reads row 0 where an index is bad; wait() reports it.
    return launch(device, "qf_gather", range_of(device, space), index.place, table.place, y.place, space,
                  table.dims.at(0), table.strides.at(0), value_of(table), value_of(y), device.bad_index());
}

}  // namespace quantflow::xpu
