// The custom kernels, from source to something that can be launched.
//
//  source (kernels.hpp) --runtime compiler--> SPIR-V per kernel --driver--> machine code
//
// The first arrow takes several seconds and needs C++ headers on the machine, so its result is kept in one file, which
// fits every device. The second takes 0.1 to 2 s per kernel on the CPU: it is taken when a kernel is first asked for,
// and the CPU's machine code is kept, a file per kernel. Level Zero drivers keep theirs themselves.
// Files are checked before use; a damaged or unreadable one counts as absent and is written anew, by rename.
#pragma once

#include <sycl/sycl.hpp>

#include <map>
#include <string>
#include <vector>

namespace quantflow::xpu {

using Bytes = std::vector<std::byte>;
using KernelImages = std::map<std::string, Bytes>;  // kernel name: SPIR-V

// Identifies the kernels' source and how it is compiled.
std::string kernel_source_hash();

// Compiles the source. Throws Error with the compiler's log.
KernelImages compile_kernels(const sycl::context&);

class KernelStore {
public:
    // cache_dir: "" keeps nothing.
    KernelStore(const sycl::context&, const sycl::device&, std::string cache_dir);

    sycl::kernel get(const std::string& name);
    std::string statistics() const;  // JSON object

private:
    const KernelImages& images();
    sycl::kernel load(const std::string& name, const Bytes& spirv);

    sycl::context context_;
    sycl::device device_;
    std::string cache_dir_;
    std::string device_key_;
    KernelImages images_;
    std::map<std::string, sycl::kernel> kernels_;
    std::string origin_;
    double compile_s_ = 0, load_s_ = 0;
    int native_hits_ = 0;
};

// One file with all images; and back. `decode` returns an empty map for anything but an intact file of this source.
Bytes encode(const KernelImages&);
KernelImages decode(const Bytes& file);
// Through a temporary file beside it. False if that fails.
bool write_file(const std::string& path, const Bytes&);

}  // namespace quantflow::xpu
