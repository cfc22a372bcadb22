#include "msdd_fast/noise.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "msdd_fast/parallel.h"
#include "msdd_fast/philox.h"
#include "msdd_fast/simd.h"

namespace msdd_fast {
namespace {

constexpr int LANES = 16;                       // blocks at a time: one AVX-512 register, two of AVX2
constexpr std::int64_t GRAIN_BLOCKS = 1 << 13;  // about 0.1 ms of work with AVX2

struct Noise {
    std::uint32_t stage, purpose;
    float a, b;  // factors of correlate_blocks; a == b means white
};

void expect(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace

// One row of blocks, i.e. two rows of pixels of `width` each. All LANES lanes are always computed, also past the
// end of the row, so that a value never depends on where a row ends or a batch is cut.
MSDD_SIMD_CLONES void noise_block_row(float* __restrict top, float* __restrict bottom, std::int64_t width,
                                      std::uint64_t seed, std::uint32_t first_block, const Noise& noise) {
    const std::int64_t blocks = width / 2;
    for (std::int64_t j = 0; j < blocks; j += LANES) {
        float eps[4][LANES];
        block_normals<LANES>(eps, seed, first_block + static_cast<std::uint32_t>(j), noise.stage, noise.purpose);
        if (noise.a != noise.b) correlate_blocks<LANES>(eps, noise.a, noise.b);
        const std::int64_t count = std::min<std::int64_t>(LANES, blocks - j);
        for (std::int64_t i = 0; i < count; ++i) {
            top[2 * (j + i)] = eps[0][i];
            top[2 * (j + i) + 1] = eps[1][i];
            bottom[2 * (j + i)] = eps[2][i];
            bottom[2 * (j + i) + 1] = eps[3][i];
        }
    }
}

namespace {

void fill(float* out, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels, std::int64_t height,
          std::int64_t width, const Noise& noise, int threads) {
    expect(batch >= 0 && channels >= 0 && height >= 0 && width >= 0, "sizes must not be negative");
    expect(height % 2 == 0 && width % 2 == 0, "height and width must be even (noise comes in 2x2 blocks), got " +
                                                  std::to_string(height) + "x" + std::to_string(width));
    expect(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
    const std::int64_t rows = channels * (height / 2), blocks = width / 2;  // of one image
    if (batch == 0 || rows == 0 || blocks == 0) return;
    expect(rows <= (std::int64_t{1} << 32) / blocks, "an image must have at most 2^32 blocks of 2x2 pixels");
    parallel_for(batch * rows, std::max<std::int64_t>(1, GRAIN_BLOCKS / blocks), threads,
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t row = begin; row < end; ++row) {
                         float* top = out + row * 2 * width;
                         const auto seed = static_cast<std::uint64_t>(seeds[row / rows]);
                         noise_block_row(top, top + width, width, seed, static_cast<std::uint32_t>(row % rows * blocks),
                                         noise);
                     }
                 });
}

}  // namespace

void start_noise(float* out, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels, std::int64_t height,
                 std::int64_t width, int threads) {
    fill(out, seeds, batch, channels, height, width, {0, PURPOSE_START, 1.0f, 1.0f}, threads);
}

void renoise_noise(float* out, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels,
                   std::int64_t height, std::int64_t width, std::int64_t stage, double correlation, int threads) {
    expect(stage >= 0 && stage <= 0xFFFFFFFF, "stage must be in [0, 2^32), got " + std::to_string(stage));
    // -1/3 may come rounded to float32. NaN fails the second comparison.
    expect(correlation >= -1.0 / 3.0 - 1e-6 && correlation < 1.0,
           "correlation must be in [-1/3, 1), got " + std::to_string(correlation));
    const auto a = static_cast<float>(std::sqrt(1.0 - correlation));
    const auto b = static_cast<float>(std::sqrt(std::max(0.0, 1.0 + 3.0 * correlation)));
    fill(out, seeds, batch, channels, height, width, {static_cast<std::uint32_t>(stage), PURPOSE_RENOISE, a, b},
         threads);
}

}  // namespace msdd_fast
