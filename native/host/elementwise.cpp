// Binary and unary functions, and the affine map along an axis: what a kernel needs to know is decided here once, when
// the step is built.
#include <cmath>
#include <type_traits>

#include "../src/activation_formulas.hpp"
#include "elementwise_steps.hpp"
#include "isa.hpp"

namespace quantflow::host {

const ElementwiseKernels& elementwise_kernels() {
    switch (best_isa()) {
        case Isa::amx_int8:
        case Isa::avx512_vnni: return isa_avx512_vnni::elementwise_kernels();
        case Isa::avx_vnni:
        case Isa::avx2: return isa_avx2::elementwise_kernels();
        default: return isa_generic::elementwise_kernels();
    }
}

Form form_of(const Tensor& t) {
    Form form;
    form.dtype = t.dtype;
    const QParams q = t.q ? *t.q : t.dtype == DType::s8 ? QParams{1, 0, -128, 127} : QParams{1, 0, 0, 255};
    form.scale = q.scale;
    form.zero_point = static_cast<float>(q.zero_point);
    form.low = static_cast<float>(q.qmin - q.zero_point);
    form.high = static_cast<float>(q.qmax - q.zero_point);
    return form;
}

using namespace elementwise;

void elementwise::refuse(const char* what, std::initializer_list<const Tensor*> tensors) {
    std::string kinds;
    for (const Tensor* t : tensors)
        kinds += std::string(kinds.empty() ? "" : ", ") + name_of(t->dtype) + (t->q ? " codes" : "");
    throw Unsupported(std::string(what) + " of " + kinds);
}

namespace {

double function_of(Unary op, double a, double b, const Epilogue& e, double x) {
    switch (op) {
        case Unary::activation: break;
        case Unary::affine: x = a * x + b; break;
        case Unary::exp: x = std::exp(x); break;
        case Unary::log: x = std::log(x); break;
        case Unary::sqrt: x = std::sqrt(x); break;
        case Unary::rsqrt: x = 1 / std::sqrt(x); break;
        case Unary::neg: x = -x; break;
        case Unary::abs: x = std::abs(x); break;
        case Unary::erf: x = std::erf(x); break;
        case Unary::reciprocal: x = 1 / x; break;
        case Unary::sin: x = std::sin(x); break;
        case Unary::cos: x = std::cos(x); break;
        case Unary::floor: x = std::floor(x); break;
        case Unary::power: x = std::pow(x, a); break;
        case Unary::logical_not: x = x == 0 ? 1 : 0; break;
    }
    return exact_activation(e, x);
}

}  // namespace

void elementwise::fold_clamp(Epilogue& e, Form& y, bool may_be_nan) {
    if (!y.is_codes()) return;
    if (e.kind == Activation::relu) {
        y.low = std::max(y.low, std::min(0.0f, y.high));
    } else if (e.kind == Activation::hardtanh && !may_be_nan && e.a <= e.b) {
        const float low = y.low, high = y.high;
        y.low = std::clamp(e.a / y.scale, low, high);
        y.high = std::clamp(e.b / y.scale, low, high);
    } else {
        return;
    }
    e = {};
}

namespace {

const char* word_of(Activation kind) {
#define QF_WORD(name, ...) #name,
    static const char* const words[] = {"identity", QF_ACTIVATIONS(QF_WORD)};
#undef QF_WORD
    return words[static_cast<int>(kind)];
}

}  // namespace

std::string elementwise::name_with(const char* op, const Epilogue& e) {
    const std::string name = std::string("host.") + op;
    return e.kind == Activation::none ? name : name + "_" + word_of(e.kind);
}

namespace {

const char* word_of(Binary op) {
    static const char* const words[] = {"add", "sub", "mul", "div", "maximum", "minimum",     "eq",
                                        "ne",  "lt",  "le",  "gt",  "ge",      "logical_and", "logical_or"};
    return words[static_cast<int>(op)];
}

const char* word_of(Unary op) {
    static const char* const words[] = {"activation", "affine",     "exp", "log", "sqrt",  "rsqrt",       "neg",  "abs",
                                        "erf",        "reciprocal", "sin", "cos", "floor", "logical_not", "power"};
    return words[static_cast<int>(op)];
}

// Calls use(f) with the function of two integers that `op` is; false if it is none. Sums and products wrap around.
template <class T, class Use>
bool with_integer_op(Binary op, Use use) {
    const auto wide = [](T v) { return static_cast<std::uint64_t>(v); };
    switch (op) {
        case Binary::add: use([=](T a, T b) { return static_cast<T>(wide(a) + wide(b)); }); return true;
        case Binary::sub: use([=](T a, T b) { return static_cast<T>(wide(a) - wide(b)); }); return true;
        case Binary::mul: use([=](T a, T b) { return static_cast<T>(wide(a) * wide(b)); }); return true;
        case Binary::maximum: use([](T a, T b) { return std::max(a, b); }); return true;
        case Binary::minimum: use([](T a, T b) { return std::min(a, b); }); return true;
        default: return false;
    }
}
template <class T, class Use>
bool with_comparison(Binary op, Use use) {
    switch (op) {
        case Binary::eq: use([](T a, T b) { return a == b; }); return true;
        case Binary::ne: use([](T a, T b) { return a != b; }); return true;
        case Binary::lt: use([](T a, T b) { return a < b; }); return true;
        case Binary::le: use([](T a, T b) { return a <= b; }); return true;
        case Binary::gt: use([](T a, T b) { return a > b; }); return true;
        case Binary::ge: use([](T a, T b) { return a >= b; }); return true;
        case Binary::logical_and: use([](T a, T b) { return a != 0 && b != 0; }); return true;
        case Binary::logical_or: use([](T a, T b) { return a != 0 || b != 0; }); return true;
        default: return false;
    }
}

bool is_comparison(Binary op) { return op >= Binary::eq; }

// Plain integers and b8, element by element.
StepPtr integer_binary(ThreadPool& pool, Binary op, const Tensor& a, const Tensor& b, const Epilogue& e,
                       const Tensor& y) {
    const bool fits = a.dtype == b.dtype && !is_real(a) && !is_real(b) && !y.q && e.kind == Activation::none &&
                      op != Binary::div && y.dtype == (is_comparison(op) ? DType::b8 : a.dtype) &&
                      (is_comparison(op) || a.dtype != DType::b8);
    if (!fits) refuse(word_of(op), {&a, &b, &y});
    const Nest nest(y.dims, {a.strides, b.strides, y.strides});
    return make_step(std::string("host.") + word_of(op), [&pool, op, a, b, y, nest] {
        nest.run(pool, 24, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            const auto each = [&](auto in, auto out, auto f) {
                using X = typename decltype(in)::type;
                using Y = typename decltype(out)::type;
                const X* pa = reinterpret_cast<const X*>(address(a, offset[0]));
                const X* pb = reinterpret_cast<const X*>(address(b, offset[1]));
                Y* py = reinterpret_cast<Y*>(address(y, offset[2]));
                const std::int64_t da = nest.column(0), db = nest.column(1), dy = nest.column(2);
                for (std::int64_t r = 0; r < rows; ++r, pa += nest.row(0), pb += nest.row(1), py += nest.row(2))
                    for (std::int64_t i = 0; i < n; ++i) py[i * dy] = static_cast<Y>(f(pa[i * da], pb[i * db]));
            };
            // b8 holds 0 or 1: compared as bytes.
            with_type(a.dtype == DType::b8 ? DType::u8 : a.dtype, [&](auto type) {
                using T = typename decltype(type)::type;
                if constexpr (std::is_integral_v<T>) {
                    if (!with_comparison<T>(op, [&](auto f) { each(type, Type<std::uint8_t>{}, f); }))
                        with_integer_op<T>(op, [&](auto f) { each(type, type, f); });
                }
            });
        });
    });
}

}  // namespace

StepPtr make_binary(ThreadPool& pool, Binary op, const Tensor& given_a, const Tensor& given_b, const Epilogue& epilogue,
                    const Tensor& y) {
    const bool compares = is_comparison(op);
    if (!is_real(given_a) || !is_real(given_b)) return integer_binary(pool, op, given_a, given_b, epilogue, y);
    if (compares ? y.dtype != DType::b8 || epilogue.kind != Activation::none : !is_real(y))
        refuse(word_of(op), {&given_a, &given_b, &y});
    Tensor a = given_a, b = given_b;
    Nest nest(y.dims, {a.strides, b.strides, y.strides});
    // The kernel for codes wants the operand that is dense first.
    if ((op == Binary::add || op == Binary::mul) && (nest.column(0) != 1 || !a.q)) {
        std::swap(a, b);
        nest = Nest(y.dims, {a.strides, b.strides, y.strides});
    }
    BinaryJob job;
    job.op = op;
    job.epilogue = epilogue;
    job.is_comparison = compares;
    job.a = form_of(a);
    job.b = form_of(b);
    job.y = form_of(y);
    const bool all_codes = a.q && b.q && y.q;
    if (op == Binary::sub && b.q) {  // the same numbers, and the kernels of add
        job.op = Binary::add;
        job.b.scale = -job.b.scale;
    }
    fold_clamp(job.epilogue, job.y, !all_codes || op == Binary::div);
    if (all_codes && job.op == Binary::mul) {
        const double factor = static_cast<double>(a.q->scale) * b.q->scale / y.q->scale;
        // An exact product of integers, then one rounding.
        job.is_folded = factor > 1e-30 && factor < 1e4;
        job.a_factor = static_cast<float>(factor);
    } else if (all_codes && job.op == Binary::add) {
        const double fa = static_cast<double>(job.a.scale) / y.q->scale,
                     fb = static_cast<double>(job.b.scale) / y.q->scale;
        // Where the sum is no saturated code, neither term exceeds the smaller one's range by more than a code's:
        // rounding errors of 2**-24 times that stay below 2e-4 codes.
        job.is_folded = std::min(std::abs(fa), std::abs(fb)) * 255 < 1024 && std::max(std::abs(fa), std::abs(fb)) < 1e6;
        job.a_factor = static_cast<float>(fa);
        job.b_factor = static_cast<float>(fb);
    }
    const std::int64_t bytes = size_of(a.dtype) + size_of(b.dtype) + size_of(y.dtype) +
                               (job.epilogue.kind == Activation::none ? 0 : 16);
    return make_step(name_with(word_of(op), epilogue), [&pool, &k = elementwise_kernels(), a, b, y, nest, job, bytes] {
        nest.run(pool, bytes, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            k.binary(job, {address(a, offset[0]), nest.row(0), nest.column(0)},
                     {address(b, offset[1]), nest.row(1), nest.column(1)},
                     {address(y, offset[2]), nest.row(2), nest.column(2)}, rows, n);
        });
    });
}

StepPtr make_unary(ThreadPool& pool, Unary op, float a, float b, const Epilogue& epilogue, const Tensor& x,
                   const Tensor& y) {
    const Nest nest(y.dims, {x.strides, y.strides});
    if (op == Unary::logical_not) {
        if (x.q || x.dtype != DType::b8 || y.dtype != DType::b8) refuse(word_of(op), {&x, &y});
        auto table = std::make_shared<std::array<std::uint8_t, 256>>();
        (*table)[0] = 1;
        return make_step("host.logical_not", [&pool, &k = elementwise_kernels(), x, y, nest, table] {
            nest.run(pool, 2, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
                k.table_to_codes(table->data(), {address(x, offset[0]), nest.row(0), nest.column(0)},
                                 {address(y, offset[1]), nest.row(1), nest.column(1)}, rows, n);
            });
        });
    }
    if (!is_real(x) || !is_real(y)) refuse(word_of(op), {&x, &y});
    if (x.q) {
        const auto reals = table_of(x, [&](double r) { return function_of(op, a, b, epilogue, r); });
        const auto codes = y.q ? coded(*reals, *y.q) : nullptr;
        return make_step("host.table", [&pool, &k = elementwise_kernels(), x, y, nest, reals, codes] {
            nest.run(pool, codes ? 2 : 5, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
                const RowsIn from{address(x, offset[0]), nest.row(0), nest.column(0)};
                const RowsOut to{address(y, offset[1]), nest.row(1), nest.column(1)};
                if (codes)
                    k.table_to_codes(codes->data(), from, to, rows, n);
                else
                    k.table_to_floats(reals->data(), from, to, rows, n);
            });
        });
    }
    UnaryJob job;
    job.op = op;
    job.a = a;
    job.b = b;
    job.epilogue = epilogue;
    job.x = form_of(x);
    job.y = form_of(y);
    fold_clamp(job.epilogue, job.y, true);
    const bool is_cheap = op == Unary::affine || op == Unary::neg || op == Unary::abs || op == Unary::activation;
    const bool is_smooth = epilogue.kind != Activation::none && epilogue.kind != Activation::relu;
    const std::int64_t bytes = size_of(x.dtype) + size_of(y.dtype) + (is_cheap ? 0 : 16) + (is_smooth ? 16 : 0);
    const std::string name = op == Unary::activation ? std::string("host.") + word_of(epilogue.kind)
                                                     : name_with(word_of(op), epilogue);
    return make_step(name, [&pool, &k = elementwise_kernels(), x, y, nest, job, bytes] {
        nest.run(pool, bytes, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            k.unary(job, {address(x, offset[0]), nest.row(0), nest.column(0)},
                    {address(y, offset[1]), nest.row(1), nest.column(1)}, rows, n);
        });
    });
}

StepPtr make_channel_affine(ThreadPool& pool, const Tensor& x, int axis, const Tensor& scale, const Tensor& shift,
                            const Epilogue& epilogue, const Tensor& y) {
    if (!is_real(x) || !is_real(y) || scale.dtype != DType::f32 || shift.dtype != DType::f32 || scale.q || shift.q)
        refuse("an affine map", {&x, &scale, &shift, &y});
    Dims along(y.dims.size(), 0);
    along[static_cast<std::size_t>(axis)] = 1;
    const Nest nest(y.dims, {x.strides, along, along, y.strides});
    AffineJob job;
    job.epilogue = epilogue;
    job.x = form_of(x);
    job.y = form_of(y);
    fold_clamp(job.epilogue, job.y, !x.q);
    job.is_in_steps = y.q && job.epilogue.kind == Activation::none;
    const std::int64_t channels = y.dims[static_cast<std::size_t>(axis)];
    const std::int64_t bytes = size_of(x.dtype) + size_of(y.dtype) + (job.epilogue.kind == Activation::none ? 0 : 16);
    // x's and y's own scales join the channel's, at each run: the numbers may be anywhere.
    auto factors = std::make_shared<std::vector<float>>(static_cast<std::size_t>(2 * channels));
    const double in_scale = x.q ? x.q->scale : 1.0, out_scale = job.is_in_steps ? y.q->scale : 1.0;
    const std::int64_t scale_step = scale.strides.back(), shift_step = shift.strides.back();
    const auto run = [&pool, &k = elementwise_kernels(), x, y, scale, shift, nest, job, bytes, channels, factors,
                      in_scale, out_scale, scale_step, shift_step] {
        float* a = factors->data();
        float* b = a + channels;
        for (std::int64_t c = 0; c < channels; ++c) {
            a[c] = static_cast<float>(scale.data<float>()[c * scale_step] * in_scale / out_scale);
            b[c] = static_cast<float>(shift.data<float>()[c * shift_step] / out_scale);
        }
        nest.run(pool, bytes, [&](const std::int64_t* offset, std::int64_t rows, std::int64_t n) {
            k.affine(job, {address(x, offset[0]), nest.row(0), nest.column(0)},
                     {a + offset[1], nest.row(1), nest.column(1)}, {b + offset[2], nest.row(2), nest.column(2)},
                     {address(y, offset[3]), nest.row(3), nest.column(3)}, rows, n);
        });
    };
    return make_step(name_with("channel_affine", epilogue), run);
}

}  // namespace quantflow::host
