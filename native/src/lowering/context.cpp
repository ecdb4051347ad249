#include "context.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../budget.hpp"
#include "../op_table.hpp"

namespace quantflow::lowering {
namespace {

bool mentions(const Val& v, int buffer) {
    if (const auto* view = v.as<View>()) return view->buffer == buffer;
    if (const auto* items = v.as<Vals>())
        return std::any_of(items->begin(), items->end(), [&](const Val& item) { return mentions(item, buffer); });
    return false;
}

}  // namespace

std::int64_t as_integer(const Val& v, const char* name) {
    if (const auto* i = v.as<std::int64_t>()) return *i;
    if (const auto* b = v.as<bool>()) return *b ? 1 : 0;
    throw Unsupported(std::string("argument '") + name + "' is no integer");
}

double as_real(const Val& v, const char* name) {
    if (const auto* d = v.as<double>()) return *d;
    return static_cast<double>(as_integer(v, name));
}

std::optional<DType> dtype_named(const std::string& name) {
    for (DType dtype : {DType::f32, DType::s64, DType::s32, DType::b8})
        if (name == name_of(dtype)) return dtype;
    return std::nullopt;
}

Context::Context(const Program& p, const Section& section, Backend& b, Constants& c)
    : program(p),
      backend(b),
      constants(c),
      graph(p, section, b.stores_unsigned()),
      fusion(graph, b.takes_terms(), p.nodes.size()),
      values_(p.values.size()) {}

int Context::new_buffer(Storage storage, std::int64_t bytes, std::byte* address) {
    result.cells.push_back(address);
    return buffers.add(storage, bytes);
}

View Context::allocate(DType dtype, Dims dims, Dims strides, std::optional<QParams> q, bool is_real) {
    const std::int64_t count = checked_count(dims);
    View v;
    v.dtype = dtype;
    v.dims = std::move(dims);
    v.strides = std::move(strides);
    v.q = q;
    v.is_real = is_real;
    require_memory(count * size_of(dtype), "a tensor");
    v.buffer = new_buffer(Storage::arena, count * size_of(dtype));
    return v;
}

View Context::allocate_result(const Dims& dims, const Dims& strides, int index) {
    const Form form = graph.form_of(index);
    return allocate(form.dtype, dims, strides, form.q, form.is_real);
}

View Context::allocate_like(const View& x, const Dims& dims, const Dims& strides) {
    return allocate(x.dtype, dims, strides, x.q, x.is_real);
}

Tensor Context::tensor(const View& v) {
    Tensor t;
    t.dtype = v.dtype;
    t.dims = v.dims;
    t.strides = v.strides;
    t.q = v.q;
    t.place = {&result.cells[static_cast<std::size_t>(v.buffer)], v.offset};
    return t;
}

OptionalTensor Context::tensor(const std::optional<View>& v) {
    return OptionalTensor(v ? std::optional<Tensor>(tensor(*v)) : std::nullopt);
}

Tensor Context::plain_tensor(const View& v) {
    Tensor t = tensor(v);
    t.q.reset();
    return t;
}

void Context::emit(std::unique_ptr<Step> step, std::initializer_list<const View*> reads,
                   std::initializer_list<const View*> writes) {
    if (result.steps.size() >= kMaxSteps)
        throw Error("more than " + std::to_string(kMaxSteps) + " steps, which is no plan");
    result.steps.push_back({std::move(step), node_index, {}});
    uses.emplace_back();
    for (const View* v : reads)
        if (v != nullptr) also_reads(*v);
    for (const View* v : writes) {
        if (v == nullptr) continue;
        uses.back().writes.push_back(v->buffer);
        buffers.touch(v->buffer, static_cast<int>(uses.size()) - 1);
    }
}

void Context::also_reads(const View& v) {
    uses.back().reads.push_back(v.buffer);
    buffers.touch(v.buffer, static_cast<int>(uses.size()) - 1);
}

bool Context::dies_here(const View& v) const {
    const Buffer& buffer = buffers[v.buffer];
    if (buffer.storage != Storage::arena || buffer.bytes != v.count() * size_of(v.dtype)) return false;
    for (std::size_t i = 0; i < values_.size(); ++i) {
        if (!mentions(values_[i], v.buffer)) continue;
        const int index = static_cast<int>(i);
        if (graph.is_output(index)) return false;
        for (int user : graph.value(index).users)
            if (user > node_index && !(graph.is_inside(user) && fusion.is_absorbed(user))) return false;
    }
    // Twice among this node's own operands: the kernel would read what it overwrites.
    int times = 0;
    for (const Arg& a : node().args)
        if (const auto* ref = a.as<Ref>(); ref != nullptr && mentions(value(ref->value), v.buffer)) ++times;
    return times <= 1;
}

View Context::constant(const std::string& name) {
    const Stored& stored = program.tensors.at(name);
    if (stored.data == nullptr && stored.count() != 0)
        throw Unsupported("tensor '" + name + "' has a dtype without kernels");
    auto [it, is_new] = constant_buffers_.emplace(name, -1);
    if (is_new) {
        it->second = new_buffer(Storage::constant, 0, constants.get(name));
        foreknown.holds(it->second, stored);
    }
    View v;
    v.buffer = it->second;
    v.dtype = stored.dtype;
    v.dims = stored.dims;
    v.strides = row_major(stored.dims);
    return v;
}

View Context::literal(DType dtype, Dims dims, std::vector<std::byte> bytes) {
    View v;
    v.dtype = dtype;
    v.strides = row_major(dims);
    v.dims = std::move(dims);
    v.buffer = new_buffer(Storage::constant, 0);
    result.literals.push_back({v.buffer, std::move(bytes)});
    return v;
}

View Context::counted(std::int64_t start, std::int64_t step, std::int64_t count, DType dtype) {
    std::vector<std::byte> bytes(static_cast<std::size_t>(count * size_of(dtype)));
    const auto put = [&](auto zero) {
        for (std::int64_t i = 0; i < count; ++i) {
            const auto number = static_cast<decltype(zero)>(start + i * step);
            std::memcpy(bytes.data() + static_cast<std::size_t>(i) * sizeof number, &number, sizeof number);
        }
    };
    if (dtype == DType::f32) put(0.0f);
    if (dtype == DType::s32) put(std::int32_t{0});
    if (dtype == DType::s64) put(std::int64_t{0});
    const View v = literal(dtype, {count}, std::move(bytes));
    if (dtype == DType::s64) foreknown.counts(v.buffer, start, step);
    return v;
}

View Context::flags(bool flag, const Dims& dims) {
    View v = literal(DType::b8, {1}, {std::byte{flag}});
    foreknown.is_all(v.buffer, flag);
    v.dims = dims;
    v.strides.assign(dims.size(), 0);
    return v;
}

const Arg* Context::argument(std::size_t position, const char* name) const {
    if (position < node().args.size()) return &node().args[position];
    const auto it = node().kwargs.find(name);
    return it == node().kwargs.end() ? nullptr : &it->second;
}

bool Context::has(std::size_t position, const char* name) const {
    const Arg* a = argument(position, name);
    return a != nullptr && !a->is_none();
}

Val Context::evaluated(const Arg& a) {
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

std::optional<Dims> Context::known_integers(const Arg& a) {
    const Val v = evaluated(a);
    const auto* items = v.as<Vals>();
    Dims numbers;
    for (const Val& item : items != nullptr ? *items : Vals{v}) {
        const auto* number = item.as<std::int64_t>();
        if (number == nullptr) return std::nullopt;
        numbers.push_back(*number);
    }
    return numbers;
}

std::optional<View> Context::known(const Arg& a) {
    if (const auto* t = a.as<TensorRef>()) return constant(t->name);
    const auto* ref = a.as<Ref>();
    const View* view = ref == nullptr ? nullptr : value(ref->value).as<View>();
    return view == nullptr ? std::nullopt : std::optional<View>(*view);
}

View Context::operand(std::size_t position, const char* name) {
    const Arg* a = argument(position, name);
    if (a != nullptr) {
        const Val v = evaluated(*a);
        if (const auto* view = v.as<View>()) return *view;
    }
    throw Unsupported(std::string("argument '") + name + "' is no tensor");
}

View Context::real_operand(std::size_t position, const char* name) {
    const View x = operand(position, name);
    if (!x.q && x.dtype != DType::f32) throw Unsupported(std::string("argument '") + name + "' holds integers");
    return x;
}

std::optional<View> Context::optional_operand(std::size_t position, const char* name) {
    return has(position, name) ? std::optional<View>(operand(position, name)) : std::nullopt;
}

std::vector<View> Context::operands() {
    const Arg* given = argument(0, "tensors");
    const Val list = given == nullptr ? Val{} : evaluated(*given);
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

std::int64_t Context::integer(std::size_t position, const char* name, std::optional<std::int64_t> fallback) {
    const Arg* a = argument(position, name);
    if (a != nullptr && !a->is_none()) return as_integer(evaluated(*a), name);
    if (fallback) return *fallback;
    throw Unsupported(std::string("argument '") + name + "' is missing");
}

double Context::real(std::size_t position, const char* name, std::optional<double> fallback) {
    const Arg* a = argument(position, name);
    if (a != nullptr && !a->is_none()) return as_real(evaluated(*a), name);
    if (fallback) return *fallback;
    throw Unsupported(std::string("argument '") + name + "' is missing");
}

bool Context::flag(std::size_t position, const char* name, bool fallback) {
    const Arg* a = argument(position, name);
    return a == nullptr || a->is_none() ? fallback : as_integer(evaluated(*a), name) != 0;
}

std::optional<DType> Context::asked_dtype() {
    const auto it = node().kwargs.find("dtype");
    if (it == node().kwargs.end() || it->second.is_none()) return std::nullopt;
    const Word* word = it->second.as<Word>();
    const auto found = word == nullptr ? std::nullopt : dtype_named(word->name);
    if (!found) throw Unsupported("a tensor of this dtype");
    return found;
}

Dims Context::integers(std::size_t position, const char* name, std::optional<Dims> fallback) {
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

View Context::copied(const View& x, Dims strides, DType dtype, std::optional<QParams> q, bool is_real) {
    View y = allocate(dtype, x.dims, std::move(strides), q, is_real);
    emit(backend.copy(tensor(x), tensor(y)), {&x}, {&y});
    return y;
}

void Context::put(const View& x, const View& y) {
    if (x.count() == 0) return;
    emit(backend.copy(tensor(x), tensor(y)), {&x}, {&y});
}

View Context::in_layout(const View& x, const Dims& strides) {
    return same_layout(x.dims, x.strides, strides) ? x : copied(x, strides, x.dtype, x.q, x.is_real);
}

View Context::reshaped(const View& x, const Dims& dims) {
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

View Context::spread_out(const View& x) {
    return repeats(x) && x.count() > 1 ? copied(x, row_major(x.dims), x.dtype, x.q, x.is_real) : x;
}

View Context::plain(const View& x) { return x.q ? copied(x, dense_like(x), DType::f32, std::nullopt) : x; }

View Context::as_f32(const View& x) {
    if (x.q) return plain(x);
    return x.dtype == DType::f32 ? x : copied(x, dense_like(x), DType::f32, std::nullopt);
}

View Context::number_like(double number, const View& like) {
    View one = allocate(like.q ? DType::f32 : like.dtype, {1}, {1});
    emit(backend.fill(number, tensor(one)), {}, {&one});
    one.dims = like.dims;
    one.strides.assign(like.dims.size(), 0);
    return one;
}

bool Context::holds(const View& x, const Val& number) {
    if (x.q || x.dtype == DType::f32) return true;
    if (number.as<bool>() != nullptr) return true;
    const auto* whole = number.as<std::int64_t>();
    if (whole == nullptr || (x.dtype != DType::s32 && x.dtype != DType::s64)) return false;
    // A number goes through a double on its way.
    const std::int64_t most = x.dtype == DType::s32 ? (std::int64_t{1} << 31) - 1 : std::int64_t{1} << 53;
    return *whole >= -most && *whole <= most;
}

}  // namespace quantflow::lowering
