// One SYCL device with what steps need of it: an in-order queue, oneDNN's view of it, memory, kernels.
#pragma once

#include <oneapi/dnnl/dnnl.hpp>
#include <oneapi/dnnl/dnnl_sycl.hpp>
#include <sycl/sycl.hpp>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../src/backend.hpp"
#include "kernel_store.hpp"

namespace quantflow::xpu {

using Constant = std::shared_ptr<std::byte>;

// What the queue reports. It may outlive its Device in the hands of a Constant.
struct AsyncErrors {
    std::mutex mutex;
    std::vector<std::exception_ptr> list;
};

class Device {
    std::shared_ptr<AsyncErrors> errors_ = std::make_shared<AsyncErrors>();

public:
    Device(const sycl::device&, const std::string& cache_dir);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    std::byte* allocate(std::size_t bytes);
    void release(void* memory);
    void copy(void* to, const void* from, std::size_t bytes);
    void wait();

    // A copy of process memory that lives as long as someone holds it.
    Constant constant(const void* data, std::size_t bytes);
    Constant buffer(std::size_t bytes);

    // Names what is submitted next, for the message of an error that turns up later.
    void begin(const std::string& kernel) { last_ = kernel; }

    // Held while a step is built or submitted. Several threads may use one backend; the commands of one step, which
    // may share scratch memory, then stay together in the queue. wait() needs no lock.
    std::mutex mutex;

    // Set by qf_gather: {happened, index, rows}.
    std::int64_t* bad_index() const { return bad_index_; }

    std::string description() const;

    sycl::queue queue;
    dnnl::engine engine;
    dnnl::stream stream;
    bool is_cpu;
    std::size_t compute_units;
    KernelStore kernels;
    // Packed weights by (codes, layout), while a step holds them.
    std::map<std::pair<const void*, std::vector<std::uint8_t>>, std::weak_ptr<std::byte>> packed;

    // Memory for the time of one step. A step reserves a range when it is built; a step made of steps holds its
    // Reservation while it builds them, so that theirs lie behind its own.
    class Reservation {
    public:
        explicit Reservation(Device& device) : device_(device), start_(device.scratch_top_) {}
        ~Reservation() { device_.scratch_top_ = start_; }
        Reservation(const Reservation&) = delete;
        Reservation& operator=(const Reservation&) = delete;
        Place take(std::size_t bytes);

    private:
        Device& device_;
        std::size_t start_;
    };
    // To be called at each run of a step that took scratch memory.
    void ensure_scratch();

private:
    std::byte* scratch_ = nullptr;
    std::size_t scratch_top_ = 0, scratch_wanted_ = 0, scratch_size_ = 0;
    std::int64_t* bad_index_ = nullptr;
    std::string last_;
};

}  // namespace quantflow::xpu
