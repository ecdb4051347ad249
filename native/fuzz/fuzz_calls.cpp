// libFuzzer target: programs built from the table's grammar, lowered and executed on small inputs.
//
// Every byte of the input is a choice: an op of the table, and for each of its arguments a value of its type, of another
// type, or none. So most programs are valid or nearly so, which random bytes of JSON never are. What computes is computed
// twice, on one thread and on four: the results must be the same to the bit.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "../src/engine.hpp"
#include "../src/lowering/ops/registry.hpp"
#include "../src/op_table.hpp"

using namespace quantflow;

namespace {

class Choices {
public:
    Choices(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
    unsigned next(unsigned count) {
        if (count == 0) return 0;
        unsigned value = 0;
        for (int i = 0; i < (count > 256 ? 2 : 1); ++i) value = value << 8 | (at_ < size_ ? data_[at_++] : 0);
        return value % count;
    }
    bool is_rare() { return next(64) == 63; }
    bool is_over() const { return at_ >= size_; }

private:
    const std::uint8_t* data_;
    std::size_t size_, at_ = 0;
};

const char* const kNumbers[] = {"0",  "1",  "2",  "3",          "-1",         "-2",   "4",
                                "6",  "8",  "16", "1048576",    "4294967296", "0.5",  "-0.25",
                                "1e30", "true", "false", "9223372036854775807", "-9223372036854775808"};
const char* const kSmall[] = {"1", "2", "3", "0", "4", "-1", "6", "-2"};
const char* const kTensors[] = {"w4", "w44", "conv", "conv1", "one", "scalar", "table", "ids", "mask", "small", "w66"};

std::string tensor(const char* name) { return std::string("{\"tensor\":\"") + name + "\"}"; }

std::string of_kind(Choices& c, const TableArgument& a, const std::vector<std::string>& values) {
    const auto any_tensor = [&] {
        return c.next(3) != 0 ? "{\"value\":\"" + values[c.next(static_cast<unsigned>(values.size()))] + "\"}"
                              : tensor(kTensors[c.next(std::size(kTensors))]);
    };
    switch (a.kind) {
        case Kind::tensor:
        case Kind::operand: return c.is_rare() ? "2.5" : any_tensor();
        case Kind::integer: return c.is_rare() ? kNumbers[c.next(std::size(kNumbers))] : kSmall[c.next(8)];
        case Kind::real:
        case Kind::number: return kNumbers[c.next(std::size(kNumbers))];
        case Kind::flag: return c.next(2) != 0 ? "true" : "false";
        case Kind::text: return c.next(2) != 0 ? "\"constant\"" : "\"none\"";
        case Kind::dtype: {
            const char* const names[] = {"float32", "int64", "int32", "bool", "float64"};
            return std::string("{\"dtype\":\"") + names[c.next(5)] + "\"}";
        }
        case Kind::layout: return "{\"layout\":\"strided\"}";
        case Kind::device: return "{\"device\":\"cpu\"}";
        case Kind::memory_format: return "{\"memory_format\":\"contiguous_format\"}";
        case Kind::none: return "null";
    }
    return "null";
}

std::string argument(Choices& c, const TableArgument& a, const std::vector<std::string>& values) {
    if (c.is_rare()) {  // of another type
        TableArgument other;
        other.kind = static_cast<Kind>(c.next(11));
        return of_kind(c, other, values);
    }
    if (a.takes_none && c.next(3) == 0) return "null";
    if (!a.is_list) return of_kind(c, a, values);
    const unsigned count = a.length > 1 && !c.is_rare() ? static_cast<unsigned>(a.length) : c.next(5);
    std::string text = "[";
    for (unsigned i = 0; i < count; ++i) text += (i > 0 ? "," : "") + of_kind(c, a, values);
    return text + "]";
}

// The ops that are lowered here, in the table's order.
const std::vector<std::string>& lowered() {
    static const std::vector<std::string> targets = [] {
        std::vector<std::string> found;
        for (const std::string& target : table_targets())
            if (lowering::op_table().count(target.substr(0, target.find('.'))) > 0) found.push_back(target);
        return found;
    }();
    return targets;
}

std::string program_of(Choices& c) {
    std::vector<std::string> values = {"x"};
    std::string nodes;
    const bool is_coded = c.next(3) == 0;
    std::string coded;
    if (is_coded) {
        nodes = R"({"name":"q","op":"quantize","output":"q","args":[{"value":"x"}]})";
        coded = R"("q":{"dtype":"int8","scale":0.05,"zero_point":0,"is_nonnegative":false})";
    }
    for (int i = 0, count = 1 + static_cast<int>(c.next(4)); i < count && !c.is_over(); ++i) {
        const std::string output = "v" + std::to_string(i);
        std::string node;
        if (is_coded && c.next(4) == 0) {
            const char* const kinds[] = {"conv", "linear", "dequantize"};
            const char* const kind = kinds[c.next(3)];
            node = std::string(R"({"name":"n","op":")") + kind + R"(","output":")" + output + R"(","args":[{"value":"q"})";
            if (std::strcmp(kind, "dequantize") != 0) node += ",null";
            node += R"(],"attrs":{"weight":")" + std::string(std::strcmp(kind, "conv") == 0 ? "conv8" : "codes") +
                    R"(","weight_scale":"scale","bias":null,"stride":[1,1],"padding":[1,1],"dilation":[1,1],"groups":1}})";
        } else {
            const TableRow& row = *table_row(lowered()[c.next(static_cast<unsigned>(lowered().size()))]);
            node = R"({"name":"n","op":"aten","target":")" + row.target + R"(","output":")" + output + R"(","args":[)";
            std::string kwargs;
            bool is_first = true;
            for (const TableArgument& a : row.arguments) {
                if (a.is_optional && c.next(2) == 0) {
                    if (!a.is_keyword) break;
                    continue;
                }
                if (c.is_rare()) continue;  // missing
                const std::string text = argument(c, a, values);
                if (a.is_keyword || c.is_rare()) {
                    kwargs += (kwargs.empty() ? "\"" : ",\"") + a.name + "\":" + text;
                } else {
                    node += (is_first ? "" : ",") + text;
                    is_first = false;
                }
            }
            node += "],\"kwargs\":{" + kwargs + "}}";
        }
        nodes += (nodes.empty() ? "" : ",") + node;
        values.push_back(output);
    }
    return R"({"format":1,"batch_is_dynamic":true,"inputs":[{"name":"x"}],"values":{)" + coded + R"(},"nodes":[)" + nodes +
           R"(],"output":{"value":")" + values.back() + R"("}})";
}

template <class T>
Stored stored(std::vector<std::vector<T>>& keep, DType dtype, std::vector<std::int64_t> dims, T value) {
    Stored s;
    s.dtype = dtype;
    s.dims = std::move(dims);
    keep.emplace_back(static_cast<std::size_t>(checked_count(s.dims)));
    for (std::size_t i = 0; i < keep.back().size(); ++i) keep.back()[i] = static_cast<T>(i % 3 == 0 ? value : T(i % 5));
    s.data = reinterpret_cast<const std::byte*>(keep.back().data());
    return s;
}

TensorTable tensors() {
    static std::vector<std::vector<float>> floats;
    static std::vector<std::vector<std::int64_t>> longs;
    static std::vector<std::vector<std::int32_t>> ints;
    static std::vector<std::vector<std::int8_t>> bytes;
    static std::vector<std::vector<std::uint8_t>> flags;
    static const TensorTable table = [] {
        TensorTable t;
        for (auto* list : {&floats}) list->reserve(64);
        longs.reserve(8), ints.reserve(8), bytes.reserve(8), flags.reserve(8);
        const std::map<std::string, std::vector<std::int64_t>> shapes = {
            {"w4", {4}}, {"w44", {4, 4}}, {"conv", {4, 4, 3, 3}}, {"conv1", {4, 4, 3}}, {"one", {1}}, {"scalar", {}},
            {"table", {10, 4}}, {"w66", {6, 6}}};
        for (const auto& [name, dims] : shapes) t.emplace(name, stored<float>(floats, DType::f32, dims, 0.5f));
        t.emplace("scale", stored<float>(floats, DType::f32, {1}, 1.0f));
        t.emplace("ids", stored<std::int64_t>(longs, DType::s64, {6}, 2));
        t.emplace("small", stored<std::int32_t>(ints, DType::s32, {6}, 1));
        t.emplace("codes", stored<std::int8_t>(bytes, DType::s8, {6, 6}, 3));
        t.emplace("conv8", stored<std::int8_t>(bytes, DType::s8, {4, 4, 3, 3}, 1));
        std::vector<std::uint8_t> mask(6, 1);
        flags.push_back(mask);
        Stored m;
        m.dtype = DType::b8;
        m.dims = {6};
        m.data = reinterpret_cast<const std::byte*>(flags.back().data());
        t.emplace("mask", m);
        return t;
    }();
    return table;
}

struct Counts {
    std::map<std::string, long> computed, kernels;
    long programs = 0, ran = 0;
    ~Counts() {
        std::fprintf(stderr, "%ld programs, %ld executed; ops of %zu lowered, of %zu kernels\n", programs, ran,
                     computed.size(), kernels.size());
        if (std::getenv("QUANTFLOW_FUZZ_COUNTS") == nullptr) return;
        for (const auto& [name, count] : computed) std::fprintf(stderr, "  op %s %ld\n", name.c_str(), count);
        for (const auto& [name, count] : kernels) std::fprintf(stderr, "  kernel %s %ld\n", name.c_str(), count);
    }
};
Counts counts;

// No op below needs more than this for inputs of 288 elements, unless a program asks for it.
constexpr std::int64_t kMostBytes = std::int64_t{1} << 26;

std::vector<std::vector<std::byte>> executed(const std::shared_ptr<LoadedProgram>& loaded,
                                             const std::shared_ptr<Backend>& backend) {
    const Program& program = loaded->program;
    Section section;
    section.last = static_cast<int>(program.nodes.size());
    section.inputs = program.inputs;
    section.outputs = program.outputs;
    InputForm form;
    form.dims = {2, 4, 6, 6};
    auto engine = std::make_shared<Engine>(loaded, backend);
    {
        // Looked at before anything is allocated: the fuzzer's own memory is small.
        const Lowered probe = lower(program, section, {form}, *backend, engine->constants);
        if (probe.arena_bytes > kMostBytes) throw Error("more than the fuzzer takes");
        for (const NamedStep& s : probe.steps) ++counts.kernels[s.step->kernel()];
    }
    Plan plan(engine, section, {form});
    std::vector<float> x(2 * 4 * 6 * 6);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(static_cast<int>(i % 17) - 8) / 4.0f;
    std::vector<std::vector<std::byte>> memory;
    std::vector<void*> outputs;
    for (const OutputForm& out : plan.outputs()) {
        const std::int64_t bytes = out.is_number ? 1 : checked_count(out.dims) * size_of(out.dtype);
        if (bytes > kMostBytes) throw Error("more than the fuzzer takes");
        memory.emplace_back(static_cast<std::size_t>(bytes));
        outputs.push_back(memory.back().data());
    }
    const void* inputs[] = {x.data()};
    plan.run(inputs, outputs.data());
    return memory;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const std::shared_ptr<Backend> one(make_host_backend(1)), four(make_host_backend(4));
    Choices choices(data, size);
    const std::string text = program_of(choices);
    ++counts.programs;
    try {
        auto loaded = std::make_shared<LoadedProgram>();
        loaded->program = parse_program(text.data(), text.size(), tensors());
        const auto alone = executed(loaded, one), together = executed(loaded, four);
        ++counts.ran;
        for (const Node& n : loaded->program.nodes) ++counts.computed[n.target.empty() ? "int8" : n.target];
        if (alone != together) {
            std::fprintf(stderr, "one thread and four give other results:\n%s\n", text.c_str());
            std::abort();
        }
    } catch (const Error&) {
        // A clear refusal is what bad programs get.
    } catch (const std::bad_alloc&) {
    }
    return 0;
}
