// Pools, reductions, embeddings and upsampling against loops in double.
#include "../host/steps.hpp"
#include "check.hpp"

using namespace check;

namespace {

ThreadPool* pool = nullptr;

Layout dense_layout() { return static_cast<Layout>(pick(0, 2)); }

void test_pool() {
    for (int round = 0; round < 1500; ++round) {
        const auto spatial = static_cast<std::size_t>(pick(0, 3) == 0 ? pick(1, 3) : 2);
        const Int channel_counts[] = {1, 3, 8, 16, 24, 33, 64, 100, 130, 300};
        Dims dims{pick(0, 20) == 0 ? 0 : pick(1, 2), channel_counts[pick(0, 9)]};
        PoolGeometry g;
        g.is_max = pick(0, 1);
        g.is_adaptive = !g.is_max && pick(0, 2) == 0;
        g.count_include_pad = pick(0, 1);
        g.divisor_override = pick(0, 4) == 0 ? pick(1, 9) : 0;
        if (g.is_adaptive) g.divisor_override = 0;
        Dims out = dims;
        for (std::size_t d = 0; d < spatial; ++d) {
            dims.push_back(pick(1, spatial == 3 ? 6 : 13));
            const Int in = dims.back();
            g.kernel.push_back(pick(1, std::min<Int>(in, 4)));
            if (pick(0, 3) == 0) g.kernel.back() = in;
            g.stride.push_back(pick(1, 3));
            g.padding.push_back(pick(0, g.kernel.back() / 2));
            g.dilation.push_back(g.is_max && pick(0, 3) == 0 ? 2 : 1);
            const Int reach = g.dilation.back() * (g.kernel.back() - 1) + 1;
            const Int room = in + 2 * g.padding.back() - reach;
            if (room < 0) g.dilation.back() = 1;
            const Int true_room = in + 2 * g.padding.back() - (g.dilation.back() * (g.kernel.back() - 1) + 1);
            const Int up = pick(0, 1) ? g.stride.back() - 1 : 0;  // ceil mode
            Int n = (true_room + up) / g.stride.back() + 1;
            if ((n - 1) * g.stride.back() >= in + g.padding.back()) --n;
            out.push_back(g.is_adaptive ? pick(1, in + 1) : n);
        }
        if (g.is_adaptive) g.kernel = g.stride = g.padding = g.dilation = {};
        const Layout layout = pick(0, 2) ? Layout::channels_last : dense_layout();
        Value x = random_real(dims, strides_of(dims, layout), pick(0, 1), 4, g.is_max && pick(0, 1));
        const Dims y_strides = strides_of(out, pick(0, 5) ? layout : dense_layout());
        Value y =
            g.is_max ? Value(x.tensor().dtype, out, y_strides, x.tensor().q) : random_real(out, y_strides, pick(0, 1));
        auto step = host::make_pool(*pool, g, x, y);
        step->run();
        const std::string what = step->kernel() + " of " + std::to_string(dims[1]) + " channels";
        const double zero_point = x.tensor().q ? x.tensor().q->zero_point : 0;
        each_index(out, [&](const Dims& i) {
            double best = -INFINITY, sum = 0, size = 0;
            Int count = 0, extent = 1;
            Dims from(spatial), window(spatial);
            for (std::size_t d = 0; d < spatial; ++d) {
                const Int in = dims[d + 2], o = i[d + 2];
                if (g.is_adaptive) {
                    from[d] = o * in / out[d + 2];
                    window[d] = ((o + 1) * in + out[d + 2] - 1) / out[d + 2] - from[d];
                } else {
                    from[d] = o * g.stride[d] - g.padding[d];
                    window[d] = g.kernel[d];
                    extent *= std::min(from[d] + window[d], in + g.padding[d]) - from[d];
                }
            }
            each_index(window, [&](const Dims& k) {
                Dims at{i[0], i[1]};
                for (std::size_t d = 0; d < spatial; ++d) {
                    const Int place = from[d] + k[d] * (g.is_adaptive ? 1 : g.dilation[d]);
                    if (place < 0 || place >= dims[d + 2]) return;
                    at.push_back(place);
                }
                const double v = raw(x, at);
                if (v > best || std::isnan(v)) best = v;
                sum += v - zero_point;
                size += std::abs(v);
                ++count;
            });
            if (g.is_max) {
                ++values;
                const double got = raw(y, i);
                if (x.tensor().q && count == 0) best = x.tensor().q->qmin;
                // A maximum with NaN in its window is NaN.
                if (std::isnan(best) ? !std::isnan(got) : got != best)
                    fail(what + ": " + std::to_string(got) + ", expected " + std::to_string(best));
                return;
            }
            const Int divisor = g.divisor_override        ? g.divisor_override
                                : g.is_adaptive           ? count
                                : g.count_include_pad     ? extent
                                                          : std::max<Int>(count, 1);
            if (count == 0) return expect(what, y, i, 0);
            const double mean = sum / static_cast<double>(divisor);
            const float r = x.tensor().q ? static_cast<float>(mean) * x.tensor().q->scale : static_cast<float>(mean);
            // Of codes the mean is the reference's, bit by bit.
            if (x.tensor().q && !y.tensor().q) {
                ++values;
                if (raw(y, i) != static_cast<double>(r)) fail(what + ": not the reference's");
            } else {
                expect(what, y, i, r, x.tensor().q ? 1e-4 : 1e-3, 1e-6, size / static_cast<double>(divisor));
            }
        });
    }
    end_group("pools");

    // Sums of the most extreme codes, over more elements than 16 bits count.
    for (int code : {0, 255})
        for (Int edge : {7, 16, 17, 40, 300}) {
            const Dims dims{1, 70, edge, edge}, out{1, 70, 1, 1}, padded{1, 70, 2, 2};
            Value x(DType::u8, dims, channels_last(dims), QParams{0.5f, 128, 0, 255});
            std::memset(x.data(), code, static_cast<std::size_t>(x.bytes()));
            Value y(DType::f32, out, row_major(out)), z(DType::f32, padded, channels_last(padded));
            PoolGeometry g;
            g.is_max = false;
            g.is_adaptive = true;
            host::make_pool(*pool, g, x, y)->run();
            PoolGeometry h;
            h.is_max = false;
            h.kernel = {edge, edge};
            h.stride = h.padding = {edge / 2, edge / 2};
            h.dilation = {1, 1};
            h.count_include_pad = false;
            host::make_pool(*pool, h, x, z)->run();
            each_index(out, [&](const Dims& i) { expect("extreme codes", y, i, (code - 128) * 0.5, 0, 0); });
            each_index(padded, [&](const Dims& i) { expect("extreme codes", z, i, (code - 128) * 0.5, 0, 0); });
        }
    end_group("pools, extreme codes");
}

void test_reduce() {
    const std::vector<Dims> shapes = {
        {},           {0},          {1},           {9},           {3, 0},          {3, 5},          {64, 200},
        {2, 7, 3},    {2, 100, 40}, {1, 300, 300}, {2, 33, 7, 7}, {1, 70, 30, 30}, {3, 4, 5, 6, 2}, {5000, 3},
        {1, 3, 5000}, {20000, 17}};
    for (int round = 0; round < 1000; ++round) {
        const Dims dims = shapes[static_cast<std::size_t>(pick(0, static_cast<Int>(shapes.size()) - 1))];
        std::vector<int> axes;
        Dims out = dims;
        for (std::size_t d = 0; d < dims.size(); ++d)
            if (pick(0, 1)) {
                axes.push_back(static_cast<int>(d));
                out[d] = 1;
            }
        const auto how = static_cast<Reduction>(pick(0, 3));
        Value x =
            random_real(dims, strides_of(dims, random_layout()), pick(0, 1), 4, how > Reduction::mean && pick(0, 1));
        Value y = random_real(out, strides_of(out, random_layout()), pick(0, 1));
        auto step = host::make_reduce(*pool, how, x, axes, y);
        step->run();
        each_index(out, [&](const Dims& i) {
            double sum = 0, size = 0, best = how == Reduction::max ? -INFINITY : INFINITY;
            Int count = 0;
            Dims window(dims.size(), 1);
            for (int a : axes) window[static_cast<std::size_t>(a)] = dims[static_cast<std::size_t>(a)];
            each_index(window, [&](const Dims& k) {
                Dims at = i;
                for (int a : axes) at[static_cast<std::size_t>(a)] = k[static_cast<std::size_t>(a)];
                const double v = static_cast<double>(real(x, at));
                sum += v;
                size += std::abs(v);
                if (std::isnan(v) || (how == Reduction::max ? v > best : v < best)) best = v;
                if (std::isnan(best)) best = NAN;
                ++count;
            });
            // std::isnan(best) stays: comparisons with NaN are false.
            double r = how == Reduction::sum ? sum : how == Reduction::mean ? sum / static_cast<double>(count) : best;
            if (how == Reduction::mean && count > 0) size /= static_cast<double>(count);
            const bool of_codes = x.tensor().q.has_value();
            // Sums of floats round: what may be is measured in codes too.
            const double steps = y.tensor().q && !of_codes ? 1e-6 * size / static_cast<double>(y.tensor().q->scale) : 0;
            expect(step->kernel() + " of " + std::to_string(count), y, i, r, 1e-3 + steps, 1e-6,
                   of_codes ? size * 0.2 : size);
        });
    }
    end_group("reductions");

    // An exact mean of codes, whatever the layout: sum, one division in double, times the scale.
    for (int round = 0; round < 100; ++round) {
        const Dims dims{pick(1, 2), pick(1, 200), pick(1, 20), pick(1, 20)}, out{dims[0], dims[1], 1, 1};
        Value x = random_real(dims, strides_of(dims, random_layout()), true);
        Value y(DType::f32, out, row_major(out));
        host::make_reduce(*pool, Reduction::mean, x, {2, 3}, y)->run();
        each_index(out, [&](const Dims& i) {
            double sum = 0;
            for (Int h = 0; h < dims[2]; ++h)
                for (Int w = 0; w < dims[3]; ++w) sum += raw(x, {i[0], i[1], h, w}) - x.tensor().q->zero_point;
            ++values;
            const float wanted = static_cast<float>(sum / static_cast<double>(dims[2] * dims[3])) * x.tensor().q->scale;
            if (raw(y, i) != static_cast<double>(wanted)) fail("mean of codes is not exact");
        });
    }
    end_group("means of codes, exactly");
}

void test_gather() {
    for (int round = 0; round < 300; ++round) {
        const Int rows = pick(1, 50);
        const Int widths[] = {0, 1, 7, 64, 768, 1500};
        const Int width = widths[pick(0, 5)];
        const std::vector<Dims> shapes = {{}, {0}, {1}, {5}, {2, 128}, {3, 1, 4}};
        Dims dims = shapes[static_cast<std::size_t>(pick(0, 5))];
        Value index(DType::s64, dims, strides_of(dims, random_layout()));
        for (Int i = 0; i < index.bytes() / 8; ++i) index.put(index.data() + 8 * i, pick(0, rows - 1));
        const Dims table_dims{rows, width};
        Value table = random_real(table_dims, strides_of(table_dims, random_layout()), pick(0, 1));
        dims.push_back(width);
        Value y = random_real(dims, strides_of(dims, random_layout()), pick(0, 1));
        host::make_gather(*pool, table, index, y)->run();
        each_index(dims, [&](const Dims& i) {
            const Int row = static_cast<Int>(raw(index, Dims(i.begin(), i.end() - 1)));
            expect("gather", y, i, real(table, {row, i.back()}), 1e-3, 0);
        });
    }
    for (Int wrong : {Int{-1}, Int{3}, std::numeric_limits<Int>::max()}) {
        Value table(DType::f32, {3, 4}, {4, 1}), index(DType::s64, {1}, {1}), y(DType::f32, {1, 4}, {4, 1});
        index.put(index.data(), wrong);
        auto step = host::make_gather(*pool, table, index, y);
        try {
            step->run();
            fail("an index outside the table was not refused");
        } catch (const Error&) {
            ++values;
        }
    }
    end_group("gather");
}

void test_upsample() {
    for (int round = 0; round < 500; ++round) {
        const bool bilinear = pick(0, 1);
        const auto spatial = static_cast<std::size_t>(bilinear ? 2 : pick(1, 3));
        const Int channel_counts[] = {1, 3, 16, 40, 65};
        Dims dims{pick(1, 2), channel_counts[pick(0, 4)]};
        Dims out = dims;
        std::vector<double> scales;
        const bool align = bilinear && pick(0, 1);
        const bool doubles = pick(0, 1);
        for (std::size_t d = 0; d < spatial; ++d) {
            dims.push_back(pick(1, 9));
            out.push_back(doubles ? 2 * dims.back() : pick(1, 20));
            const double in = static_cast<double>(dims.back()), o = static_cast<double>(out.back());
            scales.push_back(align ? (o > 1 ? (in - 1) / (o - 1) : 0) : in / o);
        }
        const Layout layout = dense_layout();
        Value x = random_real(dims, strides_of(dims, layout), pick(0, 1));
        const Dims y_strides = strides_of(out, pick(0, 5) ? layout : dense_layout());
        Value y =
            bilinear ? random_real(out, y_strides, pick(0, 1)) : Value(x.tensor().dtype, out, y_strides, x.tensor().q);
        host::make_upsample(*pool, bilinear ? Interpolation::bilinear : Interpolation::nearest, align, scales, x, y)
            ->run();
        each_index(out, [&](const Dims& i) {
            if (!bilinear) {
                Dims at{i[0], i[1]};
                for (std::size_t d = 0; d < spatial; ++d)
                    at.push_back(std::min<Int>(
                        static_cast<Int>(std::floor(static_cast<float>(i[d + 2]) * static_cast<float>(scales[d]))),
                        dims[d + 2] - 1));
                ++values;
                if (raw(y, i) != raw(x, at)) fail("nearest");
                return;
            }
            Int low[2], high[2];
            double weight[2];
            for (std::size_t d = 0; d < 2; ++d) {
                const float o = static_cast<float>(i[d + 2]), scale = static_cast<float>(scales[d]);
                const float source = align ? scale * o : std::max(0.0f, scale * (o + 0.5f) - 0.5f);
                low[d] = std::min(static_cast<Int>(source), dims[d + 2] - 1);
                high[d] = std::min(low[d] + 1, dims[d + 2] - 1);
                weight[d] = std::min(1.0, static_cast<double>(source) - static_cast<double>(low[d]));
            }
            double r = 0, size = 0;
            for (int k = 0; k < 4; ++k) {
                const double w = (k & 1 ? weight[1] : 1 - weight[1]) * (k & 2 ? weight[0] : 1 - weight[0]);
                const double v =
                    static_cast<double>(real(x, {i[0], i[1], k & 2 ? high[0] : low[0], k & 1 ? high[1] : low[1]}));
                r += w * v;
                size += std::abs(w * v);
            }
            expect("bilinear", y, i, r, 1e-3, 1e-6, size);
        });
    }
    end_group("upsampling");
}

// Sums of floats are the same for any number of threads.
void test_order() {
    ThreadPool one(1), four(4);
    for (int round = 0; round < 40; ++round) {
        const Dims dims{1, pick(1, 20), pick(200, 600), pick(1, 2) * 64}, out{1, 1, 1, dims[3]};
        Value x = random_real(dims, strides_of(dims, Layout::row_major), false);
        const auto how = pick(0, 1) ? Reduction::sum : Reduction::mean;
        const Dims strides = strides_of(out, Layout::row_major);
        Value alone = random_real(out, strides, false), shared = random_real(out, strides, false);
        host::make_reduce(one, how, x, {1, 2}, alone)->run();
        host::make_reduce(four, how, x, {1, 2}, shared)->run();
        each_index(out, [&](const Dims& i) {
            ++values;
            if (raw(alone, i) != raw(shared, i)) fail("a sum by four threads");
        });
    }
    end_group("sums by several threads");
}

int run() {
    test_order();
    for (int threads : {1, 3}) {
        ThreadPool threads_of_test(threads);
        pool = &threads_of_test;
        random_bits.seed(static_cast<unsigned>(threads));
        test_pool();
        test_reduce();
        test_gather();
        test_upsample();
    }
    if (failures > 0) std::printf("%d FAILURES\n", failures);
    return failures > 0;
}

}  // namespace

int main() { return run_for_every_isa(run); }
