#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "../host/error_sums_isa.hpp"
#include "../host/isa.hpp"
#include "../host/rates.hpp"
#include "../sycl/sycl_backend.hpp"
#include "engine.hpp"
#include "quantflow/native.h"
#include "thread_pool.hpp"

using namespace quantflow;

struct qf_program {
    std::shared_ptr<const LoadedProgram> loaded;
};
struct qf_backend {
    std::shared_ptr<Backend> backend;
};
struct qf_engine {
    std::shared_ptr<Engine> engine;
};
struct qf_plan {
    std::unique_ptr<Plan> plan;
};

namespace {

void write(char* error, std::size_t capacity, const char* text) {
    if (error == nullptr || capacity == 0) return;
    std::strncpy(error, text, capacity - 1);
    error[capacity - 1] = '\0';
}

// Runs `body`; no exception crosses the C interface.
template <typename Body>
std::int32_t guarded(char* error, std::size_t capacity, Body body) {
    try {
        body();
        return 0;
    } catch (const Unsupported& e) {
        write(error, capacity, e.what());
        return QF_UNSUPPORTED;
    } catch (const std::bad_alloc&) {
        write(error, capacity, "out of memory");
    } catch (const std::exception& e) {
        write(error, capacity, e.what());
    } catch (...) {
        write(error, capacity, "an exception of unknown kind");
    }
    return QF_ERROR;
}

// What a caller must give: null is refused by name, not followed.
template <typename T>
T* given(T* pointer, const char* what, std::size_t count = 1) {
    if (pointer == nullptr && count != 0) throw Error(std::string(what) + " is null");
    return pointer;
}

DType dtype_of(std::int32_t code) {
    if (code < QF_F32 || code > QF_BOOL) throw Error("dtype " + std::to_string(code) + " is not known");
    return static_cast<DType>(code);
}

std::vector<std::int64_t> dims_of(const std::int64_t* dims, std::int32_t rank) {
    if (rank < 0 || rank > 16) throw Error("rank " + std::to_string(rank) + " is not in [0, 16]");
    given(dims, "dims", static_cast<std::size_t>(rank));
    std::vector<std::int64_t> out(dims, dims + rank);
    checked_count(out);
    return out;
}

std::vector<int> values_of(const Program& program, const char* const* names, std::size_t count) {
    std::vector<int> out;
    given(names, "the list of names", count);
    for (std::size_t i = 0; i < count; ++i) {
        const int index = program.find(given(names[i], "a name"));
        if (index < 0) throw Error(std::string("the program has no value '") + names[i] + "'");
        out.push_back(index);
    }
    return out;
}

std::unique_ptr<Plan> planned(const qf_engine* engine, Section section, const char* const* input_names,
                              const qf_form* inputs, std::size_t input_count, const char* const* output_names,
                              std::size_t output_count) {
    const Program& program = given(engine, "engine")->engine->program->program;
    given(inputs, "inputs", input_count);
    if (section.first < 0 || section.last < section.first ||
        static_cast<std::size_t>(section.last) > program.nodes.size())
        throw Error("a section must lie inside the program");
    section.inputs = values_of(program, input_names, input_count);
    section.outputs = values_of(program, output_names, output_count);
    std::vector<InputForm> forms;
    for (std::size_t i = 0; i < input_count; ++i) {
        const qf_form& f = inputs[i];
        InputForm form;
        form.is_number = f.is_number != 0;
        form.number = f.number;
        form.is_channels_last = f.is_channels_last != 0;
        if (!form.is_number) {
            form.dtype = dtype_of(f.dtype);
            form.dims = dims_of(f.dims, f.rank);
            if (form.is_channels_last && f.rank < 3) throw Error("channels-last needs three dimensions");
        }
        forms.push_back(std::move(form));
    }
    return std::make_unique<Plan>(engine->engine, std::move(section), std::move(forms));
}

void hand_over(const nlohmann::json& found, char* json, std::size_t room, std::size_t* needed) {
    given(needed, "needed");
    given(json, "json", room);
    const std::string text = found.dump();
    *needed = text.size();
    if (room > text.size()) std::memcpy(json, text.c_str(), text.size() + 1);
}

// The rates by name, in the order of the C interface; `ghz` apart. Those of the kernels beside the ones in use, where
// there are any, begin with "vectors_".
struct NamedRate {
    const host::Int8Kernels* kernels;
    double host::int8::Rates::*member;
};
std::map<std::string, NamedRate> rates_by_name() {
    std::map<std::string, NamedRate> named;
    const auto add = [&](const host::Int8Kernels* kernels, const std::string& prefix) {
        if (kernels == nullptr) return;
#define QF_RATE(name) named[prefix + #name] = {kernels, &host::int8::Rates::name};
        QF_RATES(QF_RATE)
#undef QF_RATE
    };
    add(host::int8_kernels_in_use(), "");
    add(host::int8_kernels_beside(), "vectors_");
    return named;
}

}  // namespace

extern "C" {

std::int32_t qf_abi_version(void) { return QF_ABI_VERSION; }
const char* qf_host_isa(void) { return name_of(best_isa()); }

std::int32_t qf_program_parse(const char* json, std::size_t size, const qf_tensor* tensors, std::size_t count,
                              qf_program** program, char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] {
        TensorTable table;
        given(program, "program");
        given(json, "json", size);
        given(tensors, "tensors", count);
        for (std::size_t i = 0; i < count; ++i) {
            const qf_tensor& t = tensors[i];
            const bool is_opaque = t.dtype < 0;
            table.emplace(given(t.name, "a tensor's name"),
                          Stored{is_opaque ? DType::u8 : dtype_of(t.dtype), dims_of(t.dims, t.rank),
                                 is_opaque ? nullptr : static_cast<const std::byte*>(t.data)});
        }
        auto loaded = std::make_shared<LoadedProgram>();
        loaded->program = parse_program(json, size, std::move(table));
        *program = new qf_program{std::move(loaded)};
    });
}

std::int32_t qf_program_open(const char* json_path, const char* weights_path, qf_program** program, char* error,
                             std::size_t capacity) {
    return guarded(error, capacity, [&] {
        auto loaded = std::make_shared<LoadedProgram>();
        given(program, "program");
        loaded->weights = std::make_unique<MappedFile>(given(weights_path, "weights_path"));
        const MappedFile text(given(json_path, "json_path"));
        loaded->program = parse_program(reinterpret_cast<const char*>(text.data()), text.size(),
                                        parse_safetensors(loaded->weights->data(), loaded->weights->size()));
        *program = new qf_program{std::move(loaded)};
    });
}

void qf_program_free(qf_program* program) { delete program; }

std::int32_t qf_program_nodes(const qf_program* program) {
    return static_cast<std::int32_t>(program->loaded->program.nodes.size());
}

std::int32_t qf_program_supports(const qf_program* program, std::int32_t index) {
    const auto& nodes = program->loaded->program.nodes;
    if (index < 0 || static_cast<std::size_t>(index) >= nodes.size()) return 0;
    return is_supported(nodes[static_cast<std::size_t>(index)]) ? 1 : 0;
}

void qf_host_borrow(qf_region region) { ThreadPool::borrow_from(region); }

std::int32_t qf_backend_host(std::int32_t threads, qf_backend** backend, char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] {
        given(backend, "backend");
        if (threads < 1 || threads > 1024) throw Error("threads must be in [1, 1024], is " + std::to_string(threads));
        *backend = new qf_backend{std::shared_ptr<Backend>(make_host_backend(threads))};
    });
}

std::int32_t qf_backend_sycl(const char* library, const char* device, const char* cache_folder, qf_backend** backend,
                             char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] {
        given(backend, "backend");
        given(device, "device");
        given(cache_folder, "cache_folder");
        // Never unloaded: SYCL's own threads outlive any backend.
        void* handle = dlopen(given(library, "library"), RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) throw Error(dlerror());
        const auto make = reinterpret_cast<decltype(&qf_sycl_make_backend)>(dlsym(handle, "qf_sycl_make_backend"));
        if (make == nullptr) throw Error(std::string(library) + " is not quantflow's SYCL library");
        char text[4096] = "";
        Backend* made = make(device, cache_folder, text, sizeof text);
        if (made == nullptr) throw Error(text);
        *backend = new qf_backend{std::shared_ptr<Backend>(made)};
    });
}

void qf_backend_free(qf_backend* backend) { delete backend; }

std::int32_t qf_engine_create(const qf_program* program, const qf_backend* backend, qf_engine** engine, char* error,
                              std::size_t capacity) {
    return guarded(error, capacity, [&] {
        given(engine, "engine");
        *engine = new qf_engine{
            std::make_shared<Engine>(given(program, "program")->loaded, given(backend, "backend")->backend)};
    });
}

void qf_engine_free(qf_engine* engine) { delete engine; }

std::int32_t qf_plan_create(const qf_engine* engine, std::int32_t first, std::int32_t last,
                            const char* const* input_names, const qf_form* inputs, std::size_t input_count,
                            const char* const* output_names, std::size_t output_count, qf_plan** plan, char* error,
                            std::size_t capacity) {
    return guarded(error, capacity, [&] {
        given(plan, "plan");
        const Section section{first, last, {}, {}, false};
        *plan = new qf_plan{planned(engine, section, input_names, inputs, input_count, output_names, output_count)};
    });
}

std::int32_t qf_step_create(const qf_engine* engine, std::int32_t first, std::int32_t last,
                            const char* const* input_names, const qf_form* inputs, std::size_t input_count,
                            const char* const* output_names, std::size_t output_count, qf_plan** plan, char* error,
                            std::size_t capacity) {
    return guarded(error, capacity, [&] {
        given(plan, "plan");
        const Section section{first, last, {}, {}, true};
        *plan = new qf_plan{planned(engine, section, input_names, inputs, input_count, output_names, output_count)};
    });
}

void qf_plan_free(qf_plan* plan) { delete plan; }

void qf_plan_outputs(const qf_plan* plan, qf_form* outputs) {
    for (const OutputForm& form : plan->plan->outputs()) {
        *outputs = {};
        outputs->dtype = static_cast<std::int32_t>(form.dtype);
        outputs->rank = static_cast<std::int32_t>(form.dims.size());
        std::copy(form.dims.begin(), form.dims.end(), outputs->dims);
        outputs->is_channels_last = form.is_channels_last ? 1 : 0;
        outputs->is_number = form.is_number ? 1 : 0;
        outputs->number = form.number;
        ++outputs;
    }
}

std::int64_t qf_plan_arena_bytes(const qf_plan* plan) { return plan->plan->arena_bytes(); }

std::int32_t qf_plan_run(qf_plan* plan, const void* const* inputs, void* const* outputs, char* error,
                         std::size_t capacity) {
    return guarded(error, capacity, [&] { given(plan, "plan")->plan->run(inputs, outputs); });
}

std::int32_t qf_plan_profile(qf_plan* plan, const void* const* inputs, void* const* outputs, std::int32_t runs,
                             char* json, std::size_t room, std::size_t* needed, char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] {
        nlohmann::json list = nlohmann::json::array();
        for (const StepTime& t : given(plan, "plan")->plan->profile(inputs, outputs, std::max(1, runs)))
            list.push_back({{"node", t.node}, {"kernel", t.kernel}, {"parts", t.parts}, {"ms", t.milliseconds}});
        hand_over(list, json, room, needed);
    });
}

std::int32_t qf_plan_predicted_ms(qf_plan* plan, double* ms, char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] { *given(ms, "ms") = given(plan, "plan")->plan->predicted_ms(); });
}

std::int32_t qf_plan_tune(qf_plan* plan, const void* const* inputs, void* const* outputs, std::int32_t runs,
                          std::int32_t most, double margin, double budget_ms, char* json, std::size_t room,
                          std::size_t* needed, char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] {
        Tuning tuning;
        tuning.runs = std::max(2, runs);
        tuning.most = static_cast<std::size_t>(std::max(1, most));
        tuning.margin = margin;
        tuning.budget_ms = budget_ms;
        nlohmann::json list = nlohmann::json::array();
        for (const Tried& t : given(plan, "plan")->plan->tune(inputs, outputs, tuning)) {
            nlohmann::json ways = nlohmann::json::array();
            for (std::size_t i = 0; i < t.ways.size(); ++i) {
                const Way& way = t.ways[i];
                ways.push_back({{"rows", way.rows}, {"panels", way.panels}, {"predicted_ms", way.predicted_ms},
                                {"ms", t.milliseconds[i]}});
                if (way.shape != t.shape) ways.back()["shape"] = way.shape;
            }
            list.push_back({{"node", t.node}, {"kernel", t.kernel}, {"shape", t.shape}, {"count", t.count},
                            {"kept", t.kept}, {"ways", ways}});
        }
        hand_over(list, json, room, needed);
    });
}

std::int32_t qf_host_keep_way(const char* shape, std::int64_t rows, std::int64_t panels, char* error,
                              std::size_t capacity) {
    return guarded(error, capacity, [&] { keep_way(Way{rows, panels, 0, given(shape, "shape")}); });
}

std::int32_t qf_host_rates(char* json, std::size_t room, std::size_t* needed, char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] {
        const host::Int8Kernels& kernels = *host::int8_kernels_in_use();
        const host::int8::Rates rates = host::int8::rates_of(kernels);
        const host::int8::Caches& caches = host::int8::caches();
        nlohmann::json now, built_in;
        for (const auto& [name, rate] : rates_by_name()) {
            now[name] = host::int8::rates_of(*rate.kernels).*rate.member;
            built_in[name] = host::int8::built_in_rates(*rate.kernels).*rate.member;
        }
        hand_over({{"cpu", cpu_name()}, {"isa", name_of(best_isa())}, {"l1_bytes", caches.l1}, {"l2_bytes", caches.l2},
                   {"caches", caches.source}, {"is_measured", rates.is_measured}, {"ghz", rates.ghz}, {"rates", now},
                   {"built_in", built_in}},
                  json, room, needed);
    });
}

std::int32_t qf_host_measure_rates(std::int32_t threads, char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] {
        if (threads < 1 || threads > 1024) throw Error("threads must be in [1, 1024], is " + std::to_string(threads));
        std::vector<const host::Int8Kernels*> all{host::int8_kernels_in_use()};
        if (host::int8_kernels_beside() != nullptr) all.push_back(host::int8_kernels_beside());
        for (const host::int8::Rates& rates : host::int8::measure_rates(all, threads)) host::int8::set_rates(rates);
    });
}

std::int32_t qf_host_set_rates(const double* values, std::size_t count, char* error, std::size_t capacity) {
    return guarded(error, capacity, [&] {
        if (count == 0) return host::int8::forget_rates();
        const auto named = rates_by_name();
        if (count != named.size() + 1)
            throw Error(std::to_string(count) + " rates; there are " + std::to_string(named.size() + 1));
        given(values, "values");
        const double ghz = values[named.size()];
        std::map<const host::Int8Kernels*, host::int8::Rates> all;
        for (const auto& [name, rate] : named) {
            const host::int8::Rates usual = host::int8::built_in_rates(*rate.kernels);
            host::int8::Rates& rates = all.try_emplace(rate.kernels, usual).first->second;
            rates.*rate.member = *values++;
            rates.ghz = ghz;
        }
        for (const auto& [kernels, rates] : all) host::int8::set_rates(rates);
    });
}

std::int32_t qf_error_sums(const float* expected, const void* actual, std::int32_t dtype, float scale,
                           std::int32_t zero_point, std::size_t count, double* sums, char* error,
                           std::size_t capacity) {
    return guarded(error, capacity, [&] {
        given(expected, "expected", count);
        given(actual, "actual", count);
        given(sums, "sums");
        const host::ErrorKernels& kernels = host::error_kernels();
        const host::ErrorCoding coding{scale, zero_point};
        host::ErrorSums found;
        if (dtype == QF_F32)
            found = kernels.of_floats(expected, static_cast<const float*>(actual), count);
        else if (dtype == QF_U8)
            found = kernels.of_u8(expected, static_cast<const std::uint8_t*>(actual), coding, count);
        else if (dtype == QF_S8)
            found = kernels.of_s8(expected, static_cast<const std::int8_t*>(actual), coding, count);
        else
            throw Error("errors of dtype " + std::to_string(dtype) + " can't be summed: f32, u8 or s8");
        sums[0] = found.signal;
        sums[1] = found.noise;
        sums[2] = found.largest;
        sums[3] = found.largest_error;
    });
}

}  // extern "C"
