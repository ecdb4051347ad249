// What a device can compute. `lower.cpp` asks a backend for one Step per kernel; the session runs them in order.
//
// Rules for every kernel
//  * Codes: x' = (q - zero_point) * scale with the tensor's own `q`. Results are written as
//    q = clamp(round_half_even(r / scale) + zero_point, qmin, qmax); NaN and +Inf give qmax, -Inf gives qmin.
//  * "real operand": f32, or codes that are dequantized while they are read. "real result": f32, or codes that are
//    quantized while they are written. So dequantize and quantize around a float op cost no pass of their own.
//  * Dimensions of size 0 are legal: the step then does nothing.
//  * Shapes are checked by the caller; layouts that a kernel does not take raise Unsupported when the step is built.
//  * Steps are built once and run many times; addresses are read through `Tensor::place` at each run.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "activations.hpp"
#include "tensor.hpp"
#include "ways.hpp"

namespace quantflow {

// What steps made of constants alone, packed weights above all.
using Lasting = std::set<std::shared_ptr<const void>>;

struct ConstantBytes {
    const void* data = nullptr;
    std::int64_t size = 0;
};

// How a step computes its result a few lines at a time: a line is a row of pixels, or of a matrix.
struct Lines {
    std::int64_t count = 0;  // one after the other in the result's memory; 0: it can't
    // The operand of which a line takes more than the same line, by its cell; null: there is none.
    std::byte* const* far = nullptr;
};

class Step {
public:
    virtual ~Step() = default;
    // Host: computes before it returns. SYCL: submits to the in-order queue.
    virtual void run() = 0;
    virtual Lines lines() const { return {}; }
    // Lines [first, first + count) of the result, on this thread; each by whatever thread, after one of them has called
    // `prepare`.
    virtual void run_lines(std::int64_t, std::int64_t) {}
    virtual void prepare() {}
    // Predicted for so many lines on one thread.
    virtual double lines_ms(std::int64_t) const { return 0; }
    // The kernel that runs, for profiles and the plan: "host.igemm.avx512_vnni 6x64".
    virtual std::string kernel() const = 0;
    // Adds what a step of the same weights for other shapes would make again, if nobody held it.
    virtual void share(Lasting&) const {}
    // The weights that it reads, in order; empty: few.
    virtual ConstantBytes weights() const { return {}; }
    // Those of a step soon after it, which it may fetch into the caches while it computes. They live as long as it.
    virtual void expect(ConstantBytes) {}
    // What was chosen when it was made; null: there was nothing to choose.
    std::shared_ptr<const Decision> decision;
    // Its operands and results, parameters aside, if dimension 0 of all of them counts samples, each of which is computed
    // from its own alone; else none.
    std::vector<Tensor> samples;
};

// What it costs to compute a batch on all threads together, step by step, or on each thread sample by sample through many
// steps, so that what they hand on stays in its cache.
struct Nearness {
    int threads = 1;
    std::int64_t least_samples = 4;  // of each thread
    std::int64_t cache_bytes = 0;    // of one thread
    double far_byte_ns = 0;          // a byte from beyond it
    double hand_over_ns = 0;         // to spread a step over the threads
    double step_ns = 0;              // to start a step on one
    double last_task = 0.2;          // of a task, what all wait for at the end of a step
    double waiting = 0;              // for the slowest thread at the end of a step, to what the threads compute
};

// int8 weight codes in [-127, 127], symmetric. `codes`: (out, in / groups, *kernel), row-major; they stay valid as
// long as the backend. `scale`: 1 or `out` values. `bias`: null or `out` values.
struct Weights {
    const std::int8_t* codes = nullptr;
    std::vector<std::int64_t> dims;
    const float* scale = nullptr;
    std::int64_t scales = 1;
    const float* bias = nullptr;
};

struct ConvGeometry {
    std::vector<std::int64_t> stride, padding, dilation;  // one entry per spatial dimension (1, 2 or 3)
    std::int64_t groups = 1;
};

// A product of another weight and other codes, both of the same shapes as the step's own.
struct Product {
    Weights weights;
    Tensor x;
};

// What `linear` and `conv` do for operands that are held in two int8 terms.
struct Terms {
    static constexpr std::size_t kMost = 2;
    // At most kMost. They come before the step's own product, in this order: each is r = sum * scale + bias + (what came before) in f32. The
    // residual comes before all of them.
    std::vector<Product> products;
    // Codes, where y is codes: of what these leave over of the result. Laid out as y.
    const Tensor* rest = nullptr;
};

enum class Binary : std::uint8_t {
    add, sub, mul, div, maximum, minimum,
    eq, ne, lt, le, gt, ge, logical_and, logical_or,  // result b8
};

enum class Unary : std::uint8_t {
    activation,  // by `Epilogue`
    affine,      // a * x + b
    exp, log, sqrt, rsqrt, neg, abs, erf, reciprocal, sin, cos, floor, logical_not,
    power,  // x ** a
};

enum class Reduction : std::uint8_t { sum, mean, max, min };

struct PoolGeometry {
    std::vector<std::int64_t> kernel, stride, padding, dilation;  // one entry per spatial dimension (1, 2 or 3)
    bool is_max = true;
    bool count_include_pad = true;      // average
    std::int64_t divisor_override = 0;  // average; 0: none
    bool is_adaptive = false;           // average: window i of n covers [floor(i*in/n), ceil((i+1)*in/n))
};

enum class Interpolation : std::uint8_t { nearest, bilinear };

enum class Cell : std::uint8_t { lstm, gru, rnn_tanh, rnn_relu };

// The recurrent weight of a layer: codes, or `float_weight` (gates * hidden, hidden), constant; `weights` has no bias.
struct Recurrence {
    Cell cell = Cell::lstm;
    bool is_reverse = false;
    Weights weights;
    const Tensor* float_weight = nullptr;  // null: codes
    const float* bias = nullptr;           // of a GRU's n, (hidden); null: none
};

// All row-major, f32 but for the codes.
struct RecurrenceTensors {
    Tensor gates;                                // (steps, batch, gates * hidden)
    const Tensor *h0 = nullptr, *c0 = nullptr;   // (batch, hidden); null: zeros
    Tensor y;                                    // (steps, batch, hidden); LSTM: (steps + 1, …)
    Tensor products, state, codes;               // for the step's own use: (batch, gates * hidden), (batch, hidden) twice
};

class Backend {
public:
    virtual ~Backend() = default;

    virtual std::string name() const = 0;
    // Whether signed codes are stored as u8 with zero_point + 128 (true), or as s8 (false).
    virtual bool stores_unsigned() const = 0;

    // Whether `linear` and `conv` take an f32 residual and `Terms`.
    virtual bool takes_terms() const = 0;

    // Memory that steps may read and write, 64-byte aligned.
    virtual void* allocate(std::size_t bytes) = 0;
    virtual void release(void* memory) = 0;
    // Between memory of the process and `allocate`d memory, in order with the steps. On a host backend: memcpy.
    virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
    // Whether steps can read and write any memory of the process, so that inputs and outputs need no copy.
    virtual bool reads_process_memory() const = 0;
    // Waits until everything submitted has run; throws what went wrong.
    virtual void wait() = 0;
    // Null: all threads compute together.
    virtual std::optional<Nearness> nearness() const { return std::nullopt; }
    // The same device, whose steps run on the thread that calls them; in `spread`, with help of threads that are done.
    virtual Backend& alone() { return *this; }
    // Calls task(i) for every i in [0, count), on several threads where it has some; `task` must not throw.
    virtual void spread(std::int64_t count, const std::function<void(std::int64_t)>& task) {
        for (std::int64_t i = 0; i < count; ++i) task(i);
    }
    // The same of tasks that divide nothing for others to help with.
    virtual void share_out(std::int64_t count, const std::function<void(std::int64_t)>& task) { spread(count, task); }
    // Calls `body`, in which many steps run one after another.
    virtual void during(const std::function<void()>& body) { body(); }

    // y = epilogue(sum_k (x[m,k] - zp) * w[n,k] * scale_x * scale_w[n] + bias[n] + residual).
    // x codes (*, in), y codes or f32 (*, out), row-major; residual: codes of y's shape (with `takes_terms` also f32),
    // row-major, or null. y and residual may be the same memory. The integer sum is exact.
    virtual std::unique_ptr<Step> linear(const Weights&, const Tensor& x, const Tensor* residual, const Epilogue&,
                                         const Tensor& y, const Terms& = {}) = 0;
    // The same for convolutions: x codes (batch, channels, *spatial), y and residual channels_last, 1 to 3 spatial
    // dimensions. Padding stands for the real number 0; `padding` is what lies before x, what lies behind follows from
    // y's dimensions.
    virtual std::unique_ptr<Step> conv(const Weights&, const ConvGeometry&, const Tensor& x, const Tensor* residual,
                                       const Epilogue&, const Tensor& y, const Terms& = {}) = 0;

    // y = a @ b over the last two dimensions, batch dimensions equal in all three (broadcast by stride 0).
    // Both codes (exact integer sum), or both f32. Any strides on a and b; y real result, row-major.
    virtual std::unique_ptr<Step> matmul(const Tensor& a, const Tensor& b, const Tensor& y) = 0;
    // f32 linear: y = x @ w.T + bias. x (*, in) f32 row-major, w (out, in) and bias (out) constant or null, y f32.
    virtual std::unique_ptr<Step> float_linear(const Tensor& x, const Tensor& w, const Tensor* bias,
                                               const Tensor& y) = 0;
    // f32 convolution over 1 to 3 spatial dimensions: x and y channels_last, w (out, in / groups, *kernel) row-major and
    // bias (out) constant or null.
    virtual std::unique_ptr<Step> float_conv(const ConvGeometry&, const Tensor& x, const Tensor& w, const Tensor* bias,
                                             const Tensor& y) = 0;
    // softmax(scale * q @ k.T + mask) @ v. q (..., L, E), k (..., S, E), v (..., S, F), real operands of any strides
    // with equal batch dimensions; mask: null or f32 or b8 (false hides), broadcast by stride 0 to (..., L, S);
    // causal: position i sees j <= i. y (..., L, F) real result, any strides.
    virtual std::unique_ptr<Step> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask,
                                            bool causal, float scale, const Tensor& y) = 0;

    // All steps of a recurrent layer by the formulas of quantflow/ir/recurrence.py. `codes` has the scale of the state's:
    // 1 / 127, of h / max(1, max |h0|) of each sample. None of the sizes is 0.
    virtual std::unique_ptr<Step> recurrence(const Recurrence&, const RecurrenceTensors&) {
        throw Unsupported("a recurrence on this device");
    }

    // y[i] = x[i], element by element, any strides on both, shapes equal. Between plain dtypes: converts (b8 is 0 or
    // 1; f32 to integer truncates). real operand to real result: quantizes, dequantizes, requantizes; codes with
    // equal `q` are moved.
    virtual std::unique_ptr<Step> copy(const Tensor& x, const Tensor& y) = 0;
    virtual std::unique_ptr<Step> fill(double value, const Tensor& y) = 0;

    // y[i] = epilogue(op(a[i], b[i])); equal dims, broadcast by stride 0; any strides. Real operands and result, or
    // all plain integers / b8 of one dtype (comparisons write b8).
    virtual std::unique_ptr<Step> binary(Binary, const Tensor& a, const Tensor& b, const Epilogue&,
                                         const Tensor& y) = 0;
    // Real operand and result (codes to codes by a table of 256), equal shapes, any strides.
    virtual std::unique_ptr<Step> unary(Unary, float a, float b, const Epilogue&, const Tensor& x,
                                        const Tensor& y) = 0;
    // y[i] = cond[i] ? a[i] : b[i]; cond b8; plain dtypes or codes of equal `q`; any strides.
    virtual std::unique_ptr<Step> where(const Tensor& cond, const Tensor& a, const Tensor& b, const Tensor& y) = 0;
    // y = epilogue(x * scale[c] + shift[c]) along dimension `axis`; real operand and result; scale, shift f32 (c).
    virtual std::unique_ptr<Step> channel_affine(const Tensor& x, int axis, const Tensor& scale, const Tensor& shift,
                                                 const Epilogue&, const Tensor& y) = 0;

    // x, y (batch, channels, *spatial), channels_last or any other dense layout. Max: codes (moved) or f32.
    // Average: real operand and result; of codes it is exact: integer sum, one division in double, times scale.
    virtual std::unique_ptr<Step> pool(const PoolGeometry&, const Tensor& x, const Tensor& y) = 0;
    // Over the dimensions in `axes` (y has size 1 there); any strides; real operand and result; the sum of codes is
    // exact, the mean of codes divides in double.
    virtual std::unique_ptr<Step> reduce(Reduction, const Tensor& x, const std::vector<int>& axes, const Tensor& y) = 0;
    // Along dimension `axis`; any strides; real operand and result.
    virtual std::unique_ptr<Step> softmax(const Tensor& x, int axis, const Tensor& y) = 0;
    // Over the last dimension (dense there; other dimensions any strides); gamma, beta f32 or null; is_rms: no mean.
    // With `takes_terms`: codes that are made of an f32 y, too.
    virtual std::unique_ptr<Step> layer_norm(const Tensor& x, const Tensor* gamma, const Tensor* beta, float eps,
                                             bool is_rms, const Tensor& y, const Tensor* codes = nullptr) = 0;
    // y = epilogue((x - mean) / sqrt(variance + eps) * gamma[c] + beta[c]) with mean and variance of each sample's groups
    // of channels / groups channels. x, y (batch, channels, *spatial), both row-major or both channels_last, real
    // operand and result; gamma, beta f32 (channels) or null.
    virtual std::unique_ptr<Step> group_norm(const Tensor&, std::int64_t, const Tensor*, const Tensor*, float,
                                             const Epilogue&, const Tensor&) {
        throw Unsupported("a norm over groups of channels on this device");
    }
    // y[i..., :] = table[index[i...], :]; table (rows, width) f32 or codes (real operand), index s64, y real result.
    // An index outside [0, rows) throws Error at run (SYCL: when waited for).
    virtual std::unique_ptr<Step> gather(const Tensor& table, const Tensor& index, const Tensor& y) = 0;
    // (batch, channels, *spatial): nearest moves codes or f32; bilinear is 2-D, real operand and result.
    // `scales`: source step per output step, one per spatial dimension, as PyTorch computes it.
    virtual std::unique_ptr<Step> upsample(Interpolation, bool align_corners, const std::vector<double>& scales,
                                           const Tensor& x, const Tensor& y) = 0;
    // y[o..., r...] is x at the coordinates indices[d][o...] where dimension d has an index (s64 of equal dimensions,
    // any strides; negative ones count from the end) and r..., in order, where it has none. x and y of one kind, any
    // strides.
    // An index outside its dimension throws Error at run.
    virtual std::unique_ptr<Step> index(const Tensor&, const std::vector<std::optional<Tensor>>&, const Tensor&) {
        throw Unsupported("indexing on this device");
    }
    // y[..., i, ...] = sum of x[..., j, ...] for j <= i along dimension `axis`; s64, any strides.
    virtual std::unique_ptr<Step> running_sum(const Tensor&, int, const Tensor&) {
        throw Unsupported("a running sum on this device");
    }
};

// threads: how many cores one run may use.
std::unique_ptr<Backend> make_host_backend(int threads);

}  // namespace quantflow
