// The integer program as data: program.json and its tensors, every field checked before anything is built from it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "backend.hpp"

namespace quantflow {

// A tensor stored with the program. `data` belongs to whoever mapped or passed it and outlives the program; it is null
// for dtypes that no kernel reads (nodes that need such a tensor are left to the caller).
struct Stored {
    DType dtype = DType::f32;
    std::vector<std::int64_t> dims;
    const std::byte* data = nullptr;
    std::int64_t count() const {
        std::int64_t n = 1;
        for (auto d : dims) n *= d;
        return n;
    }
};
using TensorTable = std::unordered_map<std::string, Stored>;

// An argument of a node.
struct Arg;
using Args = std::vector<Arg>;
struct Ref {
    int value;  // index into Program::values
};
struct TensorRef {
    std::string name;
};
struct Word {  // a dtype, layout, memory format or plain string
    std::string kind, name;
};
struct None {};
struct Arg : std::variant<None, Ref, TensorRef, std::int64_t, double, bool, Word, Args> {
    using variant::variant;
    template <typename T>
    const T* as() const {
        return std::get_if<T>(static_cast<const variant*>(this));
    }
    bool is_none() const { return as<None>() != nullptr; }
};

enum class Op : std::uint8_t {
    quantize, dequantize, conv, linear, matmul, add, mul, clamp, max_pool, avg_pool, shape, cat, recurrence, aten,
    size,
};

struct Node {
    std::string name;
    Op op = Op::aten;
    std::string target;  // "softmax.int"
    int output = -1;
    Args args;
    std::map<std::string, Arg> kwargs;
    Epilogue epilogue;
    // conv and linear
    Weights weights;
    ConvGeometry geometry;
    // recurrence: `weights` (with a GRU's bias of n), or the name of a float32 weight
    Cell cell = Cell::lstm;
    bool is_reverse = false;
    std::string float_weight;
    // clamp
    std::int64_t low = 0, high = 0;
    // Whether the table has its target with these arguments; what it has not is left to the caller.
    bool is_in_table = false;
    std::string label() const { return name + (target.empty() ? "" : " (" + target + ")"); }
};

// How a value is held, as the program defines it (not as a backend stores it).
struct Value {
    std::string name;
    std::optional<QParams> q;  // of int8 or uint8 codes
    bool is_signed = false;
    bool is_nonnegative = false;
    int producer = -1;       // node index; -1: an input
    std::vector<int> users;  // node indices, ascending
};

struct Program {
    std::vector<int> inputs;   // value indices
    std::vector<int> outputs;  // value indices, in the order of the output structure
    std::vector<Node> nodes;
    std::vector<Value> values;
    TensorTable tensors;
    std::unordered_map<std::string, int> value_index;

    int find(const std::string& name) const {
        auto it = value_index.find(name);
        return it == value_index.end() ? -1 : it->second;
    }
};

// Raises Error with the place, what was found and what is legal. Reads nothing outside `json` and the table's bytes.
Program parse_program(const char* json, std::size_t size, TensorTable tensors);

// The directory of a .safetensors file held in memory.
TensorTable parse_safetensors(const std::byte* data, std::size_t size);

// A file mapped read-only for as long as the object lives.
class MappedFile {
public:
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    const std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }

private:
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace quantflow
