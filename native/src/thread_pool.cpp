#include "thread_pool.hpp"

#include <immintrin.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace quantflow {
namespace {
// About 50 microseconds of waiting before a thread goes to sleep.
constexpr int kSpins = 2000;
}  // namespace

// The caller works too and waits for tasks, not for threads: a worker that the system has put aside takes no task and
// delays nobody. Every thread owns an equal range of the tasks, so that neighbouring steps find in its cache what it
// wrote, and takes from the end of the others' when its own is empty. Whoever takes a task thereby sees the `task`
// that was stored before its range, so a worker that comes late to one job can't mistake it for the next.
struct ThreadPool::State {
    // [begin, end) in the low and high half.
    struct alignas(64) Range {
        std::atomic<std::uint64_t> bounds{0};
        void set(std::uint64_t begin, std::uint64_t end) {
            bounds.store(begin | end << 32, std::memory_order_release);
        }
        // A task from the front (the owner) or the back; -1: none is left.
        std::int64_t take(bool is_owner) {
            std::uint64_t now = bounds.load(std::memory_order_relaxed);
            for (;;) {
                const std::uint64_t begin = now & 0xffffffffu, end = now >> 32;
                if (begin >= end) return -1;
                const std::uint64_t next = is_owner ? (begin + 1) | end << 32 : begin | (end - 1) << 32;
                if (bounds.compare_exchange_weak(now, next, std::memory_order_acq_rel, std::memory_order_relaxed))
                    return static_cast<std::int64_t>(is_owner ? begin : end - 1);
            }
        }
    };
    explicit State(std::size_t size) : ranges(size) {}
    std::vector<std::thread> threads;
    const pid_t process = getpid();  // a forked child has none of the threads
    std::mutex busy;                 // held by the caller that uses the workers
    std::mutex sleep_mutex;
    std::condition_variable wake;
    std::atomic<int> sleepers{0};
    std::atomic<bool> stopping{false};
    const std::function<void(std::int64_t)>* task = nullptr;
    alignas(64) std::atomic<std::uint64_t> generation{0};
    std::vector<Range> ranges;  // per thread; the caller's first
    alignas(64) std::atomic<std::int64_t> done{0};

    void work(std::size_t self) {
        std::int64_t taken = 0;
        for (std::size_t i = 0; i < ranges.size(); ++i) {
            Range& range = ranges[(self + i) % ranges.size()];
            for (std::int64_t t; (t = range.take(i == 0)) >= 0; ++taken) (*task)(t);
        }
        if (taken > 0) done.fetch_add(taken, std::memory_order_release);
    }

    void loop(std::size_t self) {
        std::uint64_t seen = 0;
        for (;;) {
            int spins = 0;
            while (generation.load(std::memory_order_acquire) == seen) {
                if (++spins < kSpins) {
                    _mm_pause();
                    continue;
                }
                std::unique_lock<std::mutex> lock(sleep_mutex);
                sleepers.fetch_add(1);
                wake.wait(lock, [&] { return generation.load() != seen; });
                sleepers.fetch_sub(1);
            }
            seen = generation.load(std::memory_order_acquire);
            if (stopping.load(std::memory_order_acquire)) return;
            work(self);
        }
    }

    void start_generation() {
        generation.fetch_add(1);
        if (sleepers.load() == 0) return;
        // Under the lock, so that a thread between its check and its sleep is not missed.
        { std::lock_guard<std::mutex> lock(sleep_mutex); }
        wake.notify_all();
    }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>(static_cast<std::size_t>(std::max(threads, 1)))) {
    for (std::size_t i = 1; i < state_->ranges.size(); ++i) state_->threads.emplace_back([this, i] { state_->loop(i); });
}

ThreadPool::~ThreadPool() {
    if (state_->process != getpid()) {
        for (auto& thread : state_->threads) thread.detach();
        return;
    }
    state_->stopping.store(true, std::memory_order_release);
    state_->start_generation();
    for (auto& thread : state_->threads) thread.join();
}

int ThreadPool::size() const { return static_cast<int>(state_->threads.size()) + 1; }

void ThreadPool::run(std::int64_t count, const std::function<void(std::int64_t)>& task) {
    State& s = *state_;
    constexpr std::int64_t kMost = 0x7fffffff;
    if (count <= 1 || count > kMost || s.threads.empty() || s.process != getpid() || !s.busy.try_lock()) {
        for (std::int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    std::lock_guard<std::mutex> lock(s.busy, std::adopt_lock);
    s.task = &task;
    s.done.store(0, std::memory_order_relaxed);
    const std::uint64_t tasks = static_cast<std::uint64_t>(count), size = s.ranges.size();
    for (std::uint64_t i = 0; i < size; ++i) s.ranges[i].set(tasks * i / size, tasks * (i + 1) / size);
    s.start_generation();
    s.work(0);
    for (int spins = 0; s.done.load(std::memory_order_acquire) != count;) {
        if (++spins < kSpins)
            _mm_pause();
        else
            std::this_thread::yield();
    }
}

}  // namespace quantflow
