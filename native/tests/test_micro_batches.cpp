// Plans that take their batch in parts, or several steps line by line, give what they give at once, to the bit; and which
// steps may do so.
#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "../src/engine.hpp"
#include "../src/micro_batches.hpp"
#include "lowering_checks.hpp"

using namespace lowering_checks;

namespace {

const QParams kQ = codes(0.05f, 3);

// Parts whatever the sizes are.
Nearness eager(int threads) {
    Nearness n;
    n.threads = threads;
    n.least_samples = 1;
    n.far_byte_ns = n.hand_over_ns = n.waiting = 1e6;
    return n;
}

struct Case {
    Build build;
    std::vector<InputForm> forms;
    std::vector<int> outputs;
};

struct Ran {
    bool is_in_parts = false, joins_lines = false;
    Int arena_bytes = 0;
    std::vector<std::vector<std::byte>> outputs;
    std::string error;
};

Ran ran(const Case& c, int threads, const std::optional<Nearness>& nearness, int callers = 1, bool is_tuned = false) {
    auto loaded = std::make_shared<LoadedProgram>();
    loaded->program = c.build.program;
    auto engine = std::make_shared<Engine>(loaded, std::shared_ptr<Backend>(make_host_backend(threads)));
    engine->nearness = nearness;
    Section section;
    section.last = static_cast<int>(c.build.program.nodes.size());
    section.inputs = c.build.program.inputs;
    section.outputs = c.outputs;
    Ran result;
    try {
        Plan plan(engine, section, c.forms);
        result.is_in_parts = plan.runs_in_parts();
        result.joins_lines = plan.joins_lines();
        result.arena_bytes = plan.arena_bytes();
        std::vector<std::vector<float>> given;
        std::vector<const void*> inputs;
        for (const InputForm& f : c.forms) {
            std::vector<float> x(static_cast<std::size_t>(checked_count(f.dims)));
            for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 37 % 101) * 0.13f - 6.0f;
            given.push_back(std::move(x));
        }
        for (const auto& x : given) inputs.push_back(x.data());
        if (is_tuned) {
            std::vector<std::vector<std::byte>> anything;
            std::vector<void*> outputs;
            for (const OutputForm& f : plan.outputs()) {
                anything.emplace_back(static_cast<std::size_t>(checked_count(f.dims) * size_of(f.dtype)));
                outputs.push_back(anything.back().data());
            }
            Tuning tuning;
            tuning.margin = 10;
            const std::vector<Tried> tried = plan.tune(inputs.data(), outputs.data(), tuning);
            expect(!nearness || nearness->last_task > 0 ||
                       std::any_of(tried.begin(), tried.end(),
                                   [](const Tried& t) { return t.kernel == "host.lines" && t.ways.size() == 2; }),
                   "lines together and apart are tried");
        }
        std::vector<std::vector<std::vector<std::byte>>> all(static_cast<std::size_t>(callers));
        std::vector<std::thread> others;
        const auto call = [&](std::size_t caller) {
            std::vector<void*> outputs;
            for (const OutputForm& f : plan.outputs()) {
                all[caller].emplace_back(static_cast<std::size_t>(checked_count(f.dims) * size_of(f.dtype)), std::byte{0x7f});
                outputs.push_back(all[caller].back().data());
            }
            for (int i = 0; i < 3; ++i) plan.run(inputs.data(), outputs.data());
        };
        for (std::size_t i = 1; i < all.size(); ++i) others.emplace_back(call, i);
        call(0);
        for (auto& t : others) t.join();
        for (const auto& each : all) expect(each == all[0], "all callers get the same");
        result.outputs = all[0];
    } catch (const Error& error) {
        result.error = error.what();
    }
    return result;
}

Nearness never() {
    Nearness n;
    n.least_samples = 1 << 20;
    return n;
}

enum class Parts { some, none, any };

// In parts on 1 to 3 threads, or not at all, the results are the same.
void expect_same(const std::string& what, const Case& c, Parts expected) {
    const Ran whole = ran(c, 1, never());
    expect(whole.error.empty() && !whole.is_in_parts, what + ": runs " + whole.error);
    for (int threads = 1; threads <= 3; ++threads) {
        const Ran parts = ran(c, threads, eager(threads), threads);
        const std::string which = what + " on " + std::to_string(threads) + " threads";
        if (expected != Parts::any)
            expect(parts.is_in_parts == (expected == Parts::some),
                   which + (parts.is_in_parts ? ": no step" : ": some steps") + " should run in parts");
        expect(parts.outputs == whole.outputs, which + ": the same results " + parts.error);
    }
}

Node& padded_conv(Build& b, int x, Int in, Int out, Int kernel, const Arg& residual, bool is_depthwise = false) {
    Node& n = b.product(x, is_depthwise ? 1 : in, out, kernel, residual, kQ);
    n.geometry.padding = {kernel / 2, kernel / 2};
    n.geometry.groups = is_depthwise ? in : 1;
    return n;
}

void convolutions() {
    // Stem, pool, a residual block, a depthwise layer, channels put side by side; then a mean and a linear layer.
    for (const Int batch : {2, 6, 7, 24}) {
        Case c;
        Build& b = c.build;
        const int x = b.quantize(b.input(), kQ);
        const int stem = padded_conv(b, x, 3, 16, 3, None{}).output;
        const int pooled = b.node(Op::max_pool, "max_pool2d.default", {Ref{stem}, list({2, 2}), list({2, 2})}, kQ).output;
        const int inner = padded_conv(b, pooled, 16, 16, 3, None{}).output;
        const int block = padded_conv(b, inner, 16, 16, 1, Ref{pooled}).output;
        const int deep = padded_conv(b, block, 16, 16, 3, None{}, true).output;
        const int both = b.node(Op::cat, "cat.default", {Args{Ref{deep}, Ref{block}}, Int{1}}, kQ).output;
        const int last = padded_conv(b, both, 32, 8, 1, None{}).output;
        const int mean = b.aten("mean.dim", {Ref{b.dequantize(last)}, list({2, 3})});
        c.outputs = {mean, b.dequantize(inner)};  // one from inside leaves too
        c.forms = {form({batch, 3, 18, 14})};
        const bool is_even = batch % 2 == 0 && batch % 3 == 0;
        const std::string what = "convolutions of " + std::to_string(batch);
        if (is_even) {
            expect_same(what, c, Parts::some);
            const Ran whole = ran(c, 1, never());
            expect(ran(c, 1, eager(1)).arena_bytes < whole.arena_bytes, what + ": less memory");
            if (batch % 8 == 0) {  // threads that are done help the others with what their steps divide
                const Ran helped = ran(c, 8, eager(8), 2);
                expect(helped.is_in_parts && helped.outputs == whole.outputs, what + " on 8 threads: the same results");
            }
        } else {
            const Ran whole = ran(c, 1, never());
            expect(whole.error.empty() && ran(c, 1, eager(1)).outputs == whole.outputs, what + ": the same " + whole.error);
            expect(!ran(c, 4, eager(4)).is_in_parts, what + ": threads without a sample of their own work together");
        }
    }
}

// exp, then what `mix` makes of it, then neg.
template <class Mix>
Case around(const Dims& dims, const Mix& mix) {
    Case c;
    const int x = c.build.aten("neg.default", {Ref{c.build.input()}});
    const int y = c.build.aten("neg.default", {Ref{mix(c.build, c.build.aten("exp.default", {Ref{x}}))}});
    c.outputs = {y};
    c.forms = {form(dims)};
    return c;
}

void what_joins_samples() {
    const auto with = [](const char* target, Args more) {
        return [target, more](Build& b, int x) {
            Args args = {Ref{x}};
            args.insert(args.end(), more.begin(), more.end());
            return b.aten(target, args);
        };
    };
    // Around it, the rest may still run in parts.
    expect_same("a mean over samples", around({6, 5, 4}, with("mean.dim", {list({0}), true})), Parts::some);
    expect_same("a softmax over samples", around({6, 5, 4}, with("softmax.int", {Int{0}})), Parts::some);
    expect_same("samples rolled on", around({6, 5, 4}, with("roll.default", {list({1}), list({0})})), Parts::any);
    expect_same("another dimension first", around({6, 5, 4}, with("permute.default", {list({1, 0, 2})})), Parts::any);
    expect_same("as many in another dimension", around({6, 6, 6}, with("permute.default", {list({1, 0, 2})})), Parts::any);
    expect_same("samples taken together", around({6, 5, 4}, with("reshape.default", {list({2, 15, 4})})), Parts::any);
    expect_same("some of the samples", around({6, 5, 4}, with("slice.Tensor", {Int{0}, Int{1}, Int{5}})), Parts::any);
    const auto twice = [](Build& b, int x) { return b.aten("cat.default", {Args{Ref{x}, Ref{x}}, Int{0}}); };
    expect_same("the batch twice", around({6, 5, 4}, twice), Parts::any);
    const auto numbered = [](Build& b, int x) {
        const int numbers = b.aten("arange.default", {Int{6}});
        return b.aten("mul.Tensor", {Ref{x}, Ref{b.aten("reshape.default", {Ref{numbers}, list({6, 1, 1})})}});
    };
    expect_same("a number for each sample", around({6, 5, 4}, numbered), Parts::any);
    // What belongs to one sample.
    expect_same("a softmax within samples", around({6, 5, 4}, with("softmax.int", {Int{2}})), Parts::some);
    expect_same("rows taken together", around({6, 5, 4}, with("reshape.default", {list({-1, 4})})), Parts::some);
    // For one sample these are views, and there is a step less.
    const auto moved = [](Build& b, int x) {
        const int turned = b.aten("permute.default", {Ref{x}, list({1, 0, 2})});
        const int flat = b.aten("neg.default", {Ref{b.aten("reshape.default", {Ref{turned}, list({5, -1})})}});
        return b.aten("permute.default", {Ref{b.aten("reshape.default", {Ref{flat}, list({5, -1, 4})})}, list({1, 0, 2})});
    };
    expect_same("a copy that one sample doesn't need", around({6, 5, 4}, moved), Parts::some);
    // A number that depends on how many samples there are.
    const auto by_size = [](Build& b, int x) {
        return b.aten("div.Tensor", {Ref{x}, Ref{b.node(Op::size, "sym_size.int", {Ref{x}, Int{0}}).output}});
    };
    expect_same("a mean by hand", around({6, 5, 4}, by_size), Parts::none);
}

// Steps together on lines wherever they may.
Nearness by_lines(int threads) {
    Nearness n = never();
    n.threads = threads;
    n.hand_over_ns = 1e6;
    n.last_task = -1e9;
    return n;
}

Node& mixed(Node& n) {
    static const std::vector<std::int8_t> weights = [] {
        std::vector<std::int8_t> w(1 << 16);
        for (std::size_t i = 0; i < w.size(); ++i) w[i] = static_cast<std::int8_t>(i * i * 31 % 251 - 125);
        return w;
    }();
    static const float scale = 0.002f;
    n.weights.codes = weights.data();
    n.weights.scale = &scale;
    return n;
}

int strided(Node& n) {
    n.geometry.stride = {2, 2};
    return mixed(n).output;
}

void expect_lines(const std::string& what, const Case& c, bool joins) {
    const Ran whole = ran(c, 1, never());
    expect(whole.error.empty() && !whole.joins_lines, what + ": runs " + whole.error);
    for (const int threads : {2, 3, 8}) {
        const Ran lines = ran(c, threads, by_lines(threads), 2);
        const std::string which = what + " on " + std::to_string(threads) + " threads";
        expect(lines.joins_lines == joins, which + (joins ? ": some" : ": no") + " steps should run together");
        expect(lines.outputs == whole.outputs, which + ": the same results " + lines.error);
        if (joins) expect(ran(c, threads, by_lines(threads), 1, true).outputs == whole.outputs, which + ": the same, tuned");
    }
}

// Whoever reads lines of a step before it that others may not have computed yet, or that others write over, gives another
// result than step by step.
void lines_together() {
    for (const Int batch : {1, 3})
        for (const auto& [height, width] : std::vector<std::pair<Int, Int>>{{19, 14}, {2, 5}, {33, 1}}) {
            Case c;
            Build& b = c.build;
            int x = mixed(padded_conv(b, b.quantize(b.input(), kQ), 3, 40, 3, None{})).output;
            for (int block = 0; block < 2; ++block) {
                const int narrow = mixed(padded_conv(b, x, 40, 24, 1, None{})).output;
                const int windows = mixed(padded_conv(b, narrow, 24, 24, 3, None{})).output;
                x = mixed(padded_conv(b, windows, 24, 40, 1, Ref{x})).output;
            }
            const int around = mixed(padded_conv(b, x, 40, 24, 3, None{})).output;
            x = mixed(padded_conv(b, around, 24, 40, 1, Ref{x})).output;  // in place of what the windows read
            const int half = strided(padded_conv(b, x, 40, 24, 3, None{}));
            const int aside = mixed(padded_conv(b, x, 40, 8, 1, None{})).output;  // as many lines as before the stride
            const int wide = mixed(padded_conv(b, half, 24, 72, 1, None{})).output;
            x = strided(b.product(x, 40, 72, 1, Ref{wide}, kQ));  // reads all of what came before the stride
            const int wider = mixed(padded_conv(b, x, 72, 96, 1, None{})).output;
            const int deep = mixed(padded_conv(b, wider, 96, 96, 3, None{}, true)).output;
            const int joined = mixed(padded_conv(b, deep, 96, 72, 1, Ref{x})).output;
            const int both = b.node(Op::cat, "cat.default", {Args{Ref{joined}, Ref{x}}, Int{1}}, kQ).output;
            const int last = mixed(padded_conv(b, both, 144, 8, 1, None{})).output;
            c.outputs = {b.dequantize(last), b.dequantize(deep), b.dequantize(aside)};
            c.forms = {form({batch, 3, height, width})};
            const std::string size = std::to_string(height) + " x " + std::to_string(width);
            expect_lines("lines of " + std::to_string(batch) + " x " + size, c, true);
        }
    for (const Int rows : {7, 50}) {
        Case c;
        Build& b = c.build;
        const int x = mixed(b.product(b.quantize(b.input(), kQ), 30, 64, 0, None{}, kQ)).output;
        const int hidden = mixed(b.product(x, 64, 200, 0, None{}, kQ)).output;
        c.outputs = {b.dequantize(mixed(b.product(hidden, 200, 64, 0, Ref{x}, kQ)).output)};
        c.forms = {form({rows, 30})};
        expect_lines("rows of " + std::to_string(rows), c, true);
    }
    // Nothing but neighbours that read each other's lines around them.
    Case c;
    int x = c.build.quantize(c.build.input(), kQ);
    for (const Int in : {3, 16, 16}) x = mixed(padded_conv(c.build, x, in, 16, 3, None{})).output;
    c.outputs = {c.build.dequantize(x)};
    c.forms = {form({1, 3, 20, 20})};
    expect_lines("windows after windows", c, false);
}

}  // namespace

int main() {
    convolutions();
    lines_together();
    what_joins_samples();
    return report("micro batches");
}
