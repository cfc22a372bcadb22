#include "msdd_fast/norm_modulate.h"

#include <algorithm>

#include "job.h"
#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

#define MSDD_SIMD MSDD_INLINE

namespace msdd_fast {
namespace {

constexpr std::int64_t NORM_GRAIN_ELEMENTS = 1 << 15;  // about 0.02 ms

MSDD_SIMD const float* row_of(const NormModulate& job, std::int64_t r, const float* gate, float* buffer) {
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

MSDD_SIMD void write_row(const NormModulate& job, std::int64_t at, const float* x, float mean, float inverse,
                         const float* factors, const float* shift) {
    alignas(64) float results[MAX_NORM_WIDTH];
    float* __restrict h = place(job.h, job.dtype, at, results);
    for (std::int64_t i = 0; i < job.shape.width; ++i) h[i] = (x[i] - mean) * inverse * factors[i] + shift[i];
    store(h, job.shape.width, job.h, job.dtype, at);
}

}  // namespace
}  // namespace msdd_fast

#include "rows.h"

namespace msdd_fast {

MSDD_SIMD_CLONES void norm_modulate_rows(const NormModulate& job, std::int64_t begin, std::int64_t end) {
    rows_of_level(job, begin, end);
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
    auto* rows = norm_modulate_rows;
#ifdef MSDD_X86_LEVELS
    static const bool pairs = can_run("avx512bf16");
    const bool narrow = dtype == DType::bfloat16 && (y.data == nullptr || y.dtype == DType::bfloat16);
    if (pairs && narrow) rows = norm_modulate_rows_avx512bf16;
#endif
    parallel_for(shape.rows, std::max<std::int64_t>(1, NORM_GRAIN_ELEMENTS / shape.width), threads,
                 [&](std::int64_t begin, std::int64_t end) { rows(job, begin, end); });
}

}  // namespace msdd_fast
