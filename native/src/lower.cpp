#include "lower.hpp"

#include <algorithm>

#include "budget.hpp"
#include "lowering/context.hpp"
#include "lowering/ops/nodes.hpp"
#include "lowering/ops/registry.hpp"

namespace quantflow {
namespace {

using namespace lowering;

// How a backend receives the program's own codes at the section's ends.
std::pair<DType, QParams> outside(const Value& v) { return {v.is_signed ? DType::s8 : DType::u8, *v.q}; }

void take_inputs(Context& c, const std::vector<InputForm>& forms) {
    const std::vector<int>& inputs = c.graph.section().inputs;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const InputForm& form = forms[i];
        const Value& v = c.graph.value(inputs[i]);
        if (form.is_number) {
            c.result.input_cells.push_back(-1);
            c.define(inputs[i], form.number);
            continue;
        }
        View view;
        checked_count(form.dims);
        view.dtype = form.dtype;
        view.dims = form.dims;
        view.strides = form.is_channels_last ? channels_last(form.dims) : row_major(form.dims);
        view.buffer = c.new_buffer(Storage::input, view.count() * size_of(form.dtype));
        c.result.input_cells.push_back(view.buffer);
        if (v.q) {
            const StoredAs stored = c.graph.stored_as(inputs[i]);
            const bool is_stored = c.graph.hands_on_stored() && form.dtype == stored.dtype;
            const auto [dtype, q] = is_stored ? std::pair(stored.dtype, stored.q) : outside(v);
            if (form.dtype != dtype) throw Error("input '" + v.name + "' is not the int8 codes it should be");
            view.q = q;
            if (stored.dtype != dtype || !(stored.q == q))
                view = c.copied(view, dense_like(view), stored.dtype, stored.q);
        }
        c.define(inputs[i], view);
    }
}

void give_outputs(Context& c) {
    for (int index : c.graph.section().outputs) {
        const Val& v = c.value(index);
        const Value& program_value = c.graph.value(index);
        OutputForm form;
        if (const auto* number = v.as<std::int64_t>()) {
            form.is_number = true;
            form.number = *number;
            c.result.outputs.push_back(form);
            c.result.output_cells.push_back(-1);
            continue;
        }
        const View* view = v.as<View>();
        if (view == nullptr)
            throw Unsupported("node " + std::to_string(program_value.producer) +
                              ": its value is no tensor and can't leave");
        View target;
        target.dtype = view->q ? DType::f32 : view->dtype;
        if (program_value.q) {
            const StoredAs stored = c.graph.stored_as(index);
            const auto [dtype, q] =
                c.graph.hands_on_stored() ? std::pair(stored.dtype, stored.q) : outside(program_value);
            target.dtype = dtype;
            target.q = q;
        }
        target.dims = view->dims;
        const bool is_channels_last = c.graph.section().is_step && program_value.q && view->rank() >= 3;
        target.strides = is_channels_last ? channels_last(view->dims) : row_major(view->dims);
        const std::int64_t bytes = target.count() * size_of(target.dtype);
        const bool same = view->dtype == target.dtype && view->q == target.q && view->offset == 0 &&
                          same_layout(view->dims, view->strides, target.strides);
        const Buffer& b = c.buffers[view->buffer];
        if (same && b.storage == Storage::arena && b.bytes == bytes && b.first >= 0) {
            c.buffers.make_output(view->buffer);
            target.buffer = view->buffer;
        } else {
            target.buffer = c.new_buffer(Storage::output, bytes);
            c.emit(c.backend.copy(c.tensor(*view), c.tensor(target)), {view}, {&target});
        }
        form.dtype = target.dtype;
        form.dims = target.dims;
        form.is_channels_last = is_channels_last;
        c.result.outputs.push_back(form);
        c.result.output_cells.push_back(target.buffer);
    }
}

bool takes_a_number(const Context& c, const Arg& a) {
    if (const auto* items = a.as<Args>())
        return std::any_of(items->begin(), items->end(), [&](const Arg& item) { return takes_a_number(c, item); });
    const auto* ref = a.as<Ref>();
    if (ref == nullptr) return false;
    const Val& v = c.value(ref->value);
    return v.as<std::int64_t>() != nullptr || v.as<double>() != nullptr || v.as<bool>() != nullptr;
}

// Whether a node that was lowered computes anything but a number or a shape from numbers.
bool computes_with_sizes(const Context& c, const Node& n) {
    const std::string name = n.target.substr(0, n.target.find('.'));
    if (name == "reshape" || name == "view" || name == "_unsafe_view" || name == "expand") return false;
    if (n.output >= 0 && c.value(n.output).as<std::int64_t>() != nullptr) return false;
    return std::any_of(n.args.begin(), n.args.end(), [&](const Arg& a) { return takes_a_number(c, a); }) ||
           std::any_of(n.kwargs.begin(), n.kwargs.end(), [&](const auto& a) { return takes_a_number(c, a.second); });
}

void lower_node(Context& c, const Node& n) {
    switch (n.op) {
        case Op::quantize: return quantize(c, n);
        case Op::dequantize: return dequantize(c, n);
        case Op::conv:
        case Op::linear: return int8_linear(c, n);
        case Op::matmul: return int8_matmul(c, n);
        case Op::add:
        case Op::mul: {
            const View b = c.operand(1, "other"), a = c.operand(0, "self");
            return binary(c, n.op == Op::add ? Binary::add : Binary::mul, a, b, n.output, n.epilogue);
        }
        case Op::clamp: return clamp_codes(c, n);
        case Op::recurrence: return recurrence(c, n);
        case Op::size: return size(c, n);
        default: break;
    }
    const OpRow* row = find_op(n);
    if (row == nullptr) throw Unsupported("has no native kernel");
    row->lower(c, n);
}

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
        case Op::aten: return find_op(node) != nullptr;
        default: return true;
    }
}

void Lowered::place() {
    ArenaPlan arena = plan_arena(buffers), kept = plan_arena(buffers, Storage::kept);
    arena_offsets = std::move(arena.offsets);
    arena_bytes = arena.bytes;
    kept_offsets = std::move(kept.offsets);
    kept_bytes = kept.bytes;
    std::int64_t bytes = arena_bytes + kept_bytes;
    for (const Buffer& b : buffers)
        if (b.storage == Storage::output) bytes += b.bytes;
    require_memory(bytes, "a plan");
}

Lowered lower(const Program& program, const Section& section, const std::vector<InputForm>& forms, Backend& backend,
              Constants& constants) {
    Context c(program, section, backend, constants);
    take_inputs(c, forms);
    for (c.node_index = section.first; c.node_index < section.last; ++c.node_index) {
        const auto label = [&] { return "layer " + c.node().label(); };
        try {
            if (!c.fusion.is_absorbed(c.node_index)) lower_node(c, c.node());
        } catch (const Unsupported& error) {
            throw Unsupported("node " + std::to_string(c.node_index) + ": " + label() + ": " + error.what());
        } catch (const Error& error) {
            throw Error(label() + ": " + error.what());
        }
        c.result.computes_with_sizes = c.result.computes_with_sizes || computes_with_sizes(c, c.node());
    }
    c.node_index = -1;
    give_outputs(c);
    Schedule plan = schedule(c.buffers.all(), c.uses);
    std::vector<NamedStep> steps = std::move(c.result.steps);
    c.result.steps.clear();
    for (std::size_t i = 0; i < steps.size(); ++i) {
        const auto from = static_cast<std::size_t>(plan.order[i]);
        steps[from].use = std::move(c.uses[from]);
        (static_cast<int>(i) < plan.once ? c.result.once : c.result.steps).push_back(std::move(steps[from]));
    }
    c.result.buffers = std::move(plan.buffers);
    c.result.place();
    return std::move(c.result);
}

}  // namespace quantflow
