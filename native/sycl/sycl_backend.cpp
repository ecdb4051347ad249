#include "sycl_backend.hpp"

#include <dlfcn.h>
#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "device.hpp"
#include "steps.hpp"

namespace quantflow {
namespace {

using xpu::Device;
using xpu::StepPtr;

// What leaves the backend: a step that may run while other threads use the device.
class LockedStep final : public Step {
public:
    LockedStep(Device& device, StepPtr step) : device_(device), step_(std::move(step)) {}
    void run() override {
        std::lock_guard<std::mutex> lock(device_.mutex);
        step_->run();
    }
    std::string kernel() const override { return step_->kernel(); }

private:
    Device& device_;
    StepPtr step_;
};

class SyclBackend final : public Backend {
public:
    SyclBackend(const sycl::device& device, const std::string& cache_dir) : device_(device, cache_dir) {}

    std::string name() const override {
        return std::string("sycl.") + (device_.is_cpu ? "cpu" : "gpu");
    }
    bool stores_unsigned() const override { return false; }
    bool takes_terms() const override { return false; }
    void* allocate(std::size_t bytes) override { return device_.allocate(bytes); }
    void release(void* memory) override { device_.release(memory); }
    void copy(void* to, const void* from, std::size_t bytes) override { device_.copy(to, from, bytes); }
    bool reads_process_memory() const override { return false; }
    void wait() override { device_.wait(); }

    StepPtr linear(const Weights& w, const Tensor& x, const Tensor* residual, const Epilogue& e, const Tensor& y,
                   const Terms&) override {
        return locked([&] { return xpu::make_linear(device_, w, x, residual, e, y); });
    }
    StepPtr conv(const Weights& w, const ConvGeometry& g, const Tensor& x, const Tensor* residual, const Epilogue& e,
                 const Tensor& y, const Terms&) override {
        return locked([&] { return xpu::make_conv(device_, w, g, x, residual, e, y); });
    }
    StepPtr matmul(const Tensor& a, const Tensor& b, const Tensor& y) override {
        return locked([&] { return xpu::make_matmul(device_, a, b, 1.0f, y); });
    }
    StepPtr float_linear(const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor& y) override {
        return locked([&] { return xpu::make_float_linear(device_, x, w, bias, y); });
    }
    StepPtr float_conv(const ConvGeometry&, const Tensor&, const Tensor&, const Tensor*, const Tensor&) override {
        throw Unsupported("a float convolution on this device");
    }
    StepPtr attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask, bool causal, float scale,
                      const Tensor& y) override {
        return locked([&] { return xpu::make_attention(device_, q, k, v, mask, causal, scale, y); });
    }
    StepPtr copy(const Tensor& x, const Tensor& y) override { return locked([&] { return xpu::make_copy(device_, x, y); }); }
    StepPtr fill(double value, const Tensor& y) override { return locked([&] { return xpu::make_fill(device_, value, y); }); }
    StepPtr binary(Binary op, const Tensor& a, const Tensor& b, const Epilogue& e, const Tensor& y) override {
        return locked([&] { return xpu::make_binary(device_, op, a, b, e, y); });
    }
    StepPtr unary(Unary op, float a, float b, const Epilogue& e, const Tensor& x, const Tensor& y) override {
        return locked([&] { return xpu::make_unary(device_, op, a, b, e, x, y); });
    }
    StepPtr where(const Tensor& c, const Tensor& a, const Tensor& b, const Tensor& y) override {
        return locked([&] { return xpu::make_where(device_, c, a, b, y); });
    }
    StepPtr channel_affine(const Tensor& x, int axis, const Tensor& scale, const Tensor& shift, const Epilogue& e,
                           const Tensor& y) override {
        return locked([&] { return xpu::make_channel_affine(device_, x, axis, scale, shift, e, y); });
    }
    StepPtr pool(const PoolGeometry& g, const Tensor& x, const Tensor& y) override {
        return locked([&] { return xpu::make_pool(device_, g, x, y); });
    }
    StepPtr reduce(Reduction r, const Tensor& x, const std::vector<int>& axes, const Tensor& y) override {
        return locked([&] { return xpu::make_reduce(device_, r, x, axes, y); });
    }
    StepPtr softmax(const Tensor& x, int axis, const Tensor& y) override {
        return locked([&] { return xpu::make_softmax(device_, x, axis, y); });
    }
    StepPtr layer_norm(const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps, bool is_rms,
                       const Tensor& y, const Tensor* codes) override {
        if (codes != nullptr) throw Unsupported("a norm that gives codes beside floats");
        return locked([&] { return xpu::make_layer_norm(device_, x, gamma, beta, eps, is_rms, y); });
    }
    StepPtr gather(const Tensor& table, const Tensor& index, const Tensor& y) override {
        return locked([&] { return xpu::make_gather(device_, table, index, y); });
    }
    StepPtr upsample(Interpolation how, bool align, const std::vector<double>& scales, const Tensor& x,
                     const Tensor& y) override {
        return locked([&] { return xpu::make_upsample(device_, how, align, scales, x, y); });
    }

    const xpu::KernelStore& kernels() const { return device_.kernels; }

private:
    template <typename Make>
    StepPtr locked(const Make& make) {
        std::lock_guard<std::mutex> lock(device_.mutex);
        return std::make_unique<LockedStep>(device_, make());
    }

    Device device_;
};

// Before the first call into SYCL; see the header.
void find_cpu_runtime() {
    static const bool done = [] {
        Dl_info info{};
        // An address inside libsycl.so; the cast through an integer is what POSIX allows.
        const auto* inside = dlsym(RTLD_DEFAULT, "_ZN4sycl3_V18platform13get_platformsEv");
        if (std::getenv("OCL_ICD_FILENAMES") == nullptr && inside != nullptr && dladdr(inside, &info) != 0) {
            const auto path = std::filesystem::path(info.dli_fname).replace_filename("libintelocl.so");
            std::error_code ignored;
            if (std::filesystem::exists(path, ignored)) setenv("OCL_ICD_FILENAMES", path.c_str(), 0);
        }
        return true;
    }();
    (void)done;
}

int put(const std::string& text, char* to, std::size_t capacity) {
    if (to != nullptr && capacity > 0) {
        const std::size_t n = std::min(text.size(), capacity - 1);
        std::memcpy(to, text.data(), n);
        to[n] = '\0';
    }
    return static_cast<int>(text.size() + 1);
}

std::string quoted(const std::string& text) {
    std::string json = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            json += '\\';
            json += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char escape[8];
            std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
            json += escape;
        } else {
            json += c;
        }
    }
    return json + "\"";
}

const char* type_of(const sycl::device& device) { return device.is_cpu() ? "cpu" : device.is_gpu() ? "gpu" : "other"; }

const char* backend_of(const sycl::device& device) {
    switch (device.get_backend()) {
        case sycl::backend::ext_oneapi_level_zero: return "level_zero";
        case sycl::backend::opencl: return "opencl";
        case sycl::backend::ext_oneapi_cuda: return "cuda";
        case sycl::backend::ext_oneapi_hip: return "hip";
        default: return "other";
    }
}

bool has_engine(const sycl::device& device) {
    try {
        dnnl::sycl_interop::make_engine(device, sycl::context(device));
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

// What oneDNN was told to use (ONEDNN_MAX_CPU_ISA) counts, not what the CPU could do. Its values are sets of features.
bool is_exact(const sycl::device& device) {
    if (!device.is_cpu()) return true;
    const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
    const auto has = [isa](dnnl::cpu_isa wanted) {
        return (isa & static_cast<unsigned>(wanted)) == static_cast<unsigned>(wanted);
    };
    return has(dnnl::cpu_isa::avx512_core_vnni) || has(dnnl::cpu_isa::avx2_vnni);
}

std::vector<sycl::device> all_devices() {
    find_cpu_runtime();
    std::vector<sycl::device> devices;
    for (const auto& platform : sycl::platform::get_platforms())
        for (const auto& device : platform.get_devices()) devices.push_back(device);
    return devices;
}

std::string summary(const std::vector<sycl::device>& devices) {
    std::string text;
    for (const auto& device : devices)
        text += (text.empty() ? "" : "; ") + std::string(type_of(device)) + " " +
                device.get_info<sycl::info::device::name>() + " (" + backend_of(device) + ")";
    return text.empty() ? "none" : text;
}

// The device that `kind` means. GPUs through Level Zero (OpenCL's are the same ones by a slower way), the largest one:
// beside a card there may be a processor's own.
std::optional<sycl::device> choose(const std::vector<sycl::device>& devices, const std::string& kind) {
    std::optional<sycl::device> chosen;
    for (const auto& device : devices) {
        const bool fits = kind == type_of(device) && (kind == "cpu" || device.get_backend() ==
                                                                           sycl::backend::ext_oneapi_level_zero);
        const auto units = [](const sycl::device& d) { return d.get_info<sycl::info::device::max_compute_units>(); };
        if (fits && (!chosen || units(device) > units(*chosen))) chosen = device;
    }
    return chosen;
}

std::string device_json(const sycl::device& device) {
    using namespace sycl::info;
    return "{\"name\": " + quoted(device.get_info<device::name>()) +
           ", \"vendor\": " + quoted(device.get_info<device::vendor>()) + ", \"type\": \"" + type_of(device) +
           "\", \"backend\": \"" + backend_of(device) +
           "\", \"driver\": " + quoted(device.get_info<device::driver_version>()) +
           ", \"compute_units\": " + std::to_string(device.get_info<device::max_compute_units>()) +
           ", \"memory_bytes\": " + std::to_string(device.get_info<device::global_mem_size>()) +
           ", \"onednn\": " + (has_engine(device) ? "true" : "false") +
           ", \"exact_int8\": " + (is_exact(device) ? "true" : "false") + "}";
}

const char* isa_name() {
    switch (dnnl::get_effective_cpu_isa()) {
        case dnnl::cpu_isa::sse41: return "sse41";
        case dnnl::cpu_isa::avx: return "avx";
        case dnnl::cpu_isa::avx2: return "avx2";
        case dnnl::cpu_isa::avx2_vnni: return "avx2_vnni";
        case dnnl::cpu_isa::avx2_vnni_2: return "avx2_vnni_2";
        case dnnl::cpu_isa::avx512_core: return "avx512_core";
        case dnnl::cpu_isa::avx512_core_vnni: return "avx512_core_vnni";
        case dnnl::cpu_isa::avx512_core_bf16: return "avx512_core_bf16";
        case dnnl::cpu_isa::avx512_core_fp16: return "avx512_core_fp16";
        case dnnl::cpu_isa::avx512_core_amx: return "avx512_core_amx";
        default: return "other";
    }
}

}  // namespace
}  // namespace quantflow

using namespace quantflow;

extern "C" {

int qf_sycl_devices(char* json, std::size_t capacity) {
    std::string text;
    const auto add = [&text](const std::string& entry) { text += (text.empty() ? "" : ", ") + entry; };
    try {
        for (const auto& device : all_devices()) {
            try {
                add(device_json(device));
            } catch (const std::exception& e) {
                add("{\"error\": " + quoted(e.what()) + "}");
            }
        }
    } catch (const std::exception& e) {
        add("{\"error\": " + quoted(e.what()) + "}");
    }
    return put("[" + text + "]", json, capacity);
}

Backend* qf_sycl_make_backend(const char* device, const char* cache_dir, char* error, std::size_t capacity) {
    const std::string kind = device == nullptr ? "" : device;
    std::string found = "unknown";
    try {
        const auto devices = all_devices();
        found = summary(devices);
        if (kind != "cpu" && kind != "gpu")
            throw Error("device '" + kind + "' is not known; legal are 'cpu' and 'gpu'");
        const auto chosen = choose(devices, kind);
        if (!chosen)
            throw Error("SYCL finds no " + kind +
                        (kind == "cpu" ? " (does OCL_ICD_FILENAMES name libintelocl.so?)"
                                       : " with Level Zero (is the driver, libze_intel_gpu, installed, and may this "
                                         "user open /dev/dri/renderD*?)"));
        return new SyclBackend(*chosen, cache_dir == nullptr ? "" : cache_dir);
    } catch (const std::exception& e) {
        put(std::string(e.what()) + "; devices found: " + found, error, capacity);
        return nullptr;
    }
}

int qf_sycl_exact_int8(const char* device) {
    try {
        const auto chosen = choose(all_devices(), device == nullptr ? "" : device);
        return chosen && is_exact(*chosen) ? 1 : 0;
    } catch (const std::exception&) {
        return 0;
    }
}

int qf_sycl_versions(char* json, std::size_t capacity) {
    const auto* v = dnnl::version();
    return put("{\"onednn\": \"" + std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
                   std::to_string(v->patch) + "\", \"onednn_cpu_isa\": \"" + isa_name() + "\", \"sycl\": \"" +
                   std::to_string(__LIBSYCL_MAJOR_VERSION) + "." + std::to_string(__LIBSYCL_MINOR_VERSION) + "." +
                   std::to_string(__LIBSYCL_PATCH_VERSION) + "\", \"kernels\": \"" + xpu::kernel_source_hash() + "\"}",
               json, capacity);
}

int qf_sycl_kernel_statistics(const Backend* backend, char* json, std::size_t capacity) {
    const auto* made_here = dynamic_cast<const SyclBackend*>(backend);
    return put(made_here == nullptr ? "{}" : made_here->kernels().statistics(), json, capacity);
}

int qf_sycl_write_kernels(const char* directory, char* error, std::size_t capacity) {
    try {
        const auto devices = all_devices();
        if (devices.empty()) throw Error("SYCL finds no device to compile for");
        const auto images = xpu::compile_kernels(sycl::context(devices.front()));
        const std::string to = directory;
        bool done = xpu::write_file(to + "/libquantflow_sycl.kernels", xpu::encode(images));
        for (const auto& [name, image] : images)
            done = done && xpu::write_file(to + "/" + name + ".spv", image);
        if (!done) throw Error("can't write to " + to);
        return 0;
    } catch (const std::exception& e) {
        put(e.what(), error, capacity);
        return 1;
    }
}
}
