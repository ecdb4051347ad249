#include "schedule.hpp"

#include <algorithm>
#include <numeric>

namespace quantflow::lowering {
namespace {

std::size_t at(int i) { return static_cast<std::size_t>(i); }

// Whether each step runs at every call, where the buffers marked do not stay the same. Marks what such steps write.
std::vector<bool> varying_steps(std::vector<bool>& varies, const std::vector<Use>& steps) {
    std::vector<bool> found(steps.size(), false);
    for (bool changed = true; changed;) {
        changed = false;
        for (std::size_t i = 0; i < steps.size(); ++i) {
            const auto touches = [&](int buffer) { return varies[at(buffer)]; };
            const Use& use = steps[i];
            if (found[i] || (std::none_of(use.reads.begin(), use.reads.end(), touches) &&
                             std::none_of(use.writes.begin(), use.writes.end(), touches)))
                continue;
            found[i] = changed = true;
            for (int buffer : use.writes) varies[at(buffer)] = true;
        }
    }
    return found;
}

}  // namespace

Schedule schedule(std::vector<Buffer> buffers, const std::vector<Use>& steps) {
    std::vector<bool> varies;
    for (const Buffer& b : buffers) varies.push_back(b.storage == Storage::input || b.storage == Storage::output);
    std::vector<bool> each_time, is_kept;
    for (bool fits = false; !fits;) {
        each_time = varying_steps(varies, steps);
        std::vector<bool> written_once(buffers.size(), false);
        is_kept.assign(buffers.size(), false);
        for (std::size_t i = 0; i < steps.size(); ++i)
            if (!each_time[i])
                for (int buffer : steps[i].writes) written_once[at(buffer)] = true;
        fits = true;
        for (std::size_t i = 0; i < steps.size(); ++i) {
            if (!each_time[i]) continue;
            for (int buffer : steps[i].reads) {
                if (!written_once[at(buffer)]) continue;
                is_kept[at(buffer)] = true;
                if (buffers[at(buffer)].bytes > kMostKeptBytes) {
                    varies[at(buffer)] = true;
                    fits = false;
                }
            }
        }
    }
    Schedule result;
    result.order.resize(steps.size());
    std::iota(result.order.begin(), result.order.end(), 0);
    const auto first_later =
        std::stable_partition(result.order.begin(), result.order.end(), [&](int i) { return !each_time[at(i)]; });
    result.once = static_cast<int>(first_later - result.order.begin());
    for (Buffer& b : buffers) b.first = b.last = -1;
    for (std::size_t i = 0; i < result.order.size(); ++i) {
        const Use& use = steps[at(result.order[i])];
        for (const auto* touched : {&use.reads, &use.writes})
            for (int buffer : *touched) {
                Buffer& b = buffers[at(buffer)];
                if (b.first < 0) b.first = static_cast<int>(i);
                b.last = static_cast<int>(i);
            }
    }
    for (std::size_t i = 0; i < buffers.size(); ++i)
        if (is_kept[i] && buffers[i].storage == Storage::arena) buffers[i].storage = Storage::kept;
    result.buffers = std::move(buffers);
    return result;
}

}  // namespace quantflow::lowering
