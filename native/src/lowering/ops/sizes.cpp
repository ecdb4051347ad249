#include <algorithm>

#include "nodes.hpp"

namespace quantflow::lowering {
namespace {

// Sizes of PyTorch programs are far below; arithmetic on them may not overflow.
std::int64_t bounded(std::int64_t size) {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    if (size > most || size < -most) throw Error("a size of " + std::to_string(size));
    return size;
}

[[noreturn]] void refuse() { throw Unsupported("arithmetic on sizes that is not known"); }

using Size = std::int64_t;

Size floor_divided(Size a, Size b) {
    if (b == 0) refuse();
    return a / b - ((a % b != 0 && (a < 0) != (b < 0)) ? 1 : 0);
}

Size product(Size a, Size b) {
    Size ab = 0;
    if (__builtin_mul_overflow(a, b, &ab)) throw Error("a size that overflows");
    return ab;
}

Size size_of_dim(Context& c) {
    const View x = c.operand(0, "self");
    return x.dims[static_cast<std::size_t>(axis(c.integer(1, "dim"), x.rank()))];
}

Size size_of_all(Context& c) { return c.operand(0, "self").count(); }

// Ops on sizes are Python's own and share no table with tensors': "add" here adds two integers. Each row has one of
// the three.
struct SizeOp {
    const char* name;
    Size (*measure)(Context&) = nullptr;
    Size (*of_one)(Size) = nullptr;
    Size (*of_two)(Size, Size) = nullptr;
};

const SizeOp kSizeOps[] = {
    {"sym_size", size_of_dim},
    {"sym_numel", size_of_all},
    {"neg", nullptr, [](Size a) { return -a; }},
    {"int", nullptr, [](Size a) { return a; }},
    {"add", nullptr, nullptr, [](Size a, Size b) { return a + b; }},
    {"sub", nullptr, nullptr, [](Size a, Size b) { return a - b; }},
    {"mul", nullptr, nullptr, product},
    {"max", nullptr, nullptr, [](Size a, Size b) { return std::max(a, b); }},
    {"min", nullptr, nullptr, [](Size a, Size b) { return std::min(a, b); }},
    {"floordiv", nullptr, nullptr, floor_divided},
    {"mod", nullptr, nullptr, [](Size a, Size b) { return a - floor_divided(a, b) * b; }},
    {"eq", nullptr, nullptr, [](Size a, Size b) { return Size{a == b}; }},
    {"ne", nullptr, nullptr, [](Size a, Size b) { return Size{a != b}; }},
    {"lt", nullptr, nullptr, [](Size a, Size b) { return Size{a < b}; }},
    {"le", nullptr, nullptr, [](Size a, Size b) { return Size{a <= b}; }},
    {"gt", nullptr, nullptr, [](Size a, Size b) { return Size{a > b}; }},
    {"ge", nullptr, nullptr, [](Size a, Size b) { return Size{a >= b}; }},
};

Size size_value(Context& c, const Node& n) {
    const std::string base = base_name(n.target);
    const auto* op =
        std::find_if(std::begin(kSizeOps), std::end(kSizeOps), [&](const SizeOp& o) { return o.name == base; });
    const bool is_known = op != std::end(kSizeOps), is_unary = is_known && op->of_one != nullptr;
    if (is_known && op->measure != nullptr) return op->measure(c);
    Vals args;
    for (const Arg& a : n.args) args.push_back(c.evaluated(a));
    const auto whole = [&](std::size_t i) { return bounded(as_integer(args[i], "a size")); };
    if (args.size() != (is_unary ? 1u : 2u)) refuse();
    if (is_unary) return op->of_one(whole(0));
    const Size a = whole(0), b = whole(1);
    if (!is_known) refuse();
    return op->of_two(a, b);
}

void item(Context& c, const Node& n) {
    if (n.args.size() != 2) throw Unsupported("getitem of what is no list");
    const Val items = c.evaluated(n.args[0]);
    const auto* list = items.as<Vals>();
    if (list == nullptr) throw Unsupported("getitem of what is no list");
    const std::int64_t i = c.integer(1, "index");
    c.define(n.output, (*list)[static_cast<std::size_t>(axis(i, static_cast<int>(list->size())))]);
}

// `given`: its second argument says with what.
enum class Filling { zeros, ones, given };

// The fill value at that place is a number of the dtype.
void require_number(Context& c, std::size_t place, DType dtype) {
    View like;
    like.dtype = dtype;
    const Arg* number = c.argument(place, "fill_value");
    if (number == nullptr || !Context::holds(like, c.evaluated(*number))) throw Unsupported("full of this number");
}

void fill(Context& c, const Node& n, double value, const Dims& dims, DType dtype) {
    View y = c.allocate(dtype, dims, row_major(dims));
    c.emit(c.backend.fill(value, c.tensor(y)), {}, {&y});
    if (dtype == DType::b8) c.foreknown.is_all(y.buffer, value != 0);
    c.define(n.output, y);
}

void filled(Context& c, const Node& n, Filling filling) {
    const Dims dims = c.integers(0, "size");
    double value = filling == Filling::ones ? 1.0 : 0.0;
    DType dtype = DType::f32;
    if (filling == Filling::given) {
        value = c.real(1, "fill_value");
        const Val given = c.evaluated(*c.argument(1, "fill_value"));
        if (given.as<bool>() != nullptr) dtype = DType::b8;
        if (given.as<std::int64_t>() != nullptr) dtype = DType::s64;
    }
    dtype = c.asked_dtype().value_or(dtype);
    if (filling == Filling::given) require_number(c, 1, dtype);
    fill(c, n, value, dims, dtype);
}

// A tensor of another one's size and, unless it names one, dtype. `sized`: the size is an argument.
void filled_like(Context& c, const Node& n, Filling filling, bool sized) {
    const View x = c.operand(0, "self");
    double value = filling == Filling::ones ? 1.0 : 0.0;
    if (filling == Filling::given) value = c.real(sized ? 2 : 1, "fill_value");
    const DType dtype = c.asked_dtype().value_or(x.q ? DType::f32 : x.dtype);
    if (filling == Filling::given) require_number(c, sized ? 2 : 1, dtype);
    fill(c, n, value, sized ? c.integers(1, "size") : x.dims, dtype);
}

}  // namespace

void size(Context& c, const Node& n) {
    const OpRow* row = find_op(n);
    if (row != nullptr && row->role == Role::item) return item(c, n);
    c.define(n.output, size_value(c, n));
}

const OpRows& size_ops() {
    static const OpRows rows = {
        {"getitem", item, Role::item},
        {"zeros", with<filled, Filling::zeros>},
        {"ones", with<filled, Filling::ones>},
        {"full", with<filled, Filling::given>},
        {"zeros_like", with<filled_like, Filling::zeros, false>},
        {"ones_like", with<filled_like, Filling::ones, false>},
        {"full_like", with<filled_like, Filling::given, false>},
        {"new_zeros", with<filled_like, Filling::zeros, true>},
        {"new_ones", with<filled_like, Filling::ones, true>},
        {"new_full", with<filled_like, Filling::given, true>},
    };
    return rows;
}

}  // namespace quantflow::lowering
