// The second backend: Intel GPUs (Level Zero) and the CPU (Intel's OpenCL CPU runtime) by SYCL and oneDNN.
//
// A shared library of its own, libquantflow_sycl.so, which the main one opens with dlopen: so that works without them.
// P=<prefix of an environment with the packages onednn and onednn-devel>
// g++ -std=c++17 -O2 -fPIC -shared -fvisibility=hidden native/sycl/*.cpp -isystem $P/include -L $P/lib -lsycl -ldnnl -ldl
//     -Wl,--disable-new-dtags,-rpath,$P/lib -o libquantflow_sycl.so
//
// Environment: SYCL finds the CPU only if OCL_ICD_FILENAMES names libintelocl.so before SYCL starts. If it is not
// set, and the package's libintelocl.so lies beside libsycl.so, the first call here sets it.
#pragma once

#include <cstddef>

#define QF_SYCL_EXPORT __attribute__((visibility("default")))

namespace quantflow {
class Backend;
}

extern "C" {

// JSON array of all SYCL devices: name, vendor, type ("cpu" | "gpu" | "other"), backend ("level_zero" | "opencl" |
// ...), driver, compute_units, memory_bytes, onednn (whether oneDNN can make an engine), exact_int8. Never throws;
// what goes wrong is an object {"error": ...} in the array. As all functions here that fill a buffer: writes at most
// `capacity` bytes, the last one 0, and returns the bytes needed.
QF_SYCL_EXPORT int qf_sycl_devices(char* json, std::size_t capacity);

// device: "cpu" or "gpu". cache_dir: where compiled kernels are kept; null or "": nowhere. Null if there is no such
// device or it can't be used; `error` then says why and lists the devices found. The caller deletes the backend.
QF_SYCL_EXPORT quantflow::Backend* qf_sycl_make_backend(const char* device, const char* cache_dir, char* error,
                                                        std::size_t capacity);

// 1 if oneDNN's int8 sums are exact on this device. 0 on CPUs without VNNI: there u8 * s8 products saturate in 16 bits
// and weights of s8 sources lose a bit, so a caller should refuse this backend. 0 too if there is no such device.
QF_SYCL_EXPORT int qf_sycl_exact_int8(const char* device);

// JSON object: onednn, onednn_cpu_isa, sycl, kernels (hash of the kernel source).
QF_SYCL_EXPORT int qf_sycl_versions(char* json, std::size_t capacity);

// Where the backend's kernels came from and what that cost, as a JSON object: origin ("compiled" | "cache" |
// "shipped"), compile_s, load_s (seconds spent on making single kernels so far), loaded, native_hits.
QF_SYCL_EXPORT int qf_sycl_kernel_statistics(const quantflow::Backend* backend, char* json, std::size_t capacity);

// Compiles the custom kernels and writes their SPIR-V: a file NAME.spv per kernel into `directory`, and all of them
// into `directory`/libquantflow_sycl.kernels. That file, laid beside libquantflow_sycl.so, saves users the compilation
// (and the C++ headers that it needs). Needs any device. 0 if it went well, else `error` says why.
QF_SYCL_EXPORT int qf_sycl_write_kernels(const char* directory, char* error, std::size_t capacity);
}
