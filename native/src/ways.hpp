// Ways to compute a step that all give the same result: which are worth trying is predicted, which is kept may be measured.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace quantflow {

// A step cut into tasks of `rows` rows and `panels` panels.
struct Way {
    std::int64_t rows = 1, panels = 1;
    double predicted_ms = 0;
    std::string shape;  // of the steps that have it: those on other kernels than the decision's have another
    bool operator==(const Way& o) const { return rows == o.rows && panels == o.panels && shape == o.shape; }
};

// What was chosen for a step. `ways`: those that were looked at, the best prediction first; outside of a trial only the
// one that is taken.
struct Decision {
    std::string shape;  // steps of one shape have the same ways, at the same cost
    std::vector<Way> ways;
    std::size_t taken = 0;
    double work_ms = 0;        // predicted for all tasks of the one that is taken, one after another
    bool is_measured = false;  // taken because it was the fastest in `Plan::tune` or in an earlier process
};

// How a step is decided while a trial lasts: by the way at place `rank`, whatever was measured before.
struct Trial {
    std::size_t rank = 0, most = 1;  // most: ways per step
    double margin = 0;               // ways predicted to cost more than (1 + margin) of the best are not tried
    std::optional<Way> forced;       // this one, where it is among them, and no other
};

// Steps that this thread makes are made for a trial, as long as this lives.
class InTrial {
public:
    explicit InTrial(const Trial&);
    ~InTrial();
    InTrial(const InTrial&) = delete;
    InTrial& operator=(const InTrial&) = delete;

private:
    const Trial* const before_;
};
const Trial* current_trial();

// What was measured, of all models of this process.
std::optional<Way> measured_way(const std::string& shape);
void keep_way(const Way&);
void forget_way(const std::string& shape);

// The decision about the step that this thread has made last: its maker leaves it here, the backend hangs it on the step.
void leave_decision(std::shared_ptr<const Decision>);
std::shared_ptr<const Decision> take_decision();

}  // namespace quantflow
