// What int8 steps cost on this machine, for the formulas of int8_cost.cpp: built in, or measured once (rates_measured.cpp).
#pragma once

#include <memory>

#include "int8_packing.hpp"

namespace quantflow::host::int8 {

// Cycles of one core, each on the kernels of one instruction set.
//   product          a quad of a row of a tile and a panel, with operands in the L1 cache
//   window_product   the same where rows are windows
//   narrow_product   a quad of a row and one vector, where a tile has two vectors at most
//   narrow_window    the same where rows are windows
//   fetching_near    a byte of weights that the L2 cache holds
//   fetching_far     a byte of weights that it doesn't
//   finishing        an element of y
//   narrow_finishing the same where tile registers find no two panels to finish together
//   passing          a byte of a row's x and y that the L1 cache doesn't hold, for each panel; of tile registers, for each
//                    block of panels, and not measured
//   packing          a byte of a row that is packed
//   hand_over        spreading a step over the threads
//   waiting          a cycle of a step on all threads, in which those that are done wait for the slowest
#define QF_RATES(R)                                                                                                    \
    R(product) R(window_product) R(narrow_product) R(narrow_window) R(fetching_near) R(fetching_far) R(finishing)      \
    R(narrow_finishing) R(passing) R(packing) R(hand_over) R(waiting)

struct Rates {
#define QF_RATE(name) double name = 0;
    QF_RATES(QF_RATE)
#undef QF_RATE
    double ghz = 3;
    const Int8Kernels* kernels = nullptr;
    bool is_measured = false;

    // Of a task of the slowest thread, what the others wait for at the end of a step: the less even they are, the more.
    double last_task() const { return 0.2 + 2 * waiting; }
};

// What holds on the machines that the formulas were made on.
Rates built_in_rates(const Int8Kernels&);

// Those in use: the last that were set for these kernels, else the built-in ones.
Rates rates_of(const Int8Kernels&);
// Each is held within a factor of kMostApart of the built-in one: a measurement that something disturbed must not spoil a
// choice. Throws Error where one is not a positive number.
constexpr double kMostApart = 4;
void set_rates(Rates);
// The built-in ones again.
void forget_rates();

// Measures all of them, of each of these kernels, at one thread and at the pool's size; takes about a third of a second.
std::vector<Rates> measure_rates(const std::vector<const Int8Kernels*>&, int threads);

// Of one core, as the system says: sysfs, else the processor itself, else what most processors have.
struct Caches {
    i64 l1 = 32 * 1024, l2 = 1024 * 1024;
    const char* source = "built in";
};
const Caches& caches();

}  // namespace quantflow::host::int8
