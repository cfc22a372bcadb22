#include "msdd_fast/cfg_euler.h"

#include <algorithm>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/lanes_avx2.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

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

#ifdef MSDD_SIMD_DISPATCH
namespace {

constexpr std::int64_t STRIDE = 32;   // elements of an iteration: at least one cache line of each operand
constexpr std::int64_t AHEAD = 1024;  // bytes: a memory's latency before they are needed

// To the cache, though it may lie behind the end of the operand: a prefetch never faults.
template <class T>
MSDD_INLINE void prefetch(const T* at) {
    const char* address = reinterpret_cast<const char*>(at) + AHEAD;
    for (std::size_t line = 0; line < STRIDE * sizeof(T); line += 64) __builtin_prefetch(address + line);
}

template <class T, bool GUIDED, bool STEPS>
MSDD_AVX2 void elements_avx2(T* out, const T* x, const T* v, const T* uncond, std::int64_t count, float scale,
                             float dt) {
    const __m256 scales = _mm256_set1_ps(scale), dts = _mm256_set1_ps(dt);
    std::int64_t i = 0;
    for (; i + STRIDE <= count; i += STRIDE) {
        prefetch<T>(v + i);
        if constexpr (GUIDED) prefetch<T>(uncond + i);
        if constexpr (STEPS) prefetch<T>(x + i);
#pragma GCC unroll 4
        for (std::int64_t j = i; j < i + STRIDE; j += 8) {
            __m256 value = avx2::load(v + j);
            if constexpr (GUIDED) {
                const __m256 base = avx2::load(uncond + j);
                value = _mm256_add_ps(base, _mm256_mul_ps(scales, _mm256_sub_ps(value, base)));
            }
            if constexpr (STEPS) value = _mm256_add_ps(avx2::load(x + j), _mm256_mul_ps(dts, value));
            avx2::store(out + j, value);
        }
    }
    for (; i < count; ++i) {
        float value = to_float(v[i]);
        if constexpr (GUIDED) {
            const float base = to_float(uncond[i]);
            value = base + scale * (value - base);
        }
        if constexpr (STEPS) value = to_float(x[i]) + dt * value;
        out[i] = from_float<T>(value);
    }
}

template <class T>
void range_avx2(const CfgEuler& job, std::int64_t begin, std::int64_t end) {
    const auto at = [](const Rows& rows, std::int64_t row, std::int64_t column) {
        const T* data = static_cast<const T*>(rows.values.data);
        return data == nullptr ? nullptr : data + row * rows.stride + column;
    };
    const bool guided = job.v_uncond.values.data != nullptr, steps = job.x.values.data != nullptr;
    const auto run = guided ? (steps ? elements_avx2<T, true, true> : elements_avx2<T, true, false>)
                            : (steps ? elements_avx2<T, false, true> : elements_avx2<T, false, false>);
    for (std::int64_t to = begin, count; to < end; to += count) {
        const std::int64_t row = to / job.columns, column = to % job.columns;
        count = std::min(end - to, job.columns - column);
        run(static_cast<T*>(job.out) + to, at(job.x, row, column), at(job.v_cond, row, column),
            at(job.v_uncond, row, column), count, job.scale, job.dt);
    }
}

}  // namespace
#endif

// The code for this machine and these element types.
auto range_for(const CfgEuler& job) -> void (*)(const CfgEuler&, std::int64_t, std::int64_t) {
#ifdef MSDD_SIMD_DISPATCH
    const auto same = [&](const Rows& rows) {
        return rows.values.data == nullptr || rows.values.dtype == job.out_dtype;
    };
    if (has_avx2() && same(job.x) && same(job.v_cond) && same(job.v_uncond)) {
        switch (job.out_dtype) {
            case DType::float32:
                return range_avx2<float>;
            case DType::bfloat16:
                return range_avx2<BFloat16>;
            case DType::float16:
                return range_avx2<Float16>;
        }
    }
#endif
    return cfg_euler_range;
}

void cfg_euler(void* out, DType out_dtype, const Rows& x, const Rows& v_cond, const Rows& v_uncond, std::int64_t rows,
               std::int64_t columns, float scale, float dt, int threads) {
    expect(rows >= 0 && columns >= 0, "sizes must not be negative");
    expect_threads(threads);
    const std::int64_t count = rows * columns;
    if (count == 0) return;
    expect(v_cond.values.data != nullptr, "v_cond is missing");
    expect(out != nullptr, "out is missing");
    const CfgEuler job{out, out_dtype, x, v_cond, v_uncond, columns, scale, dt};
    const auto run = range_for(job);
    parallel_for(count, GRAIN_ELEMENTS, threads, [&](std::int64_t begin, std::int64_t end) { run(job, begin, end); });
}

}  // namespace msdd_fast
