// Float kernels against loops in double precision. Every tensor ends (or begins) at a page that may not be touched.
// Without QUANTFLOW_ISA in the environment, the tests run once per instruction set that this CPU has.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "../host/float_steps.hpp"
#include "../host/isa.hpp"
#include "../host/steps.hpp"

using namespace quantflow;

namespace quantflow::host::isa_emulated_tiles {
const FloatKernels& float_kernels_by_tiles();
}
using Int = std::int64_t;
using Dims = std::vector<Int>;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int failures = 0;
int checks = 0;
double worst = 0;  // largest error of a group, in units of what is allowed
std::mt19937 random_bits(7);

void fail(const std::string& what) {
    if (++failures <= 20) std::printf("  FAILED %s\n", what.c_str());
}

void end_group(const char* name) {
    std::printf("%-36s %8d values, worst error %.3f of what is allowed\n", name, checks, worst);
    checks = 0;
    worst = 0;
}

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }
Int pick(Int low, Int high) { return std::uniform_int_distribution<Int>(low, high)(random_bits); }

// Bytes between two pages that may not be touched, against the one at the end (or the beginning).
class GuardedMemory {
public:
    GuardedMemory(Int bytes, bool at_end) {
        constexpr Int page = 4096;
        const Int inside = (bytes + page - 1) / page * page;
        size_ = static_cast<std::size_t>(inside + 2 * page);
        base_ = static_cast<std::byte*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (inside > 0) mprotect(base_ + page, static_cast<std::size_t>(inside), PROT_READ | PROT_WRITE);
        data = at_end ? base_ + page + inside - bytes : base_ + page;
    }
    ~GuardedMemory() { munmap(base_, size_); }
    GuardedMemory(const GuardedMemory&) = delete;
    std::byte* data;

private:
    std::byte* base_;
    std::size_t size_;
};

// A tensor with its memory. `order`: dimensions from the outermost to the innermost in memory; `gap`: elements
// skipped between the innermost ones.
struct Value {
    Tensor t;
    std::unique_ptr<GuardedMemory> memory;

    Value(const Dims& dims, std::optional<QParams> q = {}, DType dtype = DType::f32, std::vector<int> order = {},
          Int gap = 0, std::vector<int> repeated = {}) {
        t.dims = dims;
        t.dtype = dtype;
        t.q = q;
        t.strides.assign(dims.size(), 0);
        if (order.empty())
            for (int i = 0; i < static_cast<int>(dims.size()); ++i) order.push_back(i);
        Int step = 1 + gap;
        for (std::size_t i = order.size(); i-- > 0;) {
            const auto d = static_cast<std::size_t>(order[i]);
            bool is_repeated = false;
            for (int r : repeated) is_repeated = is_repeated || r == order[i];
            if (is_repeated) continue;
            t.strides[d] = step;
            step *= dims[d];
        }
        Int last = t.count() == 0 ? -1 : 0;
        for (std::size_t d = 0; d < dims.size() && last >= 0; ++d) last += (dims[d] - 1) * t.strides[d];
        elements = last + 1;
        static bool at_end = false;
        at_end = !at_end;
        memory = std::make_unique<GuardedMemory>(elements * size_of(dtype), at_end);
        t.place = {&memory->data, 0};
        if (dtype == DType::f32)
            fill([] { return uniform(-1, 1); });
        else
            for (Int i = 0; i < elements; ++i)
                t.data<std::uint8_t>()[i] = static_cast<std::uint8_t>(dtype == DType::b8 ? pick(0, 1) : pick(0, 255));
    }
    void fill(const std::function<float()>& f) {
        for (Int i = 0; i < elements; ++i) t.data<float>()[i] = f();
    }
    Int at(const Dims& index) const {
        Int offset = 0;
        for (std::size_t d = 0; d < index.size(); ++d) offset += index[d] * t.strides[d];
        return offset;
    }
    // Code as an integer.
    Int code(Int offset) const {
        return t.dtype == DType::s8 ? t.data<std::int8_t>()[offset] : t.data<std::uint8_t>()[offset];
    }
    double operator()(const Dims& index) const {
        const Int offset = at(index);
        if (t.dtype == DType::f32) return t.data<float>()[offset];
        if (!t.q) return static_cast<double>(code(offset));
        return static_cast<double>(code(offset) - t.q->zero_point) * t.q->scale;
    }
    float& f32(const Dims& index) { return t.data<float>()[at(index)]; }
    Int elements;
};

std::string text(const Dims& index) {
    std::string s = "[";
    for (Int i : index) s += std::to_string(i) + " ";
    return s + "]";
}

// y at `index` must be `exact` within `error`, or its code must be one that a value within `error` may have.
void check(const char* what, const Value& y, const Dims& index, double exact, double error) {
    ++checks;
    if (!y.t.q) {
        const double got = y(index);
        if (std::isnan(exact) || std::isinf(exact)) {
            if (!(std::isnan(exact) ? std::isnan(got) : got == exact))
                fail(std::string(what) + text(index) + ": " + std::to_string(got) + ", not " + std::to_string(exact));
            return;
        }
        const double d = std::fabs(got - exact) / error;
        if (!(d <= 1)) {
            char numbers[100];
            std::snprintf(numbers, sizeof numbers, ": %.9g, not %.9g within %.3g", got, exact, error);
            fail(std::string(what) + text(index) + numbers);
        } else {
            worst = std::max(worst, d);
        }
        return;
    }
    const QParams& q = *y.t.q;
    const Int got = y.code(y.at(index));
    double real = exact / q.scale + q.zero_point;
    if (std::isnan(real)) real = q.qmax;
    const double slack = error / q.scale + 1e-3;
    const auto code = [&](double r) {
        return static_cast<Int>(std::min<double>(q.qmax, std::max<double>(q.qmin, std::nearbyint(r))));
    };
    if (got < code(real - slack) || got > code(real + slack))
        fail(std::string(what) + text(index) + ": code " + std::to_string(got) + ", not " + std::to_string(real));
}

void for_each(const Dims& dims, const std::function<void(const Dims&)>& f) {
    Dims index(dims.size(), 0);
    for (Int d : dims)
        if (d == 0) return;
    for (;;) {
        f(index);
        std::size_t d = dims.size();
        while (d-- > 0) {
            if (++index[d] < dims[d]) break;
            index[d] = 0;
            if (d == 0) return;
        }
        if (dims.empty()) return;
    }
}

const QParams kU8{0.013f, 117, 0, 255};
const QParams kS8{0.011f, -3, -128, 127};

// f32 and codes in turn.
struct Format {
    DType dtype;
    std::optional<QParams> q;
};
const Format kFormats[] = {{DType::f32, {}}, {DType::u8, kU8}, {DType::s8, kS8}};

// Matrix products ----------------------------------------------------------------------------------------------

void check_product(const char* what, const Value& a, const Value& b, const Tensor* bias, const Value& y) {
    const std::size_t r = a.t.dims.size();
    const Int k = a.t.dims[r - 1];
    for_each(y.t.dims, [&](const Dims& index) {
        Dims ia = index, ib = index;
        double sum = 0, size = 0;
        for (Int i = 0; i < k; ++i) {
            ia[r - 1] = i;
            ib[r - 2] = i;
            const double product = a(ia) * b(ib);
            sum += product;
            size += std::fabs(product);
        }
        const double add = bias != nullptr ? bias->data<float>()[index[r - 1]] : 0.0;
        check(what, y, index, sum + add,
              2e-7 * (std::sqrt(static_cast<double>(k)) + 4) * (size + std::fabs(add)) + 1e-30);
    });
}

void test_matmul(ThreadPool& pool) {
    struct Shape {
        Dims batch;
        Int m, k, n;
    };
    const Shape shapes[] = {{{}, 1, 1, 1},      {{}, 6, 8, 16},   {{2}, 7, 33, 17},  {{2, 3}, 5, 65, 31},
                            {{}, 13, 600, 40},  {{}, 1, 300, 70}, {{}, 2, 37, 64},   {{3}, 3, 9, 130},
                            {{}, 200, 20, 100}, {{}, 390, 7, 5},  {{}, 4, 1300, 1},  {{2}, 64, 48, 96},
                            {{}, 0, 5, 4},      {{}, 5, 0, 4},    {{}, 5, 4, 0},     {{0}, 2, 2, 2},
                            {{40}, 4, 4, 4},    {{}, 97, 129, 65}, {{3, 5}, 1, 20, 9}};
    for (const Shape& s : shapes)
        for (int layout = 0; layout < 6; ++layout) {
            Dims a = s.batch, b = s.batch, y = s.batch;
            a.insert(a.end(), {s.m, s.k});
            b.insert(b.end(), {s.k, s.n});
            y.insert(y.end(), {s.m, s.n});
            std::vector<int> same, turned;
            for (int i = 0; i < static_cast<int>(a.size()); ++i) same.push_back(i);
            turned = same;
            std::swap(turned[turned.size() - 1], turned[turned.size() - 2]);
            std::vector<int> repeated;  // one B for all batches
            if (layout == 5)
                for (int i = 0; i < static_cast<int>(s.batch.size()); ++i) repeated.push_back(i);
            const Value va(a, {}, DType::f32, layout & 1 ? turned : same, layout == 3 ? 1 : 0);
            const Value vb(b, {}, DType::f32, layout & 2 ? turned : same, layout == 4 ? 2 : 0, repeated);
            const Format& f = kFormats[layout % 3];
            const Value vy(y, f.q, f.dtype);
            auto step = host::make_float_matmul(pool, va.t, vb.t, vy.t);
            step->run();
            step->run();
            check_product("matmul", va, vb, nullptr, vy);
        }
    end_group("float matmul");

    // An Inf or NaN stays in its row and column, also beside a ragged edge.
    Value a({7, 5}), b({5, 19}), y({7, 19});
    a.f32({2, 3}) = kNaN;
    b.f32({1, 18}) = kInf;
    host::make_float_matmul(pool, a.t, b.t, y.t)->run();
    for_each(y.t.dims, [&](const Dims& i) {
        const double got = y(i);
        ++checks;
        if ((i[0] == 2) != std::isnan(got) || (i[0] != 2 && (i[1] == 18) != std::isinf(got)))
            fail("matmul NaN" + text(i));
    });
    end_group("float matmul, NaN and Inf");
}

void test_linear(ThreadPool& pool) {
    const Int shapes[][3] = {{1, 1, 1},     {128, 384, 70}, {3, 600, 16},  {1, 1025, 33}, {50, 7, 129}, {0, 4, 4},
                             {4, 0, 4},     {4, 4, 0},      {193, 40, 24}, {400, 12, 300}, {12, 5, 6}};
    for (const auto& s : shapes)
        for (int variant = 0; variant < 3; ++variant) {
            const Format& in = kFormats[variant];
            const Format& out = kFormats[(variant * 2) % 3];
            const Value x({s[0], s[1]}, in.q, in.dtype), bias({s[2]});
            const Value w({1, s[2], s[1]});
            const Value y({s[0], s[2]}, out.q, out.dtype);
            Tensor weight = w.t;
            weight.dims = {s[2], s[1]};
            weight.strides = {w.t.strides[1], w.t.strides[2]};
            auto first = host::make_float_linear(pool, x.t, weight, variant == 1 ? nullptr : &bias.t, y.t);
            auto second = host::make_float_linear(pool, x.t, weight, variant == 1 ? nullptr : &bias.t, y.t);
            first.reset();
            second->run();
            Value turned({s[1], s[2]});
            for_each(turned.t.dims, [&](const Dims& i) { turned.f32(i) = static_cast<float>(w({0, i[1], i[0]})); });
            check_product("linear", x, turned, variant == 1 ? nullptr : &bias.t, y);
        }
    // The same memory with other values is another weight.
    Value x({3, 4}), w({5, 4}), y({3, 5});
    auto before = host::make_float_linear(pool, x.t, w.t, nullptr, y.t);
    w.fill([] { return uniform(-1, 1); });
    host::make_float_linear(pool, x.t, w.t, nullptr, y.t)->run();
    Value turned({4, 5});
    for_each(turned.t.dims, [&](const Dims& i) { turned.f32(i) = static_cast<float>(w({i[1], i[0]})); });
    check_product("linear", x, turned, nullptr, y);
    // Leading dimensions that can't be joined.
    Value x3({4, 3, 9}, {}, DType::f32, {1, 0, 2}), w3({6, 9}), y3({4, 3, 6});
    host::make_float_linear(pool, x3.t, w3.t, nullptr, y3.t)->run();
    for_each(y3.t.dims, [&](const Dims& i) {
        double sum = 0;
        for (Int k = 0; k < 9; ++k) sum += x3({i[0], i[1], k}) * w3({i[2], k});
        check("linear of 3 dimensions", y3, i, sum, 1e-5);
    });
    end_group("float linear");
}

// Convolution --------------------------------------------------------------------------------------------------

// Channels-last memory, seen with channels as dimension 1.
Tensor channels_second(const Value& v) {
    Tensor t = v.t;
    t.dims.insert(t.dims.begin() + 1, t.dims.back());
    t.dims.pop_back();
    t.strides.insert(t.strides.begin() + 1, t.strides.back());
    t.strides.pop_back();
    return t;
}

void test_conv(ThreadPool& pool) {
    struct Case {
        Int batch, in, out, groups;
        std::vector<Int> size, kernel, stride, padding, dilation;
    };
    const Case cases[] = {
        {2, 3, 32, 1, {17, 13}, {3, 3}, {2, 2}, {1, 1}, {1, 1}},    // a stem
        {1, 16, 96, 1, {14, 14}, {1, 1}, {1, 1}, {0, 0}, {1, 1}},   // pointwise
        {3, 16, 24, 1, {9, 7}, {1, 1}, {2, 2}, {0, 0}, {1, 1}},     // pointwise with a stride
        {1, 40, 40, 40, {12, 11}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},  // depthwise
        {2, 33, 33, 33, {10, 9}, {5, 5}, {2, 2}, {2, 2}, {1, 1}},
        {1, 16, 16, 16, {8, 8}, {7, 7}, {1, 1}, {3, 3}, {1, 1}},    // more taps than are held
        {1, 8, 8, 8, {3, 2}, {3, 3}, {1, 1}, {4, 4}, {1, 1}},       // windows of padding alone
        {1, 8, 16, 8, {6, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},      // two outputs per channel
        {2, 12, 6, 3, {7, 9}, {3, 2}, {1, 2}, {0, 1}, {2, 1}},      // groups, dilation
        {1, 5, 7, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
        {2, 6, 5, 1, {19}, {4}, {3}, {2}, {2}},
        {1, 17, 17, 17, {23}, {3}, {1}, {1}, {1}},
        {1, 3, 4, 1, {4, 5, 6}, {2, 3, 2}, {1, 2, 1}, {1, 0, 1}, {1, 1, 2}},
        {1, 4, 4, 4, {4, 5, 6}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}},
        {1, 64, 70, 1, {12, 12}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
    };
    for (const Case& c : cases)
        for (bool with_bias : {true, false}) {
            const std::size_t n = c.size.size();
            std::vector<Int> x_dims{c.batch}, y_dims{c.batch}, w_dims{c.out, c.in / c.groups};
            for (std::size_t d = 0; d < n; ++d) {
                x_dims.push_back(c.size[d]);
                w_dims.push_back(c.kernel[d]);
                y_dims.push_back((c.size[d] + 2 * c.padding[d] - c.dilation[d] * (c.kernel[d] - 1) - 1) / c.stride[d] + 1);
            }
            x_dims.push_back(c.in);
            y_dims.push_back(c.out);
            const Value x(x_dims), w(w_dims), bias({c.out}), y(y_dims);
            ConvGeometry g;
            g.stride = c.stride;
            g.padding = c.padding;
            g.dilation = c.dilation;
            g.groups = c.groups;
            auto step = host::make_float_conv(pool, g, channels_second(x), w.t, with_bias ? &bias.t : nullptr,
                                              channels_second(y));
            step->run();
            step->run();
            for_each(y.t.dims, [&](const Dims& at) {
                const Int o = at.back(), group = o / (c.out / c.groups);
                double sum = with_bias ? bias({o}) : 0;
                Dims own = w_dims;
                own[0] = 1;
                for_each(own, [&](Dims tap) {
                    tap[0] = o;
                    Dims from{at[0]};
                    for (std::size_t d = 0; d < n; ++d) {
                        from.push_back(at[d + 1] * c.stride[d] - c.padding[d] + tap[d + 2] * c.dilation[d]);
                        if (from.back() < 0 || from.back() >= c.size[d]) return;
                    }
                    from.push_back(group * (c.in / c.groups) + tap[1]);
                    sum += x(from) * w(tap);
                });
                check("convolution", y, at, sum, 1e-4);
            });
        }
    end_group("float convolution");
}

// Attention ----------------------------------------------------------------------------------------------------

// Tiles multiply halves of floats, see float_tiles.inc.
bool by_tiles = false;

void check_attention(const char* what, const Value& q, const Value& k, const Value& v, const Value* mask, bool causal,
                     double scale, const Value& y) {
    const std::size_t r = q.t.dims.size();
    const Int s = k.t.dims[r - 2], e = q.t.dims[r - 1], f = v.t.dims[r - 1];
    Dims rows = y.t.dims;
    rows[r - 1] = f > 0 ? 1 : 0;
    std::vector<double> p(static_cast<std::size_t>(s));
    for_each(rows, [&](const Dims& row) {
        Dims iq = row, ik = row, im = row;
        double highest = -HUGE_VAL, size = 0;
        bool is_nan = false;
        for (Int j = 0; j < s; ++j) {
            double score = 0, magnitude = 0;
            ik[r - 2] = j;
            for (Int c = 0; c < e; ++c) {
                iq[r - 1] = ik[r - 1] = c;
                score += q(iq) * k(ik);
                magnitude += std::fabs(q(iq) * k(ik));
            }
            score *= scale;
            if (mask != nullptr) {
                im[r - 1] = j;
                const double m = (*mask)(im);
                // Sums of floats: the lowest float absorbs any score.
                score = mask->t.dtype == DType::b8 ? (m != 0 ? score : -HUGE_VAL)
                                                   : static_cast<double>(static_cast<float>(score + m));
                if (std::fabs(m) < 1e6) magnitude += std::fabs(m) / scale;
            }
            if (causal && j > row[r - 2]) score = -HUGE_VAL;
            if (score > -1e30) size = std::max(size, magnitude * scale);
            is_nan = is_nan || std::isnan(score);
            p[static_cast<std::size_t>(j)] = score;
            highest = std::max(highest, score);
        }
        double sum = 0;
        for (double& x : p) sum += x = highest == -HUGE_VAL ? 0 : std::exp(x - highest);
        for (Int c = 0; c < f; ++c) {
            Dims iv = row, iy = row;
            iv[r - 1] = iy[r - 1] = c;
            double total = 0, most = 0;
            for (Int j = 0; j < s; ++j) {
                iv[r - 2] = j;
                if (p[static_cast<std::size_t>(j)] == 0) continue;
                total += p[static_cast<std::size_t>(j)] * v(iv);
                most = std::max(most, std::fabs(v(iv)));
            }
            // Roundings of the scores (of size `size`) and of the products.
            const double bound = by_tiles ? 0x1p-15 * (2 + size) : 1e-6 + 3e-7 * size;
            check(what, y, iy, is_nan ? NAN : sum == 0 ? 0 : total / sum, bound * most + 1e-30);
        }
    });
}

void test_attention(ThreadPool& pool) {
    struct Shape {
        Dims batch;
        Int l, s, e, f;
    };
    const Shape shapes[] = {{{1, 2}, 128, 128, 32, 32}, {{2, 3}, 17, 19, 8, 8}, {{1}, 1, 1, 1, 1},
                            {{2}, 5, 40, 7, 33},        {{1, 2}, 50, 197, 64, 64}, {{}, 9, 1100, 16, 20},
                            {{3}, 500, 20, 4, 3},       {{1}, 31, 530, 5, 16},  {{2, 2}, 0, 4, 4, 4},
                            {{2}, 4, 0, 4, 4},          {{2}, 4, 3, 0, 5},      {{0}, 4, 3, 2, 5},
                            {{}, 700, 600, 3, 2},       {{2}, 3, 3, 2, 0},      {{1, 2}, 33, 45, 20, 18},
                            {{}, 70, 601, 48, 40},      {{2}, 16, 16, 16, 16}};
    int turn = 0;
    for (const Shape& s : shapes)
        for (int variant = 0; variant < 9; ++variant, ++turn) {
            Dims q = s.batch, k = s.batch, v = s.batch, y = s.batch, m = s.batch;
            q.insert(q.end(), {s.l, s.e});
            k.insert(k.end(), {s.s, s.e});
            v.insert(v.end(), {s.s, s.f});
            y.insert(y.end(), {s.l, s.f});
            m.insert(m.end(), {s.l, s.s});
            const int r = static_cast<int>(q.size());
            // Rows outside heads, as in (B, L, H, E); or rows innermost.
            std::vector<int> outside, innermost;
            for (int i = 0; i < r; ++i) outside.push_back(i);
            innermost = outside;
            std::swap(innermost[innermost.size() - 1], innermost[innermost.size() - 2]);
            if (r >= 3) std::swap(outside[outside.size() - 2], outside[outside.size() - 3]);
            const auto& order = variant == 4 ? innermost : outside;
            const Format& in = kFormats[variant == 5 ? 1 : variant == 6 ? 2 : 0];
            const Format& out = kFormats[variant == 5 || variant == 7 ? 1 : variant == 8 ? 2 : 0];
            const Value vq(q, in.q, in.dtype, order), vk(k, in.q, in.dtype, order, variant == 3 ? 1 : 0),
                vv(v, in.q, in.dtype, order), vy(y, out.q, out.dtype, order);
            std::optional<Value> mask;
            bool causal = false;
            if (variant == 1 || variant == 6) mask.emplace(m, std::nullopt, DType::b8);
            if (variant == 2) {
                mask.emplace(m);
                for (Int i = 0; i < mask->elements; ++i) {
                    const Int kind = pick(0, 9);
                    mask->t.data<float>()[i] = kind == 0   ? -kInf
                                               : kind == 1 ? std::numeric_limits<float>::lowest()
                                                           : uniform(-3, 3);
                }
            }
            if (variant == 3) causal = true;
            if (variant == 4) {  // one row of a mask for all
                std::vector<int> repeated;
                for (int i = 0; i + 1 < r; ++i) repeated.push_back(i);
                mask.emplace(m, std::nullopt, turn % 2 ? DType::b8 : DType::f32, std::vector<int>{}, 0, repeated);
            }
            if (variant == 7) {
                causal = true;
                mask.emplace(m, std::nullopt, DType::b8, innermost);
            }
            const float scale = 1.0f / std::sqrt(static_cast<float>(std::max<Int>(1, s.e)));
            auto step = host::make_attention(pool, vq.t, vk.t, vv.t, mask ? &mask->t : nullptr, causal, scale, vy.t);
            step->run();
            step->run();
            check_attention("attention", vq, vk, vv, mask ? &*mask : nullptr, causal, scale, vy);
        }
    end_group("attention");

    // Hidden rows: 0 as in PyTorch 2.13, all alike when hidden by the lowest float; large scores; NaN and Inf.
    for (Int keys : {21, 1040}) {
        Value q({20, 16}), k({keys, 16}), v({keys, 24}), y({20, 24}), b8({20, keys}, {}, DType::b8), f32({20, keys});
        q.fill([] { return uniform(-30, 30); });
        k.fill([] { return uniform(-3, 3); });
        std::memset(b8.t.data<std::uint8_t>(), 0, static_cast<std::size_t>(b8.elements));
        b8.t.data<std::uint8_t>()[b8.at({4, keys - 1})] = 1;
        host::make_attention(pool, q.t, k.t, v.t, &b8.t, false, 1.0f, y.t)->run();
        check_attention("hidden by b8", q, k, v, &b8, false, 1.0, y);
        for (float hidden : {-kInf, std::numeric_limits<float>::lowest(), -1e4f}) {
            for_each(f32.t.dims, [&](const Dims& i) { f32.f32(i) = i[0] % 3 == 0 || i[1] % 7 == 2 ? hidden : 0; });
            host::make_attention(pool, q.t, k.t, v.t, &f32.t, false, 0.3f, y.t)->run();
            // -1e4 leaves few digits to the scores of rows that are hidden all over.
            if (hidden != -1e4f) check_attention("hidden by f32", q, k, v, &f32, false, 0.3f, y);
        }
        host::make_attention(pool, q.t, k.t, v.t, nullptr, false, 5.0f, y.t)->run();
        check_attention("large scores", q, k, v, nullptr, false, 5.0, y);
        q.f32({3, 2}) = kNaN;
        host::make_attention(pool, q.t, k.t, v.t, nullptr, false, 0.3f, y.t)->run();
        check_attention("NaN", q, k, v, nullptr, false, 0.3f, y);
        // Half of it would be Inf minus Inf.
        q.f32({3, 2}) = 0;
        v.f32({4, 5}) = kInf;
        host::make_attention(pool, q.t, k.t, v.t, nullptr, false, 0.0f, y.t)->run();
        for_each(y.t.dims, [&](const Dims& i) {
            if (i[1] == 5 && y(i) != HUGE_VAL) fail("attention, Inf among the values");
        });
    }
    end_group("attention, hidden rows and extremes");

    // Masks of one sample that change one score, or none, beside those of another; heads share them.
    for (DType dtype : {DType::b8, DType::f32})
        for (const std::vector<int>& repeated : {std::vector<int>{1}, {1, 2}, {}})
            for (bool causal : {false, true})
                for (Int row : {-1, 0, 18, 19}) {
                    Value q({2, 3, 20, 16}), k({2, 3, 37, 16}), v({2, 3, 37, 8}), y({2, 3, 20, 8});
                    Value mask({2, 3, 20, 37}, {}, dtype, {}, 0, repeated);
                    for (Int i = 0; i < mask.elements; ++i)
                        if (dtype == DType::b8)
                            mask.t.data<std::uint8_t>()[i] = 1;
                        else
                            mask.t.data<float>()[i] = pick(0, 1) == 0 ? 0.0f : -0.0f;
                    if (row >= 0 && dtype == DType::b8) mask.t.data<std::uint8_t>()[mask.at({1, 2, row, 11})] = 0;
                    if (row >= 0 && dtype == DType::f32) mask.f32({1, 2, row, 11}) = -2;
                    host::make_attention(pool, q.t, k.t, v.t, &mask.t, causal, 1.0f, y.t)->run();
                    check_attention("mask of one score", q, k, v, &mask, causal, 1.0, y);
                }
    end_group("attention, masks that change little");
}

// Softmax and normalization ------------------------------------------------------------------------------------

void check_softmax(const Value& x, int axis, const Value& y) {
    const auto a = static_cast<std::size_t>(axis);
    Dims lines = x.t.dims;
    const Int n = lines[a];
    lines[a] = n > 0 ? 1 : 0;
    for_each(lines, [&](Dims i) {
        double highest = -HUGE_VAL, sum = 0;
        bool is_nan = false;
        for (i[a] = 0; i[a] < n; ++i[a]) {
            highest = std::max(highest, x(i));
            is_nan = is_nan || std::isnan(x(i));
        }
        is_nan = is_nan || std::isinf(highest);
        for (i[a] = 0; i[a] < n; ++i[a]) sum += std::exp(x(i) - highest);
        for (i[a] = 0; i[a] < n; ++i[a]) {
            const double p = is_nan ? NAN : std::exp(x(i) - highest) / sum;
            // x - highest rounds by half a unit of the last place of the difference.
            const double rounding = x.t.q ? 3e-7 : 6e-8 * std::fabs(x(i) - highest);
            check("softmax", y, i, p, is_nan || p == 0 ? 1e-37 : (6e-7 + rounding) * p + 1e-37);
        }
    });
}

void test_softmax(ThreadPool& pool) {
    const Dims shapes[] = {{1}, {7}, {16, 1}, {5, 33}, {3, 4, 100}, {2, 17, 5}, {1000}, {300, 50}, {0, 3}, {3, 0},
                           {2, 3, 4, 20}, {4, 1500}};
    for (const Dims& dims : shapes)
        for (int axis = 0; axis < static_cast<int>(dims.size()); ++axis)
            for (int variant = 0; variant < 5; ++variant) {
                std::vector<int> order;
                for (int i = 0; i < static_cast<int>(dims.size()); ++i) order.push_back(i);
                if (variant == 3) std::rotate(order.begin(), order.begin() + 1, order.end());
                const Format& in = kFormats[variant < 3 ? variant : 0];
                const Format out = variant == 1 ? Format{DType::u8, QParams{1 / 256.0f, 0, 0, 255}}
                                   : variant == 4 ? Format{DType::s8, QParams{1 / 300.0f, -128, -128, 127}}
                                                  : Format{DType::f32, {}};
                Value x(dims, in.q, in.dtype, order, variant == 4 ? 1 : 0);
                if (!in.q) x.fill([] { return uniform(-20, 20); });
                const Value y(dims, out.q, out.dtype);
                auto step = host::make_softmax(pool, x.t, axis, y.t);
                step->run();
                check_softmax(x, axis, y);
            }
    end_group("softmax");

    for (int axis : {0, 1}) {
        Value x({21, 21}), y({21, 21});
        for (Int i = 0; i < 21; ++i) {
            const auto at = [&](Int j) -> float& { return axis == 1 ? x.f32({i, j}) : x.f32({j, i}); };
            if (i == 1) at(20) = kNaN;
            if (i == 2) at(3) = kInf;
            if (i == 3) at(17) = -kInf;
            if (i == 4)
                for (Int j = 0; j < 21; ++j) at(j) = -kInf;
            if (i == 5) at(0) = 3e38f, at(1) = -3e38f;
            if (i == 6) at(2) = kInf, at(19) = -kInf;
            if (i == 7)
                for (Int j = 0; j < 21; ++j) at(j) = -3e38f;
            if (i == 8) at(5) = 90;
        }
        host::make_softmax(pool, x.t, axis, y.t)->run();
        check_softmax(x, axis, y);
        host::make_softmax(pool, x.t, axis, x.t)->run();  // in place
        for_each(x.t.dims, [&](const Dims& i) {
            if (!(x(i) == y(i) || (std::isnan(x(i)) && std::isnan(y(i))))) fail("softmax in place" + text(i));
        });
    }
    end_group("softmax, NaN and Inf, in place");
}

void test_layer_norm(ThreadPool& pool) {
    const Dims shapes[] = {{1, 1}, {3, 7}, {2, 5, 384}, {128, 100}, {1, 5000}, {4}, {0, 4}, {4, 0}, {3, 2, 2, 17}};
    for (const Dims& dims : shapes)
        for (int variant = 0; variant < 14; ++variant) {
            const bool is_rms = variant % 2 == 1;
            const Int n = dims.back();
            const Format& in = kFormats[variant / 2 % 3];
            const int outs[] = {0, 0, 1, 0, 2, 1, 1};
            const Format& out = kFormats[outs[variant / 2]];
            std::vector<int> order;
            for (int i = 0; i < static_cast<int>(dims.size()); ++i) order.push_back(i);
            if (variant >= 8 && order.size() > 2) std::swap(order[0], order[1]);
            Value x(dims, in.q, in.dtype, order);
            const float middle = variant >= 6 ? 100.0f : 0.5f;
            if (!in.q) x.fill([&] { return middle + uniform(-2, 2); });
            const Value y(dims, out.q, out.dtype), gamma({n}), beta({n});
            const Tensor* g = variant == 2 ? nullptr : &gamma.t;
            const Tensor* b = variant == 3 || variant == 2 ? nullptr : &beta.t;
            const float eps = 1e-5f;
            const Value codes(dims, kU8, DType::u8), copied(dims, kU8, DType::u8);
            const Tensor* coded = out.q ? nullptr : &codes.t;
            host::make_layer_norm(pool, x.t, g, b, eps, is_rms, y.t, coded)->run();
            if (coded != nullptr) {
                host::make_copy(pool, y.t, copied.t)->run();
                for (Int i = 0; i < y.t.count(); ++i)
                    if (codes.code(i) != copied.code(i) &&
                        std::fabs(y.t.data<float>()[i] / kU8.scale + kU8.zero_point -
                                  0.5 * (codes.code(i) + copied.code(i))) > 1e-3)  // beside a tie either is right
                        fail("codes beside floats");
            }
            Dims rows = dims;
            rows.back() = n > 0 ? 1 : 0;
            for_each(rows, [&](Dims i) {
                Int& c = i.back();
                double mean = 0, square = 0, most = 0;
                for (c = 0; c < n; ++c) mean += x(i) / static_cast<double>(n);
                if (is_rms) mean = 0;
                for (c = 0; c < n; ++c) {
                    square += (x(i) - mean) * (x(i) - mean) / static_cast<double>(n);
                    most = std::max(most, std::fabs(x(i)));
                }
                const double inverse = 1 / std::sqrt(square + eps);
                for (c = 0; c < n; ++c) {
                    const double normal = (x(i) - mean) * inverse;
                    const double by = g ? gamma({c}) : 1.0, add = b ? beta({c}) : 0.0;
                    // Dequantized codes are rounded to float before they are normalized.
                    const double input = in.q ? 2e-7 * most * inverse : 1e-7;
                    check("layer_norm", y, i, normal * by + add,
                          5e-7 * (std::fabs(normal * by) + std::fabs(add)) + input * std::fabs(by) + 1e-9);
                }
            });
        }
    end_group("layer_norm and rms_norm");

    Value x({6, 40}), y({6, 40});
    x.f32({1, 39}) = kNaN;
    x.f32({2, 0}) = kInf;
    for (Int c = 0; c < 40; ++c) x.f32({3, c}) = 7.25f;
    host::make_layer_norm(pool, x.t, nullptr, nullptr, 1e-5f, false, y.t)->run();
    for (Int c = 0; c < 40; ++c) {
        check("layer_norm NaN", y, {1, c}, NAN, 0);
        check("layer_norm Inf", y, {2, c}, NAN, 0);
        check("layer_norm constant", y, {3, c}, 0, 1e-6);
    }
    host::make_layer_norm(pool, x.t, nullptr, nullptr, 1e-5f, false, x.t)->run();
    for (Int c = 0; c < 40; ++c)
        if (x({0, c}) != y({0, c})) fail("layer_norm in place");
    // NaN, +Inf and -Inf as codes, through the store of any row kernel: rms_norm of one value is its sign.
    Value special({3, 1}), codes({3, 1}, kU8, DType::u8), scale({1});
    special.fill([] { return 1.0f; });
    special.f32({1, 0}) = -1;
    special.f32({2, 0}) = kNaN;
    scale.f32({0}) = 3e38f;
    host::make_layer_norm(pool, special.t, &scale.t, nullptr, 0.0f, true, codes.t)->run();
    const Int want[] = {255, 0, 255};
    for (Int i = 0; i < 3; ++i)
        if (codes.code(i) != want[i]) fail("saturated code " + std::to_string(codes.code(i)));
    end_group("layer_norm, NaN and Inf, in place");
}

void test_group_norm(ThreadPool& pool) {
    const Dims shapes[] = {{1, 4},         {3, 12, 7},     {2, 6, 9, 7}, {1, 64, 40, 33},
                           {1, 100, 3, 3}, {2, 4, 20000}, {0, 4, 3},    {1, 8, 2, 3, 5}};
    for (const Dims& dims : shapes)
        for (int variant = 0; variant < 12; ++variant) {
            const Int channels = dims[1], choices[] = {1, 2, channels}, groups = choices[variant % 3];
            const Format& in = kFormats[variant / 3 % 3];
            const Format& out = kFormats[(variant / 3 + variant / 6) % 3];
            std::vector<int> order;
            for (int i = 0; i < static_cast<int>(dims.size()); ++i)
                if (i != 1 || variant % 2 == 0) order.push_back(i);
            if (variant % 2 == 1) order.push_back(1);
            Value x(dims, in.q, in.dtype, order);
            if (!in.q) x.fill([&] { return (variant >= 6 ? 300.0f : 0.5f) + uniform(-2, 2); });
            const Value y(dims, out.q, out.dtype, order), gamma({channels}), beta({channels});
            const bool has_weights = variant != 4;
            Epilogue silu;
            silu.kind = Activation::silu;
            const Epilogue epilogue = variant >= 9 ? silu : Epilogue{};
            host::make_group_norm(pool, x.t, groups, has_weights ? &gamma.t : nullptr, has_weights ? &beta.t : nullptr,
                                  1e-5f, epilogue, y.t)
                ->run();
            if (x.t.count() == 0) continue;
            const Int width = channels / groups;
            std::vector<double> means(static_cast<std::size_t>(dims[0] * groups)), squares(means), most(means);
            const double count = static_cast<double>(x.t.count()) / static_cast<double>(means.size());
            const auto group = [&](const Dims& i) { return static_cast<std::size_t>(i[0] * groups + i[1] / width); };
            for_each(dims, [&](const Dims& i) { means[group(i)] += x(i) / count; });
            for_each(dims, [&](const Dims& i) {
                const double d = x(i) - means[group(i)];
                squares[group(i)] += d * d / count;
                most[group(i)] = std::max(most[group(i)], std::fabs(x(i)));
            });
            for_each(dims, [&](const Dims& i) {
                const std::size_t g = group(i);
                const double inverse = 1 / std::sqrt(squares[g] + 1e-5), normal = (x(i) - means[g]) * inverse;
                const double by = has_weights ? gamma({i[1]}) : 1.0, add = has_weights ? beta({i[1]}) : 0.0;
                double want = normal * by + add;
                // Scale and shift are float32: what they lose grows with x's distance from 0.
                double bound = 5e-7 * (std::fabs(normal * by) + std::fabs(add)) +
                               3e-7 * (most[g] * inverse + 1) * std::fabs(by) + 1e-9;
                if (epilogue.kind == Activation::silu) {
                    want = want / (1 + std::exp(-want));
                    bound = 1.2 * bound + 1e-6;
                }
                check("group_norm", y, i, want, bound);
            });
        }
    end_group("group_norm");

    Value x({2, 4, 30}), y({2, 4, 30});
    x.f32({0, 1, 29}) = kNaN;
    x.f32({0, 2, 0}) = kInf;
    for (Int i = 0; i < 30; ++i) x.f32({1, 3, i}) = 7.25f;
    host::make_group_norm(pool, x.t, 4, nullptr, nullptr, 1e-5f, {}, y.t)->run();
    for (Int i = 0; i < 30; ++i) {
        check("group_norm NaN", y, {0, 1, i}, NAN, 0);
        check("group_norm Inf", y, {0, 2, i}, NAN, 0);
        check("group_norm constant", y, {1, 3, i}, 0, 3e-7 * 7.25 / std::sqrt(1e-5));
    }
    host::make_group_norm(pool, x.t, 4, nullptr, nullptr, 1e-5f, {}, x.t)->run();
    for (Int i = 0; i < 30; ++i)
        if (x({1, 0, i}) != y({1, 0, i})) fail("group_norm in place");
    end_group("group_norm, NaN and Inf, in place");
}

int run_all() {
    std::printf("%s\n", name_of(best_isa()));
    for (int threads : {1, 3}) {
        ThreadPool pool(threads);
        std::printf("%d thread(s)\n", threads);
        by_tiles = has_bfloat16_tiles();
        test_matmul(pool);
        test_linear(pool);
        test_conv(pool);
        test_attention(pool);
        test_softmax(pool);
        test_layer_norm(pool);
        test_group_norm(pool);
    }
    if (best_isa() == Isa::generic) {
        ThreadPool pool(3);
        std::printf("emulated tiles\n");
        host::floats::kernels_in_use() = &host::isa_emulated_tiles::float_kernels_by_tiles();
        by_tiles = true;
        test_attention(pool);
    }
    std::printf("%s\n", failures == 0 ? "ok" : "FAILED");
    return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int, char** argv) {
    if (std::getenv("QUANTFLOW_ISA") != nullptr) return run_all();
    int bad = 0;
    for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx_vnni, Isa::avx512_vnni, Isa::amx_int8}) {
        if (isa > best_isa()) break;
        bad |= std::system((std::string("QUANTFLOW_ISA=") + name_of(isa) + " '" + argv[0] + "'").c_str());
    }
    return bad == 0 ? 0 : 1;
}
