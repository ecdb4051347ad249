// Loops over strided operands of one shape: dimensions of size 1 dropped, the written operand's fastest dimension
// innermost, neighbours merged where every operand allows it, and the work spread over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "../src/backend.hpp"
#include "../src/thread_pool.hpp"

namespace quantflow::host {

using Dims = std::vector<std::int64_t>;

inline std::byte* address(const Tensor& t, std::int64_t element) {
    return t.place.get() + element * size_of(t.dtype);
}

// A step that is a function.
class FunctionStep final : public Step {
public:
    FunctionStep(std::string kernel, std::function<void()> function)
        : kernel_(std::move(kernel)), function_(std::move(function)) {}
    void run() override { function_(); }
    std::string kernel() const override { return kernel_; }

private:
    std::string kernel_;
    std::function<void()> function_;
};

template <class Function>
std::unique_ptr<Step> make_step(std::string kernel, Function function) {
    return std::make_unique<FunctionStep>(std::move(kernel), std::move(function));
}

// Below this many bytes a second thread costs more than it saves.
constexpr std::int64_t kTaskBytes = 16 * 1024;

// How many tasks are worth their hand-over.
inline std::int64_t task_count(const ThreadPool& pool, std::int64_t bytes) {
    if (pool.size() == 1) return 1;
    return std::max<std::int64_t>(1, std::min<std::int64_t>(bytes / kTaskBytes, 4 * pool.size()));
}

// A function object that outlives the call, behind a pointer: what takes it is compiled once, and not for each.
template <class... Args>
class Callable {
public:
    template <class Function>
    explicit Callable(const Function& f)
        : object_(&f),
          call_([](const void* object, Args... args) { (*static_cast<const Function*>(object))(args...); }) {}
    void operator()(Args... args) const { call_(object_, args...); }

private:
    const void* object_;
    void (*call_)(const void*, Args...);
};
using OnRange = Callable<std::int64_t, std::int64_t>;                       // first, last
using OnPlane = Callable<const std::int64_t*, std::int64_t, std::int64_t>;  // offsets, rows, n

// Calls f(first, last) for pieces of [0, count), `bytes` of work in all.
inline void run_ranges(ThreadPool& pool, std::int64_t count, std::int64_t bytes, const OnRange& f) {
    const std::int64_t tasks = std::min(count, task_count(pool, bytes));
    if (tasks <= 1) {
        if (count > 0) f(std::int64_t{0}, count);
        return;
    }
    const auto task = [&](std::int64_t t) { f(t * count / tasks, (t + 1) * count / tasks); };
    pool.run(tasks, [&task](std::int64_t t) { task(t); });  // one pointer: std::function needs no memory
}
template <class Function>
void run_ranges(ThreadPool& pool, std::int64_t count, std::int64_t bytes, const Function& f) {
    run_ranges(pool, count, bytes, OnRange(f));
}

class Nest {
public:
    static constexpr int kMaxOperands = 4;
    static constexpr int kMaxRank = 12;

    // `strides`: one entry per operand, in elements; the last operand is the one that is written.
    Nest(const Dims& dims, std::initializer_list<Dims> strides) : operands_(static_cast<int>(strides.size())) {
        struct Loop {
            std::int64_t size;
            std::int64_t strides[kMaxOperands];
        };
        std::vector<Loop> loops;
        for (std::size_t d = 0; d < dims.size(); ++d) {
            count_ *= dims[d];
            if (dims[d] == 1) continue;
            Loop loop{dims[d], {}};
            int k = 0;
            for (const Dims& s : strides) loop.strides[k++] = s[d];
            loops.push_back(loop);
        }
        if (count_ == 0) return;
        const int last = operands_ - 1;
        std::stable_sort(loops.begin(), loops.end(),
                         [&](const Loop& a, const Loop& b) { return a.strides[last] > b.strides[last]; });
        std::vector<Loop> merged;
        for (const Loop& inner : loops) {
            const bool joins = !merged.empty() && [&] {
                for (int k = 0; k < operands_; ++k)
                    if (merged.back().strides[k] != inner.strides[k] * inner.size) return false;
                return true;
            }();
            if (joins) {
                const std::int64_t size = merged.back().size * inner.size;
                merged.back() = inner;
                merged.back().size = size;
            } else {
                merged.push_back(inner);
            }
        }
        if (merged.size() > kMaxRank) throw Unsupported("a view of more than 12 dimensions that can't be merged");
        // Always a row loop and an inner loop; the strides of a loop that turns once do not matter.
        while (merged.size() < 2) {
            Loop once{1, {}};
            if (merged.empty()) std::fill_n(once.strides, kMaxOperands, 1);
            merged.insert(merged.begin(), once);
        }
        rank_ = static_cast<int>(merged.size());
        for (int d = 0; d < rank_; ++d) {
            dims_[d] = merged[static_cast<std::size_t>(d)].size;
            for (int k = 0; k < operands_; ++k) strides_[k][d] = merged[static_cast<std::size_t>(d)].strides[k];
        }
    }

    std::int64_t count() const { return count_; }
    std::int64_t rows() const { return dims_[rank_ - 2]; }
    std::int64_t n() const { return dims_[rank_ - 1]; }
    std::int64_t row(int operand) const { return strides_[operand][rank_ - 2]; }
    std::int64_t column(int operand) const { return strides_[operand][rank_ - 1]; }

    // Makes the row loop the one along which `operand` is dense; false if there is none outside the inner loop.
    bool put_dense_in_rows(int operand) {
        for (int d = rank_ - 2; d >= 0; --d) {
            if (strides_[operand][d] != 1 || dims_[d] == 1) continue;
            std::rotate(dims_ + d, dims_ + d + 1, dims_ + rank_ - 1);
            for (int k = 0; k < operands_; ++k)
                std::rotate(strides_[k] + d, strides_[k] + d + 1, strides_[k] + rank_ - 1);
            return true;
        }
        return false;
    }

    // Calls f(offsets, rows, n) for blocks of the two inner loops: offsets in elements per operand, at most `rows()`
    // rows of at most `n()` elements. `bytes`: what an element costs, in bytes of memory traffic.
    template <class Function>
    void run(ThreadPool& pool, std::int64_t bytes, const Function& f) const {
        run_planes(pool, bytes, OnPlane(f));
    }

    // The same on this thread alone, in order.
    template <class Function>
    void run_here(const Function& f) const {
        run_planes_here(OnPlane(f));
    }

private:
    void run_planes(ThreadPool& pool, std::int64_t bytes, const OnPlane& f) const {
        if (count_ == 0) return;
        const std::int64_t wanted = task_count(pool, count_ * bytes);
        if (wanted == 1) return run_planes_here(f);
        const std::int64_t outer = this->outer();
        if (outer >= wanted)
            return run_ranges(pool, outer, count_ * bytes, [&](std::int64_t first, std::int64_t last) {
                planes(first, last, 0, rows(), 0, n(), f);
            });
        // Planes are cut along the longer loop; the inner one into pieces of whole cache lines.
        constexpr std::int64_t line = 64;
        const bool by_rows = rows() >= n() / line;
        const std::int64_t units = by_rows ? rows() : (n() + line - 1) / line;
        const std::int64_t pieces = std::min(units, (wanted + outer - 1) / outer);
        const auto task = [&](std::int64_t t) {
            const std::int64_t plane = t / pieces, piece = t % pieces;
            const std::int64_t first = piece * units / pieces, last = (piece + 1) * units / pieces;
            if (by_rows)
                planes(plane, plane + 1, first, last, 0, n(), f);
            else
                planes(plane, plane + 1, 0, rows(), first * line, std::min(last * line, n()), f);
        };
        pool.run(outer * pieces, [&task](std::int64_t t) { task(t); });
    }

    void run_planes_here(const OnPlane& f) const {
        if (count_ > 0) planes(0, outer(), 0, rows(), 0, n(), f);
    }

    std::int64_t outer() const {
        std::int64_t count = 1;
        for (int d = 0; d < rank_ - 2; ++d) count *= dims_[d];
        return count;
    }

    void planes(std::int64_t first, std::int64_t last, std::int64_t first_row, std::int64_t last_row,
                std::int64_t first_column, std::int64_t last_column, const OnPlane& f) const {
        std::int64_t index[kMaxRank] = {}, offsets[kMaxOperands] = {};
        std::int64_t rest = first;
        for (int d = rank_ - 3; d >= 0; --d) {
            index[d] = rest % dims_[d];
            rest /= dims_[d];
        }
        for (int k = 0; k < operands_; ++k) {
            offsets[k] = first_row * row(k) + first_column * column(k);
            for (int d = 0; d < rank_ - 2; ++d) offsets[k] += index[d] * strides_[k][d];
        }
        for (std::int64_t plane = first; plane < last; ++plane) {
            f(static_cast<const std::int64_t*>(offsets), last_row - first_row, last_column - first_column);
            for (int d = rank_ - 3; d >= 0; --d) {
                for (int k = 0; k < operands_; ++k) offsets[k] += strides_[k][d];
                if (++index[d] < dims_[d]) break;
                for (int k = 0; k < operands_; ++k) offsets[k] -= dims_[d] * strides_[k][d];
                index[d] = 0;
            }
        }
    }

    int operands_ = 0, rank_ = 2;
    std::int64_t count_ = 1;
    std::int64_t dims_[kMaxRank] = {1, 1};
    std::int64_t strides_[kMaxOperands][kMaxRank] = {};
};

}  // namespace quantflow::host
