#include "msdd_fast/sde_step.h"

#include <algorithm>
#include <string>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/noise.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr std::int64_t SDE_COLUMNS = 2 * LANES;  // pixels of a line at a time
constexpr std::int64_t SDE_GRAIN_PIXELS = 1 << 14;

struct SdeStep {
    void* out;
    Operand x, v, noise;
    const std::int64_t* seeds;  // null: no noise, or the noise that is given
    SdeShape shape;
    SdeOptions options;
};

// `count` velocities of a line from column `first` on.
template <class T>
MSDD_INLINE void read_pixels(const T* v, const SdeShape& s, std::int64_t image, std::int64_t channel, std::int64_t y,
                             std::int64_t first, std::int64_t count, float* to) {
    const std::int64_t p = s.patch, per_row = s.width / p, step = s.channels;
    for (std::int64_t i = 0; i < count;) {
        const std::int64_t x = first + i, inside = x % p, run = std::min(p - inside, count - i);
        const std::int64_t token = y / p * per_row + x / p;
        const T* from = v + (((token * s.batch + image) * p + y % p) * p + inside) * step + channel;
        for (std::int64_t k = 0; k < run; ++k) to[i + k] = to_float(from[k * step]);
        i += run;
    }
}

MSDD_INLINE const float* velocities(const SdeStep& job, std::int64_t image, std::int64_t channel, std::int64_t y,
                                    std::int64_t first, std::int64_t count, float* buffer) {
    const SdeShape& s = job.shape;
    if (s.patch == 0)
        return floats(job.v, ((image * s.channels + channel) * s.height + y) * s.width + first, count, buffer);
    switch (job.v.dtype) {
        case DType::float32:
            read_pixels(static_cast<const float*>(job.v.data), s, image, channel, y, first, count, buffer);
            break;
        case DType::bfloat16:
            read_pixels(static_cast<const BFloat16*>(job.v.data), s, image, channel, y, first, count, buffer);
            break;
        case DType::float16:
            read_pixels(static_cast<const Float16*>(job.v.data), s, image, channel, y, first, count, buffer);
            break;
    }
    return buffer;
}

// `count` pixels of a line; noise null: none.
MSDD_INLINE void sde_line(const SdeStep& job, std::int64_t image, std::int64_t channel, std::int64_t y,
                          std::int64_t first, std::int64_t count, const float* noise) {
    alignas(64) float xs[SDE_COLUMNS], vs[SDE_COLUMNS], results[SDE_COLUMNS];
    const std::int64_t at = ((image * job.shape.channels + channel) * job.shape.height + y) * job.shape.width + first;
    const float *x = floats(job.x, at, count, xs), *v = velocities(job, image, channel, y, first, count, vs);
    float* out = place(job.out, job.x.dtype, at, results);
    const double t = job.options.t;  // a product of two float32 is exact in float64
    const float next = job.options.t_next, keep = 1.0f - next;
    for (std::int64_t i = 0; i < count; ++i)
        out[i] = static_cast<float>(static_cast<double>(x[i]) - t * static_cast<double>(v[i]));
    if (noise != nullptr)
        for (std::int64_t i = 0; i < count; ++i) out[i] = keep * out[i] + next * noise[i];
    if (job.options.clamp)
        for (std::int64_t i = 0; i < count; ++i) {
            const float low = out[i] < -1.0f ? -1.0f : out[i];  // a NaN stays
            out[i] = low > 1.0f ? 1.0f : low;
        }
    store(out, count, job.out, job.x.dtype, at);
}

// Lines [begin, end) of the images in the order (image, y, channel); pairs of lines where seeds make the noise.
MSDD_SIMD_CLONES void sde_lines(const SdeStep& job, std::int64_t begin, std::int64_t end) {
    const SdeShape& s = job.shape;
    const std::int64_t lines = job.seeds == nullptr ? s.height : s.height / 2;
    alignas(64) float given[SDE_COLUMNS];
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t channel = i % s.channels, y = i / s.channels % lines, image = i / s.channels / lines;
        for (std::int64_t first = 0; first < s.width; first += SDE_COLUMNS) {
            const std::int64_t count = std::min(SDE_COLUMNS, s.width - first);
            if (job.seeds == nullptr) {
                const std::int64_t at = ((image * s.channels + channel) * s.height + y) * s.width + first;
                sde_line(job, image, channel, y, first, count, floats(job.noise, at, count, given));
                continue;
            }
            float eps[4][LANES];
            const auto block = static_cast<std::uint32_t>(((channel * lines + y) * s.width + first) / 2);
            block_normals<LANES>(eps, static_cast<std::uint64_t>(job.seeds[image]), block,
                                 static_cast<std::uint32_t>(job.options.stage), PURPOSE_RENOISE);
            for (int line = 0; line < 2; ++line) {
                for (int k = 0; k < LANES; ++k) {
                    given[2 * k] = eps[2 * line][k];
                    given[2 * k + 1] = eps[2 * line + 1][k];
                }
                sde_line(job, image, channel, 2 * y + line, first, count, given);
            }
        }
    }
}

void sde_step(void* out, const Operand& x, const Operand& v, const Operand& noise, const std::int64_t* seeds,
              const SdeShape& shape, const SdeOptions& options, int threads) {
    const auto& [batch, channels, height, width, patch] = shape;
    expect(batch >= 0 && channels >= 0 && height >= 0 && width >= 0 && patch >= 0, "sizes must not be negative");
    expect(patch == 0 || (height % patch == 0 && width % patch == 0), "patch must divide height and width");
    expect(options.stage >= 0 && options.stage <= 0xFFFFFFFF,
           "stage must be in [0, 2^32), got " + std::to_string(options.stage));
    expect_threads(threads);
    if (batch * channels * height * width == 0) return;
    expect(out != nullptr && x.data != nullptr && v.data != nullptr, "out, x or v is missing");
    expect(!options.renoise || (seeds == nullptr) != (noise.data == nullptr), "either seeds or noise must be given");
    SdeStep job{out, x, v, noise, seeds, shape, options};
    if (!options.renoise) {
        job.seeds = nullptr;
        job.noise = {};
    }
    expect(job.seeds == nullptr || (height % 2 == 0 && width % 2 == 0),
           "height and width must be even (noise comes in 2x2 blocks), got " + std::to_string(height) + "x" +
               std::to_string(width));
    expect(job.seeds == nullptr || channels * (height / 2) <= (std::int64_t{1} << 32) / (width / 2),
           "an image must have at most 2^32 blocks of 2x2 pixels");
    const std::int64_t lines = batch * channels * (job.seeds == nullptr ? height : height / 2);
    parallel_for(lines, std::max<std::int64_t>(1, SDE_GRAIN_PIXELS / width), threads,
                 [&](std::int64_t begin, std::int64_t end) { sde_lines(job, begin, end); });
}

}  // namespace msdd_fast
