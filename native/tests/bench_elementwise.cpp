// Times of the elementwise and window kernels on shapes of common networks: the best of many runs, with the bytes
// read and written per second. Arguments: threads, part of a name.
#include <chrono>

#include "../host/steps.hpp"
#include "check.hpp"

using namespace check;

namespace {

const char* wanted = "";

void bench(const std::string& name, Int bytes, Step& step) {
    if (name.find(wanted) == std::string::npos) return;
    double best = 1e9, spent = 0;
    for (int i = 0; i < 5 || (spent < 0.05 && i < 20000); ++i) {
        const auto start = std::chrono::steady_clock::now();
        step.run();
        const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        best = std::min(best, s);
        spent += s;
    }
    std::printf("%-46s %-24s %9.1f us  %6.1f GB/s\n", name.c_str(), step.kernel().c_str(), best * 1e6,
                static_cast<double>(bytes) / best * 1e-9);
}

Value codes(const Dims& dims, const Dims& strides, float scale = 0.03f, int zero_point = 120) {
    Value v(DType::u8, dims, strides, QParams{scale, zero_point, 0, 255});
    v.randomize();
    return v;
}

Value floats(const Dims& dims, const Dims& strides) {
    Value v(DType::f32, dims, strides);
    v.randomize();
    return v;
}

}  // namespace

int main(int argc, char** argv) {
    ThreadPool pool(argc > 1 ? std::atoi(argv[1]) : 1);
    if (argc > 2) wanted = argv[2];
    std::printf("%s, %d threads\n", name_of(best_isa()), pool.size());
    const auto row = row_major;
    const auto last = channels_last;
    {
        const Int n = 800 * 1024;
        Value a = floats({n}, {1}), b = floats({n}, {1});
        std::memset(b.data(), 0, static_cast<std::size_t>(b.bytes()));
        std::printf("%-46s %s\n", "memcpy of 3.2 MB, for comparison", "");
        bench("f32 to f32, 3.2 MB", 8 * n, *host::make_copy(pool, a, b));
    }
    {
        const Dims d{1, 3, 224, 224};
        Value x = floats(d, row(d)), y = codes(d, last(d)), z = codes(d, row(d)), f = floats(d, last(d));
        bench("quantize 3x224x224, NCHW to NHWC", 5 * x.tensor().count(), *host::make_copy(pool, x, y));
        bench("quantize 3x224x224, as it is", 5 * x.tensor().count(), *host::make_copy(pool, x, z));
        bench("3x224x224 f32 NCHW to NHWC", 8 * x.tensor().count(), *host::make_copy(pool, x, f));
    }
    {
        const Dims d{1, 256, 56, 56};
        const Int n = 256 * 56 * 56;
        Value f = floats(d, row(d)), g = floats(d, last(d)), a = codes(d, last(d)), b = codes(d, last(d), 0.05f, 3),
              y = codes(d, last(d), 0.07f, 60), p = codes(d, row(d)), h = floats(d, last(d));
        const Dims gate{1, 256, 1, 1};
        Value s = codes(gate, row(gate));
        const Tensor wide = s.repeated(d);
        bench("quantize 256x56x56 NHWC", 5 * n, *host::make_copy(pool, g, a));
        bench("quantize 256x56x56 NCHW to NHWC", 5 * n, *host::make_copy(pool, f, a));
        bench("dequantize 256x56x56 NHWC", 5 * n, *host::make_copy(pool, a, g));
        bench("dequantize 256x56x56 NHWC to NCHW", 5 * n, *host::make_copy(pool, a, f));
        bench("u8 256x56x56 NHWC to NCHW", 2 * n, *host::make_copy(pool, a, p));
        bench("f32 256x56x56 NCHW to NHWC", 8 * n, *host::make_copy(pool, f, g));
        bench("f32 256x56x56 NHWC to NCHW", 8 * n, *host::make_copy(pool, g, f));
        bench("add codes 256x56x56", 3 * n, *host::make_binary(pool, Binary::add, a, b, {}, y));
        bench("add codes relu 256x56x56", 3 * n,
              *host::make_binary(pool, Binary::add, a, b, {Activation::relu, 0, 0}, y));
        bench("mul codes 256x56x56", 3 * n, *host::make_binary(pool, Binary::mul, a, b, {}, y));
        bench("mul codes by gate 256x56x56", 2 * n, *host::make_binary(pool, Binary::mul, a, wide, {}, y));
        bench("add codes silu 256x56x56", 3 * n,
              *host::make_binary(pool, Binary::add, a, b, {Activation::silu, 0, 0}, y));
        bench("add f32 and codes to codes 256x56x56", 6 * n, *host::make_binary(pool, Binary::add, g, b, {}, y));
        bench("add f32 256x56x56", 12 * n, *host::make_binary(pool, Binary::add, g, h, {}, h));
        bench("table codes 256x56x56", 2 * n,
              *host::make_unary(pool, Unary::activation, 0, 0, {Activation::silu, 0, 0}, a, y));
        bench("table f32 256x56x56", 5 * n,
              *host::make_unary(pool, Unary::activation, 0, 0, {Activation::silu, 0, 0}, a, g));
        Value scale = floats({256}, {1}), shift = floats({256}, {1});
        const Epilogue relu{Activation::relu, 0, 0};
        bench("batch norm codes relu 256x56x56", 2 * n, *host::make_channel_affine(pool, a, 1, scale, shift, relu, y));
        bench("batch norm f32 relu to codes", 5 * n, *host::make_channel_affine(pool, g, 1, scale, shift, relu, y));
        const Dims one{1, 256, 1, 1};
        Value m = codes(one, row(one)), mf = floats(one, row(one));
        PoolGeometry everything;
        everything.is_max = false;
        everything.is_adaptive = true;
        bench("global avg pool codes 256x56x56", n, *host::make_pool(pool, everything, a, m));
        bench("global avg pool f32 256x56x56", 4 * n, *host::make_pool(pool, everything, g, mf));
    }
    {
        const Dims d{1, 24, 112, 112}, gate{1, 24, 1, 1};
        const Int n = 24 * 112 * 112;
        Value a = codes(d, last(d)), s = codes(gate, row(gate)), y = codes(d, last(d));
        const Tensor wide = s.repeated(d);
        bench("mul codes by gate 24x112x112", 2 * n, *host::make_binary(pool, Binary::mul, a, wide, {}, y));
    }
    {
        const Dims d{1, 2048, 7, 7}, o{1, 2048, 1, 1};
        Value x = codes(d, last(d)), y = codes(o, row(o)), f = floats(o, row(o));
        PoolGeometry g;
        g.is_max = false;
        g.is_adaptive = true;
        bench("global avg pool codes 2048x7x7", 2048 * 49, *host::make_pool(pool, g, x, y));
        bench("mean codes to f32 2048x7x7", 2048 * 49, *host::make_reduce(pool, Reduction::mean, x, {2, 3}, f));
    }
    {
        const Dims d{1, 64, 112, 112}, o{1, 64, 56, 56};
        const Int n = 64 * 112 * 112;
        Value x = codes(d, last(d)), y = codes(o, last(o)), f = floats(d, last(d)), fo = floats(o, last(o));
        PoolGeometry g;
        g.kernel = {3, 3};
        g.stride = {2, 2};
        g.padding = {1, 1};
        g.dilation = {1, 1};
        bench("max pool 3x3 s2 codes 64x112x112", n + n / 4, *host::make_pool(pool, g, x, y));
        bench("max pool 3x3 s2 f32 64x112x112", 5 * n, *host::make_pool(pool, g, f, fo));
        g.is_max = false;
        bench("avg pool 3x3 s2 codes 64x112x112", n + n / 4, *host::make_pool(pool, g, x, y));
        PoolGeometry h;
        h.kernel = h.stride = {2, 2};
        h.padding = {0, 0};
        h.dilation = {1, 1};
        h.is_max = false;
        bench("avg pool 2x2 codes 64x112x112", n + n / 4, *host::make_pool(pool, h, x, y));
        bench("avg pool 2x2 f32 64x112x112", 5 * n, *host::make_pool(pool, h, f, fo));
        const Dims wide{1, 64, 224, 224};
        Value w = codes(wide, last(wide)), wf = floats(wide, last(wide));
        bench("upsample nearest codes 64x112x112", 5 * n,
              *host::make_upsample(pool, Interpolation::nearest, false, {0.5, 0.5}, x, w));
        bench("upsample bilinear f32 64x112x112", 20 * n,
              *host::make_upsample(pool, Interpolation::bilinear, false, {0.5, 0.5}, f, wf));
    }
    {
        const Dims d{1, 21, 28, 28}, o{1, 21, 224, 224};
        Value x = floats(d, row(d)), y = floats(o, row(o));
        bench("upsample bilinear f32 21x28x28 NCHW, 8 times", 4 * 21 * 224 * 224,
              *host::make_upsample(pool, Interpolation::bilinear, false, {0.125, 0.125}, x, y));
    }
    {
        const Dims d{1, 58, 2, 28, 28};  // (batch, channel, group, rows, columns)
        const Int n = 58 * 2 * 28 * 28;
        Value x = codes(d, {n, 1, 58, 28 * 116, 116}), y = codes(d, {n, 2, 1, 28 * 116, 116});
        bench("channel shuffle codes 116x28x28", 2 * n, *host::make_copy(pool, x, y));
        const Dims c{1, 32, 56, 56};
        Value piece = codes(c, last(c)), to = codes(c, {256 * 56 * 56, 1, 56 * 256, 256});
        bench("cat piece codes 32 of 256 x56x56", 2 * 32 * 56 * 56, *host::make_copy(pool, piece, to));
    }
    {
        const Dims d{1, 12, 128, 64};
        const Int n = 12 * 128 * 64;
        Value x = floats(d, {n, 64, 768, 1}), y = floats(d, row(d)), q = codes(d, {n, 64, 768, 1}),
              p = codes(d, row(d));
        bench("heads f32 (1,128,12,64)", 8 * n, *host::make_copy(pool, x, y));
        bench("heads codes (1,128,12,64)", 2 * n, *host::make_copy(pool, q, p));
    }
    {
        const Dims d{1, 128, 3072}, b{1, 1, 3072}, o{1, 1, 3072};
        const Int n = 128 * 3072;
        Value x = floats(d, row(d)), y = floats(d, row(d)), bias = floats(b, row(b)), m = floats(o, row(o)),
              q = codes(d, row(d));
        const Tensor wide = bias.repeated(d);
        bench("add bias f32 128x3072", 8 * n, *host::make_binary(pool, Binary::add, x, wide, {}, y));
        for (Activation kind : {Activation::gelu, Activation::gelu_tanh, Activation::silu, Activation::sigmoid,
                                Activation::tanh, Activation::hardswish, Activation::relu})
            bench("f32 activation 128x3072", 8 * n,
                  *host::make_unary(pool, Unary::activation, 0, 0, {kind, 0, 0}, x, y));
        bench("f32 gelu to codes 128x3072", 5 * n,
              *host::make_unary(pool, Unary::activation, 0, 0, {Activation::gelu, 0, 0}, x, q));
        bench("mean over dim 1 of 128x3072", 4 * n, *host::make_reduce(pool, Reduction::mean, x, {1}, m));
        const Dims r{1, 128, 1};
        Value rows = floats(r, row(r));
        bench("mean over dim 2 of 128x3072", 4 * n, *host::make_reduce(pool, Reduction::mean, x, {2}, rows));
    }
    {
        const Dims d{1, 128, 768};
        Value table = floats({30522, 768}, {768, 1}), index(DType::s64, {1, 128}, {128, 1}), y = floats(d, row(d));
        for (Int i = 0; i < 128; ++i) index.put(index.data() + 8 * i, pick(0, 30521));
        bench("gather 128 rows of 768", 8 * 128 * 768, *host::make_gather(pool, table, index, y));
    }
    return 0;
}
