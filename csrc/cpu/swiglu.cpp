#include "msdd_fast/swiglu.h"

#include <algorithm>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/exp.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr std::int64_t SWIGLU_CHUNK = 1024;              // elements widened at a time: all buffers together fit in L1
constexpr std::int64_t SWIGLU_GRAIN_ELEMENTS = 1 << 14;  // about 0.02 ms

struct Swiglu {
    void* out;
    Operand a, b;
    std::int64_t width, stride_a, stride_b;
};

MSDD_SIMD_CLONES void swiglu_rows(const Swiglu& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float buffers[3][SWIGLU_CHUNK];
    for (std::int64_t row = begin; row < end; ++row)
        for (std::int64_t at = 0; at < job.width; at += SWIGLU_CHUNK) {
            const std::int64_t count = std::min(SWIGLU_CHUNK, job.width - at), to = row * job.width + at;
            const float* a = floats(job.a, row * job.stride_a + at, count, buffers[0]);
            const float* b = floats(job.b, row * job.stride_b + at, count, buffers[1]);
            float* __restrict out = place(job.out, job.a.dtype, to, buffers[2]);
            for (std::int64_t i = 0; i < count; ++i) out[i] = a[i] / (1.0f + exp_float(-a[i])) * b[i];
            store(out, count, job.out, job.a.dtype, to);
        }
}

void swiglu(void* out, const void* a, const void* b, DType dtype, std::int64_t rows, std::int64_t width,
            std::int64_t stride_a, std::int64_t stride_b, int threads) {
    expect(rows >= 0 && width >= 0, "sizes must not be negative");
    expect_threads(threads);
    if (rows == 0 || width == 0) return;
    expect(out != nullptr, "out is missing");
    const Swiglu job{out, {a, dtype}, {b, dtype}, width, stride_a, stride_b};
    parallel_for(rows, std::max<std::int64_t>(1, SWIGLU_GRAIN_ELEMENTS / width), threads,
                 [&](std::int64_t begin, std::int64_t end) { swiglu_rows(job, begin, end); });
}

}  // namespace msdd_fast
