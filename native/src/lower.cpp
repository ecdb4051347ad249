#include "lower.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

namespace quantflow {
namespace {

using Dims = std::vector<std::int64_t>;

// A value while steps are chosen: a view of a buffer. Codes with `is_real` stand for a float32 value of the program
// whose dequantize (or quantize) was folded into the kernels around it.
struct View {
    int buffer = -1;
    std::int64_t offset = 0;  // bytes
    DType dtype = DType::f32;
    Dims dims, strides;
    std::optional<QParams> q;
    bool is_real = false;

    int rank() const { return static_cast<int>(dims.size()); }
    std::int64_t count() const {
        std::int64_t n = 1;
        for (auto d : dims) n *= d;
        return n;
    }
    bool is_plain() const { return !q; }
};

struct Val;
using Vals = std::vector<Val>;
struct Val : std::variant<std::monostate, View, std::int64_t, double, bool, Vals> {
    using variant::variant;
    template <typename T>
    const T* as() const {
        return std::get_if<T>(static_cast<const variant*>(this));
    }
};

// Bounds padding and windows, so that arithmetic on them stays inside int64.
constexpr std::int64_t kMaxPad = std::int64_t{1} << 31;

enum class Place_ : std::uint8_t { arena, input, output, constant };

struct Buffer {
    Place_ place = Place_::arena;
    std::int64_t bytes = 0;
    int first = -1, last = -1;  // steps that touch it
};

std::string base_name(const std::string& target) { return target.substr(0, target.find('.')); }

// Elements of a tensor of these dimensions; a program may ask for any, so negative and huge ones are refused.
std::int64_t checked_count(const Dims& dims) {
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    std::int64_t n = 1, without_zeros = 1;
    for (auto d : dims) {
        if (d < 0 || d > kMost) throw Error("a dimension of " + std::to_string(d));
        without_zeros *= std::max<std::int64_t>(d, 1);
        if (without_zeros > kMost) throw Error("a tensor of more than 2^40 elements");
        n *= d;
    }
    if (dims.size() > 16) throw Error("a tensor of more than 16 dimensions");
    return n;
}

// The layout of `v` made dense: the same order of dimensions in memory, no gaps.
Dims dense_like(const View& v) {
    std::vector<std::size_t> order(v.dims.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return v.strides[a] > v.strides[b]; });
    Dims strides(v.dims.size());
    std::int64_t step = 1;
    for (std::size_t i = order.size(); i-- > 0;) {
        strides[order[i]] = step;
        step *= v.dims[order[i]];
    }
    return strides;
}

// Strides of a view of `v` with other dimensions and the same elements in row-major order, if no copy is needed.
std::optional<Dims> strides_for_reshape(const View& v, const Dims& dims) {
    if (v.count() == 0) return row_major(dims);
    Dims strides(dims.size());
    int to = static_cast<int>(dims.size()) - 1;
    std::int64_t chunk = 1, covered = 1;
    std::int64_t base = v.rank() > 0 ? v.strides.back() : 1;
    for (int from = v.rank() - 1; from >= 0; --from) {
        chunk *= v.dims[static_cast<std::size_t>(from)];
        const bool ends = from == 0 || (v.dims[static_cast<std::size_t>(from) - 1] != 1 &&
                                        v.strides[static_cast<std::size_t>(from) - 1] != chunk * base);
        if (!ends) continue;
        while (to >= 0 && (covered < chunk || dims[static_cast<std::size_t>(to)] == 1)) {
            strides[static_cast<std::size_t>(to)] = covered * base;
            covered *= dims[static_cast<std::size_t>(to)];
            --to;
        }
        if (covered != chunk) return std::nullopt;
        if (from > 0) {
            base = v.strides[static_cast<std::size_t>(from) - 1];
            chunk = covered = 1;
        }
    }
    for (; to >= 0; --to) strides[static_cast<std::size_t>(to)] = 1;
    return strides;
}

class Lowering {
public:
    Lowering(const Program& program, const Section& section, const std::vector<InputForm>& forms, Backend& backend,
             Constants& constants)
        : program_(program), section_(section), forms_(forms), backend_(backend), constants_(constants) {}

    Lowered run() {
        values_.resize(program_.values.size());
        done_.assign(program_.nodes.size(), false);
        take_inputs();
        for (node_ = section_.first; node_ < section_.last; ++node_) {
            if (done_[static_cast<std::size_t>(node_)]) continue;
            try {
                lower_node(program_.nodes[static_cast<std::size_t>(node_)]);
            } catch (const Unsupported& error) {
                throw Unsupported("node " + std::to_string(node_) + ": " + label() + ": " + error.what());
            } catch (const Error& error) {
                throw Error(label() + ": " + error.what());
            }
        }
        node_ = -1;
        give_outputs();
        plan_arena();
        return std::move(result_);
    }

private:
    const Program& program_;
    const Section& section_;
    const std::vector<InputForm>& forms_;
    Backend& backend_;
    Constants& constants_;
    Lowered result_;
    std::vector<Val> values_;
    std::vector<bool> done_;
    std::vector<Buffer> buffers_;
    std::unordered_map<std::string, int> constant_buffers_;
    std::unordered_map<int, View> dequantized_;  // value → its float32 copy
    // Value → zeros around it, which the convolution that reads it pads: it is defined without them.
    struct Border {
        Dims before, after;  // per spatial dimension
    };
    std::unordered_map<int, Border> borders_;
    // Products that the next node adds to its own sum, in order: its step computes them, too.
    struct Pending {
        const Node* node;
        View x;
        std::optional<View> residual;
    };
    std::vector<Pending> pending_;
    int node_ = -1;

    std::string label() const { return "layer " + program_.nodes[static_cast<std::size_t>(node_)].label(); }
    const Node& node() const { return program_.nodes[static_cast<std::size_t>(node_)]; }

    // --- buffers and steps

    int new_buffer(Place_ place, std::int64_t bytes, std::byte* address = nullptr) {
        buffers_.push_back({place, bytes, -1, -1});
        result_.cells.push_back(address);
        return static_cast<int>(buffers_.size()) - 1;
    }

    View allocate(DType dtype, Dims dims, Dims strides, std::optional<QParams> q = std::nullopt,
                  bool is_real = false) {
        const std::int64_t count = checked_count(dims);
        View v;
        v.dtype = dtype;
        v.dims = std::move(dims);
        v.strides = std::move(strides);
        v.q = q;
        v.is_real = is_real;
        v.buffer = new_buffer(Place_::arena, count * size_of(dtype));
        return v;
    }

    View allocate_plain(DType dtype, const Dims& dims) { return allocate(dtype, dims, row_major(dims)); }

    Tensor tensor(const View& v) {
        Tensor t;
        t.dtype = v.dtype;
        t.dims = v.dims;
        t.strides = v.strides;
        t.q = v.q;
        t.place = {&result_.cells[static_cast<std::size_t>(v.buffer)], v.offset};
        return t;
    }

    void emit(std::unique_ptr<Step> step, std::initializer_list<const View*> touched) {
        result_.steps.push_back({std::move(step), node_});
        for (const View* v : touched)
            if (v != nullptr) touch(*v);
    }
    // The last step reads or writes it.
    void touch(const View& v) {
        const int index = static_cast<int>(result_.steps.size()) - 1;
        Buffer& b = buffers_[static_cast<std::size_t>(v.buffer)];
        if (b.first < 0) b.first = index;
        b.last = index;
    }

    // --- values

    const Val& value(int index) const { return values_[static_cast<std::size_t>(index)]; }
    void define(int index, Val v) { values_[static_cast<std::size_t>(index)] = std::move(v); }

    struct StoredAs {
        DType dtype;
        QParams q;
        std::int32_t shift;  // stored code = program's code + shift
    };

    StoredAs stored_as(const Value& v) const {
        if (!v.is_signed) return {DType::u8, *v.q, 0};
        QParams q = *v.q;
        if (backend_.stores_unsigned()) {
            q.zero_point += 128;
            q.qmin = 0;
            q.qmax = 255;
            return {DType::u8, q, 128};
        }
        if (v.is_nonnegative) {  // the same integers, without the compensation that s8 x s8 needs
            q.qmin = 0;
            return {DType::u8, q, 0};
        }
        return {DType::s8, q, 0};
    }

    // How a backend receives the program's own codes at the section's ends.
    static std::pair<DType, QParams> outside(const Value& v) { return {v.is_signed ? DType::s8 : DType::u8, *v.q}; }

    void take_inputs() {
        for (std::size_t i = 0; i < section_.inputs.size(); ++i) {
            const InputForm& form = forms_[i];
            const int index = section_.inputs[i];
            const Value& v = program_.values[static_cast<std::size_t>(index)];
            if (form.is_number) {
                result_.input_cells.push_back(-1);
                define(index, form.number);
                continue;
            }
            View view;
            view.dtype = form.dtype;
            view.dims = form.dims;
            view.strides = form.is_channels_last ? channels_last(form.dims) : row_major(form.dims);
            view.buffer = new_buffer(Place_::input, view.count() * size_of(form.dtype));
            result_.input_cells.push_back(view.buffer);
            if (v.q) {
                const auto [dtype, q] = outside(v);
                if (form.dtype != dtype) throw Error("input '" + v.name + "' is not the int8 codes it should be");
                view.q = q;
                const StoredAs stored = stored_as(v);
                if (stored.dtype != dtype || !(stored.q == q)) view = copied(view, dense_like(view), stored.dtype, stored.q);
            }
            define(index, view);
        }
    }

    void give_outputs() {
        for (int index : section_.outputs) {
            const Val& v = value(index);
            OutputForm form;
            if (const auto* number = v.as<std::int64_t>()) {
                form.is_number = true;
                form.number = *number;
                result_.outputs.push_back(form);
                result_.output_cells.push_back(-1);
                continue;
            }
            const View* view = v.as<View>();
            if (view == nullptr) throw Unsupported("node " + std::to_string(program_.values[static_cast<std::size_t>(index)].producer) +
                                                   ": its value is no tensor and can't leave");
            View out = *view;
            const Value& program_value = program_.values[static_cast<std::size_t>(index)];
            std::optional<QParams> q;
            DType dtype = view->dtype;
            if (program_value.q) {
                const auto [d, p] = outside(program_value);
                dtype = d;
                q = p;
            } else if (view->q) {
                dtype = DType::f32;
            }
            form.dtype = dtype;
            form.dims = view->dims;
            const bool same = view->dtype == dtype && view->q == q && view->offset == 0 &&
                              same_layout(view->dims, view->strides, row_major(view->dims));
            const Buffer& b = buffers_[static_cast<std::size_t>(view->buffer)];
            const bool owns = b.place == Place_::arena && b.bytes == view->count() * size_of(dtype) && b.first >= 0;
            if (same && owns) {
                buffers_[static_cast<std::size_t>(view->buffer)].place = Place_::output;
            } else {
                View target;
                target.dtype = dtype;
                target.dims = view->dims;
                target.strides = row_major(view->dims);
                target.q = q;
                target.buffer = new_buffer(Place_::output, target.count() * size_of(dtype));
                emit(backend_.copy(tensor(*view), tensor(target)), {view, &target});
                out = target;
            }
            result_.outputs.push_back(form);
            result_.output_cells.push_back(out.buffer);
        }
    }

    // Arena offsets: the largest buffers first, each at the lowest place that is free while it lives.
    void plan_arena() {
        std::vector<int> order;
        for (int i = 0; i < static_cast<int>(buffers_.size()); ++i)
            if (buffers_[static_cast<std::size_t>(i)].place == Place_::arena && buffers_[static_cast<std::size_t>(i)].first >= 0)
                order.push_back(i);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
            return buffers_[static_cast<std::size_t>(a)].bytes > buffers_[static_cast<std::size_t>(b)].bytes;
        });
        result_.arena_offsets.assign(buffers_.size(), -1);
        std::vector<int> placed;
        for (int i : order) {
            const Buffer& b = buffers_[static_cast<std::size_t>(i)];
            const std::int64_t size = (b.bytes + 63) / 64 * 64;
            std::vector<std::pair<std::int64_t, std::int64_t>> taken;
            for (int j : placed) {
                const Buffer& other = buffers_[static_cast<std::size_t>(j)];
                if (other.first <= b.last && b.first <= other.last) {
                    const std::int64_t at = result_.arena_offsets[static_cast<std::size_t>(j)];
                    taken.emplace_back(at, at + (other.bytes + 63) / 64 * 64);
                }
            }
            std::sort(taken.begin(), taken.end());
            std::int64_t at = 0;
            for (const auto& [from, to] : taken) {
                if (at + size <= from) break;
                at = std::max(at, to);
            }
            result_.arena_offsets[static_cast<std::size_t>(i)] = at;
            result_.arena_bytes = std::max(result_.arena_bytes, at + size);
            placed.push_back(i);
        }
    }

    // --- arguments of a node

    const Arg* argument(std::size_t position, const char* name) const {
        if (position < node().args.size()) return &node().args[position];
        const auto it = node().kwargs.find(name);
        return it == node().kwargs.end() ? nullptr : &it->second;
    }
    bool has(std::size_t position, const char* name) const {
        const Arg* a = argument(position, name);
        return a != nullptr && !a->is_none();
    }

    Val evaluated(const Arg& a) {
        if (const auto* ref = a.as<Ref>()) return value(ref->value);
        if (const auto* t = a.as<TensorRef>()) return constant(t->name);
        if (const auto* i = a.as<std::int64_t>()) return *i;
        if (const auto* d = a.as<double>()) return *d;
        if (const auto* b = a.as<bool>()) return *b;
        if (const auto* items = a.as<Args>()) {
            Vals out;
            for (const Arg& item : *items) out.push_back(evaluated(item));
            return out;
        }
        return std::monostate{};
    }

    View constant(const std::string& name) {
        const Stored& stored = program_.tensors.at(name);
        if (stored.data == nullptr && stored.count() != 0) throw Unsupported("tensor '" + name + "' has a dtype without kernels");
        auto [it, is_new] = constant_buffers_.emplace(name, -1);
        if (is_new) it->second = new_buffer(Place_::constant, 0, constants_.get(name));
        View v;
        v.buffer = it->second;
        v.dtype = stored.dtype;
        v.dims = stored.dims;
        v.strides = row_major(stored.dims);
        return v;
    }

    View operand(std::size_t position, const char* name) {
        const Arg* a = argument(position, name);
        if (a != nullptr) {
            const Val v = evaluated(*a);
            if (const auto* view = v.as<View>()) return *view;
        }
        throw Unsupported(std::string("argument '") + name + "' is no tensor");
    }

    std::int64_t integer(std::size_t position, const char* name, std::optional<std::int64_t> fallback = std::nullopt) {
        const Arg* a = argument(position, name);
        if (a != nullptr && !a->is_none()) return as_integer(evaluated(*a), name);
        if (fallback) return *fallback;
        throw Unsupported(std::string("argument '") + name + "' is missing");
    }

    static std::int64_t as_integer(const Val& v, const char* name) {
        if (const auto* i = v.as<std::int64_t>()) return *i;
        if (const auto* b = v.as<bool>()) return *b ? 1 : 0;
        throw Unsupported(std::string("argument '") + name + "' is no integer");
    }

    double real(std::size_t position, const char* name, std::optional<double> fallback = std::nullopt) {
        const Arg* a = argument(position, name);
        if (a != nullptr && !a->is_none()) return as_real(evaluated(*a), name);
        if (fallback) return *fallback;
        throw Unsupported(std::string("argument '") + name + "' is missing");
    }

    static double as_real(const Val& v, const char* name) {
        if (const auto* d = v.as<double>()) return *d;
        return static_cast<double>(as_integer(v, name));
    }

    bool flag(std::size_t position, const char* name, bool fallback) {
        const Arg* a = argument(position, name);
        return a == nullptr || a->is_none() ? fallback : as_integer(evaluated(*a), name) != 0;
    }

    Dims integers(std::size_t position, const char* name, std::optional<Dims> fallback = std::nullopt) {
        const Arg* a = argument(position, name);
        if (a == nullptr || a->is_none()) {
            if (fallback) return *fallback;
            throw Unsupported(std::string("argument '") + name + "' is missing");
        }
        const Val v = evaluated(*a);
        if (const auto* items = v.as<Vals>()) {
            Dims out;
            for (const Val& item : *items) out.push_back(as_integer(item, name));
            return out;
        }
        return {as_integer(v, name)};
    }

    static int axis(std::int64_t dim, int rank) {
        const std::int64_t at = dim < 0 ? dim + rank : dim;
        if (at < 0 || at >= rank) throw Error("dimension " + std::to_string(dim) + " of a tensor of rank " + std::to_string(rank));
        return static_cast<int>(at);
    }

    // --- moving values

    View copied(const View& x, Dims strides, DType dtype, std::optional<QParams> q, bool is_real = false) {
        View y = allocate(dtype, x.dims, std::move(strides), q, is_real);
        emit(backend_.copy(tensor(x), tensor(y)), {&x, &y});
        return y;
    }
    View in_layout(const View& x, const Dims& strides) {
        return same_layout(x.dims, x.strides, strides) ? x : copied(x, strides, x.dtype, x.q, x.is_real);
    }
    View in_row_major(const View& x) { return in_layout(x, row_major(x.dims)); }
    View in_channels_last(const View& x) { return in_layout(x, channels_last(x.dims)); }

    // The value as plain numbers: codes that stand for a float are dequantized.
    View plain(const View& x) { return x.q ? copied(x, dense_like(x), DType::f32, std::nullopt) : x; }
    View as_f32(const View& x) {
        if (x.q) return plain(x);
        return x.dtype == DType::f32 ? x : copied(x, dense_like(x), DType::f32, std::nullopt);
    }
    // A real operand: f32, or codes that the kernel dequantizes itself.
    View as_real_operand(const View& x) { return x.q ? x : as_f32(x); }

    View number_like(double number, const View& like) {
        View one = allocate(like.q ? DType::f32 : like.dtype, {1}, {1});
        emit(backend_.fill(number, tensor(one)), {&one});
        one.dims = like.dims;
        one.strides.assign(like.dims.size(), 0);
        return one;
    }

    // --- results

    static bool moves_only(const Node& n) {
        static const char* const kMoves[] = {"reshape", "view", "flatten", "permute", "transpose", "t", "slice", "select",
                                             "squeeze", "unsqueeze", "unflatten", "narrow", "contiguous", "clone"};
        if (n.op != Op::aten) return false;
        const std::string base = base_name(n.target);
        return std::any_of(std::begin(kMoves), std::end(kMoves), [&](const char* m) { return base == m; });
    }

    bool is_output(int index) const {
        return std::find(section_.outputs.begin(), section_.outputs.end(), index) != section_.outputs.end();
    }
    bool is_inside(int node) const { return node >= section_.first && node < section_.last; }

    // The codes that every reader of a float value quantizes it to, if they all agree: then it is written as codes.
    // `is_legal` false: some reader needs the float.
    void collect_codes(int index, std::optional<StoredAs>& found, bool& is_legal) const {
        const Value& v = program_.values[static_cast<std::size_t>(index)];
        if (is_output(index)) is_legal = false;
        for (int user : v.users) {
            if (!is_legal) return;
            const Node& n = program_.nodes[static_cast<std::size_t>(user)];
            if (!is_inside(user)) {
                is_legal = false;
            } else if (n.op == Op::quantize) {
                const StoredAs s = stored_as(program_.values[static_cast<std::size_t>(n.output)]);
                if (found && !(found->q == s.q && found->dtype == s.dtype)) is_legal = false;
                found = s;
            } else if (moves_only(n)) {
                collect_codes(n.output, found, is_legal);
            } else if (n.op != Op::size) {
                is_legal = false;
            }
        }
    }

    struct Form {
        DType dtype = DType::f32;
        std::optional<QParams> q;
        bool is_real = false;
    };

    Form form_of(int index) const {
        const Value& v = program_.values[static_cast<std::size_t>(index)];
        if (v.q) {
            const StoredAs s = stored_as(v);
            return {s.dtype, s.q, false};
        }
        std::optional<StoredAs> codes;
        bool is_legal = true;
        collect_codes(index, codes, is_legal);
        if (is_legal && codes) return {codes->dtype, codes->q, true};
        return {};
    }

    View result(const Dims& dims, const Dims& strides, int index) {
        const Form form = form_of(index);
        return allocate(form.dtype, dims, strides, form.q, form.is_real);
    }

    // Whether a convolution reads the value (then channels_last is the layout to produce).
    bool feeds_conv(int index) const {
        for (int user : program_.values[static_cast<std::size_t>(index)].users) {
            const Node& n = program_.nodes[static_cast<std::size_t>(user)];
            if (n.op == Op::conv || n.op == Op::max_pool || n.op == Op::avg_pool) return true;
            if (n.op == Op::quantize && feeds_conv(n.output)) return true;
        }
        return false;
    }

    // The one node that reads a value; -1: there are more, or some outside.
    int only_user(int index) const {
        const Value& v = program_.values[static_cast<std::size_t>(index)];
        return v.users.size() == 1 && !is_output(index) && is_inside(v.users[0]) ? v.users[0] : -1;
    }

    // An activation that alone reads this node's float result, fused; returns the value that is then defined.
    int fuse_activation(int index, Epilogue& epilogue) {
        const int user = only_user(index);
        if (program_.values[static_cast<std::size_t>(index)].q || user < 0) return index;
        const Node& n = program_.nodes[static_cast<std::size_t>(user)];
        if (n.op != Op::aten || n.args.empty() || n.args[0].as<Ref>() == nullptr) return index;
        const auto found = activation_of(n);
        if (!found) return index;
        epilogue = *found;
        done_[static_cast<std::size_t>(user)] = true;
        return n.output;
    }

    static double plain_number(const Arg& a) {
        if (const auto* i = a.as<std::int64_t>()) return static_cast<double>(*i);
        if (const auto* d = a.as<double>()) return *d;
        throw Unsupported("a bound is no number");
    }

    static std::optional<Epilogue> activation_of(const Node& n) {
        const std::string base = base_name(n.target);
        const double inf = std::numeric_limits<double>::infinity();
        const auto get = [&](std::size_t i, const char* name, double fallback) {
            const Arg* a = nullptr;
            if (i < n.args.size()) {
                a = &n.args[i];
            } else if (const auto it = n.kwargs.find(name); it != n.kwargs.end()) {
                a = &it->second;
            }
            return a == nullptr || a->is_none() ? fallback : plain_number(*a);
        };
        const auto clamp = [](double low, double high) {
            return Epilogue{Activation::hardtanh, static_cast<float>(low), static_cast<float>(high)};
        };
        if (base == "relu") return Epilogue{Activation::relu};
        if (base == "relu6") return clamp(0, 6);
        if (base == "hardtanh") return clamp(get(1, "min_val", -1), get(2, "max_val", 1));
        if (n.target == "clamp.default") return clamp(get(1, "min", -inf), get(2, "max", inf));
        if (n.target == "clamp_min.default") return clamp(get(1, "min", -inf), inf);
        if (n.target == "clamp_max.default") return clamp(-inf, get(1, "max", inf));
        if (base == "leaky_relu") return Epilogue{Activation::leaky_relu, static_cast<float>(get(1, "negative_slope", 0.01))};
        if (base == "hardswish") return Epilogue{Activation::hardswish};
        if (base == "hardsigmoid") return Epilogue{Activation::hardsigmoid};
        if (base == "silu") return Epilogue{Activation::silu};
        if (base == "sigmoid") return Epilogue{Activation::sigmoid};
        if (base == "tanh") return Epilogue{Activation::tanh};
        if (base == "gelu") {
            const auto it = n.kwargs.find("approximate");
            const Arg* a = n.args.size() > 1 ? &n.args[1] : it == n.kwargs.end() ? nullptr : &it->second;
            const Word* word = a == nullptr ? nullptr : a->as<Word>();
            return Epilogue{word != nullptr && word->name == "tanh" ? Activation::gelu_tanh : Activation::gelu};
        }
        return std::nullopt;
    }

    // --- nodes

    void lower_node(const Node& n) {
        switch (n.op) {
            case Op::quantize: return quantize(n);
            case Op::dequantize: return dequantize(n);
            case Op::conv:
            case Op::linear: return linear(n);
            case Op::matmul: return int8_matmul(n);
            case Op::add: return binary_node(Binary::add, operand(0, "self"), operand(1, "other"), n.output, n.epilogue);
            case Op::mul: return binary_node(Binary::mul, operand(0, "self"), operand(1, "other"), n.output, n.epilogue);
            case Op::clamp: return clamp_codes(n);
            case Op::size: return define(n.output, size_value(n));
            default: break;
        }
        const auto& table = handlers();
        const auto it = table.find(n.target == "getitem" ? n.target : base_name(n.target));
        if (it == table.end()) throw Unsupported("has no native kernel");
        (this->*it->second)(n);
    }

    void quantize(const Node& n) {
        const View x = operand(0, "self");
        const StoredAs s = stored_as(program_.values[static_cast<std::size_t>(n.output)]);
        if (x.q && x.is_real && *x.q == s.q && x.dtype == s.dtype) {  // written as these codes already
            View codes = x;
            codes.is_real = false;
            return define(n.output, codes);
        }
        const bool images = x.rank() >= 4 || (x.rank() == 3 && feeds_conv(n.output));
        const Dims strides = images && feeds_conv(n.output) ? channels_last(x.dims) : dense_like(x);
        define(n.output, copied(as_real_operand(x), strides, s.dtype, s.q));
    }

    void dequantize(const Node& n) {
        View x = operand(0, "self");
        x.is_real = true;
        define(n.output, x);
    }

    void linear(const Node& n) {
        const bool is_conv = n.op == Op::conv;
        View x = operand(0, "input");
        ConvGeometry geometry = n.geometry;
        const std::int64_t out = n.weights.dims[0];
        Dims dims = x.dims;
        Dims strides;
        if (is_conv) {
            const std::size_t spatial = n.weights.dims.size() - 2;
            if (x.dims.size() != spatial + 2)
                throw Error("takes " + std::to_string(spatial + 2) + " dimensions, has " + std::to_string(x.rank()));
            if (x.dims[1] != n.weights.dims[1] * n.geometry.groups)
                throw Error("takes " + std::to_string(n.weights.dims[1] * n.geometry.groups) + " channels, has " +
                            std::to_string(x.dims[1]));
            dims[1] = out;
            const auto border = borders_.find(n.args[0].as<Ref>()->value);
            for (std::size_t i = 0; i < spatial; ++i) {
                const std::int64_t span = geometry.dilation[i] * (n.weights.dims[i + 2] - 1) + 1;
                std::int64_t room = x.dims[i + 2] + 2 * geometry.padding[i] - span;
                if (border != borders_.end()) {
                    room += border->second.before[i] + border->second.after[i];
                    geometry.padding[i] += border->second.before[i];
                }
                if (room < 0) throw Error("its input is smaller than its kernel");
                dims[i + 2] = room / geometry.stride[i] + 1;
            }
            x = in_channels_last(x);
            strides = channels_last(dims);
        } else {
            if (x.dims.empty() || x.dims.back() != n.weights.dims[1])
                throw Error("takes " + std::to_string(n.weights.dims[1]) + " features, has " +
                            (x.dims.empty() ? std::string("none") : std::to_string(x.dims.back())));
            dims.back() = out;
            x = in_row_major(x);
            strides = row_major(dims);
        }
        const auto step_of = [&](const View& to, const View* residual, const Epilogue& epilogue,
                                 const Terms& terms = {}) {
            std::optional<Tensor> tr;
            if (residual != nullptr) tr = tensor(*residual);
            const Tensor* pr = tr ? &*tr : nullptr;
            return is_conv ? backend_.conv(n.weights, geometry, tensor(x), pr, epilogue, tensor(to), terms)
                           : backend_.linear(n.weights, tensor(x), pr, epilogue, tensor(to), terms);
        };
        const std::vector<Pending> products = std::exchange(pending_, {});
        std::optional<View> residual;
        bool adds_reals = false;
        if (!products.empty()) {
            residual = products[0].residual;
        } else if (!n.args[1].is_none()) {
            residual = operand(1, "residual");
            if (residual->dims != dims) throw Unsupported("a residual that broadcasts");
            adds_reals = !program_.values[static_cast<std::size_t>(n.args[1].as<Ref>()->value)].q;
            if (adds_reals) residual = as_f32(*residual);
        }
        if (residual) residual = in_layout(*residual, strides);
        if (products.size() < Terms::kMost && is_added_next(n) && !dims_empty(dims)) {
            pending_ = products;
            pending_.push_back({&n, x, products.empty() ? residual : std::nullopt});
            return;
        }
        const Form form = form_of(n.output);
        if (adds_reals && !backend_.takes_terms() && !dims_empty(dims)) {
            const View product = allocate(DType::f32, dims, strides);
            emit(step_of(product, nullptr, {}), {&x, &product});
            const View y = allocate(form.dtype, dims, strides, form.q, form.is_real);
            emit(backend_.binary(Binary::add, tensor(product), tensor(*residual), n.epilogue, tensor(y)),
                 {&product, &*residual, &y});
            return define(n.output, y);
        }
        View y;
        if (residual && products.empty()) {
            const bool in_place = form.q && residual->dtype == form.dtype && !form.is_real && dies_here(*residual, n) &&
                                  residual->buffer != x.buffer;
            if (in_place) {
                y = *residual;
                y.q = form.q;
            }
        }
        const bool is_empty = dims_empty(dims);
        const std::optional<TwoTerms> written = is_empty ? std::nullopt : two_terms(n.output);
        std::optional<View> rest;
        if (written) {
            y = allocate(written->first.dtype, dims, strides, written->first.q);
            rest = allocate(written->second.dtype, dims, strides, written->second.q);
            define(written->codes, y);
            define(written->rest, *rest);
        } else {
            if (y.buffer < 0) y = allocate(form.dtype, dims, strides, form.q, form.is_real);
            define(n.output, y);
        }
        if (is_empty) return emit(backend_.fill(0, plain_view(y)), {&y});
        Terms terms;
        std::optional<Tensor> rest_tensor;
        if (rest) rest_tensor = tensor(*rest);
        if (rest) terms.rest = &*rest_tensor;
        for (const Pending& product : products) terms.products.push_back({product.node->weights, tensor(product.x)});
        const View* added = residual ? &*residual : nullptr;
        emit(step_of(y, added, n.epilogue, terms), {&x, &y, added, rest ? &*rest : nullptr});
        for (const Pending& product : products) touch(product.x);
    }

    // Whether the next node adds this one's float result, which nothing else reads, to a product of the same shapes.
    bool is_added_next(const Node& n) const {
        const int next = node_ + 1;
        if (!backend_.takes_terms() || n.epilogue.kind != Activation::none || only_user(n.output) != next ||
            program_.values[static_cast<std::size_t>(n.output)].q)
            return false;
        const Node& u = program_.nodes[static_cast<std::size_t>(next)];
        if (u.op != n.op || u.weights.dims != n.weights.dims) return false;
        const auto *x = n.args[0].as<Ref>(), *ux = u.args[0].as<Ref>(), *added = u.args[1].as<Ref>();
        const auto of = [&](const Ref* r) -> const View* {
            return r == nullptr ? nullptr : value(r->value).template as<View>();
        };
        const View *view = of(x), *other = of(ux);
        if (added == nullptr || added->value != n.output || view == nullptr || other == nullptr ||
            view->dims != other->dims)
            return false;
        const auto border = borders_.find(x->value), other_border = borders_.find(ux->value);
        const bool have = border != borders_.end(), others = other_border != borders_.end();
        return have == others && (!have || (border->second.before == other_border->second.before &&
                                            border->second.after == other_border->second.after)) &&
               u.geometry.stride == n.geometry.stride && u.geometry.padding == n.geometry.padding &&
               u.geometry.dilation == n.geometry.dilation && u.geometry.groups == n.geometry.groups;
    }

    // The two values that a float one is written as: its codes, and those of what they leave over.
    struct TwoTerms {
        int codes, rest;
        StoredAs first, second;
    };

    // Where all that reads a float value is quantize and x - dequantize(quantize(x)), itself only quantized: these are
    // done then, too.
    std::optional<TwoTerms> two_terms(int index) {
        const Value& v = program_.values[static_cast<std::size_t>(index)];
        if (!backend_.takes_terms() || v.q || is_output(index) || v.users.size() != 2 || !is_inside(v.users[0]) ||
            !is_inside(v.users[1]))
            return std::nullopt;
        const Node& quantize = program_.nodes[static_cast<std::size_t>(v.users[0])];
        const Node& sub = program_.nodes[static_cast<std::size_t>(v.users[1])];
        if (quantize.op != Op::quantize || sub.op != Op::aten || sub.target != "sub.Tensor" || sub.args.size() != 2 ||
            !sub.kwargs.empty())
            return std::nullopt;
        const auto *from = sub.args[0].as<Ref>(), *what = sub.args[1].as<Ref>();
        if (from == nullptr || what == nullptr || from->value != index) return std::nullopt;
        const int maker = program_.values[static_cast<std::size_t>(what->value)].producer, last = only_user(sub.output);
        if (maker < 0 || last < 0) return std::nullopt;
        const Node& dequantize = program_.nodes[static_cast<std::size_t>(maker)];
        const Node& rest = program_.nodes[static_cast<std::size_t>(last)];
        const auto* codes = dequantize.args.empty() ? nullptr : dequantize.args[0].as<Ref>();
        if (dequantize.op != Op::dequantize || codes == nullptr || codes->value != quantize.output ||
            rest.op != Op::quantize)
            return std::nullopt;
        for (int done : {v.users[0], v.users[1], last}) done_[static_cast<std::size_t>(done)] = true;
        const auto stored = [&](int code) { return stored_as(program_.values[static_cast<std::size_t>(code)]); };
        return TwoTerms{quantize.output, rest.output, stored(quantize.output), stored(rest.output)};
    }

    static bool dims_empty(const Dims& dims) {
        return std::any_of(dims.begin(), dims.end(), [](std::int64_t d) { return d == 0; });
    }

    // A tensor's bytes as plain integers.
    Tensor plain_view(const View& v) {
        Tensor t = tensor(v);
        t.q.reset();
        return t;
    }

    // Whether nothing reads the view's buffer after this node, and it may be written.
    bool dies_here(const View& v, const Node& n) const {
        if (buffers_[static_cast<std::size_t>(v.buffer)].place != Place_::arena) return false;
        if (buffers_[static_cast<std::size_t>(v.buffer)].bytes != v.count() * size_of(v.dtype)) return false;
        for (std::size_t i = 0; i < values_.size(); ++i) {
            if (!mentions(values_[i], v.buffer)) continue;
            if (is_output(static_cast<int>(i))) return false;
            const auto& users = program_.values[i].users;
            for (int user : users)
                if (user > node_ && !(is_inside(user) && done_[static_cast<std::size_t>(user)])) return false;
        }
        // Twice among this node's own operands: the kernel would read what it overwrites.
        int times = 0;
        for (const Arg& a : n.args)
            if (const auto* ref = a.as<Ref>(); ref != nullptr && mentions(value(ref->value), v.buffer)) ++times;
        return times <= 1;
    }

    static bool mentions(const Val& v, int buffer) {
        if (const auto* view = v.as<View>()) return view->buffer == buffer;
        if (const auto* items = v.as<Vals>())
            return std::any_of(items->begin(), items->end(), [&](const Val& item) { return mentions(item, buffer); });
        return false;
    }

    void int8_matmul(const Node& n) {
        View a = operand(0, "a"), b = operand(1, "b");
        multiply(a, b, n.output);
    }

    // a @ b with PyTorch's rules for ranks and broadcasting.
    void multiply(View a, View b, int output) {
        if (a.rank() == 0 || b.rank() == 0) throw Unsupported("matmul of a scalar");
        const bool drop_row = a.rank() == 1, drop_column = b.rank() == 1;
        if (drop_row) {
            a.dims.insert(a.dims.begin(), 1);
            a.strides.insert(a.strides.begin(), 0);
        }
        if (drop_column) {
            b.dims.push_back(1);
            b.strides.push_back(0);
        }
        const auto ra = a.dims.size(), rb = b.dims.size();
        if (a.dims[ra - 1] != b.dims[rb - 2]) throw Error("inner sizes of the product differ");
        const Dims batch = broadcast_dims(Dims(a.dims.begin(), a.dims.end() - 2), Dims(b.dims.begin(), b.dims.end() - 2));
        Dims da = batch, db = batch, dims = batch;
        da.insert(da.end(), {a.dims[ra - 2], a.dims[ra - 1]});
        db.insert(db.end(), {b.dims[rb - 2], b.dims[rb - 1]});
        dims.insert(dims.end(), {a.dims[ra - 2], b.dims[rb - 1]});
        const View ea = expanded(a, da), eb = expanded(b, db);
        View y = result(dims, row_major(dims), output);
        emit(backend_.matmul(tensor(ea), tensor(eb), 1.0f, tensor(y)), {&ea, &eb, &y});
        if (drop_row) erase_dim(y, static_cast<int>(dims.size()) - 2);
        if (drop_column) erase_dim(y, y.rank() - 1);
        define(output, y);
    }

    static void erase_dim(View& v, int at) {
        v.dims.erase(v.dims.begin() + at);
        v.strides.erase(v.strides.begin() + at);
    }

    // Sizes of PyTorch programs are far below; arithmetic on them may not overflow.
    static std::int64_t bounded(std::int64_t size) {
        if (size > (std::int64_t{1} << 40) || size < -(std::int64_t{1} << 40)) throw Error("a size of " + std::to_string(size));
        return size;
    }

    static Dims broadcast_dims(const Dims& a, const Dims& b) {
        Dims out(std::max(a.size(), b.size()));
        for (std::size_t i = 0; i < out.size(); ++i) {
            const std::int64_t x = i < a.size() ? a[a.size() - 1 - i] : 1, y = i < b.size() ? b[b.size() - 1 - i] : 1;
            if (x != y && x != 1 && y != 1) throw Error("shapes do not broadcast");
            out[out.size() - 1 - i] = x == 1 ? y : x;
        }
        return out;
    }

    static View expanded(const View& v, const Dims& dims) {
        checked_count(dims);
        if (dims.size() < v.dims.size()) throw Error("shapes do not broadcast");
        View out = v;
        out.dims = dims;
        out.strides.assign(dims.size(), 0);
        const std::size_t lead = dims.size() - v.dims.size();
        for (std::size_t i = 0; i < v.dims.size(); ++i) {
            if (v.dims[i] != dims[lead + i] && v.dims[i] != 1) throw Error("shapes do not broadcast");
            if (v.dims[i] == dims[lead + i]) out.strides[lead + i] = v.strides[i];
        }
        return out;
    }

    static bool is_comparison(Binary op) { return op >= Binary::eq; }

    void binary_node(Binary op, View a, View b, int output, Epilogue epilogue) {
        const Dims dims = broadcast_dims(a.dims, b.dims);
        const bool is_real = (a.q || a.dtype == DType::f32) || (b.q || b.dtype == DType::f32) || op == Binary::div;
        if (is_real) {
            a = as_real_operand(a);
            b = as_real_operand(b);
        } else if (a.dtype != b.dtype) {
            const DType wide = size_of(a.dtype) >= size_of(b.dtype) ? a.dtype : b.dtype;
            a = a.dtype == wide ? a : copied(a, dense_like(a), wide, std::nullopt);
            b = b.dtype == wide ? b : copied(b, dense_like(b), wide, std::nullopt);
        }
        const View ea = expanded(a, dims), eb = expanded(b, dims);
        const View& shape = a.dims == dims || b.dims != dims ? ea : eb;
        const bool gapless = shape.dims == dims && std::none_of(shape.strides.begin(), shape.strides.end(),
                                                               [](std::int64_t s) { return s == 0; });
        const Dims strides = gapless ? dense_like(shape) : row_major(dims);
        View y;
        if (is_comparison(op)) {
            y = allocate(DType::b8, dims, strides);
        } else if (is_real) {
            if (epilogue.kind == Activation::none) output = fuse_activation(output, epilogue);
            y = result(dims, strides, output);
        } else {
            y = allocate(a.dtype, dims, strides);
        }
        emit(backend_.binary(op, tensor(ea), tensor(eb), epilogue, tensor(y)), {&ea, &eb, &y});
        define(output, y);
    }

    void clamp_codes(const Node& n) {
        const View x = operand(0, "self");
        const StoredAs s = stored_as(program_.values[static_cast<std::size_t>(n.output)]);
        // Codes are compared, so the bounds are codes too: a clamp of the reals that they stand for.
        const QParams& q = *program_.values[static_cast<std::size_t>(n.output)].q;
        const auto bound = [&](std::int64_t code) {
            return static_cast<float>(code - q.zero_point) * q.scale;
        };
        View y = allocate(s.dtype, x.dims, dense_like(x), s.q);
        const Epilogue clamp{Activation::hardtanh, bound(n.low), bound(n.high)};
        emit(backend_.unary(Unary::activation, 0, 0, clamp, tensor(x), tensor(y)), {&x, &y});
        define(n.output, y);
    }

    Val size_value(const Node& n) {
        const std::string base = base_name(n.target);
        if (base == "sym_size") {
            const View x = operand(0, "self");
            return x.dims[static_cast<std::size_t>(axis(integer(1, "dim"), x.rank()))];
        }
        if (base == "sym_numel") return operand(0, "self").count();
        if (base == "getitem") {
            const Val items = evaluated(n.args.at(0));
            const auto* list = items.as<Vals>();
            if (list == nullptr) throw Unsupported("getitem of what is no list");
            const std::int64_t i = integer(1, "index");
            return (*list)[static_cast<std::size_t>(axis(i, static_cast<int>(list->size())))];
        }
        Vals args;
        for (const Arg& a : n.args) args.push_back(evaluated(a));
        const auto whole = [&](std::size_t i) { return bounded(as_integer(args.at(i), "a size")); };
        const bool is_pair = base != "neg" && base != "int";
        if (args.size() != (is_pair ? 2u : 1u)) throw Unsupported("arithmetic on sizes that is not known");
        if (base == "neg") return -whole(0);
        if (base == "int") return whole(0);
        const std::int64_t a = whole(0), b = whole(1);
        if (base == "add") return a + b;
        if (base == "sub") return a - b;
        if (base == "mul") {
            std::int64_t product = 0;
            if (__builtin_mul_overflow(a, b, &product)) throw Error("a size that overflows");
            return product;
        }
        if (base == "max") return std::max(a, b);
        if (base == "min") return std::min(a, b);
        if ((base == "floordiv" || base == "mod") && b != 0) {
            const std::int64_t quotient = a / b - ((a % b != 0 && (a < 0) != (b < 0)) ? 1 : 0);
            return base == "floordiv" ? quotient : a - quotient * b;
        }
        if (base == "eq") return static_cast<std::int64_t>(a == b);
        if (base == "ne") return static_cast<std::int64_t>(a != b);
        if (base == "lt") return static_cast<std::int64_t>(a < b);
        if (base == "le") return static_cast<std::int64_t>(a <= b);
        if (base == "gt") return static_cast<std::int64_t>(a > b);
        if (base == "ge") return static_cast<std::int64_t>(a >= b);
        throw Unsupported("arithmetic on sizes that is not known");
    }

    // --- ops by their ATen name: on codes (max_pool, shape, cat, avg_pool) and on floats alike

    using Handler = void (Lowering::*)(const Node&);
    static const std::unordered_map<std::string, Handler>& handlers() {
        static const std::unordered_map<std::string, Handler> table = {
            {"reshape", &Lowering::reshape}, {"view", &Lowering::reshape}, {"_unsafe_view", &Lowering::reshape},
            {"flatten", &Lowering::flatten}, {"unflatten", &Lowering::unflatten},
            {"permute", &Lowering::permute}, {"transpose", &Lowering::transpose}, {"t", &Lowering::transpose},
            {"slice", &Lowering::slice}, {"narrow", &Lowering::slice}, {"select", &Lowering::select},
            {"squeeze", &Lowering::squeeze}, {"unsqueeze", &Lowering::unsqueeze}, {"expand", &Lowering::expand},
            {"split", &Lowering::split}, {"split_with_sizes", &Lowering::split}, {"chunk", &Lowering::split},
            {"unbind", &Lowering::unbind}, {"getitem", &Lowering::getitem}, {"repeat", &Lowering::repeat},
            {"roll", &Lowering::roll}, {"constant_pad_nd", &Lowering::pad}, {"pad", &Lowering::pad},
            {"pixel_shuffle", &Lowering::pixel_shuffle}, {"channel_shuffle", &Lowering::channel_shuffle},
            {"contiguous", &Lowering::identity}, {"clone", &Lowering::identity}, {"detach", &Lowering::identity},
            {"alias", &Lowering::identity}, {"dropout", &Lowering::identity},
            {"cat", &Lowering::cat}, {"stack", &Lowering::stack},
            {"max_pool1d", &Lowering::pool}, {"max_pool2d", &Lowering::pool}, {"max_pool3d", &Lowering::pool},
            {"avg_pool1d", &Lowering::pool}, {"avg_pool2d", &Lowering::pool}, {"avg_pool3d", &Lowering::pool},
            {"adaptive_avg_pool1d", &Lowering::adaptive_pool}, {"adaptive_avg_pool2d", &Lowering::adaptive_pool},
            {"adaptive_avg_pool3d", &Lowering::adaptive_pool},
            {"mean", &Lowering::reduce}, {"sum", &Lowering::reduce}, {"amax", &Lowering::reduce},
            {"amin", &Lowering::reduce}, {"linalg_vector_norm", &Lowering::vector_norm},
            {"relu", &Lowering::activation}, {"relu6", &Lowering::activation}, {"hardtanh", &Lowering::activation},
            {"clamp", &Lowering::activation}, {"clamp_min", &Lowering::activation},
            {"clamp_max", &Lowering::activation}, {"leaky_relu", &Lowering::activation},
            {"hardswish", &Lowering::activation}, {"hardsigmoid", &Lowering::activation},
            {"silu", &Lowering::activation}, {"sigmoid", &Lowering::activation}, {"tanh", &Lowering::activation},
            {"gelu", &Lowering::activation},
            {"exp", &Lowering::unary}, {"log", &Lowering::unary}, {"sqrt", &Lowering::unary},
            {"rsqrt", &Lowering::unary}, {"neg", &Lowering::unary}, {"abs", &Lowering::unary},
            {"erf", &Lowering::unary}, {"reciprocal", &Lowering::unary}, {"sin", &Lowering::unary},
            {"cos", &Lowering::unary}, {"floor", &Lowering::unary}, {"logical_not", &Lowering::unary},
            {"bitwise_not", &Lowering::unary}, {"pow", &Lowering::power},
            {"add", &Lowering::arithmetic}, {"sub", &Lowering::arithmetic}, {"mul", &Lowering::arithmetic},
            {"div", &Lowering::arithmetic}, {"maximum", &Lowering::arithmetic}, {"minimum", &Lowering::arithmetic},
            {"eq", &Lowering::arithmetic}, {"ne", &Lowering::arithmetic}, {"lt", &Lowering::arithmetic},
            {"le", &Lowering::arithmetic}, {"gt", &Lowering::arithmetic}, {"ge", &Lowering::arithmetic},
            {"rsub", &Lowering::arithmetic}, {"logical_and", &Lowering::arithmetic},
            {"logical_or", &Lowering::arithmetic}, {"bitwise_and", &Lowering::arithmetic},
            {"__and__", &Lowering::arithmetic}, {"__or__", &Lowering::arithmetic},
            {"bitwise_or", &Lowering::arithmetic},
            {"where", &Lowering::where}, {"masked_fill", &Lowering::masked_fill},
            {"to", &Lowering::convert}, {"_to_copy", &Lowering::convert}, {"type_as", &Lowering::convert},
            {"matmul", &Lowering::matmul}, {"bmm", &Lowering::matmul}, {"linear", &Lowering::float_linear},
            {"conv1d", &Lowering::float_conv}, {"conv2d", &Lowering::float_conv}, {"conv3d", &Lowering::float_conv},
            {"scaled_dot_product_attention", &Lowering::attention},
            {"softmax", &Lowering::softmax}, {"_softmax", &Lowering::softmax},
            {"layer_norm", &Lowering::layer_norm}, {"rms_norm", &Lowering::rms_norm},
            {"batch_norm", &Lowering::batch_norm}, {"embedding", &Lowering::embedding},
            {"upsample_nearest1d", &Lowering::upsample}, {"upsample_nearest2d", &Lowering::upsample},
            {"upsample_nearest3d", &Lowering::upsample}, {"upsample_bilinear2d", &Lowering::upsample},
            {"zeros", &Lowering::filled}, {"ones", &Lowering::filled}, {"full", &Lowering::filled},
        };
        return table;
    }
    friend bool quantflow::is_supported(const Node&);

    void identity(const Node& n) { define(n.output, operand(0, "self")); }

    View reshaped(const View& x, const Dims& dims) {
        View y = x;
        if (auto strides = strides_for_reshape(x, dims)) {
            y.strides = *strides;
        } else {
            y = in_row_major(x);
            y.strides = row_major(dims);
        }
        y.dims = dims;
        return y;
    }

    void reshape(const Node& n) {
        const View x = operand(0, "self");
        Dims dims = integers(1, "shape");
        const auto open = std::find(dims.begin(), dims.end(), -1);
        if (open != dims.end()) {
            *open = 1;
            const std::int64_t known = checked_count(dims);
            if (known == 0) throw Error("a shape with -1 and 0");
            *open = x.count() / known;
        }
        if (checked_count(dims) != x.count())
            throw Error("a tensor of " + std::to_string(x.count()) + " elements can't have the shape asked for");
        define(n.output, reshaped(x, dims));
    }

    void flatten(const Node& n) {
        const View x = operand(0, "self");
        if (x.rank() == 0) return define(n.output, reshaped(x, {1}));
        const int from = axis(integer(1, "start_dim", 0), x.rank()), to = axis(integer(2, "end_dim", -1), x.rank());
        Dims dims(x.dims.begin(), x.dims.begin() + from);
        std::int64_t joined = 1;
        for (int i = from; i <= to; ++i) joined *= x.dims[static_cast<std::size_t>(i)];
        dims.push_back(joined);
        dims.insert(dims.end(), x.dims.begin() + to + 1, x.dims.end());
        define(n.output, reshaped(x, dims));
    }

    void unflatten(const Node& n) {
        const View x = operand(0, "self");
        const int at = axis(integer(1, "dim"), x.rank());
        Dims sizes = integers(2, "sizes");
        const auto open = std::find(sizes.begin(), sizes.end(), -1);
        if (open != sizes.end()) {
            *open = 1;
            const std::int64_t known = checked_count(sizes);
            *open = known == 0 ? 0 : x.dims[static_cast<std::size_t>(at)] / known;
        }
        if (checked_count(sizes) != x.dims[static_cast<std::size_t>(at)]) throw Error("unflatten to sizes that do not fit");
        Dims dims(x.dims.begin(), x.dims.begin() + at);
        dims.insert(dims.end(), sizes.begin(), sizes.end());
        dims.insert(dims.end(), x.dims.begin() + at + 1, x.dims.end());
        define(n.output, reshaped(x, dims));
    }

    static View permuted(const View& x, const Dims& order) {
        View y = x;
        if (order.size() != x.dims.size()) throw Error("permute names another number of dimensions");
        for (std::size_t i = 0; i < order.size(); ++i) {
            const auto from = static_cast<std::size_t>(axis(order[i], x.rank()));
            y.dims[i] = x.dims[from];
            y.strides[i] = x.strides[from];
        }
        return y;
    }

    void permute(const Node& n) { define(n.output, permuted(operand(0, "self"), integers(1, "dims"))); }

    void transpose(const Node& n) {
        View x = operand(0, "self");
        if (x.rank() < 2) return define(n.output, x);
        const bool is_t = base_name(n.target) == "t";
        const auto a = static_cast<std::size_t>(axis(is_t ? 0 : integer(1, "dim0"), x.rank()));
        const auto b = static_cast<std::size_t>(axis(is_t ? 1 : integer(2, "dim1"), x.rank()));
        std::swap(x.dims[a], x.dims[b]);
        std::swap(x.strides[a], x.strides[b]);
        define(n.output, x);
    }

    static View sliced(const View& x, int at, std::int64_t start, std::int64_t end, std::int64_t step) {
        const auto i = static_cast<std::size_t>(at);
        const std::int64_t size = x.dims[i];
        const auto clip = [&](std::int64_t p) {
            return std::clamp<std::int64_t>(p < 0 ? std::max(p, -size) + size : p, 0, size);
        };
        if (step < 1) throw Unsupported("a slice that runs backwards");
        const std::int64_t from = clip(start), to = std::max(from, clip(end));
        View y = x;
        y.dims[i] = to == from ? 0 : (to - from - 1) / step + 1;
        y.offset += from * x.strides[i] * size_of(x.dtype);
        y.strides[i] = y.dims[i] > 1 ? x.strides[i] * step : x.strides[i];
        if (y.count() == 0) y.offset = x.offset;
        return y;
    }

    void slice(const Node& n) {
        const View x = operand(0, "self");
        const int at = axis(integer(1, "dim", 0), x.rank());
        if (base_name(n.target) == "narrow") {
            const std::int64_t size = x.dims[static_cast<std::size_t>(at)];
            const std::int64_t start = integer(2, "start"), length = integer(3, "length");
            const std::int64_t from = start < 0 ? start + size : start;
            if (from < 0 || length < 0 || from > size || length > size - from) throw Error("narrow outside its input");
            return define(n.output, sliced(x, at, from, from + length, 1));
        }
        const std::int64_t end = integer(3, "end", std::numeric_limits<std::int64_t>::max());
        define(n.output, sliced(x, at, integer(2, "start", 0), end, integer(4, "step", 1)));
    }

    static View selected(const View& x, int at, std::int64_t index) {
        const auto i = static_cast<std::size_t>(at);
        const std::int64_t p = index < 0 ? index + x.dims[i] : index;
        if (p < 0 || p >= x.dims[i]) throw Error("index " + std::to_string(index) + " is outside its dimension");
        View y = x;
        y.offset += p * x.strides[i] * size_of(x.dtype);
        erase_dim(y, at);
        return y;
    }

    void select(const Node& n) {
        const View x = operand(0, "self");
        define(n.output, selected(x, axis(integer(1, "dim"), x.rank()), integer(2, "index")));
    }

    void squeeze(const Node& n) {
        View x = operand(0, "self");
        std::vector<bool> drop(x.dims.size(), !has(1, "dim"));
        if (has(1, "dim"))
            for (auto d : integers(1, "dim")) drop[static_cast<std::size_t>(axis(d, x.rank()))] = true;
        for (int i = x.rank() - 1; i >= 0; --i)
            if (drop[static_cast<std::size_t>(i)] && x.dims[static_cast<std::size_t>(i)] == 1) erase_dim(x, i);
        define(n.output, x);
    }

    void unsqueeze(const Node& n) {
        View x = operand(0, "self");
        const int at = axis(integer(1, "dim"), x.rank() + 1);
        const auto i = static_cast<std::size_t>(at);
        const std::int64_t stride = i < x.dims.size() ? x.dims[i] * x.strides[i] : 1;
        x.dims.insert(x.dims.begin() + at, 1);
        x.strides.insert(x.strides.begin() + at, stride);
        define(n.output, x);
    }

    void expand(const Node& n) {
        const View x = operand(0, "self");
        Dims dims = integers(1, "size");
        if (dims.size() < x.dims.size()) throw Error("expand to fewer dimensions");
        const std::size_t lead = dims.size() - x.dims.size();
        for (std::size_t i = 0; i < dims.size(); ++i)
            if (dims[i] == -1 && i >= lead) dims[i] = x.dims[i - lead];
        define(n.output, expanded(x, dims));
    }

    void split(const Node& n) {
        const View x = operand(0, "self");
        const std::string base = base_name(n.target);
        const int at = axis(integer(2, "dim", 0), x.rank());
        const std::int64_t size = x.dims[static_cast<std::size_t>(at)];
        Dims sizes = integers(1, "split_size");
        if (sizes.size() == 1 && n.args.at(1).as<Args>() == nullptr) {
            std::int64_t each = sizes[0];
            if (base == "chunk") each = each > 0 ? std::max<std::int64_t>(1, (size == 0 ? 0 : (size - 1) / each + 1)) : 0;
            if (each <= 0) throw Unsupported("a split into parts of no size");
            sizes.assign(static_cast<std::size_t>(size == 0 ? 1 : (size - 1) / each + 1), each);
        }
        Vals parts;
        std::int64_t from = 0;
        for (auto s : sizes) {
            const std::int64_t part = std::min(s, size - from);
            if (s < 0) throw Error("a split into parts of negative size");
            parts.emplace_back(sliced(x, at, from, from + part, 1));
            from += part;
        }
        define(n.output, parts);
    }

    void unbind(const Node& n) {
        const View x = operand(0, "self");
        const int at = axis(integer(1, "dim", 0), x.rank());
        Vals parts;
        for (std::int64_t i = 0; i < x.dims[static_cast<std::size_t>(at)]; ++i) parts.emplace_back(selected(x, at, i));
        define(n.output, parts);
    }

    void getitem(const Node& n) { define(n.output, size_value(n)); }

    // A new tensor of x's kind that pieces of codes or numbers are copied into.
    View like(const View& x, const Dims& dims, const Dims& strides) {
        return allocate(x.dtype, dims, strides, x.q, x.is_real);
    }

    void put(const View& x, const View& y) {
        if (x.count() == 0) return;
        emit(backend_.copy(tensor(x), tensor(y)), {&x, &y});
    }

    void repeat(const Node& n) {
        View x = operand(0, "self");
        const Dims times = integers(1, "repeats");
        while (x.dims.size() < times.size()) {
            x.dims.insert(x.dims.begin(), 1);
            x.strides.insert(x.strides.begin(), 0);
        }
        Dims dims, split_dims, split_strides;
        if (times.size() != x.dims.size()) throw Error("repeat names fewer dimensions than its input has");
        checked_count(times);
        for (std::size_t i = 0; i < times.size(); ++i) {
            dims.push_back(x.dims[i] * times[i]);
            split_dims.insert(split_dims.end(), {times[i], x.dims[i]});
            split_strides.insert(split_strides.end(), {0, x.strides[i]});
        }
        View source = x;
        source.dims = split_dims;
        source.strides = split_strides;
        View y = like(x, split_dims, row_major(split_dims));
        put(source, y);
        y.dims = dims;
        y.strides = row_major(dims);
        define(n.output, y);
    }

    void roll(const Node& n) {
        View x = operand(0, "self");
        const Dims shifts = integers(1, "shifts"), dims = integers(2, "dims", Dims{});
        if (dims.size() != shifts.size() || dims.empty()) throw Unsupported("roll of a flattened tensor");
        // All dimensions at once: each keeps two ranges, so 2^k blocks move.
        std::vector<std::pair<int, std::int64_t>> moves;
        for (std::size_t i = 0; i < dims.size(); ++i) {
            const int at = axis(dims[i], x.rank());
            const std::int64_t size = x.dims[static_cast<std::size_t>(at)];
            const std::int64_t shift = size == 0 ? 0 : ((shifts[i] % size) + size) % size;
            if (shift != 0) moves.emplace_back(at, shift);
        }
        if (moves.size() > 4) throw Unsupported("roll of more than four dimensions");
        View y = like(x, x.dims, dense_like(x));
        for (unsigned block = 0; block < 1u << moves.size(); ++block) {
            View from = x, to = y;
            for (std::size_t i = 0; i < moves.size(); ++i) {
                const auto [at, shift] = moves[i];
                const std::int64_t size = x.dims[static_cast<std::size_t>(at)];
                const bool wraps = ((block >> i) & 1u) != 0;
                from = wraps ? sliced(from, at, size - shift, size, 1) : sliced(from, at, 0, size - shift, 1);
                to = wraps ? sliced(to, at, 0, shift, 1) : sliced(to, at, shift, size, 1);
            }
            put(from, to);
        }
        define(n.output, y);
    }

    void pad(const Node& n) {
        View x = operand(0, "self");
        const Dims pads = integers(1, "pad");
        const Arg* mode = base_name(n.target) == "pad" ? argument(2, "mode") : nullptr;
        const Word* word = mode == nullptr ? nullptr : mode->as<Word>();
        if (word != nullptr && word->name != "constant") throw Unsupported("padding other than constant");
        double value = real(base_name(n.target) == "pad" ? 3 : 2, "value", 0.0);
        if (pads.size() > 2 * x.dims.size() || pads.size() % 2 != 0) throw Error("pad does not fit its input");
        Dims dims = x.dims;
        Dims before(x.dims.size(), 0);
        for (std::size_t i = 0; i < pads.size() / 2; ++i) {
            const std::size_t at = x.dims.size() - 1 - i;
            const std::int64_t left = pads[2 * i], right = pads[2 * i + 1];
            if (std::abs(left) > kMaxPad || std::abs(right) > kMaxPad) throw Error("padding of " + std::to_string(left));
            x = sliced(x, static_cast<int>(at), std::max<std::int64_t>(0, -left),
                       x.dims[at] + std::min<std::int64_t>(0, right), 1);
            before[at] = std::max<std::int64_t>(0, left);
            dims[at] = before[at] + x.dims[at] + std::max<std::int64_t>(0, right);
        }
        if (x.q && !x.is_real) {  // the program's fill is a code
            value += stored_as(program_.values[static_cast<std::size_t>(n.output)]).shift;
        } else if (x.q) {
            const double code = std::nearbyint(value / x.q->scale) + x.q->zero_point;
            value = std::clamp<double>(code, x.q->qmin, x.q->qmax);
        }
        if (value == (x.q ? x.q->zero_point : 0) && leave_to_conv(n.output, x.dims, before, dims))
            return define(n.output, x);
        View y = like(x, dims, [&] {
            View shape = x;
            shape.dims = dims;
            return x.count() == 0 ? row_major(dims) : dense_like(shape);
        }());
        emit(backend_.fill(value, plain_view(y)), {&y});
        View inside = y;
        for (std::size_t i = 0; i < dims.size(); ++i)
            inside = sliced(inside, static_cast<int>(i), before[i], before[i] + x.dims[i], 1);
        put(x, inside);
        define(n.output, y);
    }

    // Whether the one reader of a padded value, as it is or quantized, is a convolution, which then pads it itself.
    bool leave_to_conv(int index, const Dims& inside, const Dims& before, const Dims& padded) {
        int read = index, user = only_user(index);
        if (user >= 0 && program_.nodes[static_cast<std::size_t>(user)].op == Op::quantize) {
            read = program_.nodes[static_cast<std::size_t>(user)].output;
            user = only_user(read);
        }
        if (user < 0) return false;
        const Node& n = program_.nodes[static_cast<std::size_t>(user)];
        if (n.op != Op::conv || inside.size() != n.geometry.padding.size() + 2) return false;
        const auto is_read = [&](std::size_t i) {
            const Ref* ref = n.args[i].as<Ref>();
            return ref != nullptr && ref->value == read;
        };
        if (!is_read(0) || is_read(1)) return false;
        if (padded[0] != inside[0] || padded[1] != inside[1]) return false;
        Border border;
        for (std::size_t i = 2; i < inside.size(); ++i) {
            border.before.push_back(before[i]);
            border.after.push_back(padded[i] - inside[i] - before[i]);
            // More zeros than the kernel reaches over are no usual padding.
            const std::int64_t reach = n.geometry.dilation[i - 2] * (n.weights.dims[i] - 1);
            if (inside[i] == 0 || before[i] + n.geometry.padding[i - 2] > reach ||
                border.after.back() + n.geometry.padding[i - 2] > reach)
                return false;
        }
        borders_[read] = border;
        return true;
    }

    void pixel_shuffle(const Node& n) {
        const View x = operand(0, "self");
        const std::int64_t r = integer(1, "upscale_factor");
        if (x.rank() != 4 || r < 1 || x.dims[1] % (r * r) != 0) throw Unsupported("pixel_shuffle of this shape");
        const std::int64_t c = x.dims[1] / (r * r), h = x.dims[2], w = x.dims[3];
        const View split = reshaped(x, {x.dims[0], c, r, r, h, w});
        define(n.output, reshaped(permuted(split, {0, 1, 4, 2, 5, 3}), {x.dims[0], c, h * r, w * r}));
    }

    void channel_shuffle(const Node& n) {
        const View x = operand(0, "self");
        const std::int64_t g = integer(1, "groups");
        if (x.rank() < 3 || g < 1 || x.dims[1] % g != 0) throw Unsupported("channel_shuffle of this shape");
        Dims dims = x.dims, order;
        dims[1] = x.dims[1] / g;
        dims.insert(dims.begin() + 1, g);
        for (std::size_t i = 0; i < dims.size(); ++i) order.push_back(static_cast<std::int64_t>(i));
        std::swap(order[1], order[2]);
        define(n.output, reshaped(permuted(reshaped(x, dims), order), x.dims));
    }

    std::vector<View> operands() {
        const Val list = evaluated(node().args.at(0));
        const auto* items = list.as<Vals>();
        if (items == nullptr || items->empty()) throw Unsupported("a list of tensors is expected");
        std::vector<View> views;
        for (const Val& item : *items) {
            const auto* view = item.as<View>();
            if (view == nullptr) throw Unsupported("a list of tensors is expected");
            views.push_back(*view);
        }
        return views;
    }

    void cat(const Node& n) { join(n, operands(), integer(1, "dim", 0)); }

    void stack(const Node& n) {
        std::vector<View> parts = operands();
        const int at = axis(integer(1, "dim", 0), parts[0].rank() + 1);
        for (View& v : parts) {
            v.dims.insert(v.dims.begin() + at, 1);
            v.strides.insert(v.strides.begin() + at, 0);
        }
        join(n, parts, at);
    }

    void join(const Node& n, const std::vector<View>& all, std::int64_t dim) {
        std::vector<View> parts;
        for (const View& v : all)  // PyTorch ignores empty tensors of rank 1
            if (!(v.rank() == 1 && v.dims[0] == 0)) parts.push_back(v);
        if (parts.empty()) return define(n.output, all[0]);
        const int at = axis(dim, parts[0].rank());
        Dims dims = parts[0].dims;
        dims[static_cast<std::size_t>(at)] = 0;
        for (const View& v : parts) {
            for (std::size_t i = 0; i < dims.size(); ++i)
                if (v.dims.size() != dims.size() || (i != static_cast<std::size_t>(at) && v.dims[i] != dims[i]))
                    throw Error("cat of tensors whose shapes do not fit");
            dims[static_cast<std::size_t>(at)] += v.dims[static_cast<std::size_t>(at)];
        }
        const bool is_float = !program_.values[static_cast<std::size_t>(n.output)].q;
        View y;
        View shape = parts[0];
        for (const View& v : parts)
            if (v.count() > shape.count()) shape = v;
        shape.dims = dims;
        const bool gapless = std::none_of(shape.strides.begin(), shape.strides.end(), [](std::int64_t s) { return s == 0; });
        const Dims strides = gapless ? dense_like(shape) : row_major(dims);
        if (is_float && std::any_of(parts.begin(), parts.end(), [](const View& v) { return v.q || v.dtype == DType::f32; })) {
            y = result(dims, strides, n.output);
        } else {
            y = is_float ? allocate(parts[0].dtype, dims, strides) : result(dims, strides, n.output);
        }
        std::int64_t from = 0;
        for (const View& v : parts) {
            const std::int64_t size = v.dims[static_cast<std::size_t>(at)];
            put(v, sliced(y, at, from, from + size, 1));
            from += size;
        }
        define(n.output, y);
    }

    // --- windows

    static Dims spread(Dims v, std::size_t n) {
        if (v.size() == 1) v.assign(n, v[0]);
        return v;
    }

    // (batch, channels, *spatial): pools of PyTorch also take tensors without a batch.
    View with_batch(const View& x, std::size_t spatial, bool& added) {
        View v = x;
        added = v.dims.size() == spatial + 1;
        if (added) {
            v.strides.insert(v.strides.begin(), v.count());
            v.dims.insert(v.dims.begin(), 1);
        }
        if (v.dims.size() != spatial + 2) throw Error("a pool over another number of dimensions");
        return v;
    }

    void pool(const Node& n) {
        const std::string base = base_name(n.target);
        const bool is_max = base.compare(0, 3, "max") == 0;
        const auto spatial = static_cast<std::size_t>(base[8] - '0');
        bool added = false;
        View x = with_batch(as_real_operand(operand(0, "self")), spatial, added);
        PoolGeometry g;
        g.is_max = is_max;
        g.kernel = spread(integers(1, "kernel_size"), spatial);
        Dims stride = integers(2, "stride", Dims{});
        g.stride = stride.empty() ? g.kernel : spread(stride, spatial);
        g.padding = spread(integers(3, "padding", Dims{0}), spatial);
        g.dilation = is_max ? spread(integers(4, "dilation", Dims{1}), spatial) : Dims(spatial, 1);
        const bool ceil = flag(is_max ? 5 : 4, "ceil_mode", false);
        if (!is_max) {
            g.count_include_pad = flag(5, "count_include_pad", true);
            g.divisor_override = integer(6, "divisor_override", 0);
        }
        Dims dims = x.dims;
        for (std::size_t i = 0; i < spatial; ++i) {
            for (const auto v : {g.stride.at(i), g.kernel.at(i), g.dilation.at(i)})
                if (v < 1 || v > kMaxPad) throw Error("a pool window of size or step " + std::to_string(v));
            if (g.padding.at(i) < 0 || g.padding[i] > g.kernel[i] / 2)
                throw Error("pool padding must be at most half of the window");
            const std::int64_t room = x.dims[i + 2] + 2 * g.padding[i] - (g.dilation[i] * (g.kernel[i] - 1) + 1);
            if (room < 0) throw Error("its input is smaller than its window");
            std::int64_t out = (ceil ? (room + g.stride[i] - 1) / g.stride[i] : room / g.stride[i]) + 1;
            if (ceil && (out - 1) * g.stride[i] >= x.dims[i + 2] + g.padding[i]) --out;
            dims[i + 2] = out;
        }
        pooled(n, g, x, dims, added);
    }

    void adaptive_pool(const Node& n) {
        const auto spatial = static_cast<std::size_t>(base_name(n.target)[17] - '0');
        bool added = false;
        View x = with_batch(as_real_operand(operand(0, "self")), spatial, added);
        const Arg* sizes = argument(1, "output_size");
        Dims dims = x.dims;
        if (sizes == nullptr) throw Unsupported("a pool without a size");
        if (const auto* items = sizes->as<Args>()) {
            for (std::size_t i = 0; i < items->size() && i < spatial; ++i)
                if (!(*items)[i].is_none()) dims[i + 2] = as_integer(evaluated((*items)[i]), "output_size");
            if (items->size() == 1)
                for (std::size_t i = 1; i < spatial; ++i) dims[i + 2] = dims[2];
        } else {
            for (std::size_t i = 0; i < spatial; ++i) dims[i + 2] = as_integer(evaluated(*sizes), "output_size");
        }
        PoolGeometry g;
        g.is_max = false;
        g.is_adaptive = true;
        checked_count(dims);
        pooled(n, g, x, dims, added);
    }

    void pooled(const Node& n, const PoolGeometry& g, const View& given, const Dims& dims, bool added) {
        View x = given;
        if (!same_layout(x.dims, x.strides, dense_like(x))) x = in_channels_last(x);
        View shape = x;
        shape.dims = dims;
        View y;
        if (g.is_max && x.q && x.is_real) {  // max of codes is codes of the max
            y = allocate(x.dtype, dims, dense_like(shape), x.q, true);
        } else {
            y = result(dims, dense_like(shape), n.output);
            if (g.is_max && !x.q && y.q) y = allocate(DType::f32, dims, y.strides);
        }
        emit(backend_.pool(g, tensor(x), tensor(y)), {&x, &y});
        if (added) erase_dim(y, 0);
        define(n.output, y);
    }

    std::vector<int> axes_of(const View& x, std::size_t position, const char* name) {
        std::vector<int> axes;
        if (has(position, name))
            for (auto d : integers(position, name)) axes.push_back(axis(d, x.rank()));
        if (axes.empty()) {
            axes.resize(static_cast<std::size_t>(x.rank()));
            std::iota(axes.begin(), axes.end(), 0);
        }
        std::sort(axes.begin(), axes.end());
        return axes;
    }

    View reduced(Reduction how, const View& x, const std::vector<int>& axes, bool keep, int output) {
        Dims dims = x.dims;
        for (int a : axes) dims[static_cast<std::size_t>(a)] = 1;
        View shape = x;
        shape.dims = dims;
        View y = output < 0 ? allocate(DType::f32, dims, row_major(dims)) : result(dims, row_major(dims), output);
        emit(backend_.reduce(how, tensor(x), axes, tensor(y)), {&x, &y});
        if (!keep)
            for (auto it = axes.rbegin(); it != axes.rend(); ++it) erase_dim(y, *it);
        return y;
    }

    void reduce(const Node& n) {
        const std::string base = base_name(n.target);
        const View x = operand(0, "self");
        if (!x.q && x.dtype != DType::f32) throw Unsupported("a reduction of integers");
        if (has(3, "dtype")) throw Unsupported("a reduction to another dtype");
        const Reduction how = base == "mean" ? Reduction::mean
                              : base == "sum" ? Reduction::sum
                              : base == "amax" ? Reduction::max : Reduction::min;
        const bool has_dims = n.target != "mean.default" && n.target != "sum.default";
        const auto axes = has_dims ? axes_of(x, 1, "dim") : axes_of(x, 99, "");
        define(n.output, reduced(how, x, axes, has_dims && flag(2, "keepdim", false), n.output));
    }

    void vector_norm(const Node& n) {
        const View x = as_real_operand(operand(0, "self"));
        if (real(1, "ord", 2.0) != 2.0) throw Unsupported("a norm other than 2");
        const auto axes = axes_of(x, 2, "dim");
        View squares = allocate(DType::f32, x.dims, dense_like(x));
        emit(backend_.binary(Binary::mul, tensor(x), tensor(x), {}, tensor(squares)), {&x, &squares});
        const View sum = reduced(Reduction::sum, squares, axes, flag(3, "keepdim", false), -1);
        View y = result(sum.dims, dense_like(sum), n.output);
        emit(backend_.unary(Unary::sqrt, 0, 0, {}, tensor(sum), tensor(y)), {&sum, &y});
        define(n.output, y);
    }

    // --- elementwise

    void apply(Unary op, float a, float b, const Epilogue& epilogue, const View& x, int output) {
        View y = result(x.dims, dense_like(x), output);
        emit(backend_.unary(op, a, b, epilogue, tensor(x), tensor(y)), {&x, &y});
        define(output, y);
    }

    void activation(const Node& n) {
        const auto found = activation_of(n);
        if (!found) throw Unsupported("an activation with bounds that are no numbers");
        const View x = operand(0, "self");
        if (!x.q && x.dtype != DType::f32) throw Unsupported("an activation of integers");
        apply(Unary::activation, 0, 0, *found, spread_out(x), n.output);
    }

    // A view without repeated elements, so that its layout can be copied.
    View spread_out(const View& x) {
        const bool repeats = std::any_of(x.strides.begin(), x.strides.end(), [](std::int64_t s) { return s == 0; });
        return repeats && x.count() > 1 ? copied(x, row_major(x.dims), x.dtype, x.q, x.is_real) : x;
    }

    void unary(const Node& n) {
        static const std::unordered_map<std::string, Unary> kinds = {
            {"exp", Unary::exp}, {"log", Unary::log}, {"sqrt", Unary::sqrt}, {"rsqrt", Unary::rsqrt},
            {"neg", Unary::neg}, {"abs", Unary::abs}, {"erf", Unary::erf}, {"reciprocal", Unary::reciprocal},
            {"sin", Unary::sin}, {"cos", Unary::cos}, {"floor", Unary::floor},
            {"logical_not", Unary::logical_not}, {"bitwise_not", Unary::logical_not},
        };
        const Unary op = kinds.at(base_name(n.target));
        const View x = spread_out(operand(0, "self"));
        if (op == Unary::logical_not) {
            if (x.dtype != DType::b8) throw Unsupported("not of what is no bool");
            View y = allocate(DType::b8, x.dims, dense_like(x));
            emit(backend_.unary(op, 0, 0, {}, tensor(x), tensor(y)), {&x, &y});
            return define(n.output, y);
        }
        if (!x.q && x.dtype != DType::f32) throw Unsupported("a float function of integers");
        apply(op, 0, 0, {}, x, n.output);
    }

    void power(const Node& n) {
        if (n.target != "pow.Tensor_Scalar") throw Unsupported("a power that is a tensor");
        const View x = spread_out(operand(0, "self"));
        if (!x.q && x.dtype != DType::f32) throw Unsupported("a power of integers");
        apply(Unary::power, static_cast<float>(real(1, "exponent")), 0, {}, x, n.output);
    }

    void arithmetic(const Node& n) {
        static const std::unordered_map<std::string, Binary> kinds = {
            {"add", Binary::add}, {"sub", Binary::sub}, {"rsub", Binary::sub}, {"mul", Binary::mul},
            {"div", Binary::div}, {"maximum", Binary::maximum}, {"minimum", Binary::minimum},
            {"eq", Binary::eq}, {"ne", Binary::ne}, {"lt", Binary::lt}, {"le", Binary::le}, {"gt", Binary::gt},
            {"ge", Binary::ge}, {"logical_and", Binary::logical_and}, {"logical_or", Binary::logical_or},
            {"bitwise_and", Binary::logical_and}, {"bitwise_or", Binary::logical_or},
            {"__and__", Binary::logical_and}, {"__or__", Binary::logical_or},
        };
        const std::string base = base_name(n.target);
        const Binary op = kinds.at(base);
        if (has(99, "rounding_mode")) throw Unsupported("a division that rounds");
        if (n.args.size() < 2) throw Unsupported("an operand is missing");
        const double alpha = real(2, "alpha", 1.0);
        Val first = evaluated(n.args[0]), second = evaluated(n.args[1]);
        if (base == "rsub") std::swap(first, second);
        if (alpha != 1.0) throw Unsupported("alpha other than 1");
        const View* a = first.as<View>();
        const View* b = second.as<View>();
        const bool is_bitwise = base.find("bitwise") == 0 || base.find("__") == 0;
        for (const View* v : {a, b})
            if (is_bitwise && v != nullptr && v->dtype != DType::b8) throw Unsupported("bitwise logic of integers");
        if (a != nullptr && b != nullptr) return binary_node(op, *a, *b, n.output, {});
        const View* x = a != nullptr ? a : b;
        if (x == nullptr) throw Unsupported("no operand is a tensor");
        const double number = as_real(a != nullptr ? second : first, "other");
        const bool is_real = x->q || x->dtype == DType::f32;
        const bool affine = is_real && (op == Binary::add || op == Binary::mul || (op == Binary::sub) ||
                                        (op == Binary::div && a != nullptr && is_power_of_two(number)));
        if (affine) {
            float scale = 1, shift = 0;
            const auto value = static_cast<float>(number);
            if (op == Binary::add) shift = value;
            if (op == Binary::mul) scale = value;
            if (op == Binary::div) scale = 1.0f / value;  // exact: a power of two
            if (op == Binary::sub) {
                scale = a != nullptr ? 1.0f : -1.0f;
                shift = a != nullptr ? -value : value;
            }
            Epilogue epilogue;
            const int output = fuse_activation(n.output, epilogue);
            return apply(Unary::affine, scale, shift, epilogue, spread_out(*x), output);
        }
        View plain_x = *x;
        if (!is_real && number != std::floor(number)) plain_x = as_f32(*x);
        const View constant = number_like(number, plain_x);
        binary_node(op, a != nullptr ? plain_x : constant, a != nullptr ? constant : plain_x, n.output, {});
    }

    static bool is_power_of_two(double x) {
        int exponent = 0;
        return std::frexp(x, &exponent) == 0.5;
    }

    void where(const Node& n) {
        View condition = operand(0, "condition");
        const Val first = evaluated(*argument(1, "self")), second = evaluated(*argument(2, "other"));
        const View* a = first.as<View>();
        const View* b = second.as<View>();
        if (a == nullptr && b == nullptr) throw Unsupported("where of two numbers");
        View va = a != nullptr ? *a : View{}, vb = b != nullptr ? *b : View{};
        if (a == nullptr) va = number_like(as_real(first, "self"), vb);
        if (b == nullptr) vb = number_like(as_real(second, "other"), va);
        chosen(condition, va, vb, n.output);
    }

    void masked_fill(const Node& n) {
        const View x = operand(0, "self"), mask = operand(1, "mask");
        const Val v = evaluated(*argument(2, "value"));
        View fill;
        if (const auto* view = v.as<View>())
            fill = *view;
        else
            fill = number_like(as_real(v, "value"), x);
        chosen(mask, fill, x, n.output);
    }

    void chosen(const View& condition, View a, View b, int output) {
        if (condition.dtype != DType::b8) throw Unsupported("a condition that is no bool");
        a = plain(a);
        b = plain(b);
        if (a.dtype != b.dtype) {
            a = as_f32(a);
            b = as_f32(b);
        }
        const Dims dims = broadcast_dims(broadcast_dims(a.dims, b.dims), condition.dims);
        const View c = expanded(condition, dims), ea = expanded(a, dims), eb = expanded(b, dims);
        View y = allocate_plain(a.dtype, dims);
        emit(backend_.where(tensor(c), tensor(ea), tensor(eb), tensor(y)), {&c, &ea, &eb, &y});
        define(output, y);
    }

    void convert(const Node& n) {
        const View x = operand(0, "self");
        const Word* word = nullptr;
        for (const Arg& a : n.args)
            if (a.as<Word>() != nullptr && a.as<Word>()->kind == "dtype") word = a.as<Word>();
        if (const auto it = n.kwargs.find("dtype"); it != n.kwargs.end()) word = it->second.as<Word>();
        if (word == nullptr) throw Unsupported("a conversion that names no dtype");
        static const std::unordered_map<std::string, DType> types = {
            {"float32", DType::f32}, {"int64", DType::s64}, {"int32", DType::s32}, {"bool", DType::b8}};
        const auto it = types.find(word->name);
        if (it == types.end()) throw Unsupported("a conversion to " + word->name);
        const View p = plain(x);
        define(n.output, p.dtype == it->second ? p : copied(p, dense_like(p), it->second, std::nullopt));
    }

    // --- float math

    void matmul(const Node& n) {
        if (!written_out_attention(n)) multiply(as_f32(operand(0, "self")), as_f32(operand(1, "other")), n.output);
    }

    // softmax(q @ k * scale + mask) @ v as separate nodes, whose results nothing else reads, by the attention kernel.
    bool written_out_attention(const Node& n) {
        double scale = 1;
        std::optional<View> mask;
        std::vector<int> links;
        bool is_softmax = false;
        for (int index = n.output;;) {
            const int user = only_user(index);
            if (user < 0) return false;
            const Node& link = program_.nodes[static_cast<std::size_t>(user)];
            if (link.op != Op::aten || link.args.size() < 2) return false;
            const auto reads = [&](std::size_t i) {
                const Ref* ref = link.args[i].as<Ref>();
                return ref != nullptr && ref->value == index;
            };
            const std::string base = base_name(link.target);
            links.push_back(user);
            if (is_softmax) {
                if (base != "matmul" || !reads(0) || reads(1)) return false;
                const View q = operand(0, "self"), k = operand(1, "other");
                const std::optional<View> v = known(link.args[1]);
                if (!v || q.rank() < 2 || k.rank() != q.rank() || v->rank() != q.rank()) return false;
                Dims swapped(k.dims.size());
                std::iota(swapped.begin(), swapped.end(), 0);
                std::swap(swapped[swapped.size() - 1], swapped[swapped.size() - 2]);
                for (int done : links) done_[static_cast<std::size_t>(done)] = true;
                attend(q, permuted(k, swapped), *v, mask, false, scale, link.output);
                return true;
            }
            const double number = number_of(link.args[1]);
            if ((base == "mul" || base == "div") && !mask && reads(0) && !std::isnan(number) &&
                link.kwargs.count("rounding_mode") == 0) {
                scale = base == "mul" ? scale * number : scale / number;
            } else if (base == "add" && !mask && reads(0) != reads(1) && link.args.size() == 2 && link.kwargs.empty()) {
                mask = known(link.args[reads(0) ? 1 : 0]);
                if (!mask || mask->q || mask->dtype != DType::f32) return false;
            } else if (base == "softmax" && reads(0) && (number == -1 || number == operand(0, "self").rank() - 1) &&
                       link.args.size() == 2 && link.kwargs.empty()) {
                is_softmax = true;
            } else {
                return false;
            }
            index = link.output;
        }
    }

    // A tensor that an argument names, if it is computed by now.
    std::optional<View> known(const Arg& a) {
        if (const auto* t = a.as<TensorRef>()) return constant(t->name);
        const auto* ref = a.as<Ref>();
        const View* view = ref == nullptr ? nullptr : value(ref->value).as<View>();
        return view == nullptr ? std::nullopt : std::optional<View>(*view);
    }
    static double number_of(const Arg& a) {
        if (const auto* i = a.as<std::int64_t>()) return static_cast<double>(*i);
        const auto* d = a.as<double>();
        return d == nullptr ? std::nan("") : *d;
    }

    void float_linear(const Node& n) {
        const View x = in_row_major(as_f32(operand(0, "input"))), w = operand(1, "weight");
        std::optional<View> bias;
        if (has(2, "bias")) bias = operand(2, "bias");
        if (buffers_[static_cast<std::size_t>(w.buffer)].place != Place_::constant || w.dtype != DType::f32 || w.rank() != 2 ||
            (bias && buffers_[static_cast<std::size_t>(bias->buffer)].place != Place_::constant))
            throw Unsupported("a weight that is computed at run time");
        if (x.rank() == 0 || x.dims.back() != w.dims[1]) throw Error("takes " + std::to_string(w.dims[1]) + " features");
        Dims dims = x.dims;
        dims.back() = w.dims[0];
        View y = allocate_plain(DType::f32, dims);
        const Tensor tw = tensor(w);
        std::optional<Tensor> tb;
        if (bias) tb = tensor(*bias);
        emit(backend_.float_linear(tensor(x), tw, tb ? &*tb : nullptr, tensor(y)), {&x, &w, &y, bias ? &*bias : nullptr});
        define(n.output, y);
    }

    void float_conv(const Node& n) {
        const View w = operand(1, "weight");
        std::optional<View> bias;
        if (has(2, "bias")) bias = operand(2, "bias");
        const auto is_constant = [this](const View& v) {
            return buffers_[static_cast<std::size_t>(v.buffer)].place == Place_::constant && v.dtype == DType::f32;
        };
        if (!is_constant(w) || (bias && !is_constant(*bias))) throw Unsupported("a weight that is computed at run time");
        if (w.rank() < 3 || w.rank() > 5 || w.strides != row_major(w.dims)) throw Unsupported("a weight of this layout");
        if (n.target.find(".padding") != std::string::npos) throw Unsupported("padding by name");
        const auto spatial = static_cast<std::size_t>(w.rank()) - 2;
        const auto each = [&](std::size_t position, const char* name, std::int64_t fallback) {
            Dims values = integers(position, name, Dims{fallback});
            if (values.size() == 1) values.resize(spatial, values[0]);
            if (values.size() != spatial) throw Error(std::string(name) + " of another number of dimensions");
            return values;
        };
        ConvGeometry g;
        g.stride = each(3, "stride", 1);
        g.padding = each(4, "padding", 0);
        g.dilation = each(5, "dilation", 1);
        g.groups = integer(6, "groups", 1);
        View x = as_f32(operand(0, "input"));
        if (x.rank() != w.rank()) throw Unsupported("a convolution without a batch dimension");
        if (g.groups < 1 || w.dims[0] % g.groups != 0 || x.dims[1] != w.dims[1] * g.groups)
            throw Error("takes other channels than it gets");
        Dims dims = x.dims;
        dims[1] = w.dims[0];
        for (std::size_t i = 0; i < spatial; ++i) {
            constexpr std::int64_t most = std::int64_t{1} << 31;  // far from overflow
            if (g.stride[i] < 1 || g.dilation[i] < 1 || g.padding[i] < 0 ||
                std::max({g.stride[i], g.dilation[i], g.padding[i]}) > most)
                throw Error("an illegal stride, padding or dilation");
            const std::int64_t room = x.dims[i + 2] + 2 * g.padding[i] - g.dilation[i] * (w.dims[i + 2] - 1) - 1;
            if (room < 0) throw Error("its input is smaller than its kernel");
            dims[i + 2] = room / g.stride[i] + 1;
        }
        if (dims_empty(dims) || dims_empty(w.dims)) throw Unsupported("an empty convolution");
        x = in_channels_last(x);
        const View y = allocate(DType::f32, dims, channels_last(dims));
        const Tensor tw = tensor(w);
        std::optional<Tensor> tb;
        if (bias) tb = tensor(*bias);
        emit(backend_.float_conv(g, tensor(x), tw, tb ? &*tb : nullptr, tensor(y)), {&x, &w, &y, bias ? &*bias : nullptr});
        define(n.output, y);
    }

    void attention(const Node& n) {
        if (real(4, "dropout_p", 0.0) != 0.0) throw Unsupported("attention with dropout");
        if (flag(6, "enable_gqa", false) || flag(99, "enable_gqa", false)) throw Unsupported("grouped-query attention");
        const View q = operand(0, "query");
        std::optional<View> mask;
        if (has(3, "attn_mask")) mask = operand(3, "attn_mask");
        const double scale = real(6, "scale", std::nan(""));
        const double width = q.dims.empty() ? 1.0 : static_cast<double>(q.dims.back());
        attend(q, operand(1, "key"), operand(2, "value"), mask, flag(5, "is_causal", false),
               std::isnan(scale) ? 1.0 / std::sqrt(width) : scale, n.output);
    }

    // softmax(scale * q @ k.T + mask) @ v into the value `output`.
    void attend(View q, View k, View v, std::optional<View> mask, bool causal, double scale, int output) {
        q = as_real_operand(q);
        k = as_real_operand(k);
        v = as_real_operand(v);
        if (q.rank() < 2 || k.rank() != q.rank() || v.rank() != q.rank()) throw Unsupported("attention of these ranks");
        const auto rank = q.dims.size();
        const Dims batch = broadcast_dims(broadcast_dims(Dims(q.dims.begin(), q.dims.end() - 2), Dims(k.dims.begin(), k.dims.end() - 2)),
                                          Dims(v.dims.begin(), v.dims.end() - 2));
        const auto shaped = [&](const View& x) {
            Dims dims = batch;
            dims.insert(dims.end(), x.dims.end() - 2, x.dims.end());
            return expanded(x, dims);
        };
        q = shaped(q);
        k = shaped(k);
        v = shaped(v);
        if (q.dims[rank - 1] != k.dims[rank - 1] || k.dims[rank - 2] != v.dims[rank - 2]) throw Error("attention of shapes that do not fit");
        if (mask) {
            if (mask->dtype != DType::b8) mask = as_f32(*mask);
            Dims dims = batch;
            dims.insert(dims.end(), {q.dims[rank - 2], k.dims[rank - 2]});
            mask = expanded(*mask, dims);
        }
        Dims dims = q.dims;
        dims[rank - 1] = v.dims[rank - 1];
        // Heads side by side per position, (batch, length, heads, width) in memory: what comes next joins them.
        Dims strides = row_major(dims);
        if (rank == 4) {
            const std::int64_t heads = dims[1], width = dims[3];
            strides = {dims[2] * heads * width, width, heads * width, 1};
        }
        View y = result(dims, strides, output);
        std::optional<Tensor> tm;
        if (mask) tm = tensor(*mask);
        emit(backend_.attention(tensor(q), tensor(k), tensor(v), tm ? &*tm : nullptr, causal, static_cast<float>(scale), tensor(y)),
             {&q, &k, &v, mask ? &*mask : nullptr, &y});
        define(output, y);
    }

    void softmax(const Node& n) {
        const View x = as_real_operand(operand(0, "self"));
        if (base_name(n.target) == "softmax" && has(2, "dtype")) {
            const Word* word = argument(2, "dtype")->as<Word>();
            if (word == nullptr || word->name != "float32") throw Unsupported("softmax to another dtype");
        }
        if (x.rank() == 0) throw Unsupported("softmax of a scalar");
        const View source = spread_out(x);
        View y = result(source.dims, dense_like(source), n.output);
        emit(backend_.softmax(tensor(source), axis(integer(1, "dim"), x.rank()), tensor(y)), {&source, &y});
        define(n.output, y);
    }

    void layer_norm(const Node& n) {
        normalize(n, integers(1, "normalized_shape"), 2, real(4, "eps", 1e-5), false);
    }
    void rms_norm(const Node& n) {
        normalize(n, integers(1, "normalized_shape"), 2, real(3, "eps", 1.1920929e-07), true);
    }

    void normalize(const Node& n, const Dims& shape, std::size_t weight_at, double eps, bool is_rms) {
        View x = as_real_operand(operand(0, "input"));
        if (shape.empty() || shape.size() > x.dims.size()) throw Error("normalized_shape does not fit its input");
        const Dims given = x.dims;
        std::int64_t width = 1;
        for (auto s : shape) width *= s;
        if (shape.size() > 1 || x.strides.back() != 1) x = in_row_major(x);
        if (shape.size() > 1) {
            Dims joined(given.begin(), given.end() - static_cast<std::ptrdiff_t>(shape.size()));
            joined.push_back(width);
            x = reshaped(x, joined);
        }
        if (x.dims.back() != width) throw Error("normalized_shape does not fit its input");
        std::optional<View> gamma, beta;
        if (has(weight_at, "weight")) gamma = operand(weight_at, "weight");
        if (!is_rms && has(weight_at + 1, "bias")) beta = operand(weight_at + 1, "bias");
        for (const auto* v : {&gamma, &beta})
            if (*v && ((*v)->dtype != DType::f32 || (*v)->count() != width)) throw Unsupported("a norm whose weight is not float32");
        View y = result(x.dims, row_major(x.dims), n.output);
        std::optional<Tensor> tg, tb;
        if (gamma) tg = tensor(*gamma);
        if (beta) tb = tensor(*beta);
        emit(backend_.layer_norm(tensor(x), tg ? &*tg : nullptr, tb ? &*tb : nullptr, static_cast<float>(eps), is_rms, tensor(y)),
             {&x, gamma ? &*gamma : nullptr, beta ? &*beta : nullptr, &y});
        y.strides = row_major(given);
        y.dims = given;
        define(n.output, y);
    }

    void batch_norm(const Node& n) {
        const View x = as_real_operand(operand(0, "input"));
        if (flag(5, "training", false)) throw Unsupported("BatchNorm in training mode");
        if (x.rank() < 2) throw Unsupported("BatchNorm of a vector");
        const std::int64_t channels = x.dims[1];
        const double eps = real(7, "eps", 1e-5);
        const auto numbers = [&](std::size_t i, const char* name, float fallback) {
            std::vector<float> out(static_cast<std::size_t>(channels), fallback);
            if (!has(i, name)) return out;
            const TensorRef* ref = argument(i, name)->as<TensorRef>();
            const Stored* stored = ref == nullptr ? nullptr : &program_.tensors.at(ref->name);
            if (stored == nullptr || stored->data == nullptr || stored->dtype != DType::f32 || stored->count() != channels)
                throw Unsupported("BatchNorm whose numbers are not constant float32");
            std::memcpy(out.data(), stored->data, out.size() * sizeof(float));
            return out;
        };
        const auto weight = numbers(1, "weight", 1), bias = numbers(2, "bias", 0), mean = numbers(3, "running_mean", 0),
                   variance = numbers(4, "running_var", 1);
        std::vector<float> scale(weight.size()), shift(weight.size());
        for (std::size_t i = 0; i < scale.size(); ++i) {
            const double s = weight[i] / std::sqrt(static_cast<double>(variance[i]) + eps);
            scale[i] = static_cast<float>(s);
            shift[i] = static_cast<float>(bias[i] - mean[i] * s);
        }
        const auto keep = [&](const char* suffix, const std::vector<float>& data) {
            View v;
            v.dtype = DType::f32;
            v.dims = {channels};
            v.strides = {1};
            v.buffer = new_buffer(Place_::constant, 0,
                                  constants_.keep(std::to_string(node_) + suffix, data.data(), data.size() * sizeof(float)));
            return v;
        };
        const View s = keep(".scale", scale), b = keep(".shift", shift);
        Epilogue epilogue;
        const int output = fuse_activation(n.output, epilogue);
        const View source = spread_out(x);
        View y = result(source.dims, dense_like(source), output);
        emit(backend_.channel_affine(tensor(source), 1, tensor(s), tensor(b), epilogue, tensor(y)), {&source, &y});
        define(output, y);
    }

    void embedding(const Node& n) {
        const View table = operand(0, "weight");
        View index = operand(1, "indices");
        if (table.dtype != DType::f32 || table.rank() != 2) throw Unsupported("an embedding that is not float32");
        if (index.dtype == DType::s32) index = copied(index, dense_like(index), DType::s64, std::nullopt);
        if (index.dtype != DType::s64) throw Unsupported("an embedding whose index is no integer");
        index = in_row_major(index);
        Dims dims = index.dims;
        dims.push_back(table.dims[1]);
        View y = result(dims, row_major(dims), n.output);
        emit(backend_.gather(tensor(table), tensor(index), tensor(y)), {&table, &index, &y});
        define(n.output, y);
    }

    void upsample(const Node& n) {
        const std::string base = base_name(n.target);
        const bool bilinear = base == "upsample_bilinear2d";
        const View x = operand(0, "self");
        const auto spatial = static_cast<std::size_t>(bilinear ? 2 : base[16] - '0');
        if (x.dims.size() != spatial + 2) throw Error("an image of another number of dimensions");
        const bool is_vec = n.target.find(".vec") != std::string::npos;
        const bool align = bilinear && flag(2, "align_corners", false);
        const std::size_t scales_at = bilinear ? 3 : 2;
        std::vector<double> given;
        if (is_vec) {
            if (has(scales_at, "scale_factors")) {
                const Val factors = evaluated(*argument(scales_at, "scale_factors"));
                if (const auto* items = factors.as<Vals>())
                    for (const Val& s : *items) given.push_back(as_real(s, "scale"));
            }
        } else {
            for (std::size_t i = 0; i < spatial; ++i)
                if (scales_at + i < n.args.size() && !n.args[scales_at + i].is_none()) given.push_back(as_real(evaluated(n.args[scales_at + i]), "scale"));
        }
        for (const double s : given)
            if (!(s > 0) || s > 1e6) throw Error("a scale of " + std::to_string(s));
        Dims dims = x.dims;
        if (has(1, "output_size")) {
            const Dims sizes = integers(1, "output_size");
            for (std::size_t i = 0; i < spatial; ++i) dims[i + 2] = sizes.at(i);
        } else {
            for (std::size_t i = 0; i < spatial; ++i)
                dims[i + 2] = static_cast<std::int64_t>(std::floor(static_cast<double>(x.dims[i + 2]) * given.at(i)));
        }
        checked_count(dims);
        std::vector<double> steps;
        for (std::size_t i = 0; i < spatial; ++i) {
            const double in = static_cast<double>(x.dims[i + 2]), out = static_cast<double>(dims[i + 2]);
            if (align)
                steps.push_back(out > 1 ? (in - 1) / (out - 1) : 0.0);
            else
                steps.push_back(given.size() == spatial && given[i] > 0 ? 1.0 / given[i] : in / out);
        }
        const View source = same_layout(x.dims, x.strides, dense_like(x)) ? x : in_row_major(x);
        View shape = source;
        shape.dims = dims;
        View y = !bilinear ? allocate(source.dtype, dims, dense_like(shape), source.q, source.is_real)
                           : result(dims, dense_like(shape), n.output);
        emit(backend_.upsample(bilinear ? Interpolation::bilinear : Interpolation::nearest, align, steps, tensor(source), tensor(y)),
             {&source, &y});
        define(n.output, y);
    }

    void filled(const Node& n) {
        const std::string base = base_name(n.target);
        const Dims dims = integers(0, "size");
        double value = base == "ones" ? 1.0 : 0.0;
        if (base == "full") value = real(1, "fill_value");
        DType dtype = DType::f32;
        if (const auto it = n.kwargs.find("dtype"); it != n.kwargs.end() && !it->second.is_none()) {
            const Word* word = it->second.as<Word>();
            static const std::unordered_map<std::string, DType> types = {
                {"float32", DType::f32}, {"int64", DType::s64}, {"int32", DType::s32}, {"bool", DType::b8}};
            const auto found = word == nullptr ? types.end() : types.find(word->name);
            if (found == types.end()) throw Unsupported("a tensor of this dtype");
            dtype = found->second;
        } else if (base == "full") {
            throw Unsupported("full without a dtype");
        }
        View y = allocate_plain(dtype, dims);
        emit(backend_.fill(value, tensor(y)), {&y});
        define(n.output, y);
    }
};

}  // namespace

Constants::~Constants() {
    for (void* memory : owned_) backend_.release(memory);
}

std::byte* Constants::get(const std::string& name) {
    const Stored& stored = program_.tensors.at(name);
    // Steps never write to a constant; the cast only fits it into a Place.
    if (backend_.reads_process_memory()) return const_cast<std::byte*>(stored.data);
    return keep("tensor " + name, stored.data, static_cast<std::size_t>(stored.count() * size_of(stored.dtype)));
}

std::byte* Constants::keep(const std::string& name, const void* data, std::size_t bytes) {
    auto& place = placed_[name];
    if (place == nullptr) {
        void* memory = backend_.allocate(std::max<std::size_t>(bytes, 1));
        owned_.push_back(memory);
        if (bytes > 0) backend_.copy(memory, data, bytes);
        backend_.wait();
        place = static_cast<std::byte*>(memory);
    }
    return place;
}

bool is_supported(const Node& node) {
    switch (node.op) {
        case Op::max_pool:
        case Op::avg_pool:
        case Op::shape:
        case Op::cat:
        case Op::aten: {
            const auto& table = Lowering::handlers();
            return table.find(node.target == "getitem" ? node.target : base_name(node.target)) != table.end();
        }
        default: return true;
    }
}

Lowered lower(const Program& program, const Section& section, const std::vector<InputForm>& forms, Backend& backend,
              Constants& constants) {
    return Lowering(program, section, forms, backend, constants).run();
}

}  // namespace quantflow
