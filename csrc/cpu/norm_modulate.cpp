#include "msdd_fast/norm_modulate.h"

#include <algorithm>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/layer_norm.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

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

MSDD_SIMD_CLONES void norm_modulate_rows(const NormModulate& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float gates[MAX_NORM_WIDTH], shifts[MAX_NORM_WIDTH], scales[MAX_NORM_WIDTH];
    alignas(64) float sums[MAX_NORM_WIDTH], ys[MAX_NORM_WIDTH], results[MAX_NORM_WIDTH];
    alignas(64) float factors[MAX_NORM_WIDTH];  // of RMSNorm: its weight times 1 + scale
    const auto [rows, width, run, groups, eps] = job.shape;
    const float *gate = nullptr, *shift = nullptr, *scale = nullptr;
    std::int64_t known = -1;  // group whose rows of the tables are at hand
    for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t group = std::min(r / run, groups - 1), at = r * width;
        if (group != known) {
            gate = row(job.gate, group, width, gates);
            shift = row(job.shift, group, width, shifts);
            scale = row(job.scale, group, width, scales);
            if (job.rms_weight.values.data != nullptr) {
                const float* weight = row(job.rms_weight, group, width, results);
                for (std::int64_t i = 0; i < width; ++i) factors[i] = weight[i] * (1.0f + scale[i]);
            }
            known = group;
        }
        const float* x = floats({job.x, job.dtype}, at, width, sums);
        if (job.y.data != nullptr) {
            const float* y = floats(job.y, at, width, ys);
            float* sum = place(job.x_new, job.dtype, at, sums);
            for (std::int64_t i = 0; i < width; ++i) sum[i] = x[i] + gate[i] * y[i];
            store(sum, width, job.x_new, job.dtype, at);
            x = floats({job.x_new, job.dtype}, at, width, sums);  // as rounded
        }
        float* __restrict h = place(job.h, job.dtype, at, results);
        if (job.rms_weight.values.data != nullptr) {
            const float factor = rms_factor<NORM_LANES>(x, width, eps);
            for (std::int64_t i = 0; i < width; ++i) h[i] = x[i] * factor * factors[i] + shift[i];
        } else {
            const auto [mean, rstd] = moments<NORM_LANES>(x, width, eps);
            for (std::int64_t i = 0; i < width; ++i) h[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
        }
        store(h, width, job.h, job.dtype, at);
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
