#include "device.hpp"

#include <algorithm>
#include <cstring>

namespace quantflow::xpu {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t padded(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// sycl::free does not wait for the kernels that still use the memory.
void free_after_use(void* memory, sycl::queue queue) {
    try {
        queue.wait();
    } catch (const sycl::exception&) {
        // Reported by the next wait().
    }
    sycl::free(memory, queue);
}

}  // namespace

Device::Device(const sycl::device& device, const std::string& cache_dir)
    : queue(device,
            [errors = errors_](const sycl::exception_list& list) {
                std::lock_guard<std::mutex> lock(errors->mutex);
                errors->list.insert(errors->list.end(), list.begin(), list.end());
            },
            sycl::property::queue::in_order{}),
      engine(dnnl::sycl_interop::make_engine(queue.get_device(), queue.get_context())),
      stream(dnnl::sycl_interop::make_stream(engine, queue)),
      is_cpu(device.is_cpu()),
      compute_units(device.get_info<sycl::info::device::max_compute_units>()),
      kernels(queue.get_context(), device, cache_dir) {
    bad_index_ = sycl::malloc_host<std::int64_t>(3, queue);
    if (bad_index_ == nullptr) throw Error(description() + " offers no memory that it shares with the host");
    bad_index_[0] = 0;
}

Device::~Device() {
    free_after_use(bad_index_, queue);
    release(scratch_);
}

std::string Device::description() const {
    return queue.get_device().get_info<sycl::info::device::name>() + " (driver " +
           queue.get_device().get_info<sycl::info::device::driver_version>() + ")";
}

std::byte* Device::allocate(std::size_t bytes) {
    // A GPU reads its own memory fastest; a CPU has but one.
    const std::size_t size = padded(bytes) + kAlignment;
    void* memory = is_cpu ? sycl::aligned_alloc_shared(kAlignment, size, queue)
                          : sycl::aligned_alloc_device(kAlignment, size, queue);
    if (memory == nullptr)
        throw Error("out of memory on " + description() + ": " + std::to_string(bytes) + " bytes asked for");
    return static_cast<std::byte*>(memory);
}

void Device::release(void* memory) {
    if (memory != nullptr) free_after_use(memory, queue);
}

void Device::copy(void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    if (is_cpu) {
        // One memory: a memcpy beats a command in the queue.
        wait();
        std::memcpy(to, from, bytes);
        return;
    }
    const bool is_upload = sycl::get_pointer_type(from, queue.get_context()) == sycl::usm::alloc::unknown;
    sycl::event done = queue.memcpy(to, from, bytes);
    // The caller may change its memory as soon as this returns.
    if (is_upload) done.wait();
}

void Device::wait() {
    try {
        queue.wait_and_throw();
        std::lock_guard<std::mutex> lock(errors_->mutex);
        if (!errors_->list.empty()) {
            const std::exception_ptr first = errors_->list.front();
            errors_->list.clear();
            std::rethrow_exception(first);
        }
    } catch (const std::exception& e) {
        std::lock_guard<std::mutex> lock(mutex);
        throw Error(description() + " failed" + (last_.empty() ? "" : ", the last step submitted being " + last_) +
                    ": " + e.what());
    }
    if (bad_index_[0] != 0) {
        bad_index_[0] = 0;
        throw Error("gather: index " + std::to_string(bad_index_[1]) + " is outside [0, " +
                    std::to_string(bad_index_[2]) + ")");
    }
}

Constant Device::buffer(std::size_t bytes) {
    std::byte* memory = allocate(bytes);
    return Constant(memory, [queue = queue](std::byte* p) { free_after_use(p, queue); });
}

Constant Device::constant(const void* data, std::size_t bytes) {
    Constant memory = buffer(bytes);
    if (bytes > 0) queue.memcpy(memory.get(), data, bytes).wait();
    return memory;
}

Place Device::Reservation::take(std::size_t bytes) {
    const auto offset = static_cast<std::int64_t>(device_.scratch_top_);
    device_.scratch_top_ += padded(bytes);
    device_.scratch_wanted_ = std::max(device_.scratch_wanted_, device_.scratch_top_);
    return {&device_.scratch_, offset};
}

void Device::ensure_scratch() {
    if (scratch_wanted_ <= scratch_size_) return;
    release(scratch_);
    scratch_ = nullptr;
    scratch_size_ = 0;
    scratch_ = allocate(scratch_wanted_);
    scratch_size_ = scratch_wanted_;
}

}  // namespace quantflow::xpu
