#include "ways.hpp"

#include <map>
#include <mutex>
#include <utility>

namespace quantflow {
namespace {

// More shapes than any model has; beyond, predictions serve.
constexpr std::size_t kMostShapes = 1 << 14;

std::mutex mutex;
std::map<std::string, Way>& measured() {
    static std::map<std::string, Way> ways;
    return ways;
}
thread_local const Trial* trial = nullptr;
thread_local std::shared_ptr<const Decision> left;

}  // namespace

InTrial::InTrial(const Trial& now) : before_(trial) { trial = &now; }
InTrial::~InTrial() { trial = before_; }
const Trial* current_trial() { return trial; }

std::optional<Way> measured_way(const std::string& shape) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = measured().find(shape);
    return found == measured().end() ? std::nullopt : std::optional<Way>(found->second);
}

void keep_way(const Way& way) {
    std::lock_guard<std::mutex> lock(mutex);
    if (measured().size() < kMostShapes || measured().count(way.shape) != 0) measured()[way.shape] = way;
}

void forget_way(const std::string& shape) {
    std::lock_guard<std::mutex> lock(mutex);
    measured().erase(shape);
}

void leave_decision(std::shared_ptr<const Decision> decision) { left = std::move(decision); }
std::shared_ptr<const Decision> take_decision() { return std::exchange(left, nullptr); }

}  // namespace quantflow
