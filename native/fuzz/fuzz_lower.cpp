#include <cstring>
#include <new>
#include <nlohmann/json.hpp>

#include "targets.hpp"

namespace quantflow::fuzz {
namespace {

// The inputs' forms, as far as the program says; sizes that vary are 2.
std::vector<InputForm> forms_of(const std::string& text, const Program& program) {
    std::vector<InputForm> forms;
    const nlohmann::json root = nlohmann::json::parse(text);
    const auto& inputs = root.at("inputs");
    for (std::size_t i = 0; i < program.inputs.size(); ++i) {
        InputForm form;
        form.dims = {2, 3, 8, 8};
        const Value& held = program.values[static_cast<std::size_t>(program.inputs[i])];
        if (held.q) form.dtype = held.is_signed ? DType::s8 : DType::u8;
        const auto& input = inputs.at(i);
        if (!held.q && input.contains("dtype") && input["dtype"].is_string()) {
            const auto word = input["dtype"].get<std::string>();
            form.dtype = word == "int64" ? DType::s64 : word == "bool" ? DType::b8 : word == "int32" ? DType::s32 : DType::f32;
        }
        if (input.contains("shape") && input["shape"].is_array() && input["shape"].size() <= kMaxRank) {
            form.dims.clear();
            for (const auto& size : input["shape"])
                form.dims.push_back(size.is_number_unsigned() ? static_cast<std::int64_t>(size.get<std::uint64_t>() % 65) : 2);
        }
        if (checked_count(form.dims) > 1 << 20) throw Error("more than the fuzzer takes");
        forms.push_back(form);
    }
    return forms;
}

}  // namespace

void fuzz_lower(const std::uint8_t* data, std::size_t size) {
    std::uint32_t length = 0;
    if (size < 4) return;
    std::memcpy(&length, data, 4);
    if (length > size - 4) return;
    // Tensors are aligned in a mapped file; copies of exact size let the sanitizer see every byte read outside.
    const std::vector<char> json(data + 4, data + 4 + length);
    auto loaded = std::make_shared<LoadedProgram>();
    const std::size_t rest = size - 4 - length;
    const std::unique_ptr<std::byte[]> weights(new std::byte[rest]);
    std::memcpy(weights.get(), data + 4 + length, rest);
    count("read");
    try {
        loaded->program = parse_program(json.data(), json.size(), parse_safetensors(weights.get(), rest));
        count("loaded");
        const std::string text(json.begin(), json.end());
        for (const Node& node : loaded->program.nodes) (void)is_supported(node);
        execute(loaded, forms_of(text, loaded->program), text);
    } catch (const Error&) {
        // A clear refusal is what bad input gets.
    } catch (const nlohmann::json::exception&) {
    } catch (const std::bad_alloc&) {
    }
}

}  // namespace quantflow::fuzz
