// A backend that computes nothing: each step it makes is the text of what was asked for.
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../src/backend.hpp"
#include "../src/lower.hpp"

namespace recording {

using namespace quantflow;

// One kernel asked for: its name with all that is no tensor, and its tensors by their roles, the result "y".
class RecordedStep final : public Step {
public:
    RecordedStep(std::string name, std::string settings, std::vector<std::pair<std::string, Tensor>> operands)
        : name(std::move(name)), settings(std::move(settings)), operands(std::move(operands)) {}
    void run() override {}
    std::string kernel() const override { return name; }
    const Tensor* operand(const std::string& role) const {
        for (const auto& [r, tensor] : operands)
            if (r == role) return &tensor;
        return nullptr;
    }

    std::string name, settings;
    std::vector<std::pair<std::string, Tensor>> operands;
};

class RecordingBackend final : public Backend {
public:
    bool unsigned_codes = true;  // what `stores_unsigned` answers
    bool terms = true;           // what `takes_terms` answers
    bool process_memory = true;  // what `reads_process_memory` answers

    std::string name() const override { return "recording"; }
    bool stores_unsigned() const override { return unsigned_codes; }
    bool takes_terms() const override { return terms; }
    void* allocate(std::size_t bytes) override { return std::malloc(bytes); }
    void release(void* memory) override { std::free(memory); }
    void copy(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
    bool reads_process_memory() const override { return process_memory; }
    void wait() override {}

    std::unique_ptr<Step> linear(const Weights& w, const Tensor& x, const Tensor* residual, const Epilogue& e,
                                 const Tensor& y, const Terms& terms = {}) override {
        return product("linear", text(w) + text(e), x, residual, y, terms);
    }
    std::unique_ptr<Step> conv(const Weights& w, const ConvGeometry& g, const Tensor& x, const Tensor* residual,
                               const Epilogue& e, const Tensor& y, const Terms& terms = {}) override {
        return product("conv", text(w) + text(g) + text(e), x, residual, y, terms);
    }
    std::unique_ptr<Step> matmul(const Tensor& a, const Tensor& b, const Tensor& y) override {
        return step("matmul", "", {{"a", a}, {"b", b}, {"y", y}});
    }
    std::unique_ptr<Step> float_linear(const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor& y) override {
        return step("float_linear", "", {{"x", x}, {"w", w}, {"y", y}}, {{"bias", bias}});
    }
    std::unique_ptr<Step> float_conv(const ConvGeometry& g, const Tensor& x, const Tensor& w, const Tensor* bias,
                                     const Tensor& y) override {
        return step("float_conv", text(g), {{"x", x}, {"w", w}, {"y", y}}, {{"bias", bias}});
    }
    std::unique_ptr<Step> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask, bool causal,
                                    float scale, const Tensor& y) override {
        return step("attention", number(causal) + number(scale), {{"q", q}, {"k", k}, {"v", v}, {"y", y}},
                    {{"mask", mask}});
    }
    std::unique_ptr<Step> copy(const Tensor& x, const Tensor& y) override {
        return step("copy", "", {{"x", x}, {"y", y}});
    }
    std::unique_ptr<Step> fill(double value, const Tensor& y) override {
        return step("fill", number(value), {{"y", y}});
    }
    std::unique_ptr<Step> binary(Binary op, const Tensor& a, const Tensor& b, const Epilogue& e,
                                 const Tensor& y) override {
        return step("binary", number(static_cast<int>(op)) + text(e), {{"a", a}, {"b", b}, {"y", y}});
    }
    std::unique_ptr<Step> unary(Unary op, float a, float b, const Epilogue& e, const Tensor& x,
                                const Tensor& y) override {
        return step("unary", number(static_cast<int>(op)) + number(a) + number(b) + text(e), {{"x", x}, {"y", y}});
    }
    std::unique_ptr<Step> where(const Tensor& cond, const Tensor& a, const Tensor& b, const Tensor& y) override {
        return step("where", "", {{"cond", cond}, {"a", a}, {"b", b}, {"y", y}});
    }
    std::unique_ptr<Step> channel_affine(const Tensor& x, int axis, const Tensor& scale, const Tensor& shift,
                                         const Epilogue& e, const Tensor& y) override {
        return step("channel_affine", number(axis) + text(e), {{"x", x}, {"scale", scale}, {"shift", shift}, {"y", y}});
    }
    std::unique_ptr<Step> pool(const PoolGeometry& g, const Tensor& x, const Tensor& y) override {
        return step("pool",
                    list(g.kernel) + list(g.stride) + list(g.padding) + list(g.dilation) + number(g.is_max) +
                        number(g.count_include_pad) + number(g.divisor_override) + number(g.is_adaptive),
                    {{"x", x}, {"y", y}});
    }
    std::unique_ptr<Step> reduce(Reduction how, const Tensor& x, const std::vector<int>& axes,
                                 const Tensor& y) override {
        return step("reduce", number(static_cast<int>(how)) + list(axes), {{"x", x}, {"y", y}});
    }
    std::unique_ptr<Step> softmax(const Tensor& x, int axis, const Tensor& y) override {
        return step("softmax", number(axis), {{"x", x}, {"y", y}});
    }
    std::unique_ptr<Step> group_norm(const Tensor& x, std::int64_t groups, const Tensor* gamma, const Tensor* beta,
                                     float eps, const Epilogue& e, const Tensor& y) override {
        return step("group_norm", number(static_cast<double>(groups)) + number(eps) + text(e), {{"x", x}, {"y", y}},
                    {{"gamma", gamma}, {"beta", beta}});
    }
    std::unique_ptr<Step> layer_norm(const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps, bool is_rms,
                                     const Tensor& y, const Tensor* codes) override {
        return step("layer_norm", number(eps) + number(is_rms), {{"x", x}, {"y", y}},
                    {{"gamma", gamma}, {"beta", beta}, {"codes", codes}});
    }
    std::unique_ptr<Step> gather(const Tensor& table, const Tensor& index, const Tensor& y) override {
        return step("gather", "", {{"table", table}, {"index", index}, {"y", y}});
    }
    std::unique_ptr<Step> upsample(Interpolation how, bool align_corners, const std::vector<double>& scales,
                                   const Tensor& x, const Tensor& y) override {
        return step("upsample", number(static_cast<int>(how)) + number(align_corners) + list(scales),
                    {{"x", x}, {"y", y}});
    }
    std::unique_ptr<Step> index(const Tensor& x, const std::vector<std::optional<Tensor>>& indices,
                                const Tensor& y) override {
        return step("index", number(indices.size()), {{"x", x}, {"y", y}});
    }
    std::unique_ptr<Step> running_sum(const Tensor& x, int axis, const Tensor& y) override {
        return step("running_sum", number(axis), {{"x", x}, {"y", y}});
    }

private:
    using Operands = std::vector<std::pair<std::string, Tensor>>;
    using Optional = std::vector<std::pair<std::string, const Tensor*>>;

    template <typename T>
    static std::string number(T v) {
        std::ostringstream out;
        out.precision(17);
        out << ' ' << v;
        return out.str();
    }
    template <typename T>
    static std::string list(const std::vector<T>& v) {
        std::string out = " [";
        for (const T& item : v) out += number(item);
        return out + " ]";
    }
    static std::string text(const Epilogue& e) {
        return " epilogue" + number(static_cast<int>(e.kind)) + number(e.a) + number(e.b);
    }
    static std::string text(const ConvGeometry& g) {
        return list(g.stride) + list(g.padding) + list(g.dilation) + number(g.groups);
    }
    static std::string text(const Weights& w) {
        return number(static_cast<const void*>(w.codes)) + list(w.dims) + number(static_cast<const void*>(w.scale)) +
               number(w.scales) + number(static_cast<const void*>(w.bias));
    }
    static std::unique_ptr<Step> step(const char* name, std::string settings, Operands operands,
                                      const Optional& optional = {}) {
        for (const auto& [role, tensor] : optional)
            if (tensor != nullptr) operands.emplace_back(role, *tensor);
        return std::make_unique<RecordedStep>(name, std::move(settings), std::move(operands));
    }
    static std::unique_ptr<Step> product(const char* name, std::string settings, const Tensor& x,
                                         const Tensor* residual, const Tensor& y, const Terms& terms) {
        Operands operands = {{"x", x}, {"y", y}};
        for (std::size_t i = 0; i < terms.products.size(); ++i) {
            settings += " product" + text(terms.products[i].weights);
            operands.emplace_back("x" + std::to_string(i), terms.products[i].x);
        }
        return step(name, std::move(settings), std::move(operands), {{"residual", residual}, {"rest", terms.rest}});
    }
};

// Everything that was lowered, as text: steps with all they were given, cells by their numbers, offsets, forms.
inline std::string text_of(const Lowered& lowered) {
    std::ostringstream out;
    out.precision(17);
    const auto dims = [&](const std::vector<std::int64_t>& v) {
        out << '(';
        for (auto d : v) out << d << ',';
        out << ')';
    };
    const auto cell_of = [&](const Tensor& t) {
        for (std::size_t i = 0; i < lowered.cells.size(); ++i)
            if (t.place.base == &lowered.cells[i]) return static_cast<int>(i);
        return -1;
    };
    for (const NamedStep& s : lowered.steps) {
        const auto& step = static_cast<const RecordedStep&>(*s.step);
        out << s.node << ' ' << step.name << step.settings;
        for (const auto& [role, t] : step.operands) {
            out << "; " << role << " cell " << cell_of(t) << '+' << t.place.offset << ' ' << name_of(t.dtype);
            dims(t.dims);
            dims(t.strides);
            if (t.q) out << " q " << t.q->scale << ' ' << t.q->zero_point << ' ' << t.q->qmin << ' ' << t.q->qmax;
        }
        out << '\n';
    }
    for (const OutputForm& o : lowered.outputs) {
        out << "output " << name_of(o.dtype) << o.is_number << o.number;
        dims(o.dims);
        out << '\n';
    }
    for (const std::byte* cell : lowered.cells) out << (cell != nullptr ? 'c' : '.');
    out << "\ninputs";
    for (int c : lowered.input_cells) out << ' ' << c;
    out << "\noutputs";
    for (int c : lowered.output_cells) out << ' ' << c;
    out << "\narena " << lowered.arena_bytes << ':';
    for (auto offset : lowered.arena_offsets) out << ' ' << offset;
    out << '\n';
    return out.str();
}

}  // namespace recording
