// Statistics are computed per chunk, mean first and then squared deviations, while the chunk is in the cache. Chunks
// are combined exactly (parallel variance), so x is read from memory twice in all instead of three times.
#include "msdd_fast/group_norm_modulate_silu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/exp.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/group_statistics.h"
#include "msdd_fast/detail/layer_norm.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr int GROUP_NORM_LANES = 32;
constexpr std::int64_t GROUP_CHUNK = 8192;                   // elements: 32 KiB as float32
constexpr std::int64_t GROUP_NORM_GRAIN_ELEMENTS = 1 << 15;  // about 0.02 ms

struct GroupNormJob {
    void* out;
    Operand x, weight, bias;
    Cells scale, shift;
    GroupNormShape shape;
};

// Mean and sum of the squares about it, of `count` elements.
struct GroupPart {
    float mean, squares;
    std::int64_t count;
};

// `count` neighbouring elements of one group.
MSDD_INLINE GroupPart run_part(const GroupNormJob& job, std::int64_t begin, std::int64_t count) {
    alignas(64) float wide[GROUP_CHUNK];
    const auto [mean, squares] = centred_squares<GROUP_NORM_LANES>(floats(job.x, begin, count, wide), count);
    return {mean, squares, count};
}

static std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How the elements of a group, contiguous, are cut into chunks.
struct GroupChunks {
    std::int64_t run, count;  // elements, chunks

    explicit GroupChunks(const GroupNormShape& s)
        : run(s.height * s.width * (s.channels / s.groups)), count(ceil_div(run, GROUP_CHUNK)) {}
};

MSDD_SIMD_CLONES void chunk_parts(const GroupNormJob& job, const GroupChunks& chunks, std::int64_t begin,
                                  std::int64_t end, GroupPart* parts) {
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t group = i / chunks.count, first = i % chunks.count * GROUP_CHUNK;
        parts[i] = run_part(job, group * chunks.run + first, std::min(GROUP_CHUNK, chunks.run - first));
    }
}

// One group of one image from its `count` parts.
static GroupNorm combine(const GroupPart* parts, std::int64_t count, float eps) {
    double elements = 0, sum = 0, squares = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const auto n = static_cast<double>(parts[i].count);
        elements += n;
        sum += n * static_cast<double>(parts[i].mean);
    }
    const double mean = sum / elements;
    for (std::int64_t i = 0; i < count; ++i) {
        const GroupPart& part = parts[i];
        const double apart = static_cast<double>(part.mean) - mean;
        squares += static_cast<double>(part.squares) + static_cast<double>(part.count) * apart * apart;
    }
    return {static_cast<float>(mean), static_cast<float>(1.0 / std::sqrt(squares / elements + eps))};
}

template <bool SILU>
MSDD_INLINE void finish(const float* x, const float* means, const float* factors, const float* offsets,
                        std::int64_t count, float* __restrict out) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float y = (x[i] - means[i]) * factors[i] + offsets[i];
        out[i] = SILU ? y / (1.0f + exp_float(-y)) : y;
    }
}

MSDD_INLINE void finish_any(const GroupNormJob& job, std::int64_t at, const float* means, const float* factors,
                            const float* offsets, std::int64_t count, float* buffer, float* result) {
    const float* x = floats(job.x, at, count, buffer);
    float* const out = place(job.out, job.x.dtype, at, result);
    if (job.shape.silu)
        finish<true>(x, means, factors, offsets, count, out);
    else
        finish<false>(x, means, factors, offsets, count, out);
    store(out, count, job.out, job.x.dtype, at);
}

// Values of all channels in one cell: in place if they are neighbours, else in `buffer`; zeros if there are none.
MSDD_INLINE const float* cell(const Cells& cells, std::int64_t image, std::int64_t row, std::int64_t column,
                              std::int64_t channels, float* buffer) {
    const std::int64_t at = image * cells.image + row * cells.row + column * cells.column;
    if (cells.values.data != nullptr && cells.channel == 1) return floats(cells.values, at, channels, buffer);
    for (std::int64_t c = 0; c < channels; ++c)
        buffer[c] = cells.values.data == nullptr ? 0.0f : element(cells.values, at + c * cells.channel);
    return buffer;
}

// Lines [begin, end) of all images, channels-last.
MSDD_SIMD_CLONES void pixel_lines(const GroupNormJob& job, const GroupNorm* norms, std::int64_t begin,
                                  std::int64_t end) {
    const GroupNormShape& s = job.shape;
    const std::int64_t channels = s.channels, per_group = channels / s.groups;
    alignas(64) float means[MAX_NORM_CHANNELS], rstds[MAX_NORM_CHANNELS], biases[MAX_NORM_CHANNELS];
    alignas(64) float factors[MAX_NORM_CHANNELS], offsets[MAX_NORM_CHANNELS];
    alignas(64) float scales[MAX_NORM_CHANNELS], shifts[MAX_NORM_CHANNELS];
    alignas(64) float wide[MAX_NORM_CHANNELS], results[MAX_NORM_CHANNELS];
    std::int64_t known_image = -1, known_cell = -1;
    for (std::int64_t line = begin; line < end; ++line) {
        const std::int64_t image = line / s.height, row = line % s.height * s.rows / s.height;
        if (image != known_image) {
            for (std::int64_t c = 0; c < channels; ++c) {
                const GroupNorm& norm = norms[image * s.groups + c / per_group];
                means[c] = norm.mean;
                rstds[c] = norm.rstd * (job.weight.data == nullptr ? 1.0f : element(job.weight, c));
                biases[c] = job.bias.data == nullptr ? 0.0f : element(job.bias, c);
            }
            known_image = image;
        }
        for (std::int64_t column = 0; column < s.columns; ++column) {
            const std::int64_t here = (image * s.rows + row) * s.columns + column;
            if (here != known_cell) {
                const float* scale = cell(job.scale, image, row, column, channels, scales);
                const float* shift = cell(job.shift, image, row, column, channels, shifts);
                for (std::int64_t c = 0; c < channels; ++c) {
                    factors[c] = rstds[c] * (1.0f + scale[c]);
                    offsets[c] = biases[c] * (1.0f + scale[c]) + shift[c];
                }
                known_cell = here;
            }
            const std::int64_t first = line * s.width + column * (s.width / s.columns);
            for (std::int64_t pixel = first; pixel < first + s.width / s.columns; ++pixel)
                finish_any(job, pixel * channels, means, factors, offsets, channels, wide, results);
        }
    }
}

// Lines [begin, end) of all channels of all images, contiguous.
MSDD_SIMD_CLONES void plane_lines(const GroupNormJob& job, const GroupNorm* norms, std::int64_t begin,
                                  std::int64_t end) {
    constexpr std::int64_t PIECE = 512;
    alignas(64) float means[PIECE], factors[PIECE], offsets[PIECE], wide[PIECE], results[PIECE];
    const GroupNormShape& s = job.shape;
    for (std::int64_t line = begin; line < end; ++line) {
        const std::int64_t plane = line / s.height, image = plane / s.channels, c = plane % s.channels;
        const std::int64_t row = line % s.height * s.rows / s.height;
        const GroupNorm& norm = norms[image * s.groups + c / (s.channels / s.groups)];
        const float rstd = norm.rstd * (job.weight.data == nullptr ? 1.0f : element(job.weight, c));
        const float bias = job.bias.data == nullptr ? 0.0f : element(job.bias, c);
        const auto value = [&](const Cells& cells, std::int64_t column) {
            if (cells.values.data == nullptr) return 0.0f;
            return element(cells.values,
                           image * cells.image + c * cells.channel + row * cells.row + column * cells.column);
        };
        for (std::int64_t at = 0; at < s.width; at += PIECE) {
            const std::int64_t count = std::min(PIECE, s.width - at);
            std::int64_t known = -1;
            for (std::int64_t i = 0; i < count; ++i) {
                const std::int64_t column = (at + i) * s.columns / s.width;
                means[i] = norm.mean;
                if (column == known) {
                    factors[i] = factors[i - 1];
                    offsets[i] = offsets[i - 1];
                    continue;
                }
                const float factor = 1.0f + value(job.scale, column);
                factors[i] = rstd * factor;
                offsets[i] = bias * factor + value(job.shift, column);
                known = column;
            }
            finish_any(job, line * s.width + at, means, factors, offsets, count, wide, results);
        }
    }
}

void group_norm_modulate_silu(void* out, const void* x, DType dtype, const Operand& weight, const Operand& bias,
                              const Cells& scale, const Cells& shift, const GroupNormShape& shape, int threads) {
    const auto& [batch, channels, height, width, groups, rows, columns, channels_last, silu, eps] = shape;
    (void)silu;
    expect(batch >= 0 && channels >= 0 && height >= 0 && width >= 0, "sizes must not be negative");
    expect(groups >= 1 && channels % groups == 0, "groups must divide channels, got " + std::to_string(groups));
    expect(channels <= MAX_NORM_CHANNELS, "channels must be at most " + std::to_string(MAX_NORM_CHANNELS));
    expect(rows >= 1 && columns >= 1 && height % rows == 0 && width % columns == 0,
           "rows and columns of scale and shift must divide height and width");
    expect_threads(threads);
    if (batch == 0 || channels == 0 || height == 0 || width == 0) return;
    expect(out != nullptr, "out is missing");
    const GroupNormJob job{out, {x, dtype}, weight, bias, scale, shift, shape};
    const std::int64_t elements = channels * height * width, lines = batch * height * (channels_last ? 1 : channels);
    const auto grain = [&](std::int64_t of_one) {
        return std::max<std::int64_t>(1, GROUP_NORM_GRAIN_ELEMENTS / std::max<std::int64_t>(1, of_one));
    };
    std::vector<GroupNorm> norms(static_cast<std::size_t>(batch * groups));
    if (channels_last) {
        const PixelMap map{job.x, channels};
        group_statistics(&map, 1, batch, height * width, groups, eps, norms.data(), threads);
    } else {
        const GroupChunks chunks(shape);
        std::vector<GroupPart> parts(norms.size() * static_cast<std::size_t>(chunks.count));
        parallel_for(batch * groups * chunks.count, grain(elements / (groups * chunks.count)), threads,
                     [&](std::int64_t begin, std::int64_t end) { chunk_parts(job, chunks, begin, end, parts.data()); });
        for (std::size_t i = 0; i < norms.size(); ++i)
            norms[i] = combine(parts.data() + i * static_cast<std::size_t>(chunks.count), chunks.count, eps);
    }
    parallel_for(lines, grain(batch * elements / lines), threads, [&](std::int64_t begin, std::int64_t end) {
        (channels_last ? pixel_lines : plane_lines)(job, norms.data(), begin, end);
    });
}

}  // namespace msdd_fast
