// libFuzzer target: the program loader, and with QUANTFLOW_FUZZ_LOWER also the lowering of what it lets through.
//
// Input: 4 bytes (little endian) length of program.json, program.json, then weights.safetensors.
#include <cstdint>
#include <cstring>
#include <vector>

#include "../src/engine.hpp"

using namespace quantflow;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    std::uint32_t length = 0;
    if (size < 4) return 0;
    std::memcpy(&length, data, 4);
    if (length > size - 4) return 0;
    // Tensors are aligned in a mapped file; copies of exact size let the sanitizer see every byte read outside.
    const std::vector<char> json(data + 4, data + 4 + length);
    const std::vector<std::byte> weights(reinterpret_cast<const std::byte*>(data) + 4 + length,
                                         reinterpret_cast<const std::byte*>(data) + size);
    try {
        auto loaded = std::make_shared<LoadedProgram>();
        loaded->program = parse_program(json.data(), json.size(), parse_safetensors(weights.data(), weights.size()));
        for (const Node& node : loaded->program.nodes) (void)is_supported(node);
#ifdef QUANTFLOW_FUZZ_LOWER
        const Program& program = loaded->program;
        Section section;
        section.last = static_cast<int>(program.nodes.size());
        section.inputs = program.inputs;
        section.outputs = program.outputs;
        std::vector<InputForm> forms(program.inputs.size());
        for (InputForm& form : forms) form.dims = {2, 3, 8, 8};
        static std::shared_ptr<Backend> backend(make_host_backend(1));
        Engine engine(loaded, backend);
        const Lowered lowered = lower(program, section, forms, *backend, engine.constants);
        (void)lowered;
#endif
    } catch (const Error&) {
        // A clear refusal is what bad input gets.
    }
    return 0;
}
