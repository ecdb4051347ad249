#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <limits>

namespace quantflow {
namespace {

// More concurrent runs of one plan wait for an instance instead of taking more memory.
constexpr int kMaxInstances = 16;

std::size_t bytes_of(DType dtype, const std::vector<std::int64_t>& dims) {
    std::int64_t n = size_of(dtype);
    for (auto d : dims) n *= d;
    return static_cast<std::size_t>(n);
}

}  // namespace

struct Plan::Instance {
    explicit Instance(Backend& device) : backend(device) {}
    ~Instance() {
        for (void* memory : owned) backend.release(memory);
    }
    std::byte* allocate(std::int64_t bytes) {
        void* memory = backend.allocate(static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)));
        owned.push_back(memory);
        return static_cast<std::byte*>(memory);
    }
    Backend& backend;
    Lowered lowered;
    std::vector<void*> owned;
};

Plan::Plan(std::shared_ptr<Engine> engine, Section section, std::vector<InputForm> forms)
    : engine_(std::move(engine)), section_(std::move(section)), forms_(std::move(forms)) {
    auto first = build();
    outputs_ = first->lowered.outputs;
    arena_bytes_ = first->lowered.arena_bytes;
    built_ = 1;
    free_.push_back(std::move(first));
}

Plan::~Plan() = default;

std::unique_ptr<Plan::Instance> Plan::build() {
    std::lock_guard<std::mutex> lock(engine_->building);
    auto instance = std::make_unique<Instance>(*engine_->backend);
    instance->lowered = lower(engine_->program->program, section_, forms_, *engine_->backend, engine_->constants);
    Lowered& l = instance->lowered;
    std::byte* arena = instance->allocate(l.arena_bytes);
    for (std::size_t i = 0; i < l.cells.size(); ++i)
        if (l.arena_offsets[i] >= 0) l.cells[i] = arena + l.arena_offsets[i];
    if (!engine_->backend->reads_process_memory()) {
        for (std::size_t i = 0; i < forms_.size(); ++i)
            if (l.input_cells[i] >= 0)
                l.cells[static_cast<std::size_t>(l.input_cells[i])] =
                    instance->allocate(static_cast<std::int64_t>(bytes_of(forms_[i].dtype, forms_[i].dims)));
        for (std::size_t i = 0; i < l.outputs.size(); ++i)
            if (l.output_cells[i] >= 0)
                l.cells[static_cast<std::size_t>(l.output_cells[i])] =
                    instance->allocate(static_cast<std::int64_t>(bytes_of(l.outputs[i].dtype, l.outputs[i].dims)));
    }
    return instance;
}

std::unique_ptr<Plan::Instance> Plan::take() {
    {
        std::unique_lock<std::mutex> lock(mutex_);
        returned_.wait(lock, [&] { return !free_.empty() || built_ < kMaxInstances; });
        if (!free_.empty()) {
            auto instance = std::move(free_.back());
            free_.pop_back();
            return instance;
        }
        ++built_;
    }
    try {
        return build();
    } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        --built_;
        returned_.notify_one();
        throw;
    }
}

void Plan::give(std::unique_ptr<Instance> instance) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(instance));
    }
    returned_.notify_one();
}

void Plan::execute(Instance& instance, const void* const* inputs, void* const* outputs, std::vector<StepTime>* times) {
    Lowered& l = instance.lowered;
    Backend& backend = *engine_->backend;
    const bool direct = backend.reads_process_memory();
    for (std::size_t i = 0; i < forms_.size(); ++i) {
        if (l.input_cells[i] < 0) continue;
        auto& cell = l.cells[static_cast<std::size_t>(l.input_cells[i])];
        if (direct)  // steps only read their inputs; the cast fits the address into a cell
            cell = const_cast<std::byte*>(static_cast<const std::byte*>(inputs[i]));
        else
            backend.copy(cell, inputs[i], bytes_of(forms_[i].dtype, forms_[i].dims));
    }
    if (direct)
        for (std::size_t i = 0; i < l.outputs.size(); ++i)
            if (l.output_cells[i] >= 0)
                l.cells[static_cast<std::size_t>(l.output_cells[i])] = static_cast<std::byte*>(outputs[i]);
    for (std::size_t i = 0; i < l.steps.size(); ++i) {
        if (times == nullptr) {
            l.steps[i].step->run();
            continue;
        }
        backend.wait();
        const auto start = std::chrono::steady_clock::now();
        l.steps[i].step->run();
        backend.wait();
        const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
        (*times)[i].milliseconds = std::min((*times)[i].milliseconds, taken.count());
    }
    if (!direct)
        for (std::size_t i = 0; i < l.outputs.size(); ++i)
            if (l.output_cells[i] >= 0)
                backend.copy(outputs[i], l.cells[static_cast<std::size_t>(l.output_cells[i])],
                             bytes_of(l.outputs[i].dtype, l.outputs[i].dims));
    backend.wait();
}

void Plan::run(const void* const* inputs, void* const* outputs) {
    auto instance = take();
    try {
        execute(*instance, inputs, outputs, nullptr);
    } catch (...) {
        give(std::move(instance));
        throw;
    }
    give(std::move(instance));
}

std::vector<StepTime> Plan::profile(const void* const* inputs, void* const* outputs, int runs) {
    auto instance = take();
    std::vector<StepTime> times;
    for (const NamedStep& s : instance->lowered.steps)
        times.push_back({s.node, s.step->kernel(), std::numeric_limits<double>::infinity()});
    try {
        for (int i = 0; i < runs; ++i) execute(*instance, inputs, outputs, &times);
    } catch (...) {
        give(std::move(instance));
        throw;
    }
    give(std::move(instance));
    return times;
}

}  // namespace quantflow
