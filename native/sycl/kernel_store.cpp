#include "kernel_store.hpp"

#include <CL/cl.h>
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <sycl/backend.hpp>

#include "../src/tensor.hpp"
#include "kernel_arguments.hpp"
#include "kernels.hpp"

namespace quantflow::xpu {
namespace {

namespace syclex = sycl::ext::oneapi::experimental;
using Clock = std::chrono::steady_clock;

// One image per kernel, so that a program pays only for those it uses. No contraction: see kernels.hpp.
const std::vector<std::string> kOptions = {"-ffp-contract=off", "-fsycl-device-code-split=per_kernel"};
// The runtime compiler puts this before the name of an extern "C" kernel.
const std::string kPrefix = "__sycl_kernel_";
constexpr char kMagic[] = "quantflow kernels 1\n";
constexpr char kNativeMagic[] = "quantflow native 1\n";

std::string source() {
    return std::string("#include <sycl/sycl.hpp>\n#include <cmath>\n#include <type_traits>\n") + kSharedSource +
           kKernelSource;
}

// FNV-1a.
std::uint64_t hash(const void* data, std::size_t size, std::uint64_t h = 0xcbf29ce484222325u) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < size; ++i) h = (h ^ bytes[i]) * 0x100000001b3u;
    return h;
}

std::string hex(std::uint64_t value) {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
    return text;
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void append(Bytes& to, const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::byte*>(data);
    to.insert(to.end(), bytes, bytes + size);
}

void append_number(Bytes& to, std::uint64_t value) { append(to, &value, sizeof value); }

// Reads what `append` wrote; `ok` turns false at the first attempt to read past the end.
struct Reader {
    const std::byte* at;
    const std::byte* end;
    bool ok = true;
    const std::byte* take(std::uint64_t size) {
        if (!ok || size > static_cast<std::uint64_t>(end - at)) {
            ok = false;
            return nullptr;
        }
        return std::exchange(at, at + size);
    }
    std::uint64_t number() {
        std::uint64_t value = 0;
        if (const auto* from = take(sizeof value)) std::memcpy(&value, from, sizeof value);
        return value;
    }
    std::string text() {
        const auto size = number();
        const auto* from = take(size);
        return from == nullptr ? std::string() : std::string(reinterpret_cast<const char*>(from), size);
    }
};

// A file's bytes; empty if it can't be read.
Bytes read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    Bytes bytes(text.size());
    if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
    return bytes;
}

// The bytes before the checksum at the end, or nothing if it does not fit them.
Reader checked(const Bytes& file, const char* magic) {
    const std::size_t start = std::strlen(magic);
    Reader none{nullptr, nullptr, false};
    if (file.size() < start + sizeof(std::uint64_t)) return none;
    const std::size_t size = file.size() - sizeof(std::uint64_t);
    std::uint64_t sum = 0;
    std::memcpy(&sum, file.data() + size, sizeof sum);
    if (std::memcmp(file.data(), magic, start) != 0 || sum != hash(file.data(), size)) return none;
    return {file.data() + start, file.data() + size};
}

// Path of the kernels that were compiled when the library was built; beside the library.
std::string shipped_path() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(&shipped_path), &info) == 0 || info.dli_fname == nullptr) return {};
    return std::filesystem::path(info.dli_fname).replace_filename("libquantflow_sycl.kernels").string();
}

std::string name_in(const Bytes& spirv) {
    const char* begin = reinterpret_cast<const char*>(spirv.data());
    const char* end = begin + spirv.size();
    const char* at = std::search(begin, end, kPrefix.begin(), kPrefix.end());
    if (at == end) throw Error("the runtime compiler made an image without a kernel of ours");
    at += kPrefix.size();
    return std::string(at, std::find(at, end, '\0'));
}

// ---- OpenCL: machine code of a kernel, and back

// Loaded by hand: a machine with a GPU alone needs no OpenCL.
struct OpenCl {
#define QF_OPENCL_FUNCTIONS(use)                                                                       \
    use(clGetKernelInfo) use(clReleaseKernel) use(clCreateKernel) use(clCreateProgramWithBinary)       \
    use(clBuildProgram) use(clGetProgramInfo) use(clReleaseProgram) use(clReleaseContext) use(clReleaseDevice)
#define QF_DECLARE(name) decltype(&::name) name = nullptr;
    QF_OPENCL_FUNCTIONS(QF_DECLARE)
#undef QF_DECLARE
    bool is_loaded = false;

    OpenCl() {
        void* library = dlopen("libOpenCL.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return;
        is_loaded = true;
#define QF_LOAD(name)                                                  \
    name = reinterpret_cast<decltype(&::name)>(dlsym(library, #name)); \
    is_loaded = is_loaded && name != nullptr;
        QF_OPENCL_FUNCTIONS(QF_LOAD)
#undef QF_LOAD
    }
};

const OpenCl& opencl() {
    static const OpenCl loaded;
    return loaded;
}

struct Program {
    cl_program handle = nullptr;
    ~Program() {
        if (handle != nullptr) opencl().clReleaseProgram(handle);
    }
};

Bytes machine_code(const sycl::kernel& kernel) {
    const OpenCl& cl = opencl();
    const cl_kernel handle = sycl::get_native<sycl::backend::opencl>(kernel);
    Bytes code;
    cl_program program = nullptr;  // the kernel's own, not ours to release
    cl_uint devices = 0;
    std::size_t size = 0;
    if (cl.clGetKernelInfo(handle, CL_KERNEL_PROGRAM, sizeof program, &program, nullptr) == CL_SUCCESS &&
        cl.clGetProgramInfo(program, CL_PROGRAM_NUM_DEVICES, sizeof devices, &devices, nullptr) == CL_SUCCESS &&
        devices == 1 &&
        cl.clGetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, sizeof size, &size, nullptr) == CL_SUCCESS) {
        code.resize(size);
        auto* data = reinterpret_cast<unsigned char*>(code.data());
        if (cl.clGetProgramInfo(program, CL_PROGRAM_BINARIES, sizeof data, &data, nullptr) != CL_SUCCESS)
            code.clear();
    }
    cl.clReleaseKernel(handle);
    return code;
}

std::optional<sycl::kernel> from_machine_code(const std::byte* code, std::size_t size, const std::string& name,
                                              const sycl::context& context, const sycl::device& device) {
    const OpenCl& cl = opencl();
    const cl_context native_context = sycl::get_native<sycl::backend::opencl>(context);
    const cl_device_id id = sycl::get_native<sycl::backend::opencl>(device);
    const auto* data = reinterpret_cast<const unsigned char*>(code);
    cl_int status = CL_SUCCESS, error = CL_SUCCESS;
    Program program;
    program.handle = cl.clCreateProgramWithBinary(native_context, 1, &id, &size, &data, &status, &error);
    std::optional<sycl::kernel> kernel;
    if (error == CL_SUCCESS && status == CL_SUCCESS &&
        cl.clBuildProgram(program.handle, 1, &id, "", nullptr, nullptr) == CL_SUCCESS) {
        const cl_kernel made = cl.clCreateKernel(program.handle, (kPrefix + name).c_str(), &error);
        if (error == CL_SUCCESS) {
            kernel = sycl::make_kernel<sycl::backend::opencl>(made, context);
            cl.clReleaseKernel(made);
        }
    }
    cl.clReleaseContext(native_context);
    cl.clReleaseDevice(id);
    return kernel;
}

}  // namespace

std::string kernel_source_hash() {
    std::string text = source();
    for (const auto& option : kOptions) text += option;
    return hex(hash(text.data(), text.size()));
}

Bytes encode(const KernelImages& images) {
    Bytes file;
    append(file, kMagic, std::strlen(kMagic));
    const std::string key = kernel_source_hash();
    append_number(file, key.size());
    append(file, key.data(), key.size());
    append_number(file, images.size());
    for (const auto& [name, image] : images) {
        append_number(file, name.size());
        append(file, name.data(), name.size());
        append_number(file, image.size());
        append(file, image.data(), image.size());
    }
    append_number(file, hash(file.data(), file.size()));
    return file;
}

KernelImages decode(const Bytes& file) {
    Reader reader = checked(file, kMagic);
    KernelImages images;
    if (reader.text() != kernel_source_hash()) return images;
    for (std::uint64_t left = reader.number(); reader.ok && left > 0; --left) {
        const std::string name = reader.text();
        const auto size = reader.number();
        if (const auto* from = reader.take(size)) images[name].assign(from, from + size);
    }
    if (!reader.ok) images.clear();
    return images;
}

bool write_file(const std::string& path, const Bytes& bytes) {
    static std::atomic<unsigned> counter{0};
    const std::string temporary = path + "." + std::to_string(getpid()) + "." + std::to_string(counter++);
    std::error_code error;
    std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
    {
        std::ofstream file(temporary, std::ios::binary);
        file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        file.close();
        if (!file) {
            std::filesystem::remove(temporary, error);
            return false;
        }
    }
    std::filesystem::rename(temporary, path, error);
    if (error) std::filesystem::remove(temporary, error);
    return !error;
}

KernelImages compile_kernels(const sycl::context& context) {
    std::string log;
    try {
        auto source_bundle =
            syclex::create_kernel_bundle_from_source(context, syclex::source_language::sycl, source());
        // compile, not build: build makes machine code of every kernel, which takes longer than the compilation. An
        // object image shows its content as readily as an executable one; only the declaration asks for the latter.
        const auto compiled = syclex::compile(
            source_bundle, syclex::properties{syclex::build_options{kOptions}, syclex::save_log{&log}});
        KernelImages images;
        for (const auto& image : compiled) {
            Bytes spirv = image.ext_oneapi_get_backend_content<sycl::bundle_state::executable>();
            const std::string name = name_in(spirv);
            images[name] = std::move(spirv);
        }
        return images;
    } catch (const sycl::exception& e) {
        throw Error(std::string("the SYCL kernels can't be compiled on this machine: ") + e.what() + "\n" + log +
                    "\nThe runtime compiler needs the headers of a C++ compiler (Debian: g++); or lay a "
                    "libquantflow_sycl.kernels of this version beside libquantflow_sycl.so.");
    }
}

KernelStore::KernelStore(const sycl::context& context, const sycl::device& device, std::string cache_dir)
    : context_(context), device_(device), cache_dir_(std::move(cache_dir)) {
    const std::string key = device.get_info<sycl::info::device::name>() + "\n" +
                            device.get_info<sycl::info::device::driver_version>() + "\n" +
                            device.get_platform().get_info<sycl::info::platform::version>();
    device_key_ = hex(hash(key.data(), key.size()));
}

const KernelImages& KernelStore::images() {
    if (!images_.empty()) return images_;
    const std::string cached =
        cache_dir_.empty() ? "" : cache_dir_ + "/quantflow-kernels-" + kernel_source_hash() + ".spv";
    for (const auto& [path, origin] : {std::pair{shipped_path(), "shipped"}, std::pair{cached, "cache"}}) {
        if (path.empty()) continue;
        images_ = decode(read_file(path));
        origin_ = origin;
        if (!images_.empty()) return images_;
    }
    const auto start = Clock::now();
    images_ = compile_kernels(context_);
    compile_s_ = seconds_since(start);
    origin_ = "compiled";
    if (!cached.empty()) write_file(cached, encode(images_));
    return images_;
}

sycl::kernel KernelStore::load(const std::string& name, const Bytes& spirv) {
    const bool keeps = !cache_dir_.empty() && device_.get_backend() == sycl::backend::opencl && opencl().is_loaded;
    const std::string path = cache_dir_ + "/" + name + "-" + device_key_ + "-" +
                             hex(hash(spirv.data(), spirv.size())) + ".bin";
    if (keeps) {
        const Bytes file = read_file(path);
        Reader reader = checked(file, kNativeMagic);
        if (reader.ok)
            if (auto kernel = from_machine_code(reader.at, reader.end - reader.at, name, context_, device_)) {
                ++native_hits_;
                return *kernel;
            }
    }
    auto bundle = syclex::create_kernel_bundle_from_source(context_, syclex::source_language::spirv, spirv);
    const sycl::kernel kernel = syclex::build(bundle).ext_oneapi_get_kernel(kPrefix + name);
    if (keeps) {
        const Bytes code = machine_code(kernel);
        if (!code.empty()) {
            Bytes file;
            append(file, kNativeMagic, std::strlen(kNativeMagic));
            append(file, code.data(), code.size());
            append_number(file, hash(file.data(), file.size()));
            write_file(path, file);
        }
    }
    return kernel;
}

sycl::kernel KernelStore::get(const std::string& name) {
    const auto known = kernels_.find(name);
    if (known != kernels_.end()) return known->second;
    const auto found = images().find(name);
    if (found == images().end()) throw Error("no custom kernel is called " + name);
    const auto start = Clock::now();
    try {
        const sycl::kernel kernel = load(name, found->second);
        load_s_ += seconds_since(start);
        return kernels_.emplace(name, kernel).first->second;
    } catch (const sycl::exception& e) {
        throw Error("kernel " + name + " can't be built for " + device_.get_info<sycl::info::device::name>() + ": " +
                    e.what());
    }
}

std::string KernelStore::statistics() const {
    char text[256];
    std::snprintf(text, sizeof text,
                  "{\"origin\": \"%s\", \"compile_s\": %.3f, \"load_s\": %.3f, \"loaded\": %zu, \"native_hits\": %d}",
                  origin_.c_str(), compile_s_, load_s_, kernels_.size(), native_hits_);
    return text;
}

}  // namespace quantflow::xpu
