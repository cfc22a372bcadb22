// Rows of norm_modulate. Each level's file defines these and then includes this:
//
//   MSDD_SIMD   of functions that use the level's instructions: attribute and `inline`
//   row_of      (job, r, gate, buffer): row r of x as float32; plus gate * y where there is y, which is stored and then
//               taken as rounded. `buffer` is for both
//   write_row   (job, at, x, mean, inverse, factors, shift): h = (x - mean) * inverse * factors + shift, from element
//               `at` on
//
// No include guard: each level includes this exactly once.

#include <algorithm>

#include "job.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/layer_norm.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t NORM_TOGETHER = 16;  // rows at a time
constexpr int NORM_LANES = 32;              // four vectors of AVX2: enough to hide the latency of addition

MSDD_INLINE const float* row(const Table& table, std::int64_t group, std::int64_t width, float* buffer) {
    return floats(table.values, group * table.stride, width, buffer);
}

MSDD_SIMD void rows_of_level(const NormModulate& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float gates[MAX_NORM_WIDTH], shifts[MAX_NORM_WIDTH], factors[MAX_NORM_WIDTH], sums[MAX_NORM_WIDTH];
    const auto [rows, width, run, groups, eps] = job.shape;
    const bool rms = job.rms_weight.values.data != nullptr;
    const float *gate = nullptr, *shift = nullptr;
    std::int64_t known = -1;  // group whose rows of the tables are at hand
    const std::int64_t most = std::min(NORM_TOGETHER, MAX_NORM_WIDTH / width);
    for (std::int64_t r = begin, count; r < end; r += count) {
        const std::int64_t group = std::min(r / run, groups - 1);
        const std::int64_t group_end = group == groups - 1 ? end : (group + 1) * run;
        count = std::min({most, end - r, group_end - r});
        if (group != known) {
            gate = row(job.gate, group, width, gates);
            shift = row(job.shift, group, width, shifts);
            const float* scale = row(job.scale, group, width, factors);
            for (std::int64_t i = 0; i < width; ++i) factors[i] = 1.0f + scale[i];
            if (rms) {
                const float* weight = row(job.rms_weight, group, width, sums);
                for (std::int64_t i = 0; i < width; ++i) factors[i] = weight[i] * factors[i];
            }
            known = group;
        }
        // All rows in each loop: the chains of sums, root and quotient of several rows overlap.
        const float* xs[NORM_TOGETHER];
        float means[NORM_TOGETHER], inverses[NORM_TOGETHER];
        for (std::int64_t k = 0; k < count; ++k) xs[k] = row_of(job, r + k, gate, sums + k * width);
        for (std::int64_t k = 0; k < count; ++k) {
            const auto [mean, rstd] =
                rms ? Moments{0.0f, rms_factor<NORM_LANES>(xs[k], width, eps)} : moments<NORM_LANES>(xs[k], width, eps);
            means[k] = mean;
            inverses[k] = rstd;
        }
        for (std::int64_t k = 0; k < count; ++k)
            write_row(job, (r + k) * width, xs[k], means[k], inverses[k], factors, shift);
    }
}

}  // namespace
}  // namespace msdd_fast
