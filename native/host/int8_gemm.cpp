// int8 linear, convolution and matmul: packs weights, cuts the work into tasks, runs int8_gemm_isa.cpp's kernels.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "int8_gemm_isa.hpp"
#include "isa.hpp"
#include "memory.hpp"
#include "steps.hpp"

namespace quantflow::host {
namespace {

static_assert(static_cast<int>(Activation::none) == kInt8None && static_cast<int>(Activation::relu) == kInt8Relu &&
              static_cast<int>(Activation::hardtanh) == kInt8Hardtanh &&
              static_cast<int>(Activation::hardswish) == kInt8Hardswish &&
              static_cast<int>(Activation::hardsigmoid) == kInt8Hardsigmoid &&
              static_cast<int>(Activation::silu) == kInt8Silu &&
              static_cast<int>(Activation::sigmoid) == kInt8Sigmoid &&
              static_cast<int>(Activation::gelu) == kInt8Gelu &&
              static_cast<int>(Activation::gelu_tanh) == kInt8GeluTanh &&
              static_cast<int>(Activation::leaky_relu) == kInt8LeakyRelu &&
              static_cast<int>(Activation::tanh) == kInt8Tanh && Terms::kMost == kMostBefore);

using i64 = std::int64_t;
using u8 = std::uint8_t;

i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }
i64 round_up(i64 a, i64 b) { return divide_up(a, b) * b; }

const Int8Kernels* best_kernels() {
    switch (best_isa()) {
        case Isa::amx_int8: return &isa_amx_int8::int8_kernels;
        case Isa::avx512_vnni: return &isa_avx512_vnni::int8_kernels;
        case Isa::avx_vnni: return &isa_avx_vnni::int8_kernels;
        case Isa::avx2: return &isa_avx2::int8_kernels;
        default: return &isa_generic::int8_kernels;
    }
}

std::string tile_name(const Int8Kernels& kernels, const char* what) {
    return std::string("host.") + what + "." + kernels.name + " " + std::to_string(kernels.rows) + "x" +
           std::to_string(kernels.columns);
}

// Zeroed memory on a cache line's boundary.
template <typename T>
class Aligned {
public:
    Aligned() = default;
    explicit Aligned(i64 count) : memory_(shared_memory(static_cast<std::size_t>(count) * sizeof(T))), size_(count) {}
    T* data() const { return reinterpret_cast<T*>(memory_.get()); }
    i64 size() const { return size_; }
    T& operator[](i64 i) const { return data()[i]; }

private:
    std::shared_ptr<std::byte> memory_;
    i64 size_ = 0;
};

// A thread's own scratch, kept between runs and steps: it stays in the cache.
u8* thread_scratch(i64 bytes) {
    thread_local Aligned<u8> memory;
    // Grows by doubling: what it leaves behind is not used again.
    if (memory.size() < bytes) memory = Aligned<u8>(std::max(bytes, 2 * memory.size()));
    return memory.data();
}

// ---- weights -----------------------------------------------------------------------------------------------------

// Weights as the kernels read them. Steps for other shapes, and other instances of a model, share them.
struct PackedWeights {
    Aligned<std::int8_t> codes;
    Aligned<std::int32_t> sums;  // per padded channel
};

template <typename Make>
auto shared_weights(const std::vector<i64>& key, const Make& make) {
    using Packed = decltype(make());
    static std::mutex mutex;
    static std::map<std::vector<i64>, std::weak_ptr<const Packed>> known;
    std::lock_guard<std::mutex> lock(mutex);
    auto& entry = known[key];
    if (auto found = entry.lock()) return found;
    std::shared_ptr<const Packed> made = std::make_shared<Packed>(make());
    entry = made;
    for (auto i = known.begin(); i != known.end();) i = i->second.expired() ? known.erase(i) : std::next(i);
    return made;
}

i64 address(const void* p) { return static_cast<i64>(reinterpret_cast<std::intptr_t>(p)); }

// How a convolution's groups are computed: `merged` neighbouring groups at a time, as one group whose weights are
// zero off the diagonal, because a group of a few channels would leave most of a register tile empty.
struct Grouping {
    i64 groups, in_channels, out_channels, merged;
};

Grouping merge_groups(const Int8Kernels& kernels, i64 groups, i64 in_channels, i64 out_channels, i64 taps) {
    Grouping best{groups, in_channels, out_channels, 1};
    double best_cost = std::numeric_limits<double>::infinity();
    for (i64 merged = 1; merged <= groups; ++merged) {
        if (groups % merged != 0 || (merged > 1 && merged * out_channels > 2 * kernels.columns)) continue;
        const i64 in = merged * in_channels, quads = divide_up(taps * in, 4);
        const i64 vectors = divide_up(merged * out_channels, kernels.lanes);
        // Cycles for one row of all groups: packing, then products.
        const double cost = static_cast<double>(groups / merged) *
                            (static_cast<double>(taps) * (6 + static_cast<double>(in) / 16) +
                             0.75 * static_cast<double>(quads * std::max<i64>(vectors, 2)));
        if (cost < best_cost) {
            best_cost = cost;
            best = {groups / merged, in, merged * out_channels, merged};
        }
    }
    return best;
}

// The reduction as the kernels run through it: `runs` runs of `length` steps, each padded to whole multiplications.
struct Runs {
    i64 runs, length, quads;  // quads: of a padded run
    Runs(const Int8Kernels& kernels, i64 count, i64 steps)
        : runs(count), length(steps), quads(round_up(divide_up(steps, 4), kernels.depth)) {}
};

// [group][panel][quad][column][4]; the reduction runs over (tap, channel).
PackedWeights pack_gemm_weights(const Int8Kernels& kernels, const Weights& w, const Grouping& g, i64 taps,
                                const Runs& runs) {
    const i64 columns = kernels.columns, quads = runs.runs * runs.quads;
    const i64 panels = divide_up(g.out_channels, columns);
    const i64 own_in = g.in_channels / g.merged, own_out = g.out_channels / g.merged;
    PackedWeights packed{Aligned<std::int8_t>(g.groups * panels * quads * columns * 4),
                         Aligned<std::int32_t>(g.groups * panels * columns)};
    for (i64 group = 0; group < g.groups; ++group)
        for (i64 n = 0; n < g.out_channels; ++n) {
            const i64 panel = group * panels + n / columns, column = n % columns;
            const std::int8_t* from = w.codes + (group * g.out_channels + n) * own_in * taps;
            std::int8_t* to = packed.codes.data() + panel * quads * columns * 4 + column * 4;
            const i64 first = n / own_out * own_in;  // input channel of the merged group
            std::int32_t sum = 0;
            for (i64 c = 0; c < own_in; ++c)
                for (i64 t = 0; t < taps; ++t) {
                    const i64 step = t * g.in_channels + first + c;
                    const i64 k = step / runs.length * runs.quads * 4 + step % runs.length;
                    const std::int8_t code = from[c * taps + t];
                    to[k / 4 * columns * 4 + k % 4] = code;
                    sum += code;
                }
            packed.sums[panel * columns + column] = sum;
        }
    return packed;
}

// [16][panel][pair][column][2]: G' w G'^T with G' = 2 G = [2 0 0; 1 1 1; 1 -1 1; 0 0 2]; at most 9 * 127.
struct WinogradWeights {
    Aligned<std::int16_t> words;
    i64 panels = 0;
};

WinogradWeights pack_winograd_weights(const Int8Kernels& kernels, const Weights& w) {
    const i64 out = w.dims[0], in = w.dims[1], columns = kernels.columns, panels = divide_up(out, columns);
    WinogradWeights packed{Aligned<std::int16_t>(16 * panels * columns * in), panels};
    const auto transform = [](int a, int b, int c, int (&to)[4]) {
        to[0] = 2 * a;
        to[1] = a + b + c;
        to[2] = a - b + c;
        to[3] = 2 * c;
    };
    for (i64 n = 0; n < out; ++n)
        for (i64 k = 0; k < in; ++k) {
            const std::int8_t* g = w.codes + (n * in + k) * 9;
            int columns_of[3][4], point[4];
            for (int x = 0; x < 3; ++x) transform(g[x], g[3 + x], g[6 + x], columns_of[x]);
            for (int y = 0; y < 4; ++y) {
                transform(columns_of[0][y], columns_of[1][y], columns_of[2][y], point);
                for (int x = 0; x < 4; ++x) {
                    const i64 panel = (4 * y + x) * panels + n / columns;
                    packed.words[(panel * (in / 2) + k / 2) * columns * 2 + n % columns * 2 + k % 2] =
                        static_cast<std::int16_t>(point[x]);
                }
            }
        }
    return packed;
}

// Where channel `c` of a depthwise block lies among four vectors: see "Block" in int8_vector.hpp.
i64 block_position(const Int8Kernels& kernels, i64 c) { return c % 16 / 4 * kernels.lanes + c / 16 * 4 + c % 4; }

// The taps of a depthwise window in the order of the kernels' groups; -1: none.
std::vector<i64> plain_taps(const Int8Kernels& kernels, i64 taps) {
    std::vector<i64> order(static_cast<std::size_t>(round_up(taps, kernels.tap_group)), -1);
    for (i64 t = 0; t < taps; ++t) order[static_cast<std::size_t>(t)] = t;
    return order;
}
std::vector<i64> rolling_taps(const Int8Kernels& kernels, i64 size) {
    std::vector<i64> order;
    const i64 group = kernels.tap_group;
    for (i64 row = 0; row < size; row += group) {
        const bool is_last_alone = row + 1 == size;
        for (i64 column = 0; column < size; column += is_last_alone ? group : 1)
            for (i64 t = 0; t < group; ++t) {
                const i64 y = is_last_alone ? row : row + t, x = is_last_alone ? column + t : column;
                order.push_back(y < size && x < size ? y * size + x : -1);
            }
    }
    return order;
}

PackedWeights pack_depthwise_weights(const Int8Kernels& kernels, const Weights& w, i64 channels, i64 taps,
                                     const std::vector<i64>& order) {
    const i64 block = 4 * kernels.lanes, blocks = divide_up(channels, block), group = kernels.tap_group;
    const i64 places = static_cast<i64>(order.size()), groups = places / group;
    PackedWeights packed{Aligned<std::int8_t>(blocks * groups * block * 4), Aligned<std::int32_t>(blocks * block)};
    for (i64 c = 0; c < channels; ++c) {
        const i64 b = c / block, at = block_position(kernels, c % block);
        for (i64 place = 0; place < places; ++place) {
            const i64 tap = order[static_cast<std::size_t>(place)], t = place % group;
            if (tap < 0) continue;
            const std::int8_t code = w.codes[c * taps + tap];
            std::int8_t* to = packed.codes.data() + ((b * groups + place / group) * block + at) * 4;
            if (group == 2) {
                const std::int16_t wide = code;
                std::memcpy(to + 2 * t, &wide, 2);
            } else {
                to[t] = code;
            }
            packed.sums[b * block + at] += code;
        }
    }
    return packed;
}

// ---- checks and epilogue -----------------------------------------------------------------------------------------

void require(bool holds, const char* what) {
    if (!holds) throw Unsupported(std::string("host int8 kernel: ") + what);
}

void check_operands(const Weights& w, const Tensor& x, const Tensor* residual, const Tensor& y, const Terms& terms) {
    require(x.dtype == DType::u8 && x.q.has_value(), "x must be u8 codes");
    require(terms.products.size() <= Terms::kMost, "at most two further products");
    for (const Product& p : terms.products)
        require(p.x.dtype == DType::u8 && p.x.q && p.x.dims == x.dims && p.weights.dims == w.dims &&
                    (p.weights.scales == 1 || p.weights.scales == w.dims[0]),
                "a further product must have the shapes of the step's own");
    require(terms.rest == nullptr ||
                (terms.rest->dtype == DType::u8 && terms.rest->q && y.q && terms.rest->dims == y.dims),
            "what is left over must be u8 codes beside u8 codes");
    require((y.dtype == DType::u8 && y.q.has_value()) || (y.dtype == DType::f32 && !y.q.has_value()),
            "y must be u8 codes or f32");
    require(residual == nullptr || residual->dtype == (residual->q ? DType::u8 : DType::f32),
            "the residual must be u8 codes or f32");
    require(w.scales == 1 || w.scales == w.dims[0], "one weight scale, or one per output channel");
}

bool all_are(bool (*has_layout)(const Tensor&), const Tensor& x, const Tensor* residual, const Tensor& y,
             const Terms& terms) {
    for (const Product& p : terms.products)
        if (!has_layout(p.x)) return false;
    return has_layout(x) && has_layout(y) && (residual == nullptr || has_layout(*residual)) &&
           (terms.rest == nullptr || has_layout(*terms.rest));
}

// |q - zero_point| * |w| summed `steps` times must fit int32. Throws where it might not.
void check_reduction(i64 steps, std::int32_t zero_point, i64 largest_weight) {
    const i64 largest = std::max<i64>(zero_point, 255 - zero_point);
    const i64 limit = std::numeric_limits<std::int32_t>::max() / (largest * largest_weight);
    if (steps > limit)
        throw Error("a sum of " + std::to_string(steps) + " products of codes does not fit 32 bits; at most " +
                    std::to_string(limit) + " with zero point " + std::to_string(zero_point));
}

bool is_real(const Tensor* residual) { return residual != nullptr && !residual->q; }

// A pointer that reaches `first` at element `index`. It may lie outside what `first` belongs to.
std::int32_t* reaching(std::int32_t* first, i64 index) {
    return reinterpret_cast<std::int32_t*>(reinterpret_cast<std::uintptr_t>(first) -
                                           static_cast<std::uintptr_t>(index) * sizeof *first);
}

// Sums that a block of a step keeps of the products before its own, in the L1 cache.
constexpr i64 kSumsBytes = 32 * 1024;

// Everything but scale, bias and the addresses.
Int8Output output_of(const Tensor* residual, const Epilogue& epilogue, const Tensor& y, i64 row,
                     const Tensor* rest = nullptr) {
    Int8Output o;
    o.row = row;
    if (rest != nullptr) {
        o.step = y.q->scale;
        o.rest_inverse_scale = 1.0f / rest->q->scale;
        o.rest_zero = rest->q->zero_point;
        o.rest_low = static_cast<float>(rest->q->qmin - rest->q->zero_point);
        o.rest_high = static_cast<float>(rest->q->qmax - rest->q->zero_point);
    }
    o.is_float = !y.q.has_value();
    o.activation = static_cast<int>(epilogue.kind);
    o.a = epilogue.a;
    o.b = epilogue.b;
    if (residual != nullptr && residual->q) {
        o.residual_scale = residual->q->scale;
        o.residual_zero = residual->q->zero_point;
    }
    if (!o.is_float) {
        o.inverse_scale = 1.0f / y.q->scale;
        o.zero = y.q->zero_point;
        o.low = static_cast<float>(y.q->qmin - y.q->zero_point);
        o.high = static_cast<float>(y.q->qmax - y.q->zero_point);
        // On codes ReLU is the lower bound of the clamp; what they leave over is that of the real result.
        if (epilogue.kind == Activation::relu && o.low <= 0 && rest == nullptr) {
            o.low = std::min(0.0f, o.high);
            o.activation = kInt8None;
        }
    }
    return o;
}

// Per-channel constants at their padded positions; position(channel) gives them.
struct ChannelConstants {
    Aligned<float> scale, bias, code_scale, code_bias, code_scale_before[kMostBefore];
    Aligned<std::int32_t> start;
    template <typename Position>
    ChannelConstants(const Weights& w, const QParams& x, const Aligned<std::int32_t>& sums, bool is_centered,
                     const Position& position)
        : scale(sums.size()), bias(sums.size()), start(sums.size()) {
        for (i64 c = 0; c < w.dims[0]; ++c) {
            const i64 at = position(c);
            scale[at] = w.scale[w.scales == 1 ? 0 : c] * x.scale;
            if (w.bias != nullptr) bias[at] = w.bias[c];
        }
        if (!is_centered)
            for (i64 i = 0; i < sums.size(); ++i)
                start[i] = static_cast<std::int32_t>(0u - static_cast<std::uint32_t>(x.zero_point) *
                                                              static_cast<std::uint32_t>(sums[i]));
    }

    // Has `o` read them, and those of the products before; `steps`: of the reduction. `needs_reals`: something is added
    // to, or made of, the result in f32.
    void bind(Int8Output& o, i64 steps, const QParams& x, const std::optional<QParams>& y, bool needs_reals,
              const std::vector<const ChannelConstants*>& before) {
        o.scale = scale.data();
        o.bias = bias.data();
        o.befores = static_cast<int>(before.size());
        for (std::size_t b = 0; b < before.size(); ++b) {
            o.before[b].scale = before[b]->scale.data();
            o.before[b].bias = before[b]->bias.data();
        }
        const bool clamps = o.activation == kInt8None || o.activation == kInt8Hardtanh;
        if (o.is_float || !clamps || needs_reals) return;
        code_scale = Aligned<float>(scale.size());
        code_bias = Aligned<float>(scale.size());
        const double y_scale = y->scale, residual_step = o.residual_scale / y_scale;
        // Of any zero point's, since products before may have others.
        const double largest = (before.empty() ? std::max(x.zero_point, 255 - x.zero_point) : 255) * 127.0 * steps;
        bool fits = true;  // beyond that rounding to an integer would overflow; false for NaN
        for (std::size_t b = 0; b < before.size(); ++b) code_scale_before[b] = Aligned<float>(scale.size());
        for (i64 i = 0; i < scale.size(); ++i) {
            code_scale[i] = static_cast<float>(scale[i] / y_scale);
            double all_bias = bias[i], reach = largest * code_scale[i];
            for (std::size_t b = 0; b < before.size(); ++b) {
                code_scale_before[b][i] = static_cast<float>(before[b]->scale[i] / y_scale);
                all_bias += before[b]->bias[i];
                reach += largest * code_scale_before[b][i];
            }
            code_bias[i] = static_cast<float>(all_bias / y_scale);
            fits = fits && reach + std::fabs(code_bias[i]) + 255 * residual_step < 1 << 30;
        }
        if (!fits) return;
        const auto code = [&](float bound) {
            const float steps_from_zero = std::nearbyint(bound / y->scale);
            return static_cast<u8>(std::min(std::max(steps_from_zero, o.low), o.high) + static_cast<float>(o.zero));
        };
        const bool is_hardtanh = o.activation == kInt8Hardtanh;
        o.low_code = is_hardtanh ? code(o.a) : static_cast<u8>(o.low + static_cast<float>(o.zero));
        o.high_code = is_hardtanh ? code(o.b) : static_cast<u8>(o.high + static_cast<float>(o.zero));
        o.code_scale = code_scale.data();
        o.code_bias = code_bias.data();
        o.residual_step = static_cast<float>(residual_step);
        for (std::size_t b = 0; b < before.size(); ++b) o.before[b].code_scale = code_scale_before[b].data();
        o.is_linear = true;
    }
};

// ---- cutting the work --------------------------------------------------------------------------------------------

// Tasks of `rows` rows and `panels` panels. A thread works on neighbouring tasks: on the same rows, where these are the
// larger part of what it touches (the next step finds them in its cache), else on the same panels.
struct Tasks {
    i64 rows = 1, panels = 1, row_tasks = 1, panel_tasks = 1;
    bool shares_rows = false;
};

// Quads summed at a time: the panel's and the tile's operands then share the L1 cache.
i64 chunk_of(const Int8Kernels& kernels, i64 quads) {
    const i64 most = 20 * 1024 / (4 * (kernels.columns + 2 * kernels.rows));
    return std::max<i64>(kernels.depth, round_up(divide_up(quads, std::max<i64>(1, divide_up(quads, most))), kernels.depth));
}

// Cycles that spreading a step over threads costs.
constexpr double kHandOver = 6000;

// Weighs packing and fetching, which small tasks repeat, against idle threads at the end, which large ones cause.
Tasks cut(const Int8Kernels& kernels, const Int8Gemm& g, i64 groups, i64 rows, int threads) {
    const bool has_tiles = kernels.depth > 1, by_lines = g.is_windowed || g.is_direct;
    const double cycles_per_tile_row = has_tiles ? 0.16 : kernels.is_exact ? 1.6 : 2.4;  // of one quad and panel
    const double tile_cost = has_tiles ? 8 : 1;                                        // in rows: its weights are loaded
    const i64 cache = (has_tiles || by_lines ? 512 : 128) * 1024;
    const double quads = static_cast<double>(g.quads), columns = kernels.columns;
    // Windows are cut at the ends of lines.
    const i64 unit = g.is_windowed ? std::max<i64>(g.out[2], 1) : kernels.rows, units = divide_up(rows, unit);
    const i64 line_bytes = (g.out[2] * g.stride[2] + g.reach[2]) * g.pixel;
    Tasks best;
    double best_cost = std::numeric_limits<double>::infinity();
    for (i64 row_tasks = 1; row_tasks <= units; row_tasks += 1 + row_tasks / 8) {
        const i64 task_rows = std::min(rows, unit * divide_up(units, row_tasks));
        const i64 lines = task_rows / unit * g.stride[1] + g.reach[1] + 1;
        const i64 row_bytes = g.is_windowed ? lines * line_bytes : task_rows * (g.is_direct ? g.quads : g.chunk) * 4;
        if (task_rows > unit && row_bytes > cache) continue;
        for (i64 panel_tasks = 1; panel_tasks <= g.panels; panel_tasks += 1 + panel_tasks / 8) {
            const i64 task_panels = divide_up(g.panels, panel_tasks);
            const i64 sums_bytes = task_rows * task_panels * kernels.columns * 4;
            if (!by_lines && g.chunk < g.quads && task_panels > 1 && sums_bytes > cache) continue;
            const double r = static_cast<double>(task_rows), p = static_cast<double>(task_panels);
            const double tile_rows = static_cast<double>(divide_up(task_rows, kernels.rows)) * tile_cost + r;
            const double products = tile_rows * p * quads * cycles_per_tile_row;
            const double fetching = p * quads * columns * 4 / 16;
            const double finishing = r * p * columns * 0.5;
            // Every panel passes over the task's rows of x and y, which lie in the L1 cache or beyond.
            const double x_bytes = static_cast<double>(row_bytes) / r, y_bytes = g.output.residual_scale != 0 ? 128 : 64;
            const double passing = r * (x_bytes + y_bytes) <= 32 * 1024 ? 0 : r * p * (x_bytes + y_bytes) / 24;
            double packing = 0;
            if (g.is_windowed)
                packing = g.reads_in_place ? 0 : static_cast<double>(lines) * (static_cast<double>(line_bytes) / 16 + 40);
            else if (!g.is_direct)
                packing = r * (4 * quads * 0.06 + 5 * static_cast<double>(g.runs));
            const double task = products + fetching + finishing + passing + packing + 400;
            const i64 tasks = divide_up(rows, task_rows) * divide_up(g.panels, task_panels) * groups;
            double cost = task * static_cast<double>(divide_up(tasks, threads));
            if (threads > 1 && tasks > 1) cost += 0.3 * task + kHandOver;
            if (cost < best_cost) {
                best_cost = cost;
                best = {task_rows, task_panels, divide_up(rows, task_rows), divide_up(g.panels, task_panels)};
            }
        }
    }
    best.shares_rows = rows * (g.in_channels + g.channels) > g.channels * g.quads * 4;
    return best;
}

// The part of a step that a task is.
struct Part {
    i64 group, row, rows, panel, panels;
    Part(const Int8Gemm& g, const Tasks& tasks, i64 all_rows, i64 task) {
        const i64 rest = task % (tasks.row_tasks * tasks.panel_tasks);
        group = task / (tasks.row_tasks * tasks.panel_tasks);
        row = (tasks.shares_rows ? rest / tasks.panel_tasks : rest % tasks.row_tasks) * tasks.rows;
        panel = (tasks.shares_rows ? rest % tasks.panel_tasks : rest / tasks.row_tasks) * tasks.panels;
        rows = std::min(tasks.rows, all_rows - row);
        panels = std::min(tasks.panels, g.panels - panel);
    }
};

void run_part(const Int8Kernels& kernels, const Int8Gemm& g, const Part& part) {
    kernels.gemm(g, part.group, part.row, part.rows, part.panel, part.panels,
                 thread_scratch(kernels.gemm_scratch(g, part.rows, part.panels)));
}

// ---- steps -------------------------------------------------------------------------------------------------------

// Where the taps of a convolution lie in x, from the window's first: dilation * tap - padding.
struct TapTable {
    std::vector<std::int32_t> z, y, x;
};

// A convolution with spatial dimensions padded to three.
struct Shape3 {
    i64 in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
    i64 stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0}, dilation[3] = {1, 1, 1};
    i64 taps() const { return kernel[0] * kernel[1] * kernel[2]; }
    i64 pixels() const { return out[0] * out[1] * out[2]; }
    bool is_pointwise() const {
        bool all = true;
        for (int i = 0; i < 3; ++i) all = all && kernel[i] == 1 && stride[i] == 1 && padding[i] == 0 && out[i] == in[i];
        return all;
    }
    // One entry per tap, or per kernel row.
    TapTable table(bool of_rows) const {
        TapTable t;
        for (i64 z = 0; z < kernel[0]; ++z)
            for (i64 y = 0; y < kernel[1]; ++y)
                for (i64 x = 0; x < (of_rows ? 1 : kernel[2]); ++x) {
                    t.z.push_back(static_cast<std::int32_t>(z * dilation[0] - padding[0]));
                    t.y.push_back(static_cast<std::int32_t>(y * dilation[1] - padding[1]));
                    t.x.push_back(static_cast<std::int32_t>(x * dilation[2] - padding[2]));
                }
        return t;
    }
};

Shape3 shape_of(const Weights& w, const ConvGeometry& geometry, const Tensor& x, const Tensor& y) {
    Shape3 s;
    const int spatial = x.rank() - 2;
    for (int i = 0; i < spatial; ++i) {
        const int to = 3 - spatial + i;
        s.in[to] = x.dims[i + 2];
        s.out[to] = y.dims[i + 2];
        s.kernel[to] = w.dims[i + 2];
        s.stride[to] = geometry.stride[i];
        s.padding[to] = geometry.padding[i];
        s.dilation[to] = geometry.dilation[i];
    }
    return s;
}

void bind_output(Int8Output& o, const std::optional<Tensor>& residual, const Tensor& y,
                 const std::optional<Tensor>& rest = std::nullopt) {
    o.y = y.place.get();
    if (rest) o.rest = rest->data<u8>();
    if (!residual) return;
    if (residual->q)
        o.residual = residual->data<const u8>();
    else
        o.real_residual = residual->data<const float>();
}

class GemmStep final : public Step {
public:
    GemmStep(ThreadPool& pool, const Weights& w, const Grouping& grouping, const Shape3& shape, const Tensor& x,
             const Tensor* residual, const Epilogue& epilogue, const Tensor& y, i64 rows, const Terms& terms)
        : pool_(pool), kernels_(*int8_kernels_in_use()), x_(x), y_(y), rows_(rows), groups_(grouping.groups) {
        for (const Product& p : terms.products)
            before_.push_back(std::make_unique<GemmStep>(pool, p.weights, grouping, shape, p.x, nullptr, Epilogue{}, y,
                                                         rows, Terms{}));
        if (residual != nullptr) residual_ = *residual;
        if (terms.rest != nullptr) rest_ = *terms.rest;
        const i64 taps = shape.taps(), steps = taps * grouping.in_channels;
        const i64 columns = kernels_.columns, panels = divide_up(grouping.out_channels, columns);
        gemm_.zero = x.q->zero_point;
        gemm_.pixel = grouping.groups * grouping.in_channels;
        gemm_.in_channels = grouping.in_channels;
        gemm_.is_pointwise = shape.is_pointwise();
        // Rows a multiple of 2 KiB apart would compete for the same few sets of the L1 cache.
        gemm_.is_direct = kernels_.is_exact && gemm_.is_pointwise && steps % (4 * kernels_.depth) == 0 &&
                          gemm_.pixel % 2048 != 0;
        gemm_.is_row_run = grouping.groups == 1 && shape.dilation[2] == 1;
        taps_ = shape.table(gemm_.is_row_run);
        gemm_.runs = static_cast<i64>(taps_.z.size());
        gemm_.run_length = gemm_.is_row_run ? shape.kernel[2] * grouping.in_channels : grouping.in_channels;
        gemm_.run_z = taps_.z.data();
        gemm_.run_y = taps_.y.data();
        gemm_.run_x = taps_.x.data();
        for (int i = 0; i < 3; ++i) {
            gemm_.in[i] = shape.in[i];
            gemm_.out[i] = shape.out[i];
            gemm_.stride[i] = shape.stride[i];
            gemm_.padding[i] = shape.padding[i];
            gemm_.reach[i] = (shape.kernel[i] - 1) * shape.dilation[i];
            gemm_.inside_from[i] = shape.padding[i];
            gemm_.inside_to[i] = shape.in[i] + shape.padding[i] - gemm_.reach[i];
        }
        const Runs run(kernels_, gemm_.runs, gemm_.run_length);
        gemm_.is_windowed = suits_windows(grouping, shape, run);
        gemm_.reads_in_place = gemm_.is_windowed && 4 * run.quads == run.length;
        for (int i = 1; i < 3; ++i)
            gemm_.reads_in_place = gemm_.reads_in_place && shape.padding[i] == 0 &&
                                   (shape.out[i] - 1) * shape.stride[i] + gemm_.reach[i] < shape.in[i];
        for (i64 i = 0; i < gemm_.runs; ++i) {
            const std::size_t r = static_cast<std::size_t>(i);
            run_offset_.push_back(((taps_.z[r] * shape.in[1] + taps_.y[r]) * shape.in[2] + taps_.x[r]) * gemm_.pixel);
            window_offset_.push_back((taps_.y[r] + shape.padding[1]) * kernels_.line_bytes(gemm_) +
                                     (taps_.x[r] + shape.padding[2]) * gemm_.pixel);
        }
        gemm_.run_offset = run_offset_.data();
        gemm_.window_offset = window_offset_.data();
        const Runs runs = gemm_.is_windowed ? run : Runs(kernels_, 1, steps);
        std::vector<i64> key{address(w.codes), address(&kernels_), grouping.merged, taps, gemm_.is_windowed};
        key.insert(key.end(), w.dims.begin(), w.dims.end());
        weights_ = shared_weights(key, [&] { return pack_gemm_weights(kernels_, w, grouping, taps, runs); });
        constants_ = std::make_unique<ChannelConstants>(
            w, *x.q, weights_->sums, !kernels_.is_exact, [&](i64 c) {
                return c / grouping.out_channels * panels * columns + c % grouping.out_channels;
            });
        gemm_.weights = weights_->codes.data();
        gemm_.start = constants_->start.data();
        gemm_.channels = grouping.out_channels;
        gemm_.panels = panels;
        gemm_.quads = runs.runs * runs.quads;
        gemm_.chunk = chunk_of(kernels_, gemm_.quads);
        gemm_.output = output_of(residual, epilogue, y, grouping.groups * grouping.out_channels, terms.rest);
        std::vector<const ChannelConstants*> before;
        for (const auto& step : before_) before.push_back(step->constants_.get());
        constants_->bind(gemm_.output, taps * w.dims[1], *x.q, y.q, is_real(residual) || rest_, before);
        tasks_ = cut(kernels_, gemm_, groups_, rows_, pool.size());
    }

    void run() override {
        if (y_.count() == 0) return;
        bind();
        pool_.run(tasks_.row_tasks * tasks_.panel_tasks * groups_, [this](i64 task) {
            const Part part(gemm_, tasks_, rows_, task);
            before_.empty() ? run_part(kernels_, gemm_, part) : run_products(part);
        });
    }

    std::string kernel() const override { return tile_name(kernels_, "igemm"); }

private:
    // Windows read from lines of x save the copying of rows, which repeats every pixel once per tap. What they cost is
    // the padding of runs.
    bool suits_windows(const Grouping& grouping, const Shape3& shape, const Runs& run) const {
        const double padding = static_cast<double>(4 * run.quads) / static_cast<double>(std::max<i64>(run.length, 1));
        return kernels_.is_exact && grouping.groups == 1 && !gemm_.is_pointwise && shape.in[0] == 1 &&
               shape.out[0] == 1 && shape.kernel[0] == 1 && run.length > 0 && (kernels_.depth > 1 || padding < 1.4) &&
               (shape.kernel[1] > 1 || shape.kernel[2] > 1 || padding == 1);
    }

    void bind() {
        for (const auto& step : before_) step->bind();
        gemm_.x = x_.data<const u8>();
        gemm_.x_end = gemm_.x + x_.count();
        bind_output(gemm_.output, residual_, y_, rest_);
    }

    // A block of rows through all products before the next one.
    void run_products(Part part) const {
        const i64 width = part.panels * kernels_.columns, unit = gemm_.is_windowed ? gemm_.out[2] : kernels_.rows;
        const i64 block = unit * std::max<i64>(1, kSumsBytes / (4 * width * unit)), end = part.row + part.rows;
        const i64 sums_bytes = round_up(4 * width * std::min(block, part.rows), 64);
        i64 scratch_bytes = 0;
        for (part.rows = std::min(block, part.rows); part.row < end; part.row += part.rows) {
            part.rows = std::min(block, end - part.row);
            if (scratch_bytes == 0) scratch_bytes = kernels_.gemm_scratch(gemm_, part.rows, part.panels);
            u8* scratch = thread_scratch(static_cast<i64>(before_.size()) * sums_bytes + scratch_bytes);
            u8* own = scratch + static_cast<i64>(before_.size()) * sums_bytes;
            const i64 first = part.row * width + (part.group * gemm_.panels + part.panel) * kernels_.columns;
            const auto run = [&](const Int8Gemm& g) {
                kernels_.gemm(g, part.group, part.row, part.rows, part.panel, part.panels, own);
            };
            Int8Gemm last = gemm_;
            last.output.sums_row = width;
            for (std::size_t i = 0; i < before_.size(); ++i) {
                Int8Gemm g = before_[i]->gemm_;
                auto* sums = reinterpret_cast<std::int32_t*>(scratch + static_cast<i64>(i) * sums_bytes);
                g.output.raw_sums = reaching(sums, first);
                g.output.sums_row = width;
                last.output.before[i].sums = g.output.raw_sums;
                run(g);
            }
            run(last);
        }
    }

    ThreadPool& pool_;
    const Int8Kernels& kernels_;
    Tensor x_, y_;
    std::optional<Tensor> residual_, rest_;
    std::vector<std::unique_ptr<GemmStep>> before_;  // products that come before this one
    i64 rows_, groups_;
    std::shared_ptr<const PackedWeights> weights_;
    std::unique_ptr<ChannelConstants> constants_;
    TapTable taps_;
    std::vector<i64> run_offset_, window_offset_;
    Int8Gemm gemm_;
    Tasks tasks_;
};

class DepthwiseStep final : public Step {
    static bool suits_rolling(const Int8Kernels& kernels, const Shape3& s) {
        const bool is_flat = s.in[0] == 1 && s.out[0] == 1 && s.kernel[0] == 1;
        return kernels.rolling != nullptr && is_flat && s.kernel[1] == s.kernel[2] &&
               (s.kernel[1] == 3 || s.kernel[1] == 5) && s.dilation[2] == 1 && s.stride[2] <= 2;
    }

public:
    DepthwiseStep(ThreadPool& pool, const Weights& w, const Shape3& shape, const Tensor& x, const Tensor* residual,
                  const Epilogue& epilogue, const Tensor& y, const Terms& terms)
        : pool_(pool), kernels_(*int8_kernels_in_use()), x_(x), y_(y) {
        for (const Product& p : terms.products)
            before_.push_back(
                std::make_unique<DepthwiseStep>(pool, p.weights, shape, p.x, nullptr, Epilogue{}, y, Terms{}));
        if (residual != nullptr) residual_ = *residual;
        if (terms.rest != nullptr) rest_ = *terms.rest;
        const i64 channels = w.dims[0], taps = shape.taps(), block = 4 * kernels_.lanes;
        rolls_ = suits_rolling(kernels_, shape);
        std::vector<i64> key{address(w.codes), address(&kernels_), -1, channels, taps, rolls_};
        weights_ = shared_weights(key, [&] {
            const auto order = rolls_ ? rolling_taps(kernels_, shape.kernel[1]) : plain_taps(kernels_, taps);
            return pack_depthwise_weights(kernels_, w, channels, taps, order);
        });
        constants_ = std::make_unique<ChannelConstants>(w, *x.q, weights_->sums, false, [&](i64 c) {
            return c / block * block + block_position(kernels_, c % block);
        });
        taps_ = shape.table(false);
        job_.channels = channels;
        job_.blocks = divide_up(channels, block);
        for (int i = 0; i < 3; ++i) {
            job_.in[i] = shape.in[i];
            job_.out[i] = shape.out[i];
            job_.stride[i] = shape.stride[i];
        }
        // As long as a line, so that lines at the edge are no special case; very long lines are, but where windows roll.
        const i64 line_bytes = rolls_ ? shape.in[2] * channels
                                      : std::min<i64>(shape.out[2] * shape.stride[2] * channels, 64 * 1024);
        outside_ = Aligned<u8>(job_.blocks * block + line_bytes);
        std::memset(outside_.data(), x.q->zero_point, static_cast<std::size_t>(outside_.size()));
        job_.outside = outside_.data();
        job_.outside_bytes = outside_.size();
        const i64 reach = (shape.kernel[2] - 1) * shape.dilation[2] - shape.padding[2];
        job_.inner_begin = std::min(shape.out[2], divide_up(shape.padding[2], shape.stride[2]));
        job_.inner_end = shape.in[2] > reach ? (shape.in[2] - 1 - reach) / shape.stride[2] + 1 : 0;
        job_.inner_end = std::clamp(job_.inner_end, job_.inner_begin, shape.out[2]);
        job_.real_taps = taps;
        job_.taps = round_up(taps, kernels_.tap_group);
        job_.tap_z = taps_.z.data();
        job_.tap_y = taps_.y.data();
        job_.tap_x = taps_.x.data();
        job_.weights = reinterpret_cast<const u8*>(weights_->codes.data());
        job_.start = constants_->start.data();
        job_.output = output_of(residual, epilogue, y, channels, terms.rest);
        std::vector<const ChannelConstants*> before;
        for (const auto& step : before_) before.push_back(step->constants_.get());
        constants_->bind(job_.output, taps, *x.q, y.q, is_real(residual) || rest_, before);
        lines_ = y.dims[0] * shape.out[0] * shape.out[1];
        // Lines first: tasks that share a line both compute its taps' addresses.
        const double cycles = static_cast<double>(lines_ * shape.out[2] * job_.blocks * (3 * taps + 20));
        const i64 wanted = pool.size() == 1 || cycles < 3 * kHandOver ? 1 : 6 * pool.size();
        task_lines_ = std::max<i64>(1, lines_ / wanted);
        const i64 line_tasks = divide_up(lines_, task_lines_);
        task_blocks_ = line_tasks == 0 ? 1 : std::max<i64>(1, divide_up(job_.blocks * line_tasks, wanted));
        task_blocks_ = std::min(task_blocks_, job_.blocks);
    }

    void run() override {
        if (y_.count() == 0) return;
        bind();
        const i64 line_tasks = divide_up(lines_, task_lines_), block_tasks = divide_up(job_.blocks, task_blocks_);
        const i64 scratch = rolls_ ? kernels_.rolling_scratch(job_) : kernels_.depthwise_scratch(job_);
        const auto kernel = rolls_ ? kernels_.rolling : kernels_.depthwise;
        pool_.run(line_tasks * block_tasks, [&](i64 task) {
            const i64 line = task / block_tasks * task_lines_, block = task % block_tasks * task_blocks_;
            const i64 lines = std::min(task_lines_, lines_ - line), blocks = std::min(task_blocks_, job_.blocks - block);
            if (before_.empty()) return kernel(job_, line, lines, block, blocks, thread_scratch(scratch));
            // A line through all products before the next one.
            const i64 line_sums = job_.out[2] * job_.blocks * 4 * kernels_.lanes, befores = i64(before_.size());
            u8* sums = thread_scratch(befores * 4 * line_sums + scratch);
            for (i64 l = line; l < line + lines; ++l) {
                Int8Depthwise last = job_;
                for (i64 i = 0; i <= befores; ++i) {
                    Int8Depthwise job = i < befores ? before_[static_cast<std::size_t>(i)]->job_ : last;
                    if (i < befores) {
                        auto* kept = reinterpret_cast<std::int32_t*>(sums) + i * line_sums;
                        last.output.before[i].sums = job.output.raw_sums = reaching(kept, l * line_sums);
                    }
                    kernel(job, l, 1, block, blocks, sums + befores * 4 * line_sums);
                }
            }
        });
    }

    std::string kernel() const override { return std::string("host.depthwise.") + kernels_.name; }

private:
    void bind() {
        for (const auto& step : before_) step->bind();
        job_.x = x_.data<const u8>();
        job_.x_end = job_.x + x_.count();
        bind_output(job_.output, residual_, y_, rest_);
    }

    ThreadPool& pool_;
    const Int8Kernels& kernels_;
    Tensor x_, y_;
    std::optional<Tensor> residual_, rest_;
    std::vector<std::unique_ptr<DepthwiseStep>> before_;  // products that come before this one
    std::shared_ptr<const PackedWeights> weights_;
    std::unique_ptr<ChannelConstants> constants_;
    TapTable taps_;
    Aligned<u8> outside_;
    Int8Depthwise job_;
    bool rolls_ = false;
    i64 lines_ = 0, task_lines_ = 1, task_blocks_ = 1;
};

bool suits_winograd(const Int8Kernels& kernels, const Weights& w, const ConvGeometry& geometry, const Shape3& s,
                    const Tensor& x, const Tensor& y) {
    if (kernels.winograd == nullptr || geometry.groups != 1 || x.rank() != 4) return false;
    for (int i = 1; i < 3; ++i)
        if (s.kernel[i] != 3 || s.stride[i] != 1 || s.dilation[i] != 1) return false;
    const i64 in = w.dims[1], out = w.dims[0];
    if (in % 16 != 0 || in < 32 || out < 24) return false;
    // Four times the sum must fit.
    const i64 largest = std::max<i64>(x.q->zero_point, 255 - x.q->zero_point) * 127;
    if (4 * 9 * in > std::numeric_limits<std::int32_t>::max() / largest) return false;
    // Its weights take 3.6 times the memory: few pixels do not pay for fetching them.
    const i64 tiles = y.dims[0] * divide_up(s.out[1], 2) * divide_up(s.out[2], 2);
    return tiles >= 24 && 4 * tiles <= y.dims[0] * s.pixels() * 5 / 4;
}

class WinogradStep final : public Step {
public:
    WinogradStep(ThreadPool& pool, const Weights& w, const Shape3& shape, const Tensor& x, const Tensor* residual,
                 const Epilogue& epilogue, const Tensor& y, const Tensor* rest)
        : pool_(pool), kernels_(*int8_kernels_in_use()), x_(x), y_(y) {
        if (residual != nullptr) residual_ = *residual;
        if (rest != nullptr) rest_ = *rest;
        const std::vector<i64> key{address(w.codes), address(&kernels_), w.dims[0], w.dims[1]};
        weights_ = shared_weights(key, [&] { return pack_winograd_weights(kernels_, w); });
        constants_ = std::make_unique<ChannelConstants>(
            w, *x.q, Aligned<std::int32_t>(weights_->panels * kernels_.columns), true, [](i64 c) { return c; });
        outside_ = Aligned<u8>(w.dims[1]);
        std::memset(outside_.data(), x.q->zero_point, static_cast<std::size_t>(outside_.size()));
        job_.outside = outside_.data();
        job_.zero = x.q->zero_point;
        job_.in_channels = w.dims[1];
        for (int i = 0; i < 2; ++i) {
            job_.in[i] = shape.in[i + 1];
            job_.out[i] = shape.out[i + 1];
            job_.padding[i] = shape.padding[i + 1];
            job_.tiles[i] = divide_up(shape.out[i + 1], 2);
        }
        job_.weights = weights_->words.data();
        job_.channels = w.dims[0];
        job_.panels = weights_->panels;
        job_.output = output_of(residual, epilogue, y, w.dims[0], rest);
        job_.output.scale = constants_->scale.data();
        job_.output.bias = constants_->bias.data();

        tiles_ = y.dims[0] * job_.tiles[0] * job_.tiles[1];
        // Transformed pixels and sums of a task share the L2 cache.
        const i64 most = std::max<i64>(2 * kernels_.rows, 320 * 1024 / (32 * job_.in_channels + 2048));
        tile_tasks_ = divide_up(tiles_, most);
        const i64 wanted = pool.size() == 1 ? 1 : 4 * pool.size();
        task_panels_ = round_up(divide_up(job_.panels * tile_tasks_, std::max(wanted, tile_tasks_)), 2);
        panel_tasks_ = divide_up(job_.panels, task_panels_);
    }

    void run() override {
        if (y_.count() == 0) return;
        job_.x = x_.data<const u8>();
        bind_output(job_.output, residual_, y_, rest_);
        pool_.run(tile_tasks_ * panel_tasks_, [this](i64 task) {
            const i64 part = task % tile_tasks_, panel = task / tile_tasks_ * task_panels_;
            const i64 tile = tiles_ * part / tile_tasks_, tiles = tiles_ * (part + 1) / tile_tasks_ - tile;
            kernels_.winograd(job_, tile, tiles, panel, std::min(task_panels_, job_.panels - panel),
                              thread_scratch(kernels_.winograd_scratch(job_, tiles)));
        });
    }

    std::string kernel() const override { return tile_name(kernels_, "winograd"); }

private:
    ThreadPool& pool_;
    const Int8Kernels& kernels_;
    Tensor x_, y_;
    std::optional<Tensor> residual_, rest_;
    std::shared_ptr<const WinogradWeights> weights_;
    std::unique_ptr<ChannelConstants> constants_;
    Aligned<u8> outside_;
    Int8Winograd job_;
    i64 tiles_ = 0, tile_tasks_ = 1, task_panels_ = 1, panel_tasks_ = 1;
};

// b's codes become weights b - 128 when the step runs. With A = a - zero_a:
// sum A * (b - zero_b) = sum A * (b - 128) + (128 - zero_b) * sum A, and the last term is one number per row.
class MatmulStep final : public Step {
public:
    MatmulStep(ThreadPool& pool, const Tensor& a, const Tensor& b, float alpha, const Tensor& y)
        : pool_(pool), kernels_(*int8_kernels_in_use()), a_(a), b_(b), y_(y) {
        const int rank = a.rank();
        rows_ = a.dims[rank - 2];
        steps_ = a.dims[rank - 1];
        columns_ = b.dims[rank - 1];
        for (int i = 0; i < rank - 2; ++i) batches_ *= y.dims[i];
        const i64 largest_b = std::max<i64>(b.q->zero_point, 255 - b.q->zero_point);
        check_reduction(steps_, a.q->zero_point, largest_b);

        gemm_.zero = a.q->zero_point;
        gemm_.in_channels = gemm_.run_length = steps_;
        gemm_.is_pointwise = true;
        copies_a_ = steps_ > 1 && a.strides[rank - 1] != 1;
        gemm_.pixel = copies_a_ ? steps_ : a.strides[rank - 2];
        gemm_.is_direct = kernels_.is_exact && steps_ % (4 * kernels_.depth) == 0 && gemm_.pixel % 2048 != 0;
        gemm_.channels = columns_;
        gemm_.panels = divide_up(columns_, kernels_.columns);
        gemm_.quads = Runs(kernels_, 1, steps_).quads;
        gemm_.chunk = chunk_of(kernels_, gemm_.quads);
        gemm_.output = output_of(nullptr, Epilogue{}, y, columns_);
        const i64 padded = gemm_.panels * kernels_.columns;
        scale_ = Aligned<float>(padded);
        bias_ = Aligned<float>(padded);
        const double scale = static_cast<double>(a.q->scale) * b.q->scale * alpha;
        std::fill_n(scale_.data(), padded, static_cast<float>(scale));
        gemm_.output.scale = scale_.data();
        gemm_.output.bias = bias_.data();

        panel_bytes_ = gemm_.quads * kernels_.columns * 4;
        packed_b_ = Aligned<std::int8_t>(batches_ * gemm_.panels * panel_bytes_);
        start_ = Aligned<std::int32_t>(batches_ * padded);
        corrects_rows_ = b.q->zero_point != 128;
        if (corrects_rows_) row_start_ = Aligned<std::int32_t>(batches_ * rows_);
        if (copies_a_) dense_a_ = Aligned<u8>(batches_ * rows_ * steps_);
        tasks_ = cut(kernels_, gemm_, batches_, rows_, pool.size());
    }

    void run() override {
        if (y_.count() == 0) return;
        const i64 panels = gemm_.panels;
        pool_.run(batches_ * (panels + 1), [&](i64 task) {
            const i64 batch = task / (panels + 1), panel = task % (panels + 1);
            if (panel < panels)
                pack_panel(batch, panel);
            else if (corrects_rows_ || copies_a_)
                prepare_rows(batch);
        });
        const i64 per_batch = tasks_.row_tasks * tasks_.panel_tasks;
        pool_.run(batches_ * per_batch, [&](i64 task) {
            const i64 batch = task / per_batch;
            Int8Gemm g = gemm_;
            g.x = rows_of(batch);
            g.x_end = g.x + (rows_ - 1) * g.pixel + steps_;
            g.weights = packed_b_.data() + batch * panels * panel_bytes_;
            g.start = start_.data() + batch * panels * kernels_.columns;
            if (corrects_rows_) g.row_start = row_start_.data() + batch * rows_;
            const i64 offset = batch * rows_ * columns_;
            g.output.y = g.output.is_float ? static_cast<void*>(y_.data<float>() + offset) : y_.data<u8>() + offset;
            run_part(kernels_, g, Part(g, tasks_, rows_, task % per_batch));
        });
    }

    std::string kernel() const override { return tile_name(kernels_, "matmul"); }

private:
    const u8* batch_of(const Tensor& t, i64 batch) const {
        i64 offset = 0;
        for (int i = t.rank() - 3; i >= 0; --i) {
            offset += batch % y_.dims[i] * t.strides[i];
            batch /= y_.dims[i];
        }
        return t.data<const u8>() + offset;
    }
    const u8* rows_of(i64 batch) const {
        return copies_a_ ? dense_a_.data() + batch * rows_ * steps_ : batch_of(a_, batch);
    }

    void pack_panel(i64 batch, i64 panel) {
        const int rank = b_.rank();
        const i64 k_stride = b_.strides[rank - 2], n_stride = b_.strides[rank - 1], width = kernels_.columns;
        const i64 first = panel * width, count = std::min(width, columns_ - first);
        const u8* from = batch_of(b_, batch) + first * n_stride;
        std::int8_t* to = packed_b_.data() + (batch * gemm_.panels + panel) * panel_bytes_;
        std::int32_t* start = start_.data() + (batch * gemm_.panels + panel) * width;
        std::vector<std::int32_t> sums(static_cast<std::size_t>(width), 0);
        const auto put = [&](i64 k, i64 n) {
            const int code = from[k * k_stride + n * n_stride] - 128;
            to[k / 4 * width * 4 + n * 4 + k % 4] = static_cast<std::int8_t>(code);
            sums[static_cast<std::size_t>(n)] += code;
        };
        // The inner loop follows the memory.
        if (k_stride < n_stride) {
            for (i64 n = 0; n < count; ++n)
                for (i64 k = 0; k < steps_; ++k) put(k, n);
        } else {
            for (i64 k = 0; k < steps_; ++k)
                for (i64 n = 0; n < count; ++n) put(k, n);
        }
        for (i64 n = 0; n < count; ++n)
            start[n] = kernels_.is_exact ? static_cast<std::int32_t>(0u - static_cast<std::uint32_t>(gemm_.zero) *
                                                                              static_cast<std::uint32_t>(sums[n]))
                                         : 0;
    }

    void prepare_rows(i64 batch) {
        const int rank = a_.rank();
        const i64 m_stride = a_.strides[rank - 2], k_stride = a_.strides[rank - 1];
        const u8* from = batch_of(a_, batch);
        for (i64 m = 0; m < rows_; ++m) {
            i64 sum = 0;
            for (i64 k = 0; k < steps_; ++k) {
                const u8 code = from[m * m_stride + k * k_stride];
                sum += code;
                if (copies_a_) dense_a_[(batch * rows_ + m) * steps_ + k] = code;
            }
            if (corrects_rows_)
                row_start_[batch * rows_ + m] =
                    static_cast<std::int32_t>((128 - b_.q->zero_point) * (sum - steps_ * gemm_.zero));
        }
    }

    ThreadPool& pool_;
    const Int8Kernels& kernels_;
    Tensor a_, b_, y_;
    i64 rows_ = 0, steps_ = 0, columns_ = 0, batches_ = 1, panel_bytes_ = 0;
    bool copies_a_ = false, corrects_rows_ = false;
    Aligned<float> scale_, bias_;
    Aligned<std::int8_t> packed_b_;
    Aligned<std::int32_t> start_, row_start_;
    Aligned<u8> dense_a_;
    Int8Gemm gemm_;
    Tasks tasks_;
};

}  // namespace

const Int8Kernels*& int8_kernels_in_use() {
    static const Int8Kernels* kernels = best_kernels();
    return kernels;
}

StepPtr make_linear(ThreadPool& pool, const Weights& w, const Tensor& x, const Tensor* residual,
                    const Epilogue& epilogue, const Tensor& y, const Terms& terms) {
    check_operands(w, x, residual, y, terms);
    require(all_are(is_row_major, x, residual, y, terms), "linear takes row-major tensors");
    const i64 out = w.dims[0], in = w.dims[1];
    check_reduction(in, x.q->zero_point, 127);
    for (const Product& p : terms.products) check_reduction(in, p.x.q->zero_point, 127);
    i64 rows = 1;
    for (int i = 0; i + 1 < y.rank(); ++i) rows *= y.dims[i];
    return std::make_unique<GemmStep>(pool, w, Grouping{1, in, out, 1}, Shape3{}, x, residual, epilogue, y, rows,
                                      terms);
}

StepPtr make_conv(ThreadPool& pool, const Weights& w, const ConvGeometry& geometry, const Tensor& x,
                  const Tensor* residual, const Epilogue& epilogue, const Tensor& y, const Terms& terms) {
    check_operands(w, x, residual, y, terms);
    require(x.rank() >= 3 && x.rank() <= 5, "convolutions have 1 to 3 spatial dimensions");
    require(all_are(is_channels_last, x, residual, y, terms), "convolutions take channels_last tensors");
    const Shape3 shape = shape_of(w, geometry, x, y);
    const i64 groups = geometry.groups, in = w.dims[1], out = w.dims[0] / groups;
    check_reduction(shape.taps() * in, x.q->zero_point, 127);
    for (const Product& p : terms.products) check_reduction(shape.taps() * in, p.x.q->zero_point, 127);
    if (in == 1 && out == 1 && groups > 1)
        return std::make_unique<DepthwiseStep>(pool, w, shape, x, residual, epilogue, y, terms);
    if (terms.products.empty() && suits_winograd(*int8_kernels_in_use(), w, geometry, shape, x, y))
        return std::make_unique<WinogradStep>(pool, w, shape, x, residual, epilogue, y, terms.rest);
    const Grouping grouping = merge_groups(*int8_kernels_in_use(), groups, in, out, shape.taps());
    return std::make_unique<GemmStep>(pool, w, grouping, shape, x, residual, epilogue, y, y.dims[0] * shape.pixels(),
                                      terms);
}

StepPtr make_int8_matmul(ThreadPool& pool, const Tensor& a, const Tensor& b, float alpha, const Tensor& y) {
    require(a.dtype == DType::u8 && a.q && b.dtype == DType::u8 && b.q, "matmul operands must be u8 codes");
    require((y.dtype == DType::u8 && y.q) || (y.dtype == DType::f32 && !y.q), "y must be u8 codes or f32");
    require(a.rank() >= 2 && a.rank() == b.rank() && a.rank() == y.rank() && is_row_major(y),
            "matmul takes operands of equal rank and a row-major result");
    return std::make_unique<MatmulStep>(pool, a, b, alpha, y);
}

}  // namespace quantflow::host
