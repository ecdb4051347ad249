#include "program.hpp"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "json_guard.hpp"
#include "op_table.hpp"
#include "program_rules.hpp"

namespace quantflow {
namespace {

using json = nlohmann::json;

constexpr std::int64_t kFormat = 1;
constexpr int kMaxNesting = 16;
// Bounds that keep geometry arithmetic inside int64 and allocations sane.
constexpr std::int64_t kMaxGeometry = 1 << 20;
constexpr std::int64_t kMaxReduction = ((std::int64_t{1} << 31) - 1) / (255 * 127);

const std::unordered_map<std::string, Op> kOps = {
    {"quantize", Op::quantize}, {"dequantize", Op::dequantize}, {"conv", Op::conv},         {"linear", Op::linear},
    {"matmul", Op::matmul},     {"add", Op::add},               {"mul", Op::mul},           {"clamp", Op::clamp},
    {"max_pool", Op::max_pool}, {"avg_pool", Op::avg_pool},     {"shape", Op::shape},       {"cat", Op::cat},
    {"aten", Op::aten},         {"size", Op::size},             {"recurrence", Op::recurrence},
};

struct CellInfo {
    Cell cell;
    std::int64_t gates;
    bool has_int8, has_bias;
};
const std::unordered_map<std::string, CellInfo> kCells = {
    {"lstm", {Cell::lstm, 4, true, false}},
    {"gru", {Cell::gru, 3, true, true}},
    {"rnn_tanh", {Cell::rnn_tanh, 1, true, false}},
    {"rnn_relu", {Cell::rnn_relu, 1, false, false}},
};

struct ActivationInfo {
    Activation kind;
    std::size_t numbers;
};
#define QF_NAMED(name, Name, aten, numbers, ...) {#name, {Activation::name, numbers}},
const std::unordered_map<std::string, ActivationInfo> kActivationsByName = {QF_ACTIVATIONS(QF_NAMED)};
#undef QF_NAMED

// What a JSON value is, short enough for a message.
std::string shown(const json& value) {
    std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
    return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

const json& field(const json& object, const char* key, const std::string& where) {
    if (!object.is_object()) fail(where, "is " + shown(object) + ", must be an object");
    auto it = object.find(key);
    if (it == object.end()) fail(where, std::string("has no field '") + key + "'");
    return *it;
}

std::string text(const json& value, const std::string& where) {
    if (!value.is_string()) fail(where, "is " + shown(value) + ", must be a string");
    return value.get<std::string>();
}

std::int64_t integer(const json& value, std::int64_t low, std::int64_t high, const std::string& where) {
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() &&
                        value.get<std::uint64_t>() > std::uint64_t{std::numeric_limits<std::int64_t>::max()});
    if (fits) {
        const auto number = value.get<std::int64_t>();
        if (number >= low && number <= high) return number;
    }
    fail(where, "is " + shown(value) + ", must be an integer in [" + std::to_string(low) + ", " +
                    std::to_string(high) + "]");
}

double number(const json& value, const std::string& where) {
    if (value.is_number()) return value.get<double>();
    // Non-finite numbers are spelled {"float": "inf"}.
    if (value.is_object() && value.size() == 1 && value.begin().key() == "float" && value.begin()->is_string()) {
        const auto word = value.begin()->get<std::string>();
        if (word == "inf") return std::numeric_limits<double>::infinity();
        if (word == "-inf") return -std::numeric_limits<double>::infinity();
        if (word == "nan") return std::numeric_limits<double>::quiet_NaN();
    }
    fail(where, "is " + shown(value) + ", must be a number");
}

const json& list(const json& value, const std::string& where) {
    if (!value.is_array()) fail(where, "is " + shown(value) + ", must be a list");
    return value;
}

class Parser {
public:
    Parser(const json& root, Program& program) : root_(root), program_(program) {}

    void run() {
        integer(field(root_, "format", ""), 0, kFormat, "format");
        const json& values = field(root_, "values", "");
        if (!values.is_object()) fail("values", "must be an object");
        for (const auto& [name, value] : values.items()) read_value(name, value);
        for (const auto& input : list(field(root_, "inputs", ""), "inputs")) {
            const std::string where = "input " + std::to_string(program_.inputs.size());
            program_.inputs.push_back(define(text(field(input, "name", where), where + ": name"), -1, where));
        }
        const json& nodes = list(field(root_, "nodes", ""), "nodes");
        if (nodes.size() > kMaxNodes || program_.inputs.size() > kMaxItems)
            fail("", "has " + std::to_string(nodes.size()) + " nodes; " + std::to_string(kMaxNodes) + " are possible");
        program_.nodes.reserve(nodes.size());
        for (const auto& node : nodes) read_node(node);
        collect_outputs(field(root_, "output", ""), 0);
    }

private:
    const json& root_;
    Program& program_;
    struct Coded {
        QParams q;
        bool is_signed, is_nonnegative;
    };
    std::unordered_map<std::string, Coded> coded_;

    int define(const std::string& name, int producer, const std::string& where) {
        const int index = static_cast<int>(program_.values.size());
        if (!program_.value_index.emplace(name, index).second) fail(where, "defines '" + name + "' a second time");
        Value value;
        value.name = name;
        value.producer = producer;
        if (auto it = coded_.find(name); it != coded_.end()) {
            value.q = it->second.q;
            value.is_signed = it->second.is_signed;
            value.is_nonnegative = it->second.is_nonnegative;
        }
        program_.values.push_back(std::move(value));
        return index;
    }

    void read_value(const std::string& name, const json& data) {
        const std::string where = "value '" + name + "'";
        const std::string dtype = text(field(data, "dtype", where), where + ": dtype");
        if (dtype != "int8" && dtype != "uint8") fail(where, "dtype '" + dtype + "' is not int8 or uint8");
        Coded coded;
        coded.is_signed = dtype == "int8";
        coded.q.qmin = coded.is_signed ? -128 : 0;
        coded.q.qmax = coded.is_signed ? 127 : 255;
        coded.q.scale = static_cast<float>(number(field(data, "scale", where), where + ": scale"));
        if (!(coded.q.scale > 0) || !std::isfinite(coded.q.scale))
            fail(where, "scale is " + shown(field(data, "scale", where)) + ", must be positive and finite");
        coded.q.zero_point = static_cast<std::int32_t>(
            integer(field(data, "zero_point", where), coded.q.qmin, coded.q.qmax, where + ": zero_point"));
        const json& nonnegative = field(data, "is_nonnegative", where);
        if (!nonnegative.is_boolean()) fail(where, "is_nonnegative must be true or false");
        coded.is_nonnegative = nonnegative.get<bool>();
        if (coded.is_nonnegative && (!coded.is_signed || coded.q.zero_point != 0))
            fail(where, "only a symmetric int8 value can be is_nonnegative");
        coded_.emplace(name, coded);
    }

    void read_node(const json& data) {
        const int index = static_cast<int>(program_.nodes.size());
        std::string where = "node " + std::to_string(index);
        Node node;
        node.name = text(field(data, "name", where), where + ": name");
        where += " (" + node.name + ")";
        const std::string op = text(field(data, "op", where), where + ": op");
        const auto known = kOps.find(op);
        if (known == kOps.end()) fail(where, "op '" + op + "' is not known");
        node.op = known->second;
        if (auto it = data.find("target"); it != data.end()) node.target = text(*it, where + ": target");
        for (const auto& arg : list(field(data, "args", where), where + ": args"))
            node.args.push_back(read_arg(arg, index, 0, where));
        if (auto it = data.find("kwargs"); it != data.end()) {
            if (!it->is_object()) fail(where, "kwargs must be an object");
            for (const auto& [key, value] : it->items()) node.kwargs.emplace(key, read_arg(value, index, 0, where));
        }
        check_call(node, where);
        if (auto it = data.find("epilogue"); it != data.end()) {
            if (node.op != Op::conv && node.op != Op::linear && node.op != Op::add && node.op != Op::mul)
                fail(where, op + " has no fused activation");
            node.epilogue = read_epilogue(*it, where);
        }
        const json attrs = data.value("attrs", json::object());
        if (node.op == Op::conv || node.op == Op::linear) read_linear(node, attrs, where);
        if (node.op == Op::recurrence) read_recurrence(node, attrs, where);
        if (node.op == Op::clamp) {
            node.low = integer(field(attrs, "low", where), -128, 255, where + ": low");
            node.high = integer(field(attrs, "high", where), node.low, 255, where + ": high");
        }
        node.output = define(text(field(data, "output", where), where + ": output"), index, where);
        check_operands(program_, node, where);
        program_.nodes.push_back(std::move(node));
    }

    Arg read_arg(const json& value, int node, int depth, const std::string& where) {
        if (depth > kMaxNesting) fail(where, "arguments are nested deeper than " + std::to_string(kMaxNesting));
        if (value.is_null()) return None{};
        if (value.is_boolean()) return value.get<bool>();
        if (value.is_number_integer())
            return integer(value, std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max(),
                           where + ": argument");
        if (value.is_number()) return value.get<double>();
        if (value.is_string()) return Word{"str", value.get<std::string>()};
        if (value.is_array()) {
            if (value.size() > kMaxItems) fail(where, "a list has " + std::to_string(value.size()) + " entries");
            Args items;
            for (const auto& item : value) items.push_back(read_arg(item, node, depth + 1, where));
            return items;
        }
        if (value.size() != 1) fail(where, "argument " + shown(value) + " must have one key");
        const std::string kind = value.begin().key();
        const json& content = value.begin().value();
        if (kind == "value") {
            const int index = program_.find(text(content, where + ": value"));
            if (index < 0) fail(where, "reads " + shown(content) + ", which no earlier node defines");
            auto& users = program_.values[static_cast<std::size_t>(index)].users;
            if (users.empty() || users.back() != node) users.push_back(node);
            return Ref{index};
        }
        if (kind == "tensor") {
            const auto name = text(content, where + ": tensor");
            if (program_.tensors.find(name) == program_.tensors.end())
                fail(where, "reads tensor '" + name + "', which the weights do not hold");
            return TensorRef{name};
        }
        if (kind == "tuple") {
            Args items;
            for (const auto& item : list(content, where + ": tuple"))
                items.push_back(read_arg(item, node, depth + 1, where));
            return items;
        }
        if (kind == "float") return number(value, where + ": argument");
        if (kind == "dtype" || kind == "memory_format" || kind == "layout" || kind == "device")
            return Word{kind, text(content, where + ": " + kind)};
        fail(where, "'" + kind + "' is not a kind of argument");
    }

    // What carries the name of an ATen op has the arguments that the table allows it. An op that the table does not have,
    // or has otherwise, is only ever left to the caller.
    void check_call(Node& node, const std::string& where) const {
        const bool moves_codes = node.op == Op::max_pool || node.op == Op::avg_pool || node.op == Op::shape ||
                                 node.op == Op::cat;
        if (!moves_codes && node.op != Op::aten && node.op != Op::size) return;
        const TableRow* row = table_row(node.target);
        if (row == nullptr) {
            // Python's own functions on sizes, and items of lists, are checked where they are computed.
            node.is_in_table = node.op == Op::size || (node.op == Op::shape && node.target == "getitem");
            if (moves_codes && !node.is_in_table) fail(where, "op '" + node.target + "' is not known");
            return;
        }
        try {
            check_arguments(*row, node, where);
            node.is_in_table = true;
        } catch (const Error& error) {
            if (moves_codes) fail("", error.what());
        }
    }

    Epilogue read_epilogue(const json& data, const std::string& where) {
        const std::string kind = text(field(data, "kind", where + ": epilogue"), where + ": epilogue");
        const auto known = kActivationsByName.find(kind);
        const json& values = list(field(data, "values", where + ": epilogue"), where + ": epilogue values");
        if (known == kActivationsByName.end() || known->second.numbers != values.size())
            fail(where, "epilogue '" + kind + "' with " + std::to_string(values.size()) + " numbers is not known");
        Epilogue epilogue;
        epilogue.kind = known->second.kind;
        if (!values.empty()) epilogue.a = static_cast<float>(number(values[0], where + ": epilogue"));
        if (values.size() > 1) epilogue.b = static_cast<float>(number(values[1], where + ": epilogue"));
        if (std::isnan(epilogue.a) || std::isnan(epilogue.b)) fail(where, "a number of its epilogue is NaN");
        return epilogue;
    }

    const Stored& stored(const json& attrs, const char* role, DType dtype, const std::string& where) {
        const auto name = text(field(attrs, role, where), where + ": " + role);
        const auto it = program_.tensors.find(name);
        if (it == program_.tensors.end()) fail(where, std::string(role) + " '" + name + "' is not in the weights");
        if (it->second.dtype != dtype || (it->second.data == nullptr && it->second.count() != 0))
            fail(where, std::string(role) + " is " + name_of(it->second.dtype) + ", must be " + name_of(dtype));
        return it->second;
    }

    // Codes and scales.
    Weights read_weights(const json& attrs, bool is_matrix, const std::string& where) {
        const Stored& weight = stored(attrs, "weight", DType::s8, where);
        const Stored& scale = stored(attrs, "weight_scale", DType::f32, where);
        const auto rank = weight.dims.size();
        if (is_matrix ? rank != 2 : rank < 3 || rank > 5 || weight.count() == 0)
            fail(where, "weight has " + std::to_string(rank) + " dimensions, or none of size");
        if (weight.count() == 0) fail(where, "weight is empty");
        const std::int64_t out = weight.dims[0];
        if (weight.count() / out > kMaxReduction)
            fail(where, "reduction of " + std::to_string(weight.count() / out) + " exceeds " +
                            std::to_string(kMaxReduction) + ", int32 could overflow");
        const auto* codes = reinterpret_cast<const std::int8_t*>(weight.data);
        for (std::int64_t i = 0; i < weight.count(); ++i)
            if (codes[i] == -128) fail(where, "weight holds codes below -127");
        if (scale.count() != 1 && scale.count() != out)
            fail(where, "weight_scale must hold 1 or " + std::to_string(out) + " values");
        const auto* scales = reinterpret_cast<const float*>(scale.data);
        for (std::int64_t i = 0; i < scale.count(); ++i)
            if (!(scales[i] > 0) || !std::isfinite(scales[i]))
                fail(where, "weight_scale holds a value that is not positive and finite");
        return Weights{codes, weight.dims, scales, scale.count(), nullptr};
    }

    void read_recurrence(Node& node, const json& attrs, const std::string& where) {
        const auto name = text(field(attrs, "cell", where), where + ": cell");
        const auto known = kCells.find(name);
        if (known == kCells.end()) fail(where, "cell '" + name + "' is not known");
        const CellInfo& info = known->second;
        node.cell = info.cell;
        const json& reverse = field(attrs, "reverse", where);
        if (!reverse.is_boolean()) fail(where, "reverse must be true or false");
        node.is_reverse = reverse.get<bool>();
        std::vector<std::int64_t> dims;
        if (field(attrs, "weight_scale", where).is_null()) {
            dims = stored(attrs, "weight", DType::f32, where).dims;
            node.float_weight = text(field(attrs, "weight", where), where + ": weight");
        } else {
            if (!info.has_int8) fail(where, "a " + name + " has no int8 form");
            node.weights = read_weights(attrs, true, where);
            dims = node.weights.dims;
        }
        if (dims.size() != 2 || dims[1] == 0 || dims[0] != info.gates * dims[1])
            fail(where, "weight is not (" + std::to_string(info.gates) + " * hidden, hidden)");
        if (field(attrs, "bias", where).is_null()) return;
        const Stored& bias = stored(attrs, "bias", DType::f32, where);
        if (!info.has_bias || bias.dims != std::vector<std::int64_t>{dims[1]})
            fail(where, "bias must hold " + std::to_string(dims[1]) + " values, of a gru");
        node.weights.bias = reinterpret_cast<const float*>(bias.data);
    }

    void read_linear(Node& node, const json& attrs, const std::string& where) {
        const bool is_linear = node.op == Op::linear;
        node.weights = read_weights(attrs, is_linear, where);
        const auto rank = node.weights.dims.size();
        const std::int64_t out = node.weights.dims[0];
        if (!field(attrs, "bias", where).is_null()) {
            const Stored& bias = stored(attrs, "bias", DType::f32, where);
            if (bias.dims != std::vector<std::int64_t>{out})
                fail(where, "bias must hold " + std::to_string(out) + " values");
            node.weights.bias = reinterpret_cast<const float*>(bias.data);
        }
        if (is_linear) return;
        auto numbers = [&](const char* key, std::int64_t least) {
            std::vector<std::int64_t> result;
            for (const auto& item : list(field(attrs, key, where), where + ": " + key))
                result.push_back(integer(item, least, kMaxGeometry, where + ": " + key));
            if (result.size() != rank - 2)
                fail(where, std::string(key) + " must hold " + std::to_string(rank - 2) + " numbers");
            return result;
        };
        node.geometry.stride = numbers("stride", 1);
        node.geometry.padding = numbers("padding", 0);
        node.geometry.dilation = numbers("dilation", 1);
        node.geometry.groups = integer(field(attrs, "groups", where), 1, out, where + ": groups");
        if (out % node.geometry.groups != 0)
            fail(where, "groups " + std::to_string(node.geometry.groups) + " does not divide " + std::to_string(out) +
                            " channels");
    }

    void collect_outputs(const json& value, int depth) {
        if (depth > kMaxNesting) fail("output", "is nested deeper than " + std::to_string(kMaxNesting));
        if (value.is_array()) {
            for (const auto& item : value) collect_outputs(item, depth + 1);
        } else if (value.is_object() && value.size() == 1) {
            const std::string kind = value.begin().key();
            const json& content = value.begin().value();
            if (kind == "value") {
                const int index = program_.find(text(content, "output"));
                if (index < 0) fail("output", shown(content) + " is not defined");
                program_.outputs.push_back(index);
            } else if (kind == "tensor") {
                if (program_.tensors.find(text(content, "output")) == program_.tensors.end())
                    fail("output", shown(content) + " is not in the weights");
            } else if (kind == "tuple") {
                collect_outputs(content, depth + 1);
            } else if (kind == "dict") {
                if (!content.is_object()) fail("output", "dict must be an object");
                for (const auto& item : content) collect_outputs(item, depth + 1);
            }
        }
    }
};

}  // namespace

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f32: return "float32";
        case DType::u8: return "uint8";
        case DType::s8: return "int8";
        case DType::s32: return "int32";
        case DType::s64: return "int64";
        case DType::b8: return "bool";
    }
    return "?";
}

Program parse_program(const char* text_begin, std::size_t size, TensorTable tensors) {
    Program program;
    program.tensors = std::move(tensors);
    try {
        const json root = json::parse(text_begin, text_begin + size, json_guard("program.json", 4 + kMaxNesting));
        Parser(root, program).run();
    } catch (const json::exception& error) {
        throw Error(std::string("program.json: is not what quantflow writes: ") + error.what());
    }
    return program;
}

}  // namespace quantflow
