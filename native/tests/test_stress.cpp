// Many threads on one plan and on one thread pool: what a thread sanitizer build checks.
//
//   test_stress [threads] [calls]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "../src/engine.hpp"

using namespace quantflow;

namespace {

// quantize → conv 3x3 + relu → conv 3x3 + residual + relu → dequantize, 8 channels.
const char* const kProgram = R"({
 "format": 1, "batch_is_dynamic": true,
 "inputs": [{"name": "x", "keyword": null, "dtype": "float32", "shape": [null, 8, 10, 10]}],
 "values": {"q": {"dtype": "int8", "scale": 0.02, "zero_point": 0, "is_nonnegative": false},
            "a": {"dtype": "int8", "scale": 0.05, "zero_point": 0, "is_nonnegative": true},
            "b": {"dtype": "int8", "scale": 0.07, "zero_point": 0, "is_nonnegative": true}},
 "nodes": [
  {"name": "quantize", "op": "quantize", "output": "q", "args": [{"value": "x"}]},
  {"name": "a", "op": "conv", "output": "a", "args": [{"value": "q"}, null], "epilogue": {"kind": "relu", "values": []},
   "attrs": {"weight": "w", "weight_scale": "s", "bias": "v", "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}},
  {"name": "b", "op": "conv", "output": "b", "args": [{"value": "a"}, {"value": "a"}], "epilogue": {"kind": "relu", "values": []},
   "attrs": {"weight": "w", "weight_scale": "s", "bias": "v", "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}},
  {"name": "dequantize", "op": "dequantize", "output": "y", "args": [{"value": "b"}]}],
 "output": {"value": "y"}})";

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 8;
    const int calls = argc > 2 ? std::atoi(argv[2]) : 200;
    std::vector<std::int8_t> weight(8 * 8 * 9);
    for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<std::int8_t>(i * 37 % 255 - 127);
    const std::vector<float> scale{0.002f}, bias(8, 0.1f);
    TensorTable tensors;
    tensors["w"] = {DType::s8, {8, 8, 3, 3}, reinterpret_cast<const std::byte*>(weight.data())};
    tensors["s"] = {DType::f32, {1}, reinterpret_cast<const std::byte*>(scale.data())};
    tensors["v"] = {DType::f32, {8}, reinterpret_cast<const std::byte*>(bias.data())};
    auto loaded = std::make_shared<LoadedProgram>();
    loaded->program = parse_program(kProgram, std::strlen(kProgram), std::move(tensors));
    const Program& program = loaded->program;
    auto engine = std::make_shared<Engine>(loaded, std::shared_ptr<Backend>(make_host_backend(3)));
    Section section;
    section.last = static_cast<int>(program.nodes.size());
    section.inputs = program.inputs;
    section.outputs = program.outputs;
    InputForm form;
    form.dims = {2, 8, 10, 10};
    Plan plan(engine, section, {form});

    constexpr std::size_t kValues = 2 * 8 * 10 * 10;
    constexpr int kInputs = 4;
    std::vector<std::vector<float>> inputs(kInputs, std::vector<float>(kValues)), expected = inputs;
    for (int i = 0; i < kInputs; ++i) {
        for (std::size_t j = 0; j < kValues; ++j)
            inputs[static_cast<std::size_t>(i)][j] = static_cast<float>((j * 7 + static_cast<std::size_t>(i) * 13) % 101) * 0.03f - 1.5f;
        const void* in[] = {inputs[static_cast<std::size_t>(i)].data()};
        void* out[] = {expected[static_cast<std::size_t>(i)].data()};
        plan.run(in, out);
    }
    // Null where something is asked for is refused, and the plan goes on.
    int refused = 0;
    const void* const no_input[] = {nullptr};
    void* const no_output[] = {nullptr};
    const void* const some[] = {inputs[0].data()};
    void* into[] = {expected[0].data()};
    using Given = std::pair<const void* const*, void* const*>;
    for (const auto& [in, out] : {Given{no_input, into}, Given{nullptr, into}, Given{some, no_output}, Given{some, nullptr}})
        try {
            plan.run(in, out);
        } catch (const Error&) {
            ++refused;
        }
    std::atomic<int> wrong{refused == 4 ? 0 : 1};
    std::vector<std::thread> all;
    for (int t = 0; t < threads; ++t)
        all.emplace_back([&, t] {
            std::vector<float> y(kValues);
            for (int c = 0; c < calls; ++c) {
                const auto i = static_cast<std::size_t>((t + c) % kInputs);
                const void* in[] = {inputs[i].data()};
                void* out[] = {y.data()};
                plan.run(in, out);
                if (y != expected[i]) wrong.fetch_add(1);
            }
        });
    for (auto& thread : all) thread.join();
    std::printf("%d threads x %d calls: %d wrong\n", threads, calls, wrong.load());
    return wrong.load() == 0 ? 0 : 1;
}
