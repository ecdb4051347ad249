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
    // For what tasks of another pool divide: those of `run_helped` share it with that pool's threads that have no task
    // left, others compute it alone. Work is divided for `at_most` of them.
    struct Helpers {
        int at_most = 1;
    };
    explicit ThreadPool(Helpers helpers);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // The parallel region of an OpenMP runtime, as GCC calls it: body(data) on `threads` threads, the caller's among
    // them, and returns when all have.
    using Region = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
    // Pools that are made from now on use that team's threads while those spin after others' work, beside which threads
    // of their own would get half of the cores. Null, and in a forked child: never.
    static void borrow_from(Region region);

    int size() const;
    // Calls task(i) for every i in [0, count), spread over the threads, and returns when all are done. Tasks are
    // handed out one by one, so uneven ones balance. `task` must not throw. One caller at a time; nested calls and
    // calls while another thread uses the pool run on the caller alone.
    void run(std::int64_t count, const std::function<void(std::int64_t)>& task);
    // The same, for long tasks that divide their work by a pool of `Helpers`.
    void run_helped(std::int64_t count, const std::function<void(std::int64_t)>& task);
    // Calls `body`, which calls `run` many times: the threads for all of them are chosen once.
    void during(const std::function<void()>& body);

private:
    struct State;
    void run(std::int64_t count, const std::function<void(std::int64_t)>& task, bool is_helped);
    std::unique_ptr<State> state_;  // null: of helpers
    int helpers_ = 1;
};

}  // namespace quantflow
