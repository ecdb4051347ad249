#include "float_steps.hpp"

#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <tuple>

#include "isa.hpp"

namespace quantflow::host::floats {

namespace {

const FloatKernels& best_kernels() {
    switch (best_isa()) {
        case Isa::amx_int8:
            if (has_bfloat16_tiles()) return isa_avx512_vnni::float_kernels_by_tiles();
            [[fallthrough]];
        case Isa::avx512_vnni: return isa_avx512_vnni::float_kernels();
        case Isa::avx_vnni:
        case Isa::avx2: return isa_avx2::float_kernels();
        default: return isa_generic::float_kernels();
    }
}

}  // namespace

const FloatKernels*& kernels_in_use() {
    static const FloatKernels* kernels = &best_kernels();
    return kernels;
}

const FloatKernels& kernels() { return *kernels_in_use(); }

std::string kernel_name(const char* kernel) { return std::string("host.") + kernel + "." + name_of(best_isa()); }

Floats allocate_floats(Int count) {
    void* memory = std::aligned_alloc(64, static_cast<std::size_t>(round_up(std::max<Int>(count, 1) * 4, 64)));
    if (memory == nullptr) throw std::bad_alloc();
    return Floats(static_cast<float*>(memory));
}

float* scratch(Int floats) {
    thread_local Floats memory;
    thread_local Int size = 0;
    if (floats > size) {
        memory.reset();
        size = 0;
        memory = allocate_floats(floats);
        size = floats;
    }
    return memory.get();
}

Real real_of(const Tensor& t, const char* kernel) {
    Real real;
    if (!t.q) {
        if (t.dtype != DType::f32) throw Unsupported(std::string(kernel) + " takes no " + name_of(t.dtype));
        return real;
    }
    if (t.dtype != DType::u8 && t.dtype != DType::s8)
        throw Unsupported(std::string(kernel) + " takes no codes of " + name_of(t.dtype));
    real.coding = t.dtype == DType::u8 ? Coding::u8 : Coding::s8;
    real.scale = t.q->scale;
    real.inverse = 1.0f / t.q->scale;
    real.zero_point = static_cast<float>(t.q->zero_point);
    real.lowest = static_cast<float>(t.q->qmin - t.q->zero_point);
    real.highest = static_cast<float>(t.q->qmax - t.q->zero_point);
    return real;
}

std::shared_ptr<const PackedWeight> packed_weight(const void* owner, const RealMatrix& b, Int k, Int n) {
    using Key = std::tuple<const void*, Int, Int, Int, Int, std::uint64_t>;
    static std::mutex mutex;
    static std::map<Key, std::weak_ptr<const PackedWeight>> known;

    std::uint64_t hash = 14695981039346656037u;  // FNV-1a over words
    for (Int j = 0; j < n; ++j)
        for (Int i = 0; i < k; ++i) {
            std::uint32_t word;
            std::memcpy(&word, static_cast<const float*>(b.data) + i * b.row_stride + j * b.column_stride, 4);
            hash = (hash ^ word) * 1099511628211u;
        }
    std::lock_guard<std::mutex> lock(mutex);
    const Key key(owner, k, n, b.row_stride, b.column_stride, hash);
    if (auto found = known[key].lock()) return found;
    const FloatKernels& f = kernels();
    auto packed = std::make_shared<PackedWeight>();
    packed->panels = allocate_floats(k * round_up(n, f.tile_columns));
    f.pack(b, k, n, packed->panels.get());
    for (auto i = known.begin(); i != known.end();) i = i->second.expired() ? known.erase(i) : std::next(i);
    known[key] = packed;
    return packed;
}

}  // namespace quantflow::host::floats
