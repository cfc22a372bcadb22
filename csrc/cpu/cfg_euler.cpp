#include "msdd_fast/cfg_euler.h"

#include <algorithm>

#include "msdd_fast/check.h"
#include "msdd_fast/parallel.h"
#include "msdd_fast/simd.h"

namespace msdd_fast {

constexpr std::int64_t CHUNK = 256;               // elements widened at a time: all buffers together fit in L1
constexpr std::int64_t GRAIN_ELEMENTS = 1 << 15;  // about 0.05 ms of memory traffic

struct CfgEuler {
    void* out;
    DType out_dtype;
    Rows x, v_cond, v_uncond;
    std::int64_t columns;
    float scale, dt;
};

MSDD_SIMD_CLONES void cfg_euler_range(const CfgEuler& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float buffers[4][CHUNK];
    const float scale = job.scale, dt = job.dt;
    for (std::int64_t at = begin, count; at < end; at += count) {
        const std::int64_t row = at / job.columns, column = at % job.columns;
        count = std::min({CHUNK, end - at, job.columns - column});
        const float* x = floats(job.x.values, row * job.x.stride + column, count, buffers[0]);
        const float* cond = floats(job.v_cond.values, row * job.v_cond.stride + column, count, buffers[1]);
        const float* uncond = floats(job.v_uncond.values, row * job.v_uncond.stride + column, count, buffers[2]);
        float* __restrict out = place(job.out, job.out_dtype, at, buffers[3]);
        for (std::int64_t i = 0; i < count; ++i) {
            float v = cond[i];
            if (uncond != nullptr) v = uncond[i] + scale * (v - uncond[i]);
            if (x != nullptr) v = x[i] + dt * v;
            out[i] = v;
        }
        store(out, count, job.out, job.out_dtype, at);
    }
}

void cfg_euler(void* out, DType out_dtype, const Rows& x, const Rows& v_cond, const Rows& v_uncond, std::int64_t rows,
               std::int64_t columns, float scale, float dt, int threads) {
    expect(rows >= 0 && columns >= 0, "sizes must not be negative");
    expect_threads(threads);
    const std::int64_t count = rows * columns;
    if (count == 0) return;
    expect(v_cond.values.data != nullptr, "v_cond is missing");
    const CfgEuler job{out, out_dtype, x, v_cond, v_uncond, columns, scale, dt};
    parallel_for(count, GRAIN_ELEMENTS, threads,
                 [&](std::int64_t begin, std::int64_t end) { cfg_euler_range(job, begin, end); });
}

}  // namespace msdd_fast
