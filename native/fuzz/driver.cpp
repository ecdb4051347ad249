// Drives the fuzz targets where there is no libFuzzer: GCC has the sanitizers, but not that.
//
//   fuzz [--seconds N] [--jobs N] [--seed N] [--findings FOLDER] [FILE|FOLDER...]
//       processes of their own until the time is over, each on instruction sets in turn; what reaches new code is kept and
//       changed further. FILEs are programs to begin with. What ends a process is kept in FOLDER. 1 where there was any.
//   fuzz --file FILE...          programs (or, where the name begins with "calls", choices of the grammar) as they are
//   fuzz --write FOLDER COUNT    programs of the grammar that were computed, as files
//   fuzz --places                addresses that are watched, for build.sh
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "../src/op_table.hpp"
#include "../src/lowering/ops/registry.hpp"
#include "reached.hpp"
#include "targets.hpp"

namespace fs = std::filesystem;
using namespace quantflow;
using namespace quantflow::fuzz;

// What a sanitizer says of memory is said once, and the process ends; what lies where nobody has written is never 0.
extern "C" const char* __asan_default_options() {
    return "detect_leaks=0:hard_rss_limit_mb=4000:max_allocation_size_mb=3000:allocator_may_return_null=1:"
           "malloc_context_size=8:quarantine_size_mb=64:max_malloc_fill_size=65536:malloc_fill_byte=190:"
           "detect_stack_use_after_return=0";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

// Memory of a backend (linked with --wrap=aligned_alloc).
extern "C" void* __real_aligned_alloc(std::size_t, std::size_t);
extern "C" void* __wrap_aligned_alloc(std::size_t alignment, std::size_t size) {
    void* const memory = __real_aligned_alloc(alignment, size);
    if (memory != nullptr) std::memset(memory, filling, size);
    return memory;
}

namespace {

using Bytes = std::vector<std::uint8_t>;
using Clock = std::chrono::steady_clock;
constexpr std::size_t kLongest = 8192, kKept = 4096, kNames = 4096, kMostJobs = 256, kMostFindings = 20;
constexpr int kSliceSeconds = 20, kPatienceSeconds = 120;
const char* const kIsas[] = {"", "avx2", "generic", "avx512_vnni", "avx_vnni"};

struct Entry {
    std::uint32_t size;
    std::uint8_t data[kLongest];
};
struct Kept {
    std::atomic<std::uint32_t> count;
    Entry entries[kKept];
};
struct Named {
    std::atomic<int> state;  // 0: free, 1: being named, 2: named
    char name[80];
    std::atomic<long> count;
};
struct Job {
    std::atomic<std::int64_t> since;  // milliseconds of the clock; when its input began
    Entry input;
};
// Of all processes.
struct Shared {
    Kept kept[2];
    Named names[kNames];
    Job jobs[kMostJobs];
};
Shared* shared = nullptr;

using Target = void (*)(const std::uint8_t*, std::size_t);
const Target kTargets[] = {fuzz_calls, fuzz_lower};
const char* const kTargetNames[] = {"calls", "lower"};

std::int64_t now_ms() {
    return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now().time_since_epoch()).count();
}

Bytes read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

void put(Entry& entry, const Bytes& bytes) {
    entry.size = static_cast<std::uint32_t>(std::min(bytes.size(), kLongest));
    std::copy_n(bytes.begin(), entry.size, entry.data);
}

void keep(int target, const Bytes& bytes) {
    if (bytes.size() > kLongest) return;
    Kept& all = shared->kept[target];
    const std::uint32_t at = all.count++;
    put(all.entries[at % kKept], bytes);
}

Bytes changed(std::mt19937_64& random, Bytes bytes, int target) {
    const auto any = [&](std::size_t count) { return static_cast<std::size_t>(random() % count); };
    for (std::size_t n = 1 + any(4); n > 0 && !bytes.empty(); --n) {
        const std::size_t at = any(bytes.size());
        switch (any(6)) {
            case 0: bytes[at] = static_cast<std::uint8_t>(random()); break;
            case 1: bytes[at] = static_cast<std::uint8_t>(bytes[at] ^ 1u << any(8)); break;
            case 2: bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at)); break;
            case 3: bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), static_cast<std::uint8_t>(random())); break;
            case 4: {  // a piece of another
                Kept& all = shared->kept[target];
                if (all.count == 0) break;
                const Entry& other = all.entries[any(std::min<std::size_t>(all.count, kKept))];
                if (other.size == 0) break;
                const std::size_t from = any(other.size), length = std::min<std::size_t>(any(64) + 1, other.size - from);
                bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), other.data + from, other.data + from + length);
                break;
            }
            default: {  // digits: sizes, axes, counts
                static const char* const words[] = {"-1", "0", "1", "65536", "4294967296", "9223372036854775807", "null", "[]", "true", "1e39"};
                if (target == 0) break;
                const auto digit = std::find_if(bytes.begin() + static_cast<std::ptrdiff_t>(at), bytes.end(), [](std::uint8_t b) { return b >= '0' && b <= '9'; });
                if (digit == bytes.end()) break;
                const char* const word = words[any(10)];
                const auto place = bytes.erase(digit);
                bytes.insert(place, word, word + std::strlen(word));
            }
        }
    }
    // The length of program.json in front stays true most of the time.
    if (target == 1 && bytes.size() > 4 && any(16) != 0) {
        static const std::uint8_t last[] = {'}', 0};
        for (std::size_t i = 4; i + 9 < bytes.size(); ++i)
            if (bytes[i] == last[0] && bytes[i + 9] == '{' && bytes[i + 4] == 0 && bytes[i + 8] == 0) {
                const auto length = static_cast<std::uint32_t>(i - 3);
                std::memcpy(bytes.data(), &length, 4);
                break;
            }
    }
    if (bytes.size() > kLongest) bytes.resize(kLongest);
    return bytes;
}

void work(std::size_t number, int target, const char* isa, std::uint64_t seed, std::int64_t until) {
    if (isa[0] != '\0') setenv("QUANTFLOW_ISA", isa, 1);
    std::mt19937_64 random(seed);
    fresh();
    while (now_ms() < until) {
        Kept& all = shared->kept[target];
        const std::size_t there = std::min<std::size_t>(all.count, kKept);
        Bytes bytes;
        if (there > 0 && (target == 1 || random() % 3 != 0)) {
            const Entry& entry = all.entries[random() % there];
            bytes = changed(random, Bytes(entry.data, entry.data + entry.size), target);
        } else {
            bytes.resize(16 + random() % 300);
            for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
        }
        put(shared->jobs[number].input, bytes);
        shared->jobs[number].since = now_ms();
        kTargets[target](bytes.data(), bytes.size());
        if (fresh() > 0) keep(target, bytes);
    }
    _exit(0);
}

std::map<std::string, long> counted() {
    std::map<std::string, long> all;
    for (const Named& n : shared->names)
        if (n.state == 2) all[n.name] += n.count;
    return all;
}

void print_table(double seconds, std::size_t jobs, std::size_t findings) {
    auto all = counted();
    std::set<std::string> kernels, families, ops;
    for (const auto& [name, times] : all) {
        if (name.rfind("op ", 0) == 0) ops.insert(name.substr(3));
        if (name.rfind("kernel ", 0) != 0) continue;
        kernels.insert(name.substr(7));
        std::string family = name.substr(7);
        for (const char* const word : {".avx512_vnni", ".avx_vnni", ".avx2", ".amx_int8", ".generic"})
            if (const auto at = family.find(word); at != std::string::npos) family.erase(at);
        families.insert(family);
    }
    std::size_t lowered = 0, seen = 0;
    std::string unseen;
    for (const std::string& target : table_targets())
        if (lowering::op_table().count(target.substr(0, target.find('.'))) > 0) {
            ++lowered;
            seen += ops.count(target);
            if (ops.count(target) == 0) unseen += " " + target;
        }
    std::printf("\nprograms of the grammar: %ld built, %ld valid; files: %ld read, %ld valid; together %ld lowered, %ld executed "
                "(each ten times: over memory of other contents, on one thread, on four and on eight; %ld with the batch in "
                "parts, %ld with steps together on lines)\n",
                all["built"], all["valid"], all["read"], all["loaded"], all["lowered"], all["executed"], all["in parts"],
                all["by lines"]);
    std::printf("ops executed: %zu of the %zu rows that are lowered, of %zu in the table\n", seen, lowered, table_targets().size());
    if (!unseen.empty()) std::printf("of those not executed:%s\n", unseen.c_str());
    std::printf("kernel families executed (%zu, by %zu kernels):", families.size(), kernels.size());
    for (const std::string& family : families) std::printf(" %s", family.c_str());
    std::printf("\n");
    const std::vector<std::uintptr_t> where = places();
    std::ifstream names(fs::read_symlink("/proc/self/exe").string() + ".places");
    std::map<std::string, std::pair<long, long>> files;
    std::size_t at = 0;
    for (std::string file; std::getline(names, file) && at < where.size(); ++at) {
        if (file.rfind("src/", 0) != 0 && file.rfind("host/", 0) != 0) continue;
        auto& [reached, there] = files[file];
        ++there;
        reached += is_reached(where[at]) ? 1 : 0;
    }
    long reached = 0, there = 0;
    for (const auto& [file, counts] : files) {
        std::printf("  %5ld of %5ld places (%3ld %%) %s\n", counts.first, counts.second, 100 * counts.first / counts.second, file.c_str());
        reached += counts.first, there += counts.second;
    }
    if (there > 0) std::printf("places reached: %ld of %ld (%ld %%)\n", reached, there, 100 * reached / there);
    std::printf("%.0f seconds, %zu processes; findings: %zu\n", seconds, jobs, findings);
}

int drive(double seconds, std::size_t jobs, std::uint64_t seed, const fs::path& folder) {
    const auto start = Clock::now();
    const std::int64_t end = now_ms() + static_cast<std::int64_t>(seconds * 1000);
    struct Running {
        pid_t id = 0;
        int target = 0;
    };
    std::vector<Running> running(jobs);
    std::vector<std::uint64_t> slices(jobs);
    std::size_t findings = 0, alive = 0;
    const auto begin = [&](std::size_t j) {
        const std::uint64_t slice = slices[j]++;
        const int target = (j + slice) % 4 == 3 ? 1 : 0;
        const std::int64_t until = std::min(end, now_ms() + kSliceSeconds * 1000);
        shared->jobs[j].since = now_ms();
        std::fflush(nullptr);
        const pid_t id = fork();
        if (id == 0) work(j, target, kIsas[(j + slice) % std::size(kIsas)], seed + (j << 32) + slice, until);
        running[j] = {id, target};
        ++alive;
    };
    for (std::size_t j = 0; j < jobs; ++j) begin(j);
    while (alive > 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        for (std::size_t j = 0; j < jobs; ++j) {
            if (running[j].id == 0) continue;
            int status = 0;
            const bool is_late = now_ms() - shared->jobs[j].since > kPatienceSeconds * 1000;
            if (is_late) kill(running[j].id, SIGKILL);
            if (waitpid(running[j].id, &status, is_late ? 0 : WNOHANG) == 0) continue;
            --alive;
            running[j].id = 0;
            if (status != 0) {
                const Entry& input = shared->jobs[j].input;
                const fs::path file = folder / (std::string(kTargetNames[running[j].target]) + "-" + std::to_string(findings++));
                fs::create_directories(folder);
                std::ofstream(file, std::ios::binary).write(reinterpret_cast<const char*>(input.data), input.size);
                std::fprintf(stderr, "FINDING %s: %s; QUANTFLOW_ISA=%s\n", file.c_str(), is_late ? "takes too long" : "ended the process",
                             kIsas[(j + slices[j] - 1) % std::size(kIsas)]);
            }
            if (now_ms() < end && findings < kMostFindings) begin(j);
        }
    }
    print_table(std::chrono::duration<double>(Clock::now() - start).count(), jobs, findings);
    return findings > 0 ? 1 : 0;
}

int write(const fs::path& folder, std::size_t wanted, std::uint64_t seed) {
    fs::create_directories(folder);
    for (std::size_t made = 0; made < wanted; ++seed) {
        std::mt19937_64 random(seed);
        Bytes bytes(16 + random() % 300);
        for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
        const long before = counted()["executed"];
        fuzz_calls(bytes.data(), bytes.size());
        if (counted()["executed"] == before) continue;
        std::ofstream(folder / (std::to_string(made++) + ".program"), std::ios::binary) << written(bytes.data(), bytes.size());
    }
    return 0;
}

}  // namespace

void quantflow::fuzz::count(const std::string& what) {
    for (std::size_t at = std::hash<std::string>()(what) % kNames, tries = 0; tries < kNames; ++tries, at = (at + 1) % kNames) {
        Named& n = shared->names[at];
        int is_free = 0;
        if (n.state.compare_exchange_strong(is_free, 1)) {
            std::snprintf(n.name, sizeof n.name, "%s", what.c_str());
            n.state = 2;
        }
        while (n.state == 1) {
        }
        if (what.compare(0, sizeof n.name - 1, n.name) == 0) {
            ++n.count;
            return;
        }
    }
}

int main(int count, char** words) {
    void* const memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 2;
    shared = static_cast<Shared*>(memory);  // all zero, as it begins
    double seconds = 10;
    std::size_t jobs = 1;
    std::uint64_t seed = 1;
    fs::path findings = "findings";
    std::vector<fs::path> files;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i], next = i + 1 < count ? words[i + 1] : "";
        if (word == "--places") {
            for (const std::uintptr_t place : places()) std::printf("%#lx\n", static_cast<unsigned long>(place - 1));
            return 0;
        }
        if (word == "--file") {
            for (++i; i < count; ++i) {
                const Bytes bytes = read(words[i]);
                kTargets[fs::path(words[i]).filename().string().rfind("calls", 0) == 0 ? 0 : 1](bytes.data(), bytes.size());
            }
            return 0;
        }
        if (word == "--write" && i + 2 < count) return write(next, std::strtoull(words[i + 2], nullptr, 10), seed);
        if (word == "--seconds")
            seconds = std::atof(next.c_str()), ++i;
        else if (word == "--jobs")
            jobs = std::clamp<std::size_t>(std::strtoull(next.c_str(), nullptr, 10), 1, kMostJobs), ++i;
        else if (word == "--seed")
            seed = std::strtoull(next.c_str(), nullptr, 10), ++i;
        else if (word == "--findings")
            findings = next, ++i;
        else if (fs::is_directory(word))
            for (const auto& entry : fs::directory_iterator(word)) files.push_back(entry.path());
        else
            files.emplace_back(word);
    }
    watch();
    std::sort(files.begin(), files.end());
    for (const fs::path& file : files) keep(1, read(file));
    return drive(seconds, jobs, seed, findings);
}
