#include "msdd_fast/norm_modulate.h"

#include <algorithm>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/layer_norm.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr std::int64_t NORM_TOGETHER = 16;             // rows at a time
constexpr int NORM_LANES = 32;                         // four vectors of AVX2: enough to hide the latency of addition
constexpr std::int64_t NORM_GRAIN_ELEMENTS = 1 << 15;  // about 0.02 ms

struct NormModulate {
    void *h, *x_new;
    const void* x;
    DType dtype;
    Operand y;
    Table gate, shift, scale, rms_weight;
    NormShape shape;
};

MSDD_INLINE const float* row(const Table& table, std::int64_t group, std::int64_t width, float* buffer) {
    return floats(table.values, group * table.stride, width, buffer);
}

// Row `r` of x, plus gate * y where there is y, which is stored and then taken as rounded. `buffer` is for both.
MSDD_INLINE const float* row_of(const NormModulate& job, std::int64_t r, const float* gate, float* buffer) {
    alignas(64) float ys[MAX_NORM_WIDTH];
    const std::int64_t width = job.shape.width, at = r * width;
    const float* x = floats({job.x, job.dtype}, at, width, buffer);
    if (job.y.data == nullptr) return x;
    const float* y = floats(job.y, at, width, ys);
    float* sum = place(job.x_new, job.dtype, at, buffer);
    for (std::int64_t i = 0; i < width; ++i) sum[i] = x[i] + gate[i] * y[i];
    store(sum, width, job.x_new, job.dtype, at);
    return floats({job.x_new, job.dtype}, at, width, buffer);
}

MSDD_SIMD_CLONES void norm_modulate_rows(const NormModulate& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float gates[MAX_NORM_WIDTH], shifts[MAX_NORM_WIDTH], scales[MAX_NORM_WIDTH];
    alignas(64) float sums[MAX_NORM_WIDTH], results[MAX_NORM_WIDTH];
    alignas(64) float factors[MAX_NORM_WIDTH];  // of RMSNorm: its weight times 1 + scale
    const auto [rows, width, run, groups, eps] = job.shape;
    const bool rms = job.rms_weight.values.data != nullptr;
    const float *gate = nullptr, *shift = nullptr, *scale = nullptr;
    std::int64_t known = -1;  // group whose rows of the tables are at hand
    const std::int64_t most = std::min(NORM_TOGETHER, MAX_NORM_WIDTH / width);
    for (std::int64_t r = begin, count; r < end; r += count) {
        const std::int64_t group = std::min(r / run, groups - 1);
        const std::int64_t group_end = group == groups - 1 ? end : (group + 1) * run;
        count = std::min({most, end - r, group_end - r});
        if (group != known) {
            gate = row(job.gate, group, width, gates);
            shift = row(job.shift, group, width, shifts);
            scale = row(job.scale, group, width, scales);
            if (rms) {
                const float* weight = row(job.rms_weight, group, width, results);
                for (std::int64_t i = 0; i < width; ++i) factors[i] = weight[i] * (1.0f + scale[i]);
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
        for (std::int64_t k = 0; k < count; ++k) {
            const std::int64_t at = (r + k) * width;
            const float *const x = xs[k], mean = means[k], inverse = inverses[k];
            float* __restrict h = place(job.h, job.dtype, at, results);
            if (rms)
                for (std::int64_t i = 0; i < width; ++i) h[i] = x[i] * inverse * factors[i] + shift[i];
            else
                for (std::int64_t i = 0; i < width; ++i) h[i] = (x[i] - mean) * inverse * (1.0f + scale[i]) + shift[i];
            store(h, width, job.h, job.dtype, at);
        }
    }
}

void norm_modulate(void* h, void* x_new, const void* x, DType dtype, const Operand& y, const Table& gate,
                   const Table& shift, const Table& scale, const Table& rms_weight, const NormShape& shape,
                   int threads) {
    expect(shape.rows >= 0 && shape.width >= 0, "sizes must not be negative");
    expect(shape.width <= MAX_NORM_WIDTH, "width must be at most " + std::to_string(MAX_NORM_WIDTH));
    expect(shape.run >= 1 && shape.groups >= 1, "run and groups must be at least 1");
    expect_threads(threads);
    if (shape.rows == 0 || shape.width == 0) return;
    expect(shift.values.data != nullptr && scale.values.data != nullptr, "shift or scale is missing");
    expect(h != nullptr && (y.data == nullptr || x_new != nullptr), "h or x_new is missing");
    expect(y.data == nullptr || gate.values.data != nullptr, "gate is missing");
    const NormModulate job{h, x_new, x, dtype, y, gate, shift, scale, rms_weight, shape};
    parallel_for(shape.rows, std::max<std::int64_t>(1, NORM_GRAIN_ELEMENTS / shape.width), threads,
                 [&](std::int64_t begin, std::int64_t end) { norm_modulate_rows(job, begin, end); });
}

}  // namespace msdd_fast
