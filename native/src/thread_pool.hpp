// Threads that wait by spinning for a moment, then sleep: an int8 layer takes tens of microseconds, and waking a
// sleeping thread costs as much.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace quantflow {

class ThreadPool {
public:
    explicit ThreadPool(int threads);  // the calling thread counts as one
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const;
    // Calls task(i) for every i in [0, count), spread over the threads, and returns when all are done. Tasks are
    // handed out one by one, so uneven ones balance. `task` must not throw. One caller at a time; nested calls and
    // calls while another thread uses the pool run on the caller alone.
    void run(std::int64_t count, const std::function<void(std::int64_t)>& task);

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace quantflow
