#include "thread_pool.hpp"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace quantflow {
namespace {
// About 50 microseconds of waiting before a thread goes to sleep.
constexpr int kSpins = 2000;

std::atomic<ThreadPool::Region> region_of_process{nullptr};
std::atomic<pid_t> process_of_region{0};  // a forked child has none of that team either, and must not wait for it

ThreadPool::Region region_now() {
    return process_of_region.load() == getpid() ? region_of_process.load() : nullptr;
}

// The clock of a borrowed thread of this thread's team, once it has one. Each thread that computes has a team of its own.
struct Clock {
    clockid_t id = 0;
    bool is_known = false;
};
thread_local Clock clock_of_team;

// Whether that team is awake, and on a core, right now. An unknown clock, and one of a thread that ended: try it.
bool is_team_running() {
    timespec before, after;
    if (!clock_of_team.is_known || clock_gettime(clock_of_team.id, &before) != 0) return true;
    for (int i = 0; i < 4; ++i) _mm_pause();
    return clock_gettime(clock_of_team.id, &after) != 0 || before.tv_nsec != after.tv_nsec ||
           before.tv_sec != after.tv_sec;
}

// Where the threads of a team may run, the caller's first: an OpenMP runtime that binds threads (OMP_PROC_BIND)
// leaves the caller one place, which every thread that it makes inherits. Empty: the caller isn't bound.
std::vector<cpu_set_t> places_of_team(ThreadPool::Region region, std::size_t threads) {
    struct Visit {
        std::vector<cpu_set_t> places;
        const std::thread::id caller = std::this_thread::get_id();
        std::atomic<std::size_t> others{0};
        void enter() {
            const bool is_caller = std::this_thread::get_id() == caller;
            const std::size_t self = is_caller ? 0 : others.fetch_add(1) + 1;
            if (self < places.size()) sched_getaffinity(0, sizeof(cpu_set_t), &places[self]);
        }
    } visit;
    cpu_set_t own;
    if (region == nullptr || threads < 2 || sched_getaffinity(0, sizeof own, &own) != 0) return {};
    if (static_cast<std::size_t>(CPU_COUNT(&own)) >= threads) return {};
    visit.places.assign(threads, own);
    region([](void* data) { static_cast<Visit*>(data)->enter(); }, &visit, static_cast<unsigned>(threads), 0);
    return visit.places;
}
}  // namespace

void ThreadPool::borrow_from(Region region) {
    process_of_region.store(getpid());
    region_of_process.store(region);
}

namespace {

void relax(int spins) {
    if (spins < kSpins)
        _mm_pause();
    else
        std::this_thread::yield();
}

template <class Done>
void await(const Done& is_done) {
    for (int spins = 0; !is_done();) relax(++spins);
}

// The caller works too and waits for tasks, not for threads: a worker that the system has put aside takes no task and
// delays nobody. Every thread owns an equal range of the tasks, so that neighbouring steps find in its cache what it
// wrote, and takes from the end of the others' when its own is empty. Whoever takes a task thereby sees the `task`
// that was stored before its range, so a worker that comes late to one job can't mistake it for the next.
struct Team {
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
    // What the thread computes step by step inside its own task, open to threads that have no task left.
    struct alignas(64) Offer {
        Range range;
        const std::function<void(std::int64_t)>* task = nullptr;
        alignas(64) std::atomic<std::int64_t> done{0};  // by others
    };
    // Tasks that a thread has done, of all jobs. Each counts for itself: one number for all would be handed round among
    // the caches while everybody waits for it.
    struct alignas(64) Count {
        std::atomic<std::int64_t> tasks{0};
    };
    // Of the task that this thread is in: where it may offer what it divides. Null: nowhere.
    struct Place {
        Team* team = nullptr;
        std::size_t self = 0;
    };
    static thread_local Place place;

    explicit Team(std::size_t size) : ranges(size), offers(size), counts(size) {}
    std::mutex sleep_mutex;
    std::condition_variable wake;
    std::atomic<int> sleepers{0};
    std::atomic<bool> stopping{false};
    const std::function<void(std::int64_t)>* task = nullptr;
    alignas(64) std::atomic<std::uint64_t> generation{0};
    std::vector<Range> ranges;  // per thread; the caller's first
    std::vector<Offer> offers;  // likewise
    std::vector<Count> counts;  // likewise
    std::atomic<bool> are_helped{false};
    std::atomic<std::int64_t> total{0};  // tasks of all jobs so far, this one's included

    bool is_done() const {
        std::int64_t done = 0;
        for (const Count& each : counts) done += each.tasks.load(std::memory_order_acquire);
        return done == total.load(std::memory_order_relaxed);
    }

    void work(std::size_t self, std::uint64_t seen) {
        place = {this, self};
        for (std::size_t i = 0; i < ranges.size(); ++i) {
            Range& range = ranges[(self + i) % ranges.size()];
            std::int64_t taken = 0;
            for (std::int64_t t; (t = range.take(i == 0)) >= 0; ++taken) (*task)(t);
            // Before it looks at the others' ranges, each of which may lie in another cache.
            if (taken > 0) counts[self].tasks.fetch_add(taken, std::memory_order_release);
        }
        place = {};
        if (are_helped.load(std::memory_order_relaxed)) help(self, seen);
    }

    // Takes from what the others offer until their tasks of this generation are done.
    void help(std::size_t self, std::uint64_t seen) {
        for (int spins = 0; !is_done() && generation.load(std::memory_order_acquire) == seen;) {
            bool found = false;
            for (std::size_t i = 1; i < offers.size(); ++i) {
                Offer& offer = offers[(self + i) % offers.size()];
                const std::int64_t t = offer.range.take(false);
                if (t < 0) continue;
                (*offer.task)(t);
                offer.done.fetch_add(1, std::memory_order_release);
                found = true;
            }
            if (found)
                spins = 0;
            else
                relax(++spins);
        }
    }

    // All of it, with the help of those who have nothing else to do.
    void offer(std::size_t self, std::int64_t count, const std::function<void(std::int64_t)>& shared) {
        Offer& own = offers[self];
        own.task = &shared;
        own.done.store(0, std::memory_order_relaxed);
        own.range.set(0, static_cast<std::uint64_t>(count));
        std::int64_t left = count;
        for (std::int64_t t; (t = own.range.take(true)) >= 0; --left) shared(t);
        await([&] { return own.done.load(std::memory_order_acquire) == left; });
    }

    void loop(std::size_t self, std::uint64_t seen) {
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
            work(self, seen);
        }
    }

    void start_generation() {
        generation.fetch_add(1);
        if (sleepers.load() == 0) return;
        // Under the lock, so that a thread between its check and its sleep is not missed.
        { std::lock_guard<std::mutex> lock(sleep_mutex); }
        wake.notify_all();
    }

    void share_out(std::int64_t count, const std::function<void(std::int64_t)>& shared, bool is_helped) {
        task = &shared;
        are_helped.store(is_helped, std::memory_order_relaxed);
        total.fetch_add(count, std::memory_order_relaxed);
        const std::uint64_t tasks = static_cast<std::uint64_t>(count), size = ranges.size();
        for (std::uint64_t i = 0; i < size; ++i) ranges[i].set(tasks * i / size, tasks * (i + 1) / size);
        start_generation();
        work(0, generation.load(std::memory_order_relaxed));
        await([this] { return is_done(); });
    }
};

thread_local Team::Place Team::place;

}  // namespace

// Threads of its own sleep when nobody needs them, and one that the system has put aside delays nobody; but they would
// fight for the cores with a borrowed team that still spins after others' work. So that one is taken while it spins.
struct ThreadPool::State {
    explicit State(std::size_t size) : own(size), lent(size) {}
    Team own, lent;
    const Region region = region_now();
    std::vector<std::thread> threads;
    const pid_t process = getpid();  // a forked child has none of the threads
    std::mutex busy;                 // held by the caller that uses the workers
    Team* team = nullptr;            // which it uses
    bool is_running = false;         // whether it is inside `run`

    struct Visit {
        State& state;
        const std::function<void()>& body;
        const std::thread::id caller = std::this_thread::get_id();
        const std::uint64_t generation = state.lent.generation.load();  // one who comes late sees that it ended
        std::atomic<std::size_t> threads{1};
        clockid_t clock = 0;
        bool has_clock = false;
        std::exception_ptr error = nullptr;  // no exception may cross the region

        void enter() {
            Team& lent = state.lent;
            if (std::this_thread::get_id() != caller) {
                const std::size_t self = threads.fetch_add(1);
                if (self == 1) has_clock = pthread_getcpuclockid(pthread_self(), &clock) == 0;
                lent.loop(self % lent.ranges.size(), generation);
                return;
            }
            state.team = &lent;
            try {
                body();
            } catch (...) {
                error = std::current_exception();
            }
            lent.stopping.store(true, std::memory_order_release);
            lent.start_generation();
        }
    };

    // By the holder of `busy`.
    void hold(const std::function<void()>& body) {
        struct Holding {
            explicit Holding(State* state) { holds = state; }
            ~Holding() { holds = nullptr; }
        } holding(this);
        if (region == nullptr || !is_team_running()) {
            team = &own;
            body();
            return;
        }
        lent.stopping.store(false);
        Visit visit{*this, body};
        region([](void* data) { static_cast<Visit*>(data)->enter(); }, &visit, static_cast<unsigned>(own.ranges.size()),
               0);
        clock_of_team = {visit.clock, visit.has_clock};
        if (visit.error) std::rethrow_exception(visit.error);
    }

    static thread_local const State* holds;  // whose `busy` this thread holds
};

thread_local const ThreadPool::State* ThreadPool::State::holds = nullptr;

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>(static_cast<std::size_t>(std::max(threads, 1)))) {
    const std::vector<cpu_set_t> places = places_of_team(state_->region, state_->own.ranges.size());
    for (std::size_t i = 1; i < state_->own.ranges.size(); ++i)
        state_->threads.emplace_back([this, i, place = places.empty() ? std::nullopt : std::optional(places[i])] {
            if (place) sched_setaffinity(0, sizeof *place, &*place);
            state_->own.loop(i, 0);
        });
}

ThreadPool::~ThreadPool() {
    if (!state_) return;
    if (state_->process != getpid()) {
        for (auto& thread : state_->threads) thread.detach();
        return;
    }
    state_->own.stopping.store(true, std::memory_order_release);
    state_->own.start_generation();
    for (auto& thread : state_->threads) thread.join();
}

ThreadPool::ThreadPool(Helpers helpers) : helpers_(helpers.at_most) {}

int ThreadPool::size() const { return state_ ? static_cast<int>(state_->threads.size()) + 1 : helpers_; }

void ThreadPool::run(std::int64_t count, const std::function<void(std::int64_t)>& task) { run(count, task, false); }

void ThreadPool::run_helped(std::int64_t count, const std::function<void(std::int64_t)>& task) {
    run(count, task, true);
}

void ThreadPool::run(std::int64_t count, const std::function<void(std::int64_t)>& task, bool is_helped) {
    constexpr std::int64_t kMost = 0x7fffffff;
    const auto alone = [&] {
        for (std::int64_t i = 0; i < count; ++i) task(i);
    };
    if (count <= 1 || count > kMost || size() == 1) return alone();
    if (!state_) {
        const Team::Place place = std::exchange(Team::place, {});  // what its tasks divide is not offered
        place.team != nullptr ? place.team->offer(place.self, count, task) : alone();
        Team::place = place;
        return;
    }
    State& s = *state_;
    if (State::holds == &s && !s.is_running) {
        s.is_running = true;
        s.team->share_out(count, task, is_helped);
        s.is_running = false;
        return;
    }
    if (State::holds == &s || s.process != getpid() || !s.busy.try_lock()) return alone();
    std::lock_guard<std::mutex> lock(s.busy, std::adopt_lock);
    s.hold([&] { run(count, task, is_helped); });
}

void ThreadPool::during(const std::function<void()>& body) {
    if (!state_) return body();
    State& s = *state_;
    if (s.region == nullptr || size() == 1 || State::holds == &s || s.process != getpid() || !s.busy.try_lock()) {
        body();
        return;
    }
    std::lock_guard<std::mutex> lock(s.busy, std::adopt_lock);
    s.hold(body);
}

}  // namespace quantflow
