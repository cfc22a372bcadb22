#include "msdd_fast/geglu.h"

#include <algorithm>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/erf.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr std::int64_t GEGLU_CHUNK = 1024;              // elements widened at a time: all buffers together fit in L1
constexpr std::int64_t GEGLU_GRAIN_ELEMENTS = 1 << 14;  // as swiglu's

struct Geglu {
    void* out;
    Rows value, gate;
    std::int64_t width;
};

MSDD_SIMD_CLONES void geglu_rows(const Geglu& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float buffers[3][GEGLU_CHUNK];
    const DType dtype = job.value.values.dtype;
    for (std::int64_t row = begin; row < end; ++row)
        for (std::int64_t at = 0; at < job.width; at += GEGLU_CHUNK) {
            const std::int64_t count = std::min(GEGLU_CHUNK, job.width - at), to = row * job.width + at;
            const float* value = floats(job.value.values, row * job.value.stride + at, count, buffers[0]);
            const float* gate = floats(job.gate.values, row * job.gate.stride + at, count, buffers[1]);
            float* __restrict out = place(job.out, dtype, to, buffers[2]);
            for (std::int64_t i = 0; i < count; ++i) out[i] = value[i] * gelu(gate[i]);
            store(out, count, job.out, dtype, to);
        }
}

void geglu(void* out, const Rows& value, const Rows& gate, std::int64_t rows, std::int64_t width, int threads) {
    expect(rows >= 0 && width >= 0, "sizes must not be negative");
    expect_threads(threads);
    if (rows == 0 || width == 0) return;
    expect(out != nullptr && value.values.data != nullptr && gate.values.data != nullptr,
           "out, value or gate is missing");
    expect(value.values.dtype == gate.values.dtype, "value and gate must have one dtype");
    const Geglu job{out, value, gate, width};
    parallel_for(rows, std::max<std::int64_t>(1, GEGLU_GRAIN_ELEMENTS / width), threads,
                 [&](std::int64_t begin, std::int64_t end) { geglu_rows(job, begin, end); });
}

}  // namespace msdd_fast
