// A part of a product: tile by tile, the sums of up to ROWS rows of x with a panel of the weight, then what follows.
// Each SIMD level's file defines these and then includes this:
//
//   MSDD_SIMD           attribute of functions that use the level's instructions
//   Element, STEP       of x as the tiles read it: float, 1; BFloat16, 2; or std::uint8_t, 4
//   PANEL, ROWS         columns and rows of a tile
//   tile                (x, stride, rows, words of a panel, in, out): rows x PANEL sums, of bytes as std::int32_t; also
//                       begin_tiles and end_tiles; micro_kernel.h or its own
//   MSDD_NARROW         if it has its own `narrow_sums` from float to bfloat16
//   MSDD_SWIGLU         if it has its own `swiglu_sums`
//
// Everything has internal linkage, so levels do not clash.
//
// No include guard: each level includes this exactly once.

#include <algorithm>
#include <type_traits>

#include "job.h"
#include "msdd_fast/detail/exp.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/scratch.h"
#include "write.h"

namespace msdd_fast {
namespace {

#ifndef MSDD_SWIGLU
// The first half of a row becomes silu(first half) * second half; `bias` of both is added before, if there is one.
MSDD_SIMD inline void swiglu_sums(float* sums, const float* bias) {
    constexpr std::int64_t HALF = PANEL / 2;
    if (bias != nullptr)
        for (std::int64_t i = 0; i < PANEL; ++i) sums[i] += bias[i];
    for (std::int64_t i = 0; i < HALF; ++i) sums[i] = sums[i] / (1.0f + exp_float(-sums[i])) * sums[i + HALF];
}
#endif

// One row of a tile: bias, activation, rounding. `count` columns exist, WIDTH are in the tile.
template <class T, bool SWIGLU>
MSDD_SIMD inline void finish_row(float* sums, const float* bias, std::int64_t count, T* out) {
    constexpr std::int64_t WIDTH = SWIGLU ? PANEL / 2 : PANEL;
    if constexpr (SWIGLU) {
        swiglu_sums(sums, bias);
    } else if (bias != nullptr) {
        for (std::int64_t i = 0; i < PANEL; ++i) sums[i] += bias[i];
    }
    if (count == WIDTH)
        write(sums, WIDTH, out);  // of a size that the compiler knows
    else
        write(sums, count, out);
}

constexpr bool QUANTIZED = std::is_same_v<Element, std::uint8_t>;

// One row of sums of bytes as the numbers that they stand for. `panel` is where the panel's scales begin.
MSDD_SIMD inline void dequantize_row(float* __restrict sums, const float* panel, float row_scale) {
    for (std::int64_t i = 0; i < PANEL; ++i) {
        const std::int32_t total = detail::as_int(sums[i]) - detail::as_int(panel[PANEL + i]);
        sums[i] = static_cast<float>(total) * (row_scale * panel[i]);
    }
}

template <class T, bool SWIGLU>
MSDD_SIMD void run_panels(const LinearJob& job, const LinearPart& part, const Element* x, std::int64_t stride) {
    alignas(64) float sums[ROWS * PANEL], bias[PANEL];
    constexpr std::int64_t WIDTH = SWIGLU ? PANEL / 2 : PANEL;
    // Tiles of nearly equal heights: a last one of a single row would cost as much as one of three.
    const std::int64_t tiles = (part.rows + ROWS - 1) / ROWS;
    for (std::int64_t panel = part.panel; panel < part.panel + part.panels; ++panel) {
        const std::int64_t first = panel * WIDTH, count = std::min(WIDTH, job.width - first);
        const bool biased = job.bias.data != nullptr;
        if (biased) {
            std::fill(bias, bias + PANEL, 0.0f);
            for (int half = 0; half <= (SWIGLU ? 1 : 0); ++half) {
                float* const to = bias + half * WIDTH;
                const float* from = floats(job.bias, first + half * job.width, count, to);
                if (from != to) std::copy(from, from + count, to);
            }
        }
        for (std::int64_t i = 0; i < tiles; ++i) {
            const std::int64_t begin = part.rows * i / tiles, rows = part.rows * (i + 1) / tiles - begin;
            const float* const words = job.packed + panel * job.panel_words;
            tile(x + begin * stride, stride, rows, words, job.in, sums);
            for (std::int64_t r = 0; r < rows; ++r) {
                const std::int64_t row = part.row + begin + r;
                if constexpr (QUANTIZED)
                    dequantize_row(sums + r * PANEL, words + job.panel_words - 2 * PANEL, job.row_scales[row]);
                finish_row<T, SWIGLU>(sums + r * PANEL, biased ? bias : nullptr, count,
                                      static_cast<T*>(job.out) + row * job.out_stride + first);
            }
        }
    }
}

template <class T>
MSDD_SIMD void run_as(const LinearJob& job, const LinearPart& part, const Element* x, std::int64_t stride) {
    if (job.swiglu)
        run_panels<T, true>(job, part, x, stride);
    else
        run_panels<T, false>(job, part, x, stride);
}

// Rows of x from `row` on, widened into scratch unless the tiles read their dtype; `stride` becomes that of the result.
template <class E>
MSDD_SIMD inline const E* rows_of(const LinearJob& job, const LinearPart& part, std::int64_t& stride) {
    const std::int64_t begin = part.row * stride;
    if constexpr (std::is_same_v<E, float>) {
        if (job.x.values.dtype != DType::float32) {
            float* const wide = scratch_of(part.rows * job.in);
            for (std::int64_t r = 0; r < part.rows; ++r)
                floats(job.x.values, begin + r * stride, job.in, wide + r * job.in);
            stride = job.in;
            return wide;
        }
    }
    return static_cast<const E*>(job.x.values.data) + begin;
}

MSDD_SIMD void run_part(const LinearJob& job, const LinearPart& part) {
    std::int64_t stride = job.x.stride;
    const Element* const x = rows_of<Element>(job, part, stride);
    begin_tiles();
    switch (job.out_dtype) {
        case DType::float32:
            run_as<float>(job, part, x, stride);
            break;
        case DType::bfloat16:
            run_as<BFloat16>(job, part, x, stride);
            break;
        case DType::float16:
            run_as<Float16>(job, part, x, stride);
            break;
    }
    end_tiles();
}

}  // namespace
}  // namespace msdd_fast
