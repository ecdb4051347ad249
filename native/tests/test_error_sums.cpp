// Sums of errors against loops in double, to the bit of one another on every instruction set.
#include "../host/error_sums_isa.hpp"
#include "check.hpp"

using namespace check;
using host::ErrorCoding;
using host::ErrorKernels;
using host::ErrorSums;

namespace {

template <typename Actual, typename Real>
ErrorSums looped(const std::vector<float>& x, const std::vector<Actual>& actual, Real real) {
    ErrorSums sums;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double error = static_cast<double>(x[i]) - static_cast<double>(real(actual[i]));
        sums.signal += static_cast<double>(x[i]) * x[i];
        sums.noise += error * error;
        sums.largest = std::max(sums.largest, std::fabs(static_cast<double>(x[i])));
        sums.largest_error = std::max(sums.largest_error, std::fabs(error));
    }
    return sums;
}

bool near(double a, double b) { return std::fabs(a - b) <= 1e-12 * std::max(std::fabs(a), std::fabs(b)); }

void expect(const ErrorSums& found, const ErrorSums& wanted, const std::string& what) {
    if (!near(found.signal, wanted.signal) || !near(found.noise, wanted.noise)) fail("sums of " + what);
    if (found.largest != wanted.largest || found.largest_error != wanted.largest_error) fail("largest of " + what);
}

void expect_equal(const ErrorSums& a, const ErrorSums& b, const std::string& what) {
    if (std::memcmp(&a, &b, sizeof(a)) != 0) fail("instruction sets differ: " + what);
}

template <typename Code>
void test_codes(const ErrorKernels& k, ErrorSums (*ErrorKernels::*of)(const float*, const Code*, ErrorCoding, std::size_t),
                const std::vector<float>& x, const std::string& what) {
    std::vector<Code> codes(x.size());
    for (Code& q : codes) q = static_cast<Code>(pick(0, 255));
    const ErrorCoding coding{0.037f, static_cast<std::int32_t>(pick(-128, 127))};
    const auto real = [&](Code q) { return static_cast<float>(std::int32_t{q} - coding.zero_point) * coding.scale; };
    const ErrorSums found = (k.*of)(x.data(), codes.data(), coding, x.size());
    expect(found, looped(x, codes, real), what);
    expect_equal(found, (host::isa_generic::error_kernels().*of)(x.data(), codes.data(), coding, x.size()), what);
}

}  // namespace

int main() {
    const ErrorKernels& k = host::error_kernels();
    std::normal_distribution<float> normal;
    for (std::size_t n : {0, 1, 7, 8, 9, 16, 1000, 4099}) {
        std::vector<float> x(n), y(n);
        for (float& v : x) v = normal(random_bits);
        for (std::size_t i = 0; i < n; ++i) y[i] = x[i] + 0.1f * normal(random_bits);
        const std::string what = std::to_string(n) + " values";
        const ErrorSums found = k.of_floats(x.data(), y.data(), n);
        expect(found, looped(x, y, [](float v) { return v; }), what);
        expect_equal(found, host::isa_generic::error_kernels().of_floats(x.data(), y.data(), n), what);
        test_codes(k, &ErrorKernels::of_u8, x, what + " in uint8");
        test_codes(k, &ErrorKernels::of_s8, x, what + " in int8");
        for (float bad : {NAN, INFINITY, -INFINITY})
            for (auto* broken : {&x, &y}) {
                if (n == 0) continue;
                const std::size_t at = n / 2;
                const float kept = (*broken)[at];
                (*broken)[at] = bad;
                if (std::isfinite(k.of_floats(x.data(), y.data(), n).noise)) fail("a value that is not finite: " + what);
                (*broken)[at] = kept;
            }
    }
    std::printf("error sums: %d failures\n", failures);
    return failures ? 1 : 0;
}
