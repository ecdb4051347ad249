// Drives a fuzz target with random bytes where there is no libFuzzer: GCC has the sanitizers, but not that.
//
//   fuzz_calls SECONDS [SEED]       until the time is over; the seed of what fails is printed first
//   fuzz_calls --file FILE...       inputs that were found before
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int count, char** words) {
    if (count > 2 && std::strcmp(words[1], "--file") == 0) {
        for (int i = 2; i < count; ++i) {
            std::ifstream file(words[i], std::ios::binary);
            const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
            LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
        }
        return 0;
    }
    const double seconds = count > 1 ? std::atof(words[1]) : 10;
    std::uint64_t seed = count > 2 ? std::strtoull(words[2], nullptr, 10) : 1;
    const auto start = std::chrono::steady_clock::now();
    const char* const kept = std::getenv("QUANTFLOW_FUZZ_LAST");
    for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++seed) {
        std::mt19937_64 random(seed);
        std::vector<std::uint8_t> bytes(16 + random() % 120);
        for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
        if (kept != nullptr) {  // what a crash leaves behind
            std::FILE* file = std::fopen(kept, "wb");
            std::fwrite(bytes.data(), 1, bytes.size(), file);
            std::fclose(file);
        }
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::fprintf(stderr, "seeds up to %llu\n", static_cast<unsigned long long>(seed));
    return 0;
}
