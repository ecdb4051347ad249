// Threads of the pool's own, and threads that it borrows from a team.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../src/thread_pool.hpp"

using quantflow::ThreadPool;

namespace {

std::atomic<int> regions{0};
int failures = 0;

void check(bool holds, const char* what) {
    if (holds) return;
    ++failures;
    std::printf("  FAILED %s\n", what);
}

void region(void (*body)(void*), void* data, unsigned threads, unsigned) {
    ++regions;
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; ++i) team.emplace_back([=] { body(data); });
    body(data);
    for (auto& thread : team) thread.join();
}

// A team of which only the caller comes.
void alone(void (*body)(void*), void* data, unsigned, unsigned) { body(data); }

void check_runs(ThreadPool& pool) {
    for (const std::int64_t count : {0, 1, 2, 3, 100}) {
        std::vector<std::atomic<int>> times(static_cast<std::size_t>(count));
        pool.run(count, [&](std::int64_t i) {
            ++times[static_cast<std::size_t>(i)];
            pool.run(2, [](std::int64_t) {});  // on the caller alone
        });
        for (const auto& each : times) check(each == 1, "every task runs once");
    }
}

void test_borrowed() {
    ThreadPool::borrow_from(region);
    ThreadPool pool(3);
    check_runs(pool);
    regions = 0;
    pool.during([&] {
        check_runs(pool);
        pool.during([&] { check_runs(pool); });
    });
    check(regions <= 1, "threads are borrowed once");  // its team ends with the region: none runs then
    bool was_thrown = false;
    try {
        pool.during([] { throw std::runtime_error("inside"); });
    } catch (const std::runtime_error&) {
        was_thrown = true;
    }
    check(was_thrown, "an exception leaves the region");
    pool.during([&] { check_runs(pool); });
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&] {
            for (int j = 0; j < 50; ++j) pool.during([&] { check_runs(pool); });
        });
    for (auto& caller : callers) caller.join();
    ThreadPool::borrow_from(alone);
    ThreadPool lonely(3);
    lonely.during([&] { check_runs(lonely); });
    ThreadPool::borrow_from(nullptr);
}

// Long tasks divide their work: once, by the thread itself or by one that has no task left, never at deeper levels.
void test_helped(ThreadPool& pool) {
    ThreadPool helpers(ThreadPool::Helpers{4});
    check(helpers.size() == 4, "work is divided for so many");
    for (const std::int64_t count : {1, 2, 7}) {
        constexpr std::int64_t kSteps = 50, kPieces = 8;
        std::vector<std::atomic<int>> times(static_cast<std::size_t>(count * kSteps * kPieces));
        std::atomic<int> foreign{0}, too_early{0}, deeper{0};
        pool.run_helped(count, [&](std::int64_t task) {
            const std::thread::id own = std::this_thread::get_id();
            for (std::int64_t step = 0; step < kSteps; ++step) {
                std::atomic<std::int64_t> done{0};
                helpers.run(kPieces, [&](std::int64_t piece) {
                    foreign += std::this_thread::get_id() != own;
                    const std::thread::id runs = std::this_thread::get_id();
                    helpers.run(2, [&](std::int64_t) { deeper += std::this_thread::get_id() != runs; });
                    if (task == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));  // the others are done first
                    ++times[static_cast<std::size_t>((task * kSteps + step) * kPieces + piece)];
                    ++done;
                });
                too_early += done != kPieces;
            }
        });
        for (const auto& each : times) check(each == 1, "every piece runs once");
        check(too_early == 0, "a step ends with its last piece");
        check(deeper == 0, "pieces divide nothing");
        check((foreign > 0) == (pool.size() > 1 && count > 1), "threads without a task help, where there are some");
    }
    std::atomic<int> alone{0};
    const std::thread::id own = std::this_thread::get_id();
    helpers.run(5, [&](std::int64_t) { alone += std::this_thread::get_id() == own; });
    helpers.during([&] { helpers.run(5, [&](std::int64_t) { alone += std::this_thread::get_id() == own; }); });
    check(alone == 10, "outside of a task, the caller computes alone");
}

}  // namespace

int main() {
    ThreadPool own(3), single(1);
    check_runs(own);
    check_runs(single);
    test_helped(own);
    test_helped(single);
    own.during([&] { check_runs(own); });
    test_borrowed();
    check_runs(own);
    std::printf("thread pool: %d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
