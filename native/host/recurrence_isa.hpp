// One step of a recurrent cell, for one instruction set, as a table of functions on plain memory.
#pragma once

#include <cstdint>

namespace quantflow::host {

// One sample. `gates` and `products`: (gates, hidden).
struct CellStep {
    const float* gates = nullptr;
    const float* products = nullptr;
    float reach = 1;              // of the products
    const float* bias = nullptr;  // GRU, of n; null: none
    const float* before = nullptr;  // the state that the step starts from
    float* c = nullptr;             // LSTM
    float* after = nullptr;
    std::uint8_t* codes = nullptr;  // of the state after: round(h * steps) + 128; null: not wanted
    float steps = 0;
    std::int64_t hidden = 0;
};

struct RecurrenceKernels {
    void (*lstm)(const CellStep&);
    void (*gru)(const CellStep&);
    void (*rnn_tanh)(const CellStep&);
    void (*rnn_relu)(const CellStep&);
    // Codes of a first state.
    void (*code)(const float* h, std::int64_t hidden, float steps, std::uint8_t* codes);
};

namespace isa_generic { extern const RecurrenceKernels recurrence_kernels; }
namespace isa_avx2 { extern const RecurrenceKernels recurrence_kernels; }
namespace isa_avx512_vnni { extern const RecurrenceKernels recurrence_kernels; }

}  // namespace quantflow::host
