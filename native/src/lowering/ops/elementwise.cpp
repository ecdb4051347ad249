#include <algorithm>
#include <cmath>

#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

// -x or |x| of integers.
void signed_integer(Context& c, Unary op, const View& x, int output) {
    const View zero = c.number_like(0, x);
    const Dims strides = row_major(x.dims);
    View negative = c.allocate(x.dtype, x.dims, strides), y = negative;
    c.emit(c.backend.binary(Binary::sub, c.tensor(zero), c.tensor(x), {}, c.tensor(negative)), {&zero, &x},
           {&negative});
    if (op == Unary::abs) {
        y = c.allocate(x.dtype, x.dims, strides);
        c.emit(c.backend.binary(Binary::maximum, c.tensor(x), c.tensor(negative), {}, c.tensor(y)), {&x, &negative},
               {&y});
    }
    c.define(output, y);
}

void unary(Context& c, const Node& n, Unary op) {
    const View x = c.spread_out(c.operand(0, "self"));
    const bool is_integer = !x.q && (x.dtype == DType::s64 || x.dtype == DType::s32);
    if (is_integer && (op == Unary::neg || op == Unary::abs)) return signed_integer(c, op, x, n.output);
    if (op == Unary::logical_not) {
        if (x.dtype != DType::b8) throw Unsupported("not of what is no bool");
        View y = c.allocate(DType::b8, x.dims, dense_like(x));
        c.emit(c.backend.unary(op, 0, 0, {}, c.tensor(x), c.tensor(y)), {&x}, {&y});
        return c.define(n.output, y);
    }
    if (!x.q && x.dtype != DType::f32) throw Unsupported("a float function of integers");
    apply(c, op, 0, 0, {}, x, n.output);
}

void power(Context& c, const Node& n) {
    if (overload_name(n.target) != "Tensor_Scalar") throw Unsupported("a power that is a tensor");
    const View x = c.spread_out(c.operand(0, "self"));
    if (!x.q && x.dtype != DType::f32) throw Unsupported("a power of integers");
    apply(c, Unary::power, static_cast<float>(c.real(1, "exponent")), 0, {}, x, n.output);
}

bool is_power_of_two(double x) {
    int exponent = 0;
    return std::frexp(x, &exponent) == 0.5;
}

// Which operand comes first, and what they may be.
enum class Operands { in_order, swapped, bools };

// The result where it is known before anything runs, of positions and flags.
std::optional<View> foreknown(Context& c, Binary op, const Val& first, const Val& second) {
    const View *a = first.as<View>(), *b = second.as<View>();
    if (op == Binary::logical_and || op == Binary::logical_or) {
        if (a == nullptr || b == nullptr || a->dtype != DType::b8 || b->dtype != DType::b8) return std::nullopt;
        const Dims dims = broadcast_dims(a->dims, b->dims);
        for (const auto& [flags, other] : {std::pair{a, b}, std::pair{b, a}}) {
            const std::optional<bool> flag = c.foreknown.flag(*flags);
            if (flag) return *flag == (op == Binary::logical_and) ? expanded(*other, dims) : c.flags(*flag, dims);
        }
        return std::nullopt;
    }
    const auto counting = [&](const Val& v) -> std::optional<Counting> {
        if (const auto* number = v.as<std::int64_t>()) return Counting{*number, {}};
        const auto* view = v.as<View>();
        return view == nullptr ? std::nullopt : c.foreknown.counting(*view);
    };
    const auto ca = counting(first), cb = counting(second);
    if (!ca || !cb) return std::nullopt;
    const Dims none, &a_dims = a != nullptr ? a->dims : none, &b_dims = b != nullptr ? b->dims : none;
    if (const auto flag = Foreknown::compared(op, *ca, a_dims, *cb, b_dims))
        return c.flags(*flag, broadcast_dims(a_dims, b_dims));
    if (a == nullptr || b != nullptr) return std::nullopt;
    // Positions moved by a number are positions.
    const auto wide = static_cast<std::size_t>(
        std::count_if(a->dims.begin(), a->dims.end(), [](std::int64_t size) { return size > 1; }));
    if ((op != Binary::add && op != Binary::sub) || wide > 1) return std::nullopt;
    if (cb->start == 0) return *a;
    const auto at = std::find_if(a->dims.begin(), a->dims.end(), [](std::int64_t size) { return size > 1; });
    const std::int64_t step = wide == 0 ? 1 : ca->steps[static_cast<std::size_t>(at - a->dims.begin())];
    View moved = c.counted(ca->start + (op == Binary::add ? cb->start : -cb->start), step, wide == 0 ? 1 : *at,
                           DType::s64);
    moved.dims = a->dims;
    moved.strides.assign(a->dims.size(), 0);
    if (wide == 1) moved.strides[static_cast<std::size_t>(at - a->dims.begin())] = 1;
    return moved;
}

void arithmetic(Context& c, const Node& n, Binary op, Operands kind) {
    if (c.has(99, "rounding_mode")) throw Unsupported("a division that rounds");
    if (n.args.size() < 2) throw Unsupported("an operand is missing");
    if (const Arg* given = c.argument(2, "alpha"); given != nullptr && given->as<bool>() != nullptr)
        throw Unsupported("alpha that is a bool");
    const double alpha = c.real(2, "alpha", 1.0);
    Val first = c.evaluated(n.args[0]), second = c.evaluated(n.args[1]);
    if (kind == Operands::swapped) std::swap(first, second);
    if (alpha != 1.0) throw Unsupported("alpha other than 1");
    const View* a = first.as<View>();
    const View* b = second.as<View>();
    const bool compares = op >= Binary::eq;
    for (const View* v : {a, b})
        if (kind == Operands::bools && v != nullptr && v->dtype != DType::b8)
            throw Unsupported("bitwise logic of integers");
    for (const View* v : {a, b})
        if (op == Binary::sub && v != nullptr && !v->q && v->dtype == DType::b8) throw Unsupported("subtraction of bools");
    if (const auto known = foreknown(c, op, first, second)) return c.define(n.output, *known);
    if (a != nullptr && b != nullptr) {
        // Kinds of integers that widen each other, or that PyTorch computes in no byte of.
        for (const View* v : {a, b})
            if (!compares && !v->q && v->dtype != DType::f32 && size_of(v->dtype) == 1 &&
                (a->dtype == b->dtype || v->dtype != DType::b8))
                throw Unsupported("arithmetic of small integers");
        if (!a->q && !b->q && a->dtype != b->dtype && a->dtype != DType::f32 && b->dtype != DType::f32 &&
            (size_of(a->dtype) == size_of(b->dtype)))
            throw Unsupported("several kinds of small integers");
        return binary(c, op, *a, *b, n.output, {});
    }
    const View* x = a != nullptr ? a : b;
    if (x == nullptr) throw Unsupported("no operand is a tensor");
    const double number = as_real(a != nullptr ? second : first, "other");
    const bool is_real = x->q || x->dtype == DType::f32;
    if (!is_real && op != Binary::div && !Context::holds(*x, a != nullptr ? second : first))
        throw Unsupported("integers and a number of another kind");
    if (!is_real && x->dtype == DType::b8 && !compares) throw Unsupported("arithmetic of bools");
    const bool affine = is_real && (op == Binary::add || op == Binary::mul || (op == Binary::sub) ||
                                    (op == Binary::div && a != nullptr && is_power_of_two(number)));
    if (affine) {
        float scale = 1, shift = 0;
        const auto value = static_cast<float>(number);
        if (op == Binary::add) shift = value;
        if (op == Binary::mul) scale = value;
        if (op == Binary::div) scale = 1.0f / value;  // exact: a power of two
        if (op == Binary::sub) {
            scale = a != nullptr ? 1.0f : -1.0f;
            shift = a != nullptr ? -value : value;
        }
        Epilogue epilogue;
        const int output = c.fusion.absorb_activation(n.output, epilogue);
        return apply(c, Unary::affine, scale, shift, epilogue, c.spread_out(*x), output);
    }
    View plain_x = *x;
    if (!is_real && number != std::floor(number)) plain_x = c.as_f32(*x);
    const View constant = c.number_like(number, plain_x);
    binary(c, op, a != nullptr ? plain_x : constant, a != nullptr ? constant : plain_x, n.output, {});
}

// Two tensors; another overload reduces.
void lesser_or_greater(Context& c, const Node& n, Binary op) {
    if (overload_name(n.target) != "other") throw Unsupported("a reduction with positions");
    arithmetic(c, n, op, Operands::in_order);
}

// condition ? a : b, broadcast.
void chosen(Context& c, const View& condition, View a, View b, int output) {
    if (condition.dtype != DType::b8) throw Unsupported("a condition that is no bool");
    a = c.plain(a);
    b = c.plain(b);
    if (a.dtype != b.dtype) {
        if (a.dtype != DType::f32 && b.dtype != DType::f32) throw Unsupported("a choice of several kinds of integers");
        a = c.as_f32(a);
        b = c.as_f32(b);
    }
    const Dims dims = broadcast_dims(broadcast_dims(a.dims, b.dims), condition.dims);
    const View cond = expanded(condition, dims), ea = expanded(a, dims), eb = expanded(b, dims);
    View y = c.allocate(a.dtype, dims, row_major(dims));
    c.emit(c.backend.where(c.tensor(cond), c.tensor(ea), c.tensor(eb), c.tensor(y)), {&cond, &ea, &eb}, {&y});
    c.define(output, y);
}

void where(Context& c, const Node& n) {
    View condition = c.operand(0, "condition");
    const Arg *self = c.argument(1, "self"), *other = c.argument(2, "other");
    if (self == nullptr || other == nullptr) throw Unsupported("where without two choices");
    const Val first = c.evaluated(*self), second = c.evaluated(*other);
    const View* a = first.as<View>();
    const View* b = second.as<View>();
    if (a == nullptr && b == nullptr) throw Unsupported("where of two numbers");
    if (!Context::holds(a != nullptr ? *a : *b, a != nullptr ? second : first) && (a == nullptr || b == nullptr))
        throw Unsupported("integers and a number of another kind");
    View va = a != nullptr ? *a : View{}, vb = b != nullptr ? *b : View{};
    if (a == nullptr) va = c.number_like(as_real(first, "self"), vb);
    if (b == nullptr) vb = c.number_like(as_real(second, "other"), va);
    chosen(c, condition, va, vb, n.output);
}

void masked_fill(Context& c, const Node& n) {
    const View x = c.operand(0, "self"), mask = c.operand(1, "mask");
    const Arg* given = c.argument(2, "value");
    if (given == nullptr) throw Unsupported("masked_fill without a value");
    const Val v = c.evaluated(*given);
    View fill;
    if (const auto* view = v.as<View>()) {
        fill = *view;
        if (fill.rank() != 0) throw Error("masked_fill with a value of several elements");
        if (!x.q && !fill.q && fill.dtype != x.dtype) throw Unsupported("masked_fill with another kind of number");
        if (!x.q && x.dtype != DType::f32 && fill.q) throw Unsupported("masked_fill with another kind of number");
    } else {
        if (!Context::holds(x, v)) throw Unsupported("integers and a number of another kind");
        fill = c.number_like(as_real(v, "value"), x);
    }
    chosen(c, mask, fill, x, n.output);
}

void convert(Context& c, const Node& n) {
    const View x = c.operand(0, "self");
    if (base_name(n.target) == "type_as") {
        const View like = c.operand(1, "other");
        const DType dtype = like.q ? DType::f32 : like.dtype;
        const View p = c.plain(x);
        return c.define(n.output, p.dtype == dtype ? p : c.copied(p, dense_like(p), dtype, std::nullopt));
    }
    const Word* word = nullptr;
    for (const Arg& a : n.args)
        if (a.as<Word>() != nullptr && a.as<Word>()->kind == "dtype") word = a.as<Word>();
    if (const auto it = n.kwargs.find("dtype"); it != n.kwargs.end()) word = it->second.as<Word>();
    if (word == nullptr) throw Unsupported("a conversion that names no dtype");
    const std::optional<DType> dtype = dtype_named(word->name);
    if (!dtype) throw Unsupported("a conversion to " + word->name);
    const View p = c.plain(x);
    c.define(n.output, p.dtype == *dtype ? p : c.copied(p, dense_like(p), *dtype, std::nullopt));
}

}  // namespace

void binary(Context& c, Binary op, View a, View b, int output, Epilogue epilogue) {
    const Dims dims = broadcast_dims(a.dims, b.dims);
    const bool is_real = (a.q || a.dtype == DType::f32) || (b.q || b.dtype == DType::f32) || op == Binary::div;
    if (is_real) {
        a = c.as_real_operand(a);
        b = c.as_real_operand(b);
    } else if (a.dtype != b.dtype) {
        const DType wide = size_of(a.dtype) >= size_of(b.dtype) ? a.dtype : b.dtype;
        a = a.dtype == wide ? a : c.copied(a, dense_like(a), wide, std::nullopt);
        b = b.dtype == wide ? b : c.copied(b, dense_like(b), wide, std::nullopt);
    }
    const View ea = expanded(a, dims), eb = expanded(b, dims);
    const View& shape = a.dims == dims || b.dims != dims ? ea : eb;
    const Dims strides = shape.dims == dims && !repeats(shape) ? dense_like(shape) : row_major(dims);
    View y;
    if (op >= Binary::eq) {
        y = c.allocate(DType::b8, dims, strides);
    } else if (is_real) {
        if (epilogue.kind == Activation::none) output = c.fusion.absorb_activation(output, epilogue);
        y = c.allocate_result(dims, strides, output);
    } else {
        y = c.allocate(a.dtype, dims, strides);
    }
    c.emit(c.backend.binary(op, c.tensor(ea), c.tensor(eb), epilogue, c.tensor(y)), {&ea, &eb}, {&y});
    c.define(output, y);
}

void apply(Context& c, Unary op, float a, float b, const Epilogue& epilogue, const View& x, int output) {
    View y = c.allocate_result(x.dims, dense_like(x), output);
    c.emit(c.backend.unary(op, a, b, epilogue, c.tensor(x), c.tensor(y)), {&x}, {&y});
    c.define(output, y);
}

const OpRows& elementwise_ops() {
    static const OpRows rows = {
        {"exp", with<unary, Unary::exp>},
        {"log", with<unary, Unary::log>},
        {"sqrt", with<unary, Unary::sqrt>},
        {"rsqrt", with<unary, Unary::rsqrt>},
        {"neg", with<unary, Unary::neg>},
        {"abs", with<unary, Unary::abs>},
        {"erf", with<unary, Unary::erf>},
        {"reciprocal", with<unary, Unary::reciprocal>},
        {"sin", with<unary, Unary::sin>},
        {"cos", with<unary, Unary::cos>},
        {"floor", with<unary, Unary::floor>},
        {"logical_not", with<unary, Unary::logical_not>},
        {"bitwise_not", with<unary, Unary::logical_not>},
        {"pow", power},
        {"add", with<arithmetic, Binary::add, Operands::in_order>, Role::add},
        {"sub", with<arithmetic, Binary::sub, Operands::in_order>, Role::subtract},
        {"mul", with<arithmetic, Binary::mul, Operands::in_order>, Role::multiply},
        {"div", with<arithmetic, Binary::div, Operands::in_order>, Role::divide},
        {"maximum", with<arithmetic, Binary::maximum, Operands::in_order>},
        {"minimum", with<arithmetic, Binary::minimum, Operands::in_order>},
        {"max", with<lesser_or_greater, Binary::maximum>},
        {"min", with<lesser_or_greater, Binary::minimum>},
        {"eq", with<arithmetic, Binary::eq, Operands::in_order>},
        {"ne", with<arithmetic, Binary::ne, Operands::in_order>},
        {"lt", with<arithmetic, Binary::lt, Operands::in_order>},
        {"le", with<arithmetic, Binary::le, Operands::in_order>},
        {"gt", with<arithmetic, Binary::gt, Operands::in_order>},
        {"ge", with<arithmetic, Binary::ge, Operands::in_order>},
        {"logical_and", with<arithmetic, Binary::logical_and, Operands::in_order>},
        {"logical_or", with<arithmetic, Binary::logical_or, Operands::in_order>},
        {"rsub", with<arithmetic, Binary::sub, Operands::swapped>},
        {"bitwise_and", with<arithmetic, Binary::logical_and, Operands::bools>},
        {"bitwise_or", with<arithmetic, Binary::logical_or, Operands::bools>},
        {"__and__", with<arithmetic, Binary::logical_and, Operands::bools>},
        {"__or__", with<arithmetic, Binary::logical_or, Operands::bools>},
        {"where", where},
        {"masked_fill", masked_fill},
        {"to", convert},
        {"_to_copy", convert},
        {"type_as", convert},
    };
    return rows;
}

}  // namespace quantflow::lowering
