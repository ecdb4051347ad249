// What the loader refuses before anything is built: texts that two readers could take for different things.
#include <string>

#include "../src/program.hpp"
#include "check.hpp"

using namespace check;

namespace {

std::string refusal(const std::function<void()>& load) {
    try {
        load();
    } catch (const Error& error) {
        return error.what();
    }
    return "nothing";
}

std::string tensors_refusal(const std::string& header) {
    std::string text(8, '\0');
    const std::uint64_t length = header.size();
    std::memcpy(text.data(), &length, 8);
    text += header + std::string(16, '\0');
    GuardedMemory memory(static_cast<Int>(text.size()), true);
    std::memcpy(memory.data, text.data(), text.size());
    return refusal([&] { parse_safetensors(memory.data, text.size()); });
}

void expect_refusal(const std::string& found, const std::string& expected) {
    ++values;
    if (found != expected) fail("refuses '" + found + "', must refuse '" + expected + "'");
}

void headers() {
    const std::string a = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
    const std::string later = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]})";
    const std::string where = "weights.safetensors: its header";
    expect_refusal(tensors_refusal("{" + a + "}"), "nothing");
    expect_refusal(tensors_refusal("{" + a + "," + later + "}"), where + " gives key \"a\" twice");
    expect_refusal(tensors_refusal("{" + a + "," + later.substr(0, 1) + "\\u0061" + later.substr(2) + "}"),
                   where + " gives key \"a\" twice");
    expect_refusal(tensors_refusal(R"({"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}})"),
                   where + " gives key \"dtype\" twice");
    expect_refusal(tensors_refusal(R"({"__metadata__":{"k":"1","k":"2"}})"), where + " gives key \"k\" twice");
    expect_refusal(tensors_refusal("{" + a + R"(,"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})"), "nothing");
    expect_refusal(tensors_refusal(R"({"a":[[[[[[]]]]]]})"), where + " is nested too deep");
}

void programs() {
    const auto found = [](const std::string& text) {
        return refusal([&] { parse_program(text.data(), text.size(), {}); });
    };
    expect_refusal(found(R"({"format":1,"format":1})"), "program.json gives key \"format\" twice");
    expect_refusal(found(std::string(1000, '[') + std::string(1000, ']')), "program.json is nested too deep");
}

}  // namespace

int main() {
    headers();
    programs();
    end_group("loading");
    return failures != 0;
}
