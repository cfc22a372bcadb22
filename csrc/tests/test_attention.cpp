// Attention against the formula in double precision, with no framework: prints what failed, exits 1.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "msdd_fast/attention.h"

namespace {

int failures = 0;

void check(bool condition, const char* what) {
    if (condition) return;
    std::printf("FAILED: %s\n", what);
    ++failures;
}

// Numbers in [-2, 2) that look random.
std::vector<float> numbers(std::size_t count, std::uint32_t seed) {
    std::vector<float> result(count);
    for (auto& x : result) {
        seed = seed * 1664525u + 1013904223u;
        x = static_cast<float>(seed >> 8) * 0x1p-22f - 2.0f;
    }
    return result;
}

constexpr std::int64_t BATCH = 2, QUERIES = 53, KEYS = 800, HEADS = 2, SIZE = 48;
constexpr msdd_fast::AttentionShape SHAPE{BATCH, QUERIES, KEYS, HEADS, SIZE};

// Token-major, as (tokens, BATCH, HEADS, SIZE).
msdd_fast::HeadsView view(std::vector<float>& x) { return {x.data(), HEADS * SIZE, BATCH * HEADS * SIZE, SIZE}; }

std::int64_t at(std::int64_t image, std::int64_t token, std::int64_t head) {
    return ((token * BATCH + image) * HEADS + head) * SIZE;
}

double worst_error(const std::vector<float>& out, const std::vector<float>& q, const std::vector<float>& k,
                   const std::vector<float>& v) {
    double worst = 0;
    for (std::int64_t image = 0; image < BATCH; ++image)
        for (std::int64_t head = 0; head < HEADS; ++head)
            for (std::int64_t query = 0; query < QUERIES; ++query) {
                std::vector<double> sums(SIZE, 0.0);
                double total = 0;
                for (std::int64_t key = 0; key < KEYS; ++key) {
                    double score = 0;
                    for (std::int64_t i = 0; i < SIZE; ++i)
                        score += static_cast<double>(q[at(image, query, head) + i]) * k[at(image, key, head) + i];
                    const double weight = std::exp(score / std::sqrt(static_cast<double>(SIZE)));
                    total += weight;
                    for (std::int64_t i = 0; i < SIZE; ++i) sums[i] += weight * v[at(image, key, head) + i];
                }
                for (std::int64_t i = 0; i < SIZE; ++i)
                    worst = std::fmax(worst, std::fabs(out[at(image, query, head) + i] - sums[i] / total));
            }
    return worst;
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
    auto q = numbers(BATCH * QUERIES * HEADS * SIZE, 1), k = numbers(BATCH * KEYS * HEADS * SIZE, 2);
    auto v = numbers(BATCH * KEYS * HEADS * SIZE, 3);
    const auto run = [&](const std::string& level, int threads) {
        std::vector<float> out(q.size(), NAN);
        msdd_fast::attention(view(out), view(q), view(k), view(v), {}, msdd_fast::DType::float32, SHAPE, level,
                             threads);
        return out;
    };
    const std::vector<float> best = run("", 1);
    check(worst_error(best, q, k, v) < 1e-5, "the formula, at this machine's level");
    check(worst_error(run("plain", 1), q, k, v) < 1e-5, "the formula, at the plain level");
    check(best == run(msdd_fast::attention_level(), 5), "the number of threads changes nothing");
    check(refuses([&] { run("sse9", 1); }), "an unknown level is refused");
    check(refuses([&] { run("", 0); }), "no threads are refused");
    if (failures == 0) std::printf("all passed\n");
    return failures != 0;
}
