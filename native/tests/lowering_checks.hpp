// What tests of the lowering share: programs put together node by node, lowered by the recording backend.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "recording_backend.hpp"

namespace lowering_checks {

using namespace quantflow;
using recording::RecordedStep;
using Int = std::int64_t;
using Dims = std::vector<Int>;

inline int failures = 0;
inline int checks = 0;

inline void expect(bool holds, const std::string& what) {
    ++checks;
    if (!holds && ++failures <= 20) std::printf("  FAILED %s\n", what.c_str());
}

inline int report(const char* name) {
    std::printf("%s: %d checks, %d failed\n", name, checks, failures);
    return failures == 0 ? 0 : 1;
}

inline QParams codes(float scale, std::int32_t zero_point = 0) { return {scale, zero_point, -128, 127}; }

class Build {
public:
    Program program;

    int value(const std::optional<QParams>& q = std::nullopt) {
        Value v;
        v.name = "v" + std::to_string(program.values.size());
        v.q = q;
        v.is_signed = q.has_value();
        program.values.push_back(v);
        return static_cast<int>(program.values.size()) - 1;
    }
    int input(const std::optional<QParams>& q = std::nullopt) {
        program.inputs.push_back(value(q));
        return program.inputs.back();
    }
    Node& node(Op op, const std::string& target, Args args, const std::optional<QParams>& q = std::nullopt) {
        Node n;
        n.is_in_table = true;
        n.op = op;
        n.target = target;
        n.args = std::move(args);
        n.output = value(q);
        const int index = static_cast<int>(program.nodes.size());
        n.name = "n" + std::to_string(index);
        program.values.back().producer = index;
        for (const Arg& a : n.args) note_use(a, index);
        program.nodes.push_back(std::move(n));
        return program.nodes.back();
    }
    int aten(const std::string& target, Args args) { return node(Op::aten, target, std::move(args)).output; }
    int quantize(int x, const QParams& q) { return node(Op::quantize, "", {Ref{x}}, q).output; }
    int dequantize(int x) { return node(Op::dequantize, "", {Ref{x}}).output; }
    // A convolution of `kernel` squared, or a linear layer with kernel 0.
    Node& product(int x, Int in, Int out, Int kernel, const Arg& residual, const std::optional<QParams>& q) {
        static const std::vector<std::int8_t> weights(1 << 16, 1);
        static const float scale = 1;
        Node& n = node(kernel > 0 ? Op::conv : Op::linear, "", {Ref{x}, residual}, q);
        n.weights.codes = weights.data();
        n.weights.scale = &scale;
        n.weights.dims = {out, in};
        if (kernel > 0) {
            n.weights.dims.insert(n.weights.dims.end(), {kernel, kernel});
            n.geometry.stride = n.geometry.dilation = {1, 1};
            n.geometry.padding = {0, 0};
        }
        return n;
    }
    int conv(int x, Int in, Int out, Int kernel, const std::optional<QParams>& q = std::nullopt) {
        return product(x, in, out, kernel, None{}, q).output;
    }
    int linear(int x, Int in, Int out, const std::optional<QParams>& q = std::nullopt, const Arg& residual = None{}) {
        return product(x, in, out, 0, residual, q).output;
    }

private:
    void note_use(const Arg& a, int user) {
        if (const auto* ref = a.as<Ref>()) {
            auto& users = program.values[static_cast<std::size_t>(ref->value)].users;
            if (users.empty() || users.back() != user) users.push_back(user);
        }
        if (const auto* items = a.as<Args>())
            for (const Arg& item : *items) note_use(item, user);
    }
};

inline Args list(const Dims& dims) { return Args(dims.begin(), dims.end()); }

inline InputForm form(Dims dims, DType dtype = DType::f32) {
    InputForm f;
    f.dims = std::move(dims);
    f.dtype = dtype;
    return f;
}

// A lowered program; steps keep pointing to its cells.
struct Result {
    Lowered lowered;
    std::string error;  // instead of a result
    bool is_unsupported = false;

    std::size_t size() const { return lowered.steps.size(); }
    const RecordedStep& step(std::size_t i) const {
        if (i >= size()) {
            std::printf("  FAILED step %zu of %zu is asked for %s\n", i, size(), error.c_str());
            std::exit(1);
        }
        return static_cast<const RecordedStep&>(*lowered.steps[i].step);
    }
    const Tensor& operand(std::size_t i, const char* role) const {
        const Tensor* t = step(i).operand(role);
        if (t == nullptr) {
            std::printf("  FAILED step %zu (%s) has no %s\n", i, step(i).name.c_str(), role);
            std::exit(1);
        }
        return *t;
    }
    int cell(const Tensor& t) const {
        for (std::size_t i = 0; i < lowered.cells.size(); ++i)
            if (t.place.base == &lowered.cells[i]) return static_cast<int>(i);
        return -1;
    }
    int cell(std::size_t i, const char* role) const { return cell(operand(i, role)); }
    Int offset(int cell) const { return lowered.arena_offsets[static_cast<std::size_t>(cell)]; }
    std::string names() const {
        std::string all;
        for (std::size_t i = 0; i < size(); ++i) all += (i > 0 ? " " : "") + step(i).name;
        return all;
    }
};

inline Result lowered(const Build& b, const std::vector<InputForm>& forms, const std::vector<int>& outputs,
                      recording::RecordingBackend backend = {}, bool is_step = false) {
    Section section;
    section.is_step = is_step;
    section.last = static_cast<int>(b.program.nodes.size());
    section.inputs = b.program.inputs;
    section.outputs = outputs;
    Constants constants(backend, b.program);
    Result r;
    try {
        r.lowered = lower(b.program, section, forms, backend, constants);
    } catch (const Unsupported& error) {
        r.error = error.what();
        r.is_unsupported = true;
    } catch (const Error& error) {
        r.error = error.what();
    }
    return r;
}

inline void expect_steps(const Result& r, const std::string& names, const std::string& what) {
    expect(r.error.empty() && r.names() == names,
           what + ": '" + r.names() + "' " + r.error + ", expected '" + names + "'");
}

}  // namespace lowering_checks
