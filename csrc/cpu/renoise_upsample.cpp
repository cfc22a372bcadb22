#include "msdd_fast/renoise_upsample.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/noise.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

// One row of 2x2 blocks of one channel. Neighbouring pixels of x and of the output are `step` elements apart.
struct BlockRow {
    const void* x;  // `blocks` pixels; null means zeros
    void *top, *bottom;
    std::int64_t blocks, step;
    std::uint64_t seed;
    std::uint32_t first_block;
};

template <class T>
MSDD_INLINE void renoise_row_of(const BlockRow& row, const NoiseFormula& formula) {
    const T* x = static_cast<const T*>(row.x);
    const std::int64_t step = row.step;
    for (std::int64_t j = 0; j < row.blocks; j += LANES) {
        const std::int64_t count = std::min<std::int64_t>(LANES, row.blocks - j);
        const bool whole = step == 1 && count == LANES;
        T pixel[LANES] = {};
        if (x != nullptr && whole)
            std::memcpy(pixel, x + j, sizeof pixel);
        else if (x != nullptr)
            for (std::int64_t i = 0; i < count; ++i) pixel[i] = x[(j + i) * step];

        float wide_pixel[LANES], wide[2][2 * LANES];
        widen(pixel, LANES, wide_pixel);
        renoise_blocks(wide_pixel, row.seed, row.first_block + static_cast<std::uint32_t>(j), formula, wide);
        T rows[2][2 * LANES];
        narrow(wide[0], 2 * LANES, rows[0]);
        narrow(wide[1], 2 * LANES, rows[1]);

        T* top = static_cast<T*>(row.top) + 2 * j * step;
        T* bottom = static_cast<T*>(row.bottom) + 2 * j * step;
        if (whole) {
            std::memcpy(top, rows[0], sizeof rows[0]);
            std::memcpy(bottom, rows[1], sizeof rows[1]);
        } else {
            for (std::int64_t i = 0; i < 2 * count; ++i) {
                top[i * step] = rows[0][i];
                bottom[i * step] = rows[1][i];
            }
        }
    }
}

// Not a template and not in an anonymous namespace, or it would get no clones.
MSDD_SIMD_CLONES void renoise_row(DType dtype, const BlockRow& row, const NoiseFormula& formula) {
    switch (dtype) {
        case DType::float32:
            return renoise_row_of<float>(row, formula);
        case DType::bfloat16:
            return renoise_row_of<BFloat16>(row, formula);
        case DType::float16:
            return renoise_row_of<Float16>(row, formula);
    }
}

void noise_image(void* out, const void* x, DType dtype, bool channels_last, const std::int64_t* seeds,
                 std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
                 const NoiseFormula& formula, int threads) {
    expect(batch >= 0 && channels >= 0 && height >= 0 && width >= 0, "sizes must not be negative");
    expect_threads(threads);
    const std::int64_t rows = channels * height;  // of one image
    if (batch == 0 || rows == 0 || width == 0) return;
    expect(rows <= (std::int64_t{1} << 32) / width, "an image must have at most 2^32 blocks of 2x2 pixels");
    expect(out != nullptr && seeds != nullptr, "out or seeds is missing");

    const std::int64_t step = channels_last ? channels : 1;
    const std::int64_t size = dtype == DType::float32 ? 4 : 2;
    const char* source = static_cast<const char*>(x);
    char* target = static_cast<char*>(out);
    // In memory order: row = (image, channel, y), or (image, y, channel) if channels come last.
    const auto body = [=, &formula](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const std::int64_t line = row / step, channel = row % step;
            char* top = target + size * (4 * line * width * step + channel);
            const std::int64_t plane_row = channels_last ? channel * height + line % height : row % rows;
            renoise_row(dtype,
                        {source == nullptr ? nullptr : source + size * (line * width * step + channel), top,
                         top + size * 2 * width * step, width, step, static_cast<std::uint64_t>(seeds[row / rows]),
                         static_cast<std::uint32_t>(plane_row * width)},
                        formula);
        }
    };
    parallel_for(batch * rows, std::max<std::int64_t>(1, GRAIN_BLOCKS / width), threads, body);
}

NoiseFormula renoise_formula(const RenoiseScalars& scalars) {
    const double correlation = scalars.correlation;
    expect(scalars.stage >= 0 && scalars.stage <= 0xFFFFFFFF,
           "stage must be in [0, 2^32), got " + std::to_string(scalars.stage));
    // -1/3 may come rounded to float32. NaN fails the second comparison.
    expect(correlation >= -1.0 / 3.0 - 1e-6 && correlation < 1.0,
           "correlation must be in [-1/3, 1), got " + std::to_string(correlation));
    const auto a = static_cast<float>(std::sqrt(1.0 - correlation));
    const auto b = static_cast<float>(std::sqrt(std::max(0.0, 1.0 + 3.0 * correlation)));
    return {static_cast<std::uint32_t>(scalars.stage), PURPOSE_RENOISE, a, b, scalars.alpha, scalars.beta};
}

void renoise_upsample(void* out, const void* x, DType dtype, bool channels_last, const std::int64_t* seeds,
                      std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
                      const RenoiseScalars& scalars, int threads) {
    const NoiseFormula formula = renoise_formula(scalars);
    expect(x != nullptr || batch * channels * height * width == 0, "x is missing");
    noise_image(out, x, dtype, channels_last, seeds, batch, channels, height, width, formula, threads);
}

}  // namespace msdd_fast
