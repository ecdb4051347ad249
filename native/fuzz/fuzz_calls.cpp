#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <nlohmann/json.hpp>

#include "grammar.hpp"
#include "targets.hpp"

namespace quantflow::fuzz {
namespace {

// No op needs more than this for inputs of a few thousand elements, unless a program asks for it.
constexpr std::int64_t kMostBytes = std::int64_t{1} << 24;

std::vector<std::byte> filled(const InputForm& form, std::size_t number) {
    const std::int64_t count = checked_count(form.dims);
    std::vector<std::byte> bytes(static_cast<std::size_t>(count * size_of(form.dtype)) + 1);
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t k = i * 29 + static_cast<std::int64_t>(number);
        switch (form.dtype) {
            case DType::f32: {
                const float special[] = {std::numeric_limits<float>::infinity(), -1e30f, 0.0f, 1e-40f};
                const float value = k % 97 == 5 && number % 2 == 1 ? special[k % 4] : static_cast<float>(k % 17 - 8) / 4.0f;
                std::memcpy(&bytes[static_cast<std::size_t>(i) * 4], &value, 4);
                break;
            }
            case DType::s64: {
                const std::int64_t value = k % 7 - (k % 5 == 0 ? 4 : 0);
                std::memcpy(&bytes[static_cast<std::size_t>(i) * 8], &value, 8);
                break;
            }
            case DType::s32: {
                const auto value = static_cast<std::int32_t>(k % 7);
                std::memcpy(&bytes[static_cast<std::size_t>(i) * 4], &value, 4);
                break;
            }
            case DType::b8: bytes[static_cast<std::size_t>(i)] = std::byte{static_cast<unsigned char>(k % 3 != 0)}; break;
            default: bytes[static_cast<std::size_t>(i)] = static_cast<std::byte>(k % 251);
        }
    }
    return bytes;
}

struct Results {
    bool is_ordered = true;  // sums of floats are in one order, whatever the number of threads
    std::vector<OutputForm> forms;
    std::vector<std::vector<std::byte>> memory;
};

Results executed(const std::shared_ptr<LoadedProgram>& loaded, const std::vector<InputForm>& forms,
                 const std::shared_ptr<Backend>& backend, unsigned char fill, bool is_first,
                 const std::optional<Nearness>& nearness = std::nullopt) {
    const Program& program = loaded->program;
    filling = fill;
    Results results;
    Section section;
    section.last = static_cast<int>(program.nodes.size());
    section.inputs = program.inputs;
    section.outputs = program.outputs;
    auto engine = std::make_shared<Engine>(loaded, backend);
    engine->nearness = nearness;
    {
        // Looked at before anything is allocated: the fuzzer's own memory is small.
        const Lowered probe = lower(program, section, forms, *backend, engine->constants);
        if (is_first) count("lowered");
        if (probe.arena_bytes > kMostBytes || probe.kept_bytes > kMostBytes) throw Error("more than the fuzzer takes");
        for (const auto* steps : {&probe.once, &probe.steps})
            for (const NamedStep& s : *steps) {
                const std::string kernel = s.step->kernel();
                if (is_first) count("kernel " + kernel);
                // It cuts the batch into as many parts as there are threads, and few rows are summed otherwise than many.
                if (kernel.find("recurrence of host.sgemm") != std::string::npos) results.is_ordered = false;
            }
    }
    Plan plan(engine, section, forms);
    std::vector<std::vector<std::byte>> given;
    std::vector<const void*> inputs;
    for (std::size_t i = 0; i < forms.size(); ++i) given.push_back(filled(forms[i], i));
    for (std::size_t i = 0; i < forms.size(); ++i) {
        // Exactly as long as they are: the sanitizer sees the first byte that is read behind them.
        const std::size_t bytes = given[i].size() - 1;
        void* const own = std::malloc(std::max<std::size_t>(bytes, 1));
        std::memcpy(own, given[i].data(), bytes);
        inputs.push_back(forms[i].is_number ? nullptr : own);
        if (forms[i].is_number) std::free(own);
    }
    if (plan.runs_in_parts()) count("in parts");
    if (plan.joins_lines()) count("by lines");
    results.forms = plan.outputs();
    std::vector<void*> outputs;
    bool is_small = true;
    for (const OutputForm& out : results.forms) {
        const std::int64_t bytes = out.is_number ? 0 : checked_count(out.dims) * size_of(out.dtype);
        is_small = is_small && bytes <= kMostBytes;
        results.memory.emplace_back(static_cast<std::size_t>(is_small ? bytes : 0), static_cast<std::byte>(fill));
        outputs.push_back(results.memory.back().data());
    }
    const auto free_all = [&] {
        for (const void* memory : inputs) std::free(const_cast<void*>(memory));
    };
    try {
        if (!is_small) throw Error("more than the fuzzer takes");
        plan.run(inputs.data(), outputs.data());
        plan.run(inputs.data(), outputs.data());  // over what the first run left behind
    } catch (...) {
        free_all();
        throw;
    }
    free_all();
    return results;
}

// To the bit, but for the payload of NaN.
bool agree(const Results& a, const Results& b) {
    if (a.memory.size() != b.memory.size()) return false;
    for (std::size_t i = 0; i < a.memory.size(); ++i) {
        if (a.memory[i].size() != b.memory[i].size() || a.forms[i].dims != b.forms[i].dims || a.forms[i].number != b.forms[i].number)
            return false;
        if (a.forms[i].dtype != DType::f32) {
            if (a.memory[i] != b.memory[i]) return false;
            continue;
        }
        for (std::size_t at = 0; at < a.memory[i].size(); at += 4) {
            float x = 0, y = 0;
            std::memcpy(&x, &a.memory[i][at], 4), std::memcpy(&y, &b.memory[i][at], 4);
            if (x == y || (std::isnan(x) && std::isnan(y))) continue;
            std::fprintf(stderr, "output %zu, element %zu: %.9g and %.9g\n", i, at / 4, static_cast<double>(x), static_cast<double>(y));
            return false;
        }
    }
    return true;
}

}  // namespace

unsigned char filling = 0;

std::shared_ptr<Backend> backend_of(int threads) {
    static const std::shared_ptr<Backend> one(make_host_backend(1)), four(make_host_backend(4)),
        eight(make_host_backend(8));
    return threads == 1 ? one : threads == 4 ? four : eight;
}

void execute(std::shared_ptr<LoadedProgram> loaded, const std::vector<InputForm>& forms, const std::string& text) {
    const Results alone = executed(loaded, forms, backend_of(1), 0x7f, true);
    const Results again = executed(loaded, forms, backend_of(1), 0xff, false);
    const Results together = executed(loaded, forms, backend_of(4), 0x7f, false);
    Nearness forced;
    forced.least_samples = 1;
    forced.far_byte_ns = forced.hand_over_ns = forced.waiting = 1e6;
    if (!forms.empty() && !forms[0].dims.empty() && forms[0].dims[0] % 2 == 0) forced.threads = 2;
    // Of many threads, those without a part help the others.
    const Results in_parts = executed(loaded, forms, backend_of(8), 0x7f, false, forced);
    Nearness lines;
    lines.threads = 4;
    lines.least_samples = 1 << 20;
    lines.last_task = -1e6;
    const Results by_lines = executed(loaded, forms, backend_of(4), 0x7f, false, lines);
    count("executed");
    for (const Node& n : loaded->program.nodes) count("op " + (n.target.empty() ? "int8" : n.target));
    const bool is_same = agree(alone, again);
    const bool is_shared = !alone.is_ordered || agree(alone, together);
    const bool is_in_parts = !alone.is_ordered || agree(alone, in_parts);
    if (is_same && is_shared && is_in_parts && (!alone.is_ordered || agree(alone, by_lines))) return;
    std::fprintf(stderr, "%s gives other results:\n%s\n",
                 !is_same       ? "memory of other contents"
                 : !is_shared   ? "another number of threads"
                 : !is_in_parts ? "the batch in parts"
                                : "steps together on lines",
                 text.c_str());
    std::abort();
}

void fuzz_calls(const std::uint8_t* data, std::size_t size) {
    Choices choices(data, size);
    count("built");
    try {
        filling = 0x7f;
        const Grammar grammar(choices, *backend_of(1));
        const std::string text = grammar.text();
        auto loaded = std::make_shared<LoadedProgram>();
        loaded->program = parse_program(text.data(), text.size(), grammar.tensors());
        count("valid");
        execute(loaded, grammar.inputs(), text);
    } catch (const Error&) {
        // A clear refusal is what bad programs get.
    } catch (const std::bad_alloc&) {
    }
}

std::string written(const std::uint8_t* data, std::size_t size) {
    Choices choices(data, size);
    const Grammar grammar(choices, *backend_of(1));
    const std::string text = grammar.text();
    static const char* const types[] = {"F32", "U8", "I8", "I32", "I64", "BOOL"};
    // Those of wide elements first, so that all are aligned without gaps, which safetensors does not take.
    std::vector<std::pair<std::string, Stored>> used;
    for (const auto& [name, tensor] : grammar.tensors())
        if (text.find('"' + name + '"') != std::string::npos) used.emplace_back(name, tensor);
    std::sort(used.begin(), used.end(), [](const auto& a, const auto& b) {
        const std::int64_t x = size_of(a.second.dtype), y = size_of(b.second.dtype);
        return x != y ? x > y : a.first < b.first;
    });
    nlohmann::json header = nlohmann::json::object();
    std::string bytes;
    for (const auto& [name, tensor] : used) {
        const std::size_t from = bytes.size();
        bytes.append(reinterpret_cast<const char*>(tensor.data), static_cast<std::size_t>(tensor.count() * size_of(tensor.dtype)));
        header[name] = {{"dtype", types[static_cast<int>(tensor.dtype)]}, {"shape", tensor.dims}, {"data_offsets", {from, bytes.size()}}};
    }
    std::string head = header.dump();
    head.append((8 - head.size() % 8) % 8, ' ');
    const auto little = [](std::uint64_t number, int count) {
        std::string out;
        for (int i = 0; i < count; ++i) out.push_back(static_cast<char>(number >> (8 * i)));
        return out;
    };
    return little(text.size(), 4) + text + little(head.size(), 8) + head + bytes;
}

}  // namespace quantflow::fuzz
