// The state of one lowering: its values, buffers and steps, and the arguments of the node at hand.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "arena.hpp"
#include "foreknown.hpp"
#include "fusion.hpp"
#include "graph.hpp"
#include "layout.hpp"
#include "schedule.hpp"

namespace quantflow::lowering {

struct Val;
using Vals = std::vector<Val>;
struct Val : std::variant<std::monostate, View, std::int64_t, double, bool, Vals> {
    using variant::variant;
    template <typename T>
    const T* as() const {
        return std::get_if<T>(static_cast<const variant*>(this));
    }
};

std::int64_t as_integer(const Val& v, const char* name);
double as_real(const Val& v, const char* name);
// Null: no kernel computes on it.
std::optional<DType> dtype_named(const std::string& name);

// An optional operand as kernels take it.
class OptionalTensor {
public:
    explicit OptionalTensor(std::optional<Tensor> tensor) : tensor_(std::move(tensor)) {}
    const Tensor* get() const { return tensor_ ? &*tensor_ : nullptr; }

private:
    std::optional<Tensor> tensor_;
};
inline const View* pointer_to(const std::optional<View>& v) { return v ? &*v : nullptr; }

class Context {
public:
    Context(const Program& program, const Section& section, Backend& backend, Constants& constants);

    const Program& program;
    Backend& backend;
    Constants& constants;
    const Graph graph;
    Fusion fusion;
    Buffers buffers;
    std::vector<Use> uses;  // of each step
    Foreknown foreknown;
    Lowered result;
    int node_index = -1;  // of the node that is lowered; -1: inputs or outputs

    const Node& node() const { return graph.node(node_index); }

    // --- buffers and steps

    int new_buffer(Storage storage, std::int64_t bytes, std::byte* address = nullptr);
    bool is_constant(const View& v) const { return buffers[v.buffer].storage == Storage::constant; }
    View allocate(DType dtype, Dims dims, Dims strides, std::optional<QParams> q = std::nullopt, bool is_real = false);
    // For the result that is the program's value `index`, in the form that suits its readers.
    View allocate_result(const Dims& dims, const Dims& strides, int index);
    // A new tensor of x's kind that pieces of codes or numbers are copied into.
    View allocate_like(const View& x, const Dims& dims, const Dims& strides);

    Tensor tensor(const View& v);
    OptionalTensor tensor(const std::optional<View>& v);
    // A tensor's bytes as plain integers.
    Tensor plain_tensor(const View& v);

    // What the step reads, and all that it writes; null is no operand.
    void emit(std::unique_ptr<Step> step, std::initializer_list<const View*> reads,
              std::initializer_list<const View*> writes);
    // The last step reads it.
    void also_reads(const View& v);

    // --- values

    const Val& value(int index) const { return values_[static_cast<std::size_t>(index)]; }
    void define(int index, Val v) { values_[static_cast<std::size_t>(index)] = std::move(v); }
    // Whether nothing reads the view's buffer after this node, and it may be written.
    bool dies_here(const View& v) const;
    // A stored tensor.
    View constant(const std::string& name);
    // start, start + step, and so on: f32 or integers that are known now, so that no step computes them.
    View counted(std::int64_t start, std::int64_t step, std::int64_t count, DType dtype);
    // One flag, repeated.
    View flags(bool flag, const Dims& dims);

    // --- arguments of the node, by position or name

    const Arg* argument(std::size_t position, const char* name) const;
    bool has(std::size_t position, const char* name) const;
    Val evaluated(const Arg& a);
    // The numbers that an argument is or names, if they are known by now.
    std::optional<Dims> known_integers(const Arg& a);
    // A tensor that an argument names, if it is computed by now.
    std::optional<View> known(const Arg& a);
    View operand(std::size_t position, const char* name);
    // One that must be f32, or codes of a float: PyTorch refuses integers there, or computes in them.
    View real_operand(std::size_t position, const char* name);
    std::optional<View> optional_operand(std::size_t position, const char* name);
    // All tensors of a list, the first argument.
    std::vector<View> operands();
    std::int64_t integer(std::size_t position, const char* name, std::optional<std::int64_t> fallback = std::nullopt);
    double real(std::size_t position, const char* name, std::optional<double> fallback = std::nullopt);
    bool flag(std::size_t position, const char* name, bool fallback);
    // The keyword `dtype`; null: none is named.
    std::optional<DType> asked_dtype();
    Dims integers(std::size_t position, const char* name, std::optional<Dims> fallback = std::nullopt);

    // --- moving values

    View copied(const View& x, Dims strides, DType dtype, std::optional<QParams> q, bool is_real = false);
    // A copy of x into part of another tensor.
    void put(const View& x, const View& y);
    View in_layout(const View& x, const Dims& strides);
    View in_row_major(const View& x) { return in_layout(x, row_major(x.dims)); }
    View in_channels_last(const View& x) { return in_layout(x, channels_last(x.dims)); }
    View reshaped(const View& x, const Dims& dims);
    // A view without repeated elements, so that its layout can be copied.
    View spread_out(const View& x);
    // The value as plain numbers: codes that stand for a float are dequantized.
    View plain(const View& x);
    View as_f32(const View& x);
    // A real operand: f32, or codes that the kernel dequantizes itself.
    View as_real_operand(const View& x) { return x.q ? x : as_f32(x); }
    // One element, repeated to `like`'s dimensions.
    View number_like(double number, const View& like);
    // Whether `number` is one of x's kind, so that no dtype changes and nothing is cut off.
    static bool holds(const View& x, const Val& number);

private:
    std::vector<Val> values_;
    std::unordered_map<std::string, int> constant_buffers_;

    View literal(DType dtype, Dims dims, std::vector<std::byte> bytes);
};

}  // namespace quantflow::lowering
