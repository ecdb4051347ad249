#include "grammar.hpp"

#include <algorithm>
#include <numeric>

#include "../src/lowering/ops/registry.hpp"

namespace quantflow::fuzz {
namespace {

using Dims = Grammar::Dims;

const std::vector<Dims>& shapes() {
    static const std::vector<Dims> list = {{2, 4, 6, 6}, {3, 8},       {2, 5, 8},    {1, 4, 3, 6, 6}, {1, 3, 9, 9},
                                           {4},          {1, 1, 1, 1}, {0, 4, 6, 6}, {1, 32, 14, 14}, {2, 16, 7, 5},
                                           {5, 2, 8},    {1, 64, 8, 8}, {7, 33},     {2, 3, 4, 8},    {1, 8, 1, 20}};
    return list;
}
const char* const kNumbers[] = {"0",  "1",  "2",       "3",          "-1",  "-2",    "4",    "6",    "8",
                                "16", "0.5", "1048576", "4294967296", "1.5", "-0.25", "1e30", "true", "false",
                                "9223372036854775807", "-9223372036854775808"};
const char* const kMild[] = {"0.5", "1", "2", "-0.25", "3", "0", "-1", "0.125"};
const std::int64_t kSmall[] = {1, 2, 0, 3, 4, -1, 6, -2};

std::string value(const std::string& name) { return "{\"value\":\"" + name + "\"}"; }
std::string listed(const Dims& items) {
    std::string text = "[";
    for (std::size_t i = 0; i < items.size(); ++i) text += (i > 0 ? "," : "") + std::to_string(items[i]);
    return text + "]";
}
bool begins(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }
bool is_one_of(const std::string& name, std::initializer_list<const char*> names) {
    return std::any_of(names.begin(), names.end(), [&](const char* n) { return name == n; });
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
const std::vector<std::string>& moving() {
    static const std::vector<std::string> targets = [] {
        std::vector<std::string> found = {"constant_pad_nd.default", "pixel_shuffle.default", "upsample_nearest2d.vec",
                                          "roll.default", "repeat.default", "channel_shuffle.default"};
        for (const std::string& target : lowered())
            if (lowering::op_table().at(target.substr(0, target.find('.')))->role == lowering::Role::move)
                found.push_back(target);
        return found;
    }();
    return targets;
}

}  // namespace

Grammar::Grammar(Choices& choices, Backend& backend) : c_(choices), backend_(backend) {
    const Dims first = shapes()[c_.next(shapes().size())];
    const Dims second = c_.one_in(3) ? shapes()[c_.next(shapes().size())] : first;
    const auto give = [&](const char* name, const char* word, DType dtype, const Dims& dims) {
        InputForm form;
        form.dtype = dtype;
        form.dims = dims;
        inputs_.push_back(form);
        known_.push_back({name, dtype, dims, "", false, false});
        inputs_text_ += std::string(inputs_text_.empty() ? "" : ",") + "{\"name\":\"" + name +
                        "\",\"keyword\":null,\"dtype\":\"" + word + "\",\"shape\":" + listed(dims) + "}";
    };
    give("i", "int64", DType::s64, c_.one_in(3) ? first : Dims{6});
    give("m", "bool", DType::b8, c_.one_in(3) ? Dims{first.empty() ? 1 : first.back()} : first);
    give("y", "float32", DType::f32, second);
    give("x", "float32", DType::f32, first);
    const std::size_t wanted = 1 + c_.next(6);
    while (nodes_.size() < wanted && !c_.is_over())
        if (!grow()) break;
}

std::string Grammar::text() const {
    const auto joined = [](const std::vector<std::string>& parts) {
        std::string all;
        for (const std::string& part : parts) all += (all.empty() ? "" : ",") + part;
        return all;
    };
    // Mostly the last value; all that are read by nobody would hinder fusion.
    return R"({"format":1,"batch_is_dynamic":false,"inputs":[)" + inputs_text_ + R"(],"values":{)" + joined(coded_) +
           R"(},"nodes":[)" + joined(nodes_) + R"(],"output":)" + value(known_.back().name) + "}";
}

// One node more. False: what was tried doesn't fit, and is left in to be refused.
bool Grammar::grow() {
    if (c_.one_in(24)) grow_by_pattern();
    for (int tries = 0; tries < 4 && !c_.is_over(); ++tries) {
        std::string codes;
        const std::string output = next_name();
        const std::string node = c_.next(3) == 0 ? node_of_codes(output, codes) : node_of_op(output, codes);
        if (keep(node, output, codes)) return true;
        if (c_.one_in(32)) {
            nodes_.push_back(node);
            if (!codes.empty()) coded_.push_back("\"" + output + "\":" + codes);
            known_.push_back({output, DType::f32, {}, codes, false, false});
            return false;
        }
    }
    return true;
}

// What lowering recognizes over several nodes: attention that is written out, and operands in two terms.
void Grammar::grow_by_pattern() {
    const Known x = pick();
    if (x.dtype != DType::f32 || !x.codes.empty() || x.is_list || x.is_number || x.dims.size() < 2) return;
    const auto aten = [&](const char* target, const std::string& args) {
        const std::string output = next_name();
        const bool fits = keep(R"({"name":"n","op":"aten","target":")" + std::string(target) + R"(","output":")" + output +
                                   R"(","args":[)" + args + R"(],"kwargs":{}})",
                               output, "");
        return fits ? output : std::string();
    };
    if (c_.next(2) == 0) {
        const std::string k = aten("transpose.int", value(x.name) + ",-2,-1");
        std::string s = k.empty() ? "" : aten("matmul.default", value(x.name) + "," + value(k));
        if (!s.empty() && c_.next(2) == 0) s = aten("mul.Tensor", value(s) + ",0.5");
        if (!s.empty() && c_.next(2) == 0) s = aten("add.Tensor", value(s) + "," + tensor(DType::f32, {x.dims[x.dims.size() - 2]}));
        if (!s.empty()) s = aten("softmax.int", value(s) + ",-1");
        if (!s.empty()) aten("matmul.default", value(s) + "," + value(c_.next(3) == 0 ? pick().name : x.name));
        return;
    }
    const auto quantized = [&](const std::string& of) {
        const std::string output = next_name();
        return keep(R"({"name":"n","op":"quantize","output":")" + output + R"(","args":[)" + value(of) + "]}", output, codes())
                   ? output : std::string();
    };
    const std::string q = quantized(x.name);
    if (q.empty()) return;
    const std::string d = next_name();
    if (!keep(R"({"name":"n","op":"dequantize","output":")" + d + R"(","args":[)" + value(q) + "]}", d, "")) return;
    const std::string rest = aten("sub.Tensor", value(x.name) + "," + value(d));
    const std::string q2 = rest.empty() ? "" : quantized(rest);
    if (q2.empty()) return;
    const std::string weight = tensor(DType::s8, {8, x.dims.back()});
    std::string residual = "null";
    for (const std::string& term : {q, q2}) {
        const std::string output = next_name();
        if (!keep(R"({"name":"n","op":"linear","output":")" + output + R"(","args":[)" + value(term) + "," + residual +
                      R"(],"attrs":{"weight":)" + weight.substr(10, weight.size() - 11) + R"(,"weight_scale":)" +
                      tensor(DType::f32, {1}).substr(10, tensor(DType::f32, {1}).size() - 11) + R"(,"bias":null}})",
                  output, ""))
            return;
        residual = value(output);
    }
}

// Whether the program with this node can be computed; it is one of its nodes then.
bool Grammar::keep(const std::string& node, const std::string& output, const std::string& codes) {
    nodes_.push_back(node);
    if (!codes.empty()) coded_.push_back("\"" + output + "\":" + codes);
    known_.push_back({output, DType::f32, {}, codes, false, false});
    try {
        const std::string all = text();
        const Program program = parse_program(all.data(), all.size(), tensors_);
        Constants constants(backend_, program);
        Section section;
        section.last = static_cast<int>(program.nodes.size());
        section.inputs = program.inputs;
        section.outputs = program.outputs;
        const Lowered made = lower(program, section, inputs_, backend_, constants);
        const OutputForm& out = made.outputs.back();
        known_.back().dtype = out.dtype;
        known_.back().dims = out.dims;
        known_.back().is_number = out.is_number;
        if (made.arena_bytes <= std::int64_t{1} << 22 && (out.is_number || checked_count(out.dims) <= 1 << 20)) return true;
    } catch (const Error& error) {
        if (std::string(error.what()).find("can't leave") != std::string::npos) {
            known_.back().is_list = true;
            return true;
        }
    }
    nodes_.pop_back();
    known_.pop_back();
    if (!codes.empty()) coded_.pop_back();
    return false;
}

const Grammar::Known& Grammar::pick() {
    return c_.next(2) == 0 ? known_.back() : known_[c_.next(known_.size())];
}

const Grammar::Known* Grammar::pick_of(DType dtype, bool is_coded) {
    std::vector<const Known*> fitting;
    for (const Known& k : known_)
        if (k.codes.empty() != is_coded && !k.is_list && !k.is_number && (is_coded || k.dtype == dtype)) fitting.push_back(&k);
    if (fitting.empty()) return nullptr;
    return c_.next(2) == 0 ? fitting.back() : fitting[c_.next(fitting.size())];
}

// A tensor of these dimensions, the same one each time, as an argument.
std::string Grammar::tensor(DType dtype, Dims dims) {
    static const char* const words[] = {"f", "u", "c", "s", "l", "b"};
    std::string name = words[static_cast<int>(dtype)];
    for (const auto d : dims) name += "_" + std::to_string(d);
    if (tensors_.count(name) == 0 && dims.size() <= 8) {
        std::int64_t count = 1;
        for (auto& d : dims) {
            d = std::clamp<std::int64_t>(d, 0, 64);
            count *= d;
        }
        if (count > 1 << 18) dims = {1}, count = 1;
        memory_.emplace_back(static_cast<std::size_t>(count * size_of(dtype)) + 1);  // data() of nothing is null
        std::byte* const data = memory_.back().data();
        for (std::int64_t i = 0; i < count; ++i) switch (dtype) {
                case DType::f32: reinterpret_cast<float*>(data)[i] = static_cast<float>(1 + i * 37 % 16) / 16.0f; break;
                case DType::s64: reinterpret_cast<std::int64_t*>(data)[i] = i % 3; break;
                case DType::s32: reinterpret_cast<std::int32_t*>(data)[i] = static_cast<std::int32_t>(i % 3); break;
                case DType::s8: reinterpret_cast<std::int8_t*>(data)[i] = static_cast<std::int8_t>(i * 31 % 255 - 127); break;
                default: reinterpret_cast<std::uint8_t*>(data)[i] = i % 3 == 0 ? 0 : 1;
            }
        Stored s;
        s.dtype = dtype;
        s.dims = dims;
        s.data = data;
        tensors_.emplace(name, s);
    }
    return "{\"tensor\":\"" + name + "\"}";
}

std::string Grammar::codes() {
    static const char* const kinds[] = {
        R"({"dtype":"int8","scale":0.05,"zero_point":0,"is_nonnegative":false})",
        R"({"dtype":"uint8","scale":0.03,"zero_point":120,"is_nonnegative":false})",
        R"({"dtype":"int8","scale":0.11,"zero_point":-7,"is_nonnegative":false})",
        R"({"dtype":"int8","scale":0.02,"zero_point":0,"is_nonnegative":true})",
        R"({"dtype":"uint8","scale":1e-30,"zero_point":0,"is_nonnegative":false})",
    };
    return kinds[c_.next(c_.one_in(8) ? 5 : 3)];
}

std::string Grammar::epilogue() {
    static const char* const kinds[] = {"relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "gelu_tanh",
                                        "leaky_relu", "tanh"};
    if (c_.next(2) == 0) return "";
    const std::string kind = kinds[c_.next(std::size(kinds))];
    const char* const values = kind == "hardtanh" ? "-0.5,1" : kind == "leaky_relu" ? "0.1" : "";
    return R"(,"epilogue":{"kind":")" + kind + R"(","values":[)" + values + "]}";
}

std::string Grammar::node_of_op(const std::string& output, std::string& codes) {
    codes.clear();
    const Known& last = known_.back();
    if (last.is_list)
        return R"({"name":"n","op":"aten","target":"getitem","output":")" + output + R"(","args":[)" + value(last.name) + "," +
               std::to_string(static_cast<std::int64_t>(c_.next(3)) - 1) + R"(],"kwargs":{}})";
    const TableRow& row = *table_row(lowered()[c_.next(lowered().size())]);
    const Known* real = pick_of(c_.one_in(6) ? DType::s64 : c_.one_in(6) ? DType::b8 : DType::f32, false);
    return call("aten", row, real == nullptr ? pick() : *real, output);
}

std::string Grammar::node_of_codes(const std::string& output, std::string& codes) {
    const Known *coded = pick_of(DType::f32, true), *real = pick_of(DType::f32, false);
    const auto simple = [&](const char* op, const std::string& args, const std::string& more) {
        return std::string(R"({"name":"n","op":")") + op + R"(","output":")" + output + R"(","args":[)" + args + "]" + more + "}";
    };
    if (coded == nullptr || c_.one_in(5)) {
        codes = this->codes();
        return simple("quantize", value((real == nullptr ? pick() : *real).name), "");
    }
    const Known x = *coded;
    switch (c_.next(13)) {
        case 0: return simple("dequantize", value(x.name), "");
        case 1:
        case 2: return linear("linear", x, output, codes);
        case 3:
        case 4:
        case 5: return linear("conv", x, output, codes);
        case 6:
        case 7: {
            const char* const op = c_.next(2) == 0 ? "add" : "mul";
            const Known* other = pick_of(DType::f32, true);
            if (c_.next(2) == 0) codes = this->codes();
            return simple(op, value(x.name) + "," + value(other->name), epilogue());
        }
        case 8: {
            if (c_.next(2) == 0) codes = this->codes();
            return simple("matmul", value(x.name) + "," + value(pick_of(DType::f32, true)->name), "");
        }
        case 9: {
            codes = x.codes;
            return simple("clamp", value(x.name), R"(,"attrs":{"low":0,"high":)" + std::to_string(20 + c_.next(100)) + "}");
        }
        case 10: {
            const bool is_max = c_.next(2) == 0;
            static const char* const maxima[] = {"max_pool2d.default", "max_pool1d.default", "max_pool3d.default"};
            static const char* const means[] = {"avg_pool2d.default", "adaptive_avg_pool2d.default", "mean.dim", "avg_pool1d.default",
                                                "avg_pool3d.default", "adaptive_avg_pool1d.default"};
            if (is_max || c_.next(2) == 0) codes = is_max ? x.codes : this->codes();
            return call(is_max ? "max_pool" : "avg_pool", *table_row(is_max ? maxima[c_.next(3)] : means[c_.next(6)]), x, output);
        }
        case 11: {
            codes = x.codes;
            if (c_.next(3) == 0) return call("cat", *table_row(c_.next(2) == 0 ? "cat.default" : "stack.default"), x, output);
            return call("shape", *table_row(moving()[c_.next(moving().size())]), x, output);
        }
        default: {
            const Known* gates = real;
            return gates == nullptr ? simple("dequantize", value(x.name), "") : recurrence(*gates, output);
        }
    }
}

std::string Grammar::linear(const std::string& op, const Known& x, const std::string& output, std::string& codes) {
    static const std::int64_t widths[] = {4, 8, 16, 1, 33, 64};
    const std::int64_t out = widths[c_.next(6)];
    Dims weight;
    std::string more;
    if (op == "linear") {
        weight = {out, x.dims.empty() ? 1 : x.dims.back()};
    } else {
        const std::int64_t channels = x.dims.size() < 2 ? 1 : x.dims[1];
        const std::int64_t groups = c_.next(3) == 0 ? channels : c_.next(4) == 0 && channels % 2 == 0 ? 2 : 1;
        weight = {groups > 1 ? groups * static_cast<std::int64_t>(1 + c_.next(2)) : out, groups > 0 ? channels / groups : 1};
        const std::size_t spatial = x.dims.size() < 3 ? 2 : x.dims.size() - 2;
        static const std::int64_t sizes[] = {3, 1, 2, 5};
        const std::int64_t kernel = sizes[c_.next(4)], stride = c_.one_in(3) ? 2 : 1, dilation = c_.one_in(6) ? 2 : 1;
        const std::int64_t padding = c_.next(2) == 0 ? kernel / 2 : static_cast<std::int64_t>(c_.next(4));
        weight.insert(weight.end(), spatial, c_.one_in(12) ? 1 + static_cast<std::int64_t>(c_.next(4)) : kernel);
        more = R"(,"stride":)" + listed(Dims(spatial, stride)) + R"(,"padding":)" + listed(Dims(spatial, padding)) +
               R"(,"dilation":)" + listed(Dims(spatial, dilation)) + R"(,"groups":)" + std::to_string(groups);
    }
    const auto named = [&](DType dtype, const Dims& dims) {
        const std::string text = tensor(dtype, dims);
        return text.substr(10, text.size() - 11);
    };
    std::string residual = "null";
    if (c_.one_in(4)) residual = value((c_.next(2) == 0 ? pick() : x).name);
    if (c_.next(3) != 0) codes = this->codes();
    return R"({"name":"n","op":")" + op + R"(","output":")" + output + R"(","args":[)" + value(x.name) + "," + residual + "]" +
           epilogue() + R"(,"attrs":{"weight":)" + named(DType::s8, weight) + R"(,"weight_scale":)" +
           named(DType::f32, {c_.next(2) == 0 ? 1 : weight[0]}) + R"(,"bias":)" +
           (c_.next(2) == 0 ? "null" : named(DType::f32, {weight[0]})) + more + "}}";
}

std::string Grammar::recurrence(const Known& gates, const std::string& output) {
    static const char* const cells[] = {"lstm", "gru", "rnn_tanh", "rnn_relu"};
    static const std::int64_t counts[] = {4, 3, 1, 1};
    const std::size_t cell = c_.next(4);
    const std::int64_t width = gates.dims.empty() ? 4 : gates.dims.back(), hidden = std::max<std::int64_t>(1, width / counts[cell]);
    const bool is_coded = cell < 3 && c_.next(2) == 0;
    const auto named = [&](DType dtype, const Dims& dims) {
        const std::string text = tensor(dtype, dims);
        return text.substr(10, text.size() - 11);
    };
    const std::int64_t batch = gates.dims.size() == 3 ? gates.dims[1] : 1;
    const auto state = [&] { return c_.next(2) == 0 ? std::string("null") : tensor(DType::f32, {batch, hidden}); };
    return R"({"name":"n","op":"recurrence","output":")" + output + R"(","args":[)" + value(gates.name) + "," + state() + "," +
           (cell == 0 ? state() : "null") + R"(],"attrs":{"cell":")" + cells[cell] + R"(","reverse":)" +
           (c_.next(2) == 0 ? "true" : "false") + R"(,"weight":)" +
           named(is_coded ? DType::s8 : DType::f32, {counts[cell] * hidden, hidden}) + R"(,"weight_scale":)" +
           (is_coded ? named(DType::f32, {1}) : "null") + R"(,"bias":)" +
           (cell == 1 && c_.next(2) == 0 ? named(DType::f32, {hidden}) : "null") + "}}";
}

std::string Grammar::call(const std::string& op, const TableRow& row, const Known& from, const std::string& output) {
    const Known self = from;
    std::string args, kwargs;
    bool is_first = true, is_self = true, by_name = false;
    for (const TableArgument& a : row.arguments) {
        if (a.is_optional && c_.next(2) == 0) {
            by_name = true;  // what follows has no place any more
            continue;
        }
        if (c_.one_in(200)) continue;  // missing
        const std::string text = argument(a, row, self, is_self);
        if (a.kind == Kind::tensor || a.kind == Kind::operand) is_self = false;
        if (a.is_keyword || by_name || c_.one_in(100)) {
            kwargs += (kwargs.empty() ? "\"" : ",\"") + a.name + "\":" + text;
        } else {
            args += (is_first ? "" : ",") + text;
            is_first = false;
        }
    }
    return R"({"name":"n","op":")" + op + R"(","target":")" + row.target + R"(","output":")" + output + R"(","args":[)" + args +
           R"(],"kwargs":{)" + kwargs + "}}";
}

std::string Grammar::argument(const TableArgument& a, const TableRow& row, const Known& self, bool is_self) {
    if (c_.one_in(200)) {  // of another type
        TableArgument other;
        other.kind = static_cast<Kind>(c_.next(12));
        return of_kind(other, row, self, false);
    }
    if (a.takes_none && c_.next(3) == 0) return "null";
    if (!a.is_list) return of_kind(a, row, self, is_self);
    if (a.kind == Kind::integer) return integers(a, row, self);
    const std::size_t count = a.length > 1 ? a.length : 1 + c_.next(3);
    std::string text = "[";
    for (std::size_t i = 0; i < count; ++i) {
        text += i > 0 ? "," : "";
        text += a.takes_none_inside && c_.next(3) == 0 ? "null"
                : a.kind == Kind::tensor && !begins(row.target, "index") && c_.next(3) != 0 ? value(self.name)
                : a.kind == Kind::real && c_.next(3) != 0                                  ? "2.0"
                                                                                           : of_kind(a, row, self, is_self);
    }
    return text + "]";
}

std::string Grammar::of_kind(const TableArgument& a, const TableRow& row, const Known& self, bool is_self) {
    switch (a.kind) {
        case Kind::tensor:
            if (is_self && !begins(row.target, "where") && !begins(row.target, "embedding")) return value(self.name);
            return operand(a, row, self);
        case Kind::operand:
            if (is_self) return value(self.name);
            return c_.one_in(3) ? kMild[c_.next(std::size(kMild))] : operand(a, row, self);
        case Kind::integer: return integer(a, self);
        case Kind::real:
        case Kind::number: return c_.next(4) != 0 ? kMild[c_.next(std::size(kMild))] : kNumbers[c_.next(std::size(kNumbers))];
        case Kind::flag: return c_.next(2) != 0 ? "true" : "false";
        case Kind::text: return c_.next(4) != 0 ? "\"constant\"" : "\"none\"";
        case Kind::dtype: {
            const char* const names[] = {"float32", "int64", "int32", "bool", "float64", "int8", "uint8"};
            return std::string("{\"dtype\":\"") + names[c_.next(c_.one_in(4) ? 7 : 4)] + "\"}";
        }
        case Kind::layout: return "{\"layout\":\"strided\"}";
        case Kind::device: return "{\"device\":\"cpu\"}";
        case Kind::memory_format: return c_.next(2) == 0 ? "{\"memory_format\":\"contiguous_format\"}" : "{\"memory_format\":\"channels_last\"}";
        case Kind::none: return "null";
    }
    return "null";
}

Dims Grammar::weight_of(const std::string& target, const Known& self) {
    static const std::int64_t widths[] = {4, 8, 16, 1, 33};
    const std::int64_t out = widths[c_.next(5)], last = self.dims.empty() ? 1 : self.dims.back();
    const std::int64_t channels = self.dims.size() < 2 ? 1 : self.dims[1];
    if (begins(target, "linear")) return {out, last};
    if (begins(target, "conv")) {
        static const std::int64_t sizes[] = {3, 1, 2, 5};
        const std::int64_t groups = c_.next(3) == 0 ? std::max<std::int64_t>(1, channels) : 1;
        Dims dims = {groups > 1 ? groups : out, channels / groups};
        dims.insert(dims.end(), static_cast<std::size_t>(target[4] - '0'), sizes[c_.next(4)]);
        return dims;
    }
    if (begins(target, "embedding")) return {10, out};
    if (begins(target, "batch_norm") || begins(target, "group_norm") || begins(target, "instance_norm"))
        return {channels};
    return {last};
}

// A tensor that is not the first: of its name's meaning, as large as it must be.
std::string Grammar::operand(const TableArgument& a, const TableRow& row, const Known& self) {
    const std::string& name = a.name;
    const bool is_true_to_name = !c_.one_in(12);
    if (is_true_to_name && name == "weight") return tensor(DType::f32, weight_of(row.target, self));
    if (is_true_to_name && is_one_of(name, {"bias", "running_mean", "running_var"})) {
        if (begins(row.target, "batch_norm") || begins(row.target, "group_norm") ||
            begins(row.target, "instance_norm"))
            return tensor(DType::f32, {self.dims.size() < 2 ? 1 : self.dims[1]});
        if (begins(row.target, "layer_norm")) return tensor(DType::f32, {self.dims.empty() ? 1 : self.dims.back()});
        // As many as the weight that was made last has rows, most of the time.
        static const std::int64_t widths[] = {4, 8, 16, 1, 33};
        const std::int64_t channels = self.dims.size() < 2 ? 1 : self.dims[1];
        return tensor(DType::f32, {c_.one_in(6) ? channels : widths[c_.next(5)]});
    }
    const auto of = [&](DType dtype) {
        const Known* found = pick_of(dtype, false);
        return found == nullptr || c_.next(3) == 0 ? tensor(dtype, c_.next(2) == 0 ? self.dims : Dims{2}) : value(found->name);
    };
    if (is_true_to_name && is_one_of(name, {"index", "indices", "batch1"})) return of(c_.one_in(8) ? DType::b8 : DType::s64);
    if (is_true_to_name && is_one_of(name, {"mask", "condition"})) return of(DType::b8);
    if (is_true_to_name && is_one_of(name, {"key", "value", "query"}) && c_.next(4) != 0) return value(self.name);
    if (is_true_to_name && is_one_of(name, {"mat2", "other", "tensor2"}) && (begins(row.target, "matmul") || begins(row.target, "bmm"))) {
        Dims dims = self.dims;
        if (dims.size() < 2) return tensor(DType::f32, self.dims);
        std::swap(dims[dims.size() - 1], dims[dims.size() - 2]);
        if (c_.next(2) == 0) dims.back() = 1 + static_cast<std::int64_t>(c_.next(40));
        return tensor(DType::f32, c_.next(3) == 0 ? Dims(dims.end() - 2, dims.end()) : dims);
    }
    std::vector<const Known*> alike;
    for (const Known& k : known_)
        if (sized_like(k, self) && k.codes.empty()) alike.push_back(&k);
    if (!alike.empty() && c_.next(3) != 0) return value(alike[c_.next(alike.size())]->name);
    if (c_.next(2) == 0) {  // broadcast
        Dims dims = self.dims;
        for (auto& d : dims)
            if (c_.next(3) == 0) d = 1;
        if (!dims.empty() && c_.next(3) == 0) dims.erase(dims.begin());
        return tensor(self.dtype == DType::s64 ? DType::s64 : DType::f32, dims);
    }
    return value(pick().name);
}

std::string Grammar::integer(const TableArgument& a, const Known& self) {
    const auto rank = static_cast<std::int64_t>(std::max<std::size_t>(1, self.dims.size()));
    if (c_.one_in(100)) return kNumbers[c_.next(std::size(kNumbers))];
    if (c_.one_in(24))  // a number that the program computes
        for (auto k = known_.rbegin(); k != known_.rend(); ++k)
            if (k->is_number) return value(k->name);
    if (a.is_axis || is_one_of(a.name, {"dim", "start_dim", "end_dim", "dim0", "dim1", "axis0", "axis1"}))
        return std::to_string(static_cast<std::int64_t>(c_.next(static_cast<std::size_t>(2 * rank))) - rank);
    if (is_one_of(a.name, {"groups", "num_groups", "upscale_factor", "chunks"})) return std::to_string(1 + c_.next(2));
    if (a.name == "end") return c_.next(2) == 0 ? "9223372036854775807" : std::to_string(c_.next(8));
    return std::to_string(kSmall[c_.next(a.is_bounded && a.low >= 0 ? 5 : 8)]);
}

std::string Grammar::integers(const TableArgument& a, const TableRow& row, const Known& self) {
    const Dims& dims = self.dims;
    const std::size_t rank = dims.size();
    if (c_.one_in(60)) {
        Dims any(c_.next(6));
        for (auto& n : any) n = kSmall[c_.next(8)];
        return listed(any);
    }
    if (a.is_axis || is_one_of(a.name, {"dims", "dim"})) {
        Dims axes(rank);
        std::iota(axes.begin(), axes.end(), 0);
        for (std::size_t i = rank; i > 1; --i) std::swap(axes[i - 1], axes[c_.next(i)]);
        if (!begins(row.target, "permute") && rank > 0) axes.resize(1 + c_.next(rank));
        for (auto& axis : axes)
            if (c_.one_in(4)) axis -= static_cast<std::int64_t>(rank);
        return listed(axes);
    }
    if (a.name == "normalized_shape") return listed(rank == 0 ? Dims{1} : Dims(dims.end() - 1 - static_cast<std::ptrdiff_t>(rank > 1 ? c_.next(2) : 0), dims.end()));
    if (is_one_of(a.name, {"shape", "size", "sizes"})) {
        Dims to = dims;
        if (begins(row.target, "expand")) {
            for (auto& d : to)
                if (d == 1) d = 1 + static_cast<std::int64_t>(c_.next(3));
            if (c_.next(3) == 0) to.insert(to.begin(), 2);
            return listed(to);
        }
        switch (c_.next(6)) {
            case 0: return "[-1]";
            case 1:  // two next to each other
                if (rank > 1) {
                    const std::size_t at = c_.next(rank - 1);
                    to[at] *= to[at + 1];
                    to.erase(to.begin() + static_cast<std::ptrdiff_t>(at) + 1);
                }
                break;
            case 2:  // one in two
                if (rank > 0) {
                    const std::size_t at = c_.next(rank);
                    const std::int64_t by = to[at] % 2 == 0 ? 2 : to[at] % 3 == 0 ? 3 : 1;
                    to[at] /= by;
                    to.insert(to.begin() + static_cast<std::ptrdiff_t>(at), by);
                }
                break;
            case 3: to = pick().dims; break;
            case 4: to = {rank > 0 ? dims[0] : 1, -1}; break;
            default: to = {2, 3}; break;
        }
        if (!to.empty() && c_.one_in(4)) to[c_.next(to.size())] = -1;
        return listed(to);
    }
    if (is_one_of(a.name, {"split_size", "split_sizes"})) {
        const std::int64_t all = rank > 0 ? dims[0] : 1, part = static_cast<std::int64_t>(c_.next(static_cast<std::size_t>(all) + 1));
        return listed({part, all - part});
    }
    if (a.name == "repeats") {
        Dims times(rank + (c_.one_in(4) ? 1 : 0));
        for (auto& n : times) n = 1 + static_cast<std::int64_t>(c_.next(2));
        return listed(times);
    }
    if (a.name == "pad") {
        Dims pad(2 * (1 + c_.next(std::max<std::size_t>(1, std::min<std::size_t>(rank, 3)))));
        for (auto& n : pad) n = c_.one_in(8) ? -1 : static_cast<std::int64_t>(c_.next(3));
        return listed(pad);
    }
    Dims items(a.length > 1 ? a.length : 1 + c_.next(3));
    const bool is_window = is_one_of(a.name, {"kernel_size", "output_size"});
    for (auto& n : items)
        n = a.name == "dilation" || a.name == "stride" ? 1 + static_cast<std::int64_t>(c_.next(2))
            : a.name == "padding"                      ? static_cast<std::int64_t>(c_.next(2))
            : is_window                                ? 1 + static_cast<std::int64_t>(c_.next(5))
                                                       : kSmall[c_.next(8)];
    return listed(items);
}

}  // namespace quantflow::fuzz
