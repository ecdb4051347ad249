// What kernel tests share: tensors whose memory ends (or begins) at a page that may not be touched, random layouts
// and values, and the rule by which codes and reals are compared.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../host/isa.hpp"
#include "../src/tensor.hpp"

namespace check {

using namespace quantflow;
using Int = std::int64_t;
using Dims = std::vector<Int>;

inline int failures = 0;
inline Int values = 0;
inline Int off_by_one = 0;
inline std::mt19937 random_bits(11);

inline void fail(const std::string& what) {
    if (++failures <= 20) std::printf("  FAILED %s\n", what.c_str());
}

inline void end_group(const char* name) {
    std::printf("%-12s %-28s %9lld values, %lld codes off by one\n", name_of(best_isa()), name,
                static_cast<long long>(values), static_cast<long long>(off_by_one));
    values = off_by_one = 0;
}

inline Int pick(Int low, Int high) { return std::uniform_int_distribution<Int>(low, high)(random_bits); }
inline float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }

// Bytes between two pages that may not be touched, against one of them.
class GuardedMemory {
public:
    GuardedMemory(Int bytes, bool at_end) {
        constexpr Int page = 4096;
        const Int inside = (bytes + page - 1) / page * page;
        size_ = static_cast<std::size_t>(inside + 2 * page);
        base_ = static_cast<std::byte*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (inside > 0) mprotect(base_ + page, static_cast<std::size_t>(inside), PROT_READ | PROT_WRITE);
        data = at_end ? base_ + page + inside - bytes : base_ + page;
    }
    ~GuardedMemory() { munmap(base_, size_); }
    GuardedMemory(const GuardedMemory&) = delete;
    GuardedMemory& operator=(const GuardedMemory&) = delete;
    std::byte* data;

private:
    std::byte* base_;
    std::size_t size_;
};

enum class Layout { row_major, channels_last, permuted, gaps };

inline Layout random_layout() { return static_cast<Layout>(pick(0, 3)); }

inline Dims strides_of(const Dims& dims, Layout layout) {
    if (layout == Layout::row_major) return row_major(dims);
    if (layout == Layout::channels_last && dims.size() >= 3) return channels_last(dims);
    Dims order(dims.size()), strides(dims.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_bits);
    Int step = layout == Layout::gaps ? pick(1, 2) : 1;
    for (Int d : order) {
        const auto at = static_cast<std::size_t>(d);
        strides[at] = step;
        step *= dims[at] + (layout == Layout::gaps ? pick(0, 2) : 0);
    }
    return strides;
}

// A tensor with memory of its own.
class Value {
public:
    Value(DType dtype, const Dims& dims, const Dims& strides, std::optional<QParams> q = std::nullopt) {
        Int last = 0;
        for (std::size_t d = 0; d < dims.size(); ++d) last += (dims[d] - 1) * strides[d];
        t_.dtype = dtype;
        t_.dims = dims;
        t_.strides = strides;
        t_.q = q;
        bytes_ = t_.count() == 0 ? 0 : (last + 1) * size_of(dtype);
        memory_ = std::make_unique<GuardedMemory>(bytes_, pick(0, 2) != 0);
        base_ = std::make_unique<std::byte*>(memory_->data);
        t_.place = Place{base_.get(), 0};
        if (bytes_ > 0) std::memset(memory_->data, 0xA5, static_cast<std::size_t>(bytes_));
    }

    const Tensor& tensor() const { return t_; }
    operator const Tensor&() const { return t_; }
    // The same memory with a dimension repeated.
    Tensor repeated(const Dims& dims) const {
        Tensor t = t_;
        for (std::size_t d = 0; d < dims.size(); ++d)
            if (t.dims[d] == 1 && dims[d] != 1) t.strides[d] = 0;
        t.dims = dims;
        return t;
    }

    // f32: a few sizes of reals, and special values if asked for; integers of all sizes; codes of all values.
    Value& randomize(float size = 4, bool special = false) {
        const Int n = bytes_ / size_of(t_.dtype);
        for (Int i = 0; i < n; ++i) {
            std::byte* p = memory_->data + i * size_of(t_.dtype);
            switch (t_.dtype) {
                case DType::f32: {
                    const float specials[] = {0.0f, -0.0f, std::numeric_limits<float>::infinity(),
                                              -std::numeric_limits<float>::infinity(),
                                              std::numeric_limits<float>::quiet_NaN(), 1e-42f, 3e37f, -3e37f};
                    put(p, special && pick(0, 5) == 0 ? specials[pick(0, 7)] : uniform(-size, size));
                    break;
                }
                case DType::u8:
                    put(p, static_cast<std::uint8_t>(pick(0, 9) == 0 ? pick(0, 1) * 255 : pick(0, 255)));
                    break;
                case DType::s8: put(p, static_cast<std::int8_t>(pick(-128, 127))); break;
                case DType::s32: put(p, static_cast<std::int32_t>(pick(-9, 9))); break;
                case DType::s64: put(p, static_cast<std::int64_t>(pick(-9, 9))); break;
                case DType::b8: put(p, static_cast<std::uint8_t>(pick(0, 1))); break;
            }
        }
        return *this;
    }

    template <class T>
    void put(std::byte* p, T v) {
        std::memcpy(p, &v, sizeof v);
    }
    std::byte* data() { return memory_->data; }
    Int bytes() const { return bytes_; }
    std::vector<std::byte> snapshot() const { return {memory_->data, memory_->data + bytes_}; }

private:
    Tensor t_;
    Int bytes_ = 0;
    std::unique_ptr<GuardedMemory> memory_;
    std::unique_ptr<std::byte*> base_;
};

inline Int offset_of(const Tensor& t, const Dims& index) {
    Int offset = 0;
    for (std::size_t d = 0; d < index.size(); ++d) offset += index[d] * t.strides[d];
    return offset;
}

// The number stored there: a code stays a code.
inline double raw(const Tensor& t, const Dims& index) {
    const std::byte* p = t.place.get() + offset_of(t, index) * size_of(t.dtype);
    const auto as = [&](auto v) {
        std::memcpy(&v, p, sizeof v);
        return static_cast<double>(v);
    };
    switch (t.dtype) {
        case DType::f32: return as(0.0f);
        case DType::s8: return as(std::int8_t{0});
        case DType::s32: return as(std::int32_t{0});
        case DType::s64: return as(std::int64_t{0});
        default: return as(std::uint8_t{0});
    }
}

// The float32 that it stands for.
inline float real(const Tensor& t, const Dims& index) {
    const float v = static_cast<float>(raw(t, index));
    return t.q ? (v - static_cast<float>(t.q->zero_point)) * t.q->scale : v;
}

inline void each_index(const Dims& dims, const std::function<void(const Dims&)>& f) {
    Int count = 1;
    for (Int d : dims) count *= d;
    Dims index(dims.size(), 0);
    for (Int i = 0; i < count; ++i) {
        f(index);
        for (std::size_t d = dims.size(); d-- > 0;) {
            if (++index[d] < dims[d]) break;
            index[d] = 0;
        }
    }
}

// Whether y holds the real r: codes by the rule of the design (at most one code off, `near_tie` codes from a tie),
// floats within `error` relative to r (or to `size`, where terms cancel).
inline void expect(const std::string& what, const Tensor& y, const Dims& index, double r, double near_tie = 1e-3,
                   double error = 1e-6, double size = 0) {
    ++values;
    const double got = raw(y, index);
    std::string place;
    for (Int i : index) place += " " + std::to_string(i);
    const auto complain = [&](double wanted) {
        fail(what + " at" + place + ": " + std::to_string(got) + ", expected " + std::to_string(wanted));
    };
    if (y.q) {
        const double steps = r / static_cast<double>(y.q->scale) + y.q->zero_point;
        const double clamped = std::isnan(steps) ? y.q->qmax : std::clamp<double>(steps, y.q->qmin, y.q->qmax);
        const double wanted = std::nearbyint(clamped);
        if (got == wanted) return;
        ++off_by_one;
        const double to_tie = std::abs(std::abs(clamped - std::floor(clamped)) - 0.5);
        if (std::abs(got - wanted) > 1 || to_tie > near_tie) complain(clamped);
    } else if (std::isnan(r) || std::isnan(got)) {
        if (std::isnan(r) != std::isnan(got)) complain(r);
    } else if (got != r && !(std::abs(got - r) <= error * std::max(std::abs(r), size) + 1e-37)) {
        complain(r);
    }
}

inline QParams random_q(float scale = 0) {
    QParams q;
    q.scale = scale > 0 ? scale : std::exp(uniform(-5, -1));
    const Int zero_points[] = {0, 128, 255, pick(0, 255)};
    q.zero_point = static_cast<std::int32_t>(zero_points[pick(0, 3)]);
    if (pick(0, 5) == 0) {  // part of the codes only
        q.qmin = static_cast<std::int32_t>(pick(0, q.zero_point));
        q.qmax = static_cast<std::int32_t>(pick(std::max(q.zero_point, q.qmin + 1), 256)) - 1;
        if (q.qmax < q.zero_point) q.qmax = 255;
    }
    return q;
}

// A real tensor: f32 or codes.
inline Value random_real(const Dims& dims, const Dims& strides, bool of_codes, float size = 4, bool special = false) {
    Value v(of_codes ? DType::u8 : DType::f32, dims, strides, of_codes ? std::optional(random_q()) : std::nullopt);
    v.randomize(size, special);
    return v;
}

// Runs the tests in a process of their own for each instruction set that this CPU has, or for QUANTFLOW_ISA alone.
inline int run_for_every_isa(int (*tests)()) {
    if (std::getenv("QUANTFLOW_ISA") != nullptr) return tests();
    int failed = 0;
    for (const char* isa : {"generic", "avx2", "avx_vnni", "avx512_vnni"}) {
        std::fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            setenv("QUANTFLOW_ISA", isa, 1);
            if (std::strcmp(name_of(best_isa()), isa) != 0) {
                std::printf("%-12s not on this CPU\n", isa);
                std::fflush(stdout);
                _exit(0);
            }
            const int result = tests();
            std::fflush(stdout);
            _exit(result);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
            std::printf("%-12s FAILED (status %d)\n", isa, status);
            failed = 1;
        }
    }
    return failed;
}

}  // namespace check
