// Products with packed weights against the formula in double precision, with no framework: prints what failed, exits 1.
// Buffers end where the data ends, so that a sanitizer sees every access beyond.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "msdd_fast/linear.h"
#include "msdd_fast/linear_int8.h"

namespace {

int failures = 0;

void check(bool condition, const char* what) {
    if (condition) return;
    std::printf("FAILED: %s\n", what);
    ++failures;
}

using msdd_fast::BFloat16;
using msdd_fast::DType;
using msdd_fast::to_float;

// Multiples of 1/64 in [-2, 2) that look random: bfloat16 holds them, and float32 their sums of products, exactly.
template <class T>
std::vector<T> numbers(std::int64_t count, std::uint32_t seed) {
    std::vector<T> result(static_cast<std::size_t>(count));
    for (auto& x : result) {
        seed = seed * 1664525u + 1013904223u;
        x = msdd_fast::from_float<T>(static_cast<float>(seed >> 24) * 0x1p-6f - 2.0f);
    }
    return result;
}

template <class T>
constexpr DType TYPE = DType::float32;
template <>
constexpr DType TYPE<BFloat16> = DType::bfloat16;

// A weight packed for one level. The memory is aligned to 64 bytes and ends where the panels end.
struct alignas(64) Line {
    float words[16];
};

struct Sizes {
    std::int64_t rows, in, out;
};

template <class T>
std::vector<float> product(const Sizes& sizes, const std::vector<T>& x, const std::vector<T>& weight,
                           const std::vector<float>& bias, bool swiglu, const std::string& level, int threads) {
    const msdd_fast::LinearShape shape{sizes.out, sizes.in, swiglu};
    const msdd_fast::PackedSize size = msdd_fast::linear_packed_size(shape, TYPE<T>, level);
    const std::int64_t bytes = size.elements * (size.dtype == DType::bfloat16 ? 2 : 4);
    std::vector<Line> packed(static_cast<std::size_t>(bytes / 64));
    msdd_fast::linear_pack(packed.data(), {weight.data(), TYPE<T>}, sizes.in, shape, level, threads);
    const std::int64_t width = swiglu ? sizes.out / 2 : sizes.out;
    std::vector<float> out(static_cast<std::size_t>(sizes.rows * width), NAN);
    msdd_fast::linear(out.data(), DType::float32, width, {{x.data(), TYPE<T>}, sizes.in}, sizes.rows, packed.data(),
                      {bias.data(), DType::float32}, shape, level, threads);
    return out;
}

template <class T>
double worst_error(const Sizes& sizes, const std::vector<T>& x, const std::vector<T>& weight,
                   const std::vector<float>& bias, bool swiglu, const std::vector<float>& out) {
    const std::int64_t width = swiglu ? sizes.out / 2 : sizes.out;
    double worst = 0;
    for (std::int64_t r = 0; r < sizes.rows; ++r) {
        const auto sum = [&](std::int64_t column) {
            double total = bias[column];
            for (std::int64_t k = 0; k < sizes.in; ++k)
                total += static_cast<double>(to_float(x[r * sizes.in + k])) * to_float(weight[column * sizes.in + k]);
            return total;
        };
        for (std::int64_t c = 0; c < width; ++c) {
            const double a = sum(c), exact = swiglu ? a / (1 + std::exp(-a)) * sum(c + width) : a;
            worst = std::fmax(worst, std::fabs(out[r * width + c] - exact) / std::fmax(1.0, std::fabs(exact)));
        }
    }
    return worst;
}

template <class T>
void check_level(const std::string& level) {
    for (const Sizes& sizes : {Sizes{1, 1, 2}, Sizes{7, 33, 130}, Sizes{19, 64, 64}, Sizes{101, 40, 30}})
        for (const bool swiglu : {false, true}) {
            const auto x = numbers<T>(sizes.rows * sizes.in, 1), weight = numbers<T>(sizes.out * sizes.in, 2);
            const auto bias = numbers<float>(sizes.out, 3);
            const auto out = product(sizes, x, weight, bias, swiglu, level, 1);
            const double error = worst_error(sizes, x, weight, bias, swiglu, out);
            const std::string text = level + ", " + std::to_string(sizes.rows) + " rows" + (swiglu ? ", swiglu" : "");
            check(swiglu ? error < 1e-6 : error == 0, ("the formula: " + text).c_str());
        }
}

// Numbers that 8 bits hold exactly, the largest of each row and column among them: the product is exact but for scales.
void check_int8(const std::string& level) {
    for (const Sizes& sizes : {Sizes{1, 1, 2}, Sizes{7, 33, 130}, Sizes{19, 64, 64}, Sizes{101, 70, 30}}) {
        const auto levels_of = [](std::int64_t rows, std::int64_t width, std::uint32_t seed) {
            auto values = numbers<float>(rows * width, seed);
            for (auto& v : values) v = std::floor(v * 63.0f);
            for (std::int64_t r = 0; r < rows; ++r) values[static_cast<std::size_t>(r * width)] = 127.0f;
            return values;
        };
        const auto x = levels_of(sizes.rows, sizes.in, 7), weight = levels_of(sizes.out, sizes.in, 8);
        const auto bias = numbers<float>(sizes.out, 9);
        const msdd_fast::LinearShape shape{sizes.out, sizes.in, false};
        const std::int64_t words = msdd_fast::linear_int8_packed_words(shape, level);
        std::vector<Line> packed(static_cast<std::size_t>(words / 16));
        msdd_fast::linear_int8_pack(packed.data(), {weight.data(), DType::float32}, sizes.in, shape, level, 2);
        const std::int64_t stride =
            (sizes.in + msdd_fast::QUANTIZED_DEPTH - 1) / msdd_fast::QUANTIZED_DEPTH * msdd_fast::QUANTIZED_DEPTH;
        std::vector<std::uint8_t> values(static_cast<std::size_t>(sizes.rows * stride));
        std::vector<float> scales(static_cast<std::size_t>(sizes.rows));
        std::vector<float> out(static_cast<std::size_t>(sizes.rows * sizes.out), NAN);
        msdd_fast::quantize_rows(values.data(), stride, scales.data(), {{x.data(), DType::float32}, sizes.in},
                                 sizes.rows, sizes.in, 2);
        msdd_fast::linear_int8(out.data(), DType::float32, sizes.out, {values.data(), stride, scales.data()},
                               sizes.rows, packed.data(), {bias.data(), DType::float32}, shape, level, 2);
        check(worst_error<float>(sizes, x, weight, bias, false, out) < 1e-6, ("int8: " + level).c_str());
    }
}

template <class Call>
bool refuses(const Call& call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

}  // namespace

int main() {
    for (const char* level : {"plain", "plain_bf16", "plain_amx", "avx2", "avx512", "avx512bf16", "amx"}) {
        try {
            msdd_fast::linear_packed_size({1, 1, false}, DType::bfloat16, level);
        } catch (const std::invalid_argument&) {
            std::printf("this machine cannot run %s\n", level);
            continue;
        }
        check_level<float>(level);
        check_level<BFloat16>(level);
    }

    for (const char* level : {"plain", "plain_amx", "avx512vnni", "amx"}) {
        try {
            msdd_fast::linear_int8_packed_words({1, 1, false}, level);
        } catch (const std::invalid_argument&) {
            std::printf("this machine cannot run %s\n", level);
            continue;
        }
        check_int8(level);
    }

    const Sizes sizes{120, 200, 300};
    const auto x = numbers<BFloat16>(sizes.rows * sizes.in, 4), weight = numbers<BFloat16>(sizes.out * sizes.in, 5);
    const auto bias = numbers<float>(sizes.out, 6);
    const auto run = [&](const std::string& level, int threads) {
        return product(sizes, x, weight, bias, true, level, threads);
    };
    const std::vector<float> best = run("", 1);
    check(best == run(msdd_fast::linear_level(), 5), "the number of threads changes nothing");
    std::vector<std::thread> callers;
    std::vector<int> equal(4, 0);
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&, i] { equal[static_cast<std::size_t>(i)] = run("", 3) == best; });
    for (auto& caller : callers) caller.join();
    for (const int same : equal) check(same != 0, "several callers at once");
    check(refuses([&] { run("sse9", 1); }), "an unknown level is refused");
    check(refuses([&] { run("", 0); }), "no threads are refused");
    check(refuses([&] { msdd_fast::linear_packed_size({3, 8, true}, DType::float32, ""); }), "odd halves are refused");
    if (failures == 0) std::printf("all passed\n");
    return failures != 0;
}
