#include "thread_pool.hpp"

#include <immintrin.h>
#include <unistd.h>

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
// delays nobody. `remaining` hands out task numbers downwards; whoever receives one >= 0 thereby sees the `task` that
// was stored before it, so a worker that comes late to one job can't mistake it for the next.
struct ThreadPool::State {
    std::vector<std::thread> threads;
    const pid_t process = getpid();  // a forked child has none of the threads
    std::mutex busy;                 // held by the caller that uses the workers
    std::mutex sleep_mutex;
    std::condition_variable wake;
    std::atomic<int> sleepers{0};
    std::atomic<bool> stopping{false};
    const std::function<void(std::int64_t)>* task = nullptr;
    alignas(64) std::atomic<std::uint64_t> generation{0};
    alignas(64) std::atomic<std::int64_t> remaining{0};
    alignas(64) std::atomic<std::int64_t> done{0};

    void work() {
        for (std::int64_t i; (i = remaining.fetch_sub(1, std::memory_order_acq_rel) - 1) >= 0;) {
            (*task)(i);
            done.fetch_add(1, std::memory_order_release);
        }
    }

    void loop() {
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
            work();
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

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
    for (int i = 1; i < threads; ++i) state_->threads.emplace_back([this] { state_->loop(); });
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
    if (count <= 1 || s.threads.empty() || s.process != getpid() || !s.busy.try_lock()) {
        for (std::int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    std::lock_guard<std::mutex> lock(s.busy, std::adopt_lock);
    s.task = &task;
    s.done.store(0, std::memory_order_relaxed);
    s.remaining.store(count, std::memory_order_release);
    s.start_generation();
    s.work();
    for (int spins = 0; s.done.load(std::memory_order_acquire) != count;) {
        if (++spins < kSpins)
            _mm_pause();
        else
            std::this_thread::yield();
    }
}

}  // namespace quantflow
