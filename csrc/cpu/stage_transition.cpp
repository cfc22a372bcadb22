#include "msdd_fast/stage_transition.h"

#include <algorithm>
#include <string>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/end_of_stage.h"
#include "msdd_fast/detail/noise.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

// A line of pixels of one channel is split into pieces of `patch` pixels, one per token of a row of tokens.
struct Line {
    std::int64_t token_stride, patch;  // elements
};

// Calls body(element, first, count) for the pieces of pixels [begin, begin + total): `count` pixels, `first` of them
// before it, begin `element` elements behind the line's address.
template <class Body>
MSDD_INLINE void for_pieces(const Line& line, std::int64_t begin, std::int64_t total, const Body& body) {
    std::int64_t inside = begin % line.patch, token = begin / line.patch * line.token_stride;
    for (std::int64_t first = 0; first < total; token += line.token_stride, inside = 0) {
        const std::int64_t count = std::min(line.patch - inside, total - first);
        body(token + inside, first, count);
        first += count;
    }
}

template <class T>
MSDD_INLINE void gather_of(const T* source, const Line& line, std::int64_t begin, std::int64_t count,
                           float (&pixels)[LANES]) {
    T raw[LANES] = {};
    for_pieces(line, begin, count, [&](std::int64_t element, std::int64_t first, std::int64_t pieces) {
        copy(raw + first, source + element, pieces);
    });
    widen(raw, LANES, pixels);
}

// Pixels [begin, begin + count) of the line that starts `offset` elements into the operand, then zeros.
MSDD_INLINE void gather(const PatchRows& rows, std::int64_t offset, std::int64_t patch, std::int64_t begin,
                        std::int64_t count, float (&pixels)[LANES]) {
    const Line line{rows.token_stride, patch};
    switch (rows.dtype) {
        case DType::float32:
            return gather_of(static_cast<const float*>(rows.data) + offset, line, begin, count, pixels);
        case DType::bfloat16:
            return gather_of(static_cast<const BFloat16*>(rows.data) + offset, line, begin, count, pixels);
        case DType::float16:
            return gather_of(static_cast<const Float16*>(rows.data) + offset, line, begin, count, pixels);
    }
}

// E at pixels [begin, begin + count) of line `y` of a channel of an image.
MSDD_INLINE void euler_line(const EndOfStage& end, std::int64_t image, std::int64_t channel, std::int64_t y,
                            std::int64_t begin, std::int64_t count, float (&pixels)[LANES]) {
    if (end.x.data == nullptr) {
        std::fill_n(pixels, LANES, 0.0f);
        return;
    }
    const std::int64_t patch = end.shape.patch, first_token = y / patch * end.shape.grid;
    const std::int64_t feature = (channel * patch + y % patch) * patch;
    const auto read = [&](const PatchRows& rows, float (&target)[LANES]) {
        gather(rows, first_token * rows.token_stride + image * rows.image_stride + feature, patch, begin, count,
               target);
    };
    euler(end, read, pixels);
}

// A pair of lines of the output, counted in memory order: (row of tokens, image, channel, pair).
template <class T>
MSDD_INLINE void renoise_pair_of(const NoiseRows& job, std::int64_t index) {
    const std::int64_t pairs = job.patch / 2, features = job.channels * job.patch * job.patch;
    const std::int64_t pair = index % pairs, channel = index / pairs % job.channels;
    const std::int64_t image = index / (pairs * job.channels) % job.batch;
    const std::int64_t token_row = index / (pairs * job.channels * job.batch);
    const std::int64_t blocks = job.columns * pairs, y = token_row * pairs + pair;  // line of blocks
    const auto first_block = static_cast<std::uint32_t>((channel * job.rows * pairs + y) * blocks);
    const Line line{job.batch * features, job.patch};
    T* target = static_cast<T*>(job.out) + (token_row * job.columns * job.batch + image) * features +
                (channel * job.patch + 2 * pair) * job.patch;
    for (std::int64_t j = 0; j < blocks; j += LANES) {
        const std::int64_t count = std::min<std::int64_t>(LANES, blocks - j);
        float pixels[LANES], wide[2][2 * LANES];
        euler_line(job.end, image, channel, y, j, count, pixels);
        renoise_blocks(pixels, static_cast<std::uint64_t>(job.seeds[image]),
                       first_block + static_cast<std::uint32_t>(j), job.formula, wide);
        T lines[2][2 * LANES];
        narrow(wide[0], 2 * LANES, lines[0]);
        narrow(wide[1], 2 * LANES, lines[1]);
        for_pieces(line, 2 * j, 2 * count, [&](std::int64_t element, std::int64_t first, std::int64_t pieces) {
            copy(target + element, lines[0] + first, pieces);
            copy(target + element + job.patch, lines[1] + first, pieces);
        });
    }
}

// Not a template and not in an anonymous namespace, or it would get no clones.
MSDD_SIMD_CLONES void renoise_pair(const NoiseRows& job, std::int64_t index) {
    switch (job.dtype) {
        case DType::float32:
            return renoise_pair_of<float>(job, index);
        case DType::bfloat16:
            return renoise_pair_of<BFloat16>(job, index);
        case DType::float16:
            return renoise_pair_of<Float16>(job, index);
    }
}

void noise_rows(const NoiseRows& job, int threads) {
    expect(job.batch >= 0 && job.channels >= 0 && job.rows >= 0 && job.columns >= 0, "sizes must not be negative");
    expect(job.patch >= 2 && job.patch % 2 == 0,
           "patch_size must be even (noise comes in 2x2 blocks), got " + std::to_string(job.patch));
    expect_threads(threads);
    const std::int64_t blocks = job.columns * job.patch / 2;  // of one line
    const std::int64_t lines = job.rows * job.channels * (job.patch / 2);
    if (job.batch == 0 || lines == 0 || blocks == 0) return;
    expect(lines <= (std::int64_t{1} << 32) / blocks, "an image must have at most 2^32 blocks of 2x2 pixels");
    expect(job.out != nullptr && job.seeds != nullptr, "out or seeds is missing");
    parallel_for(job.batch * lines, std::max<std::int64_t>(1, GRAIN_BLOCKS / blocks), threads,
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t i = begin; i < end; ++i) renoise_pair(job, i);
                 });
}

void stage_transition(void* out, const PatchRows& x, const PatchRows& v, const PatchRows& v_uncond,
                      const PatchShape& shape, const EulerScalars& euler, const std::int64_t* seeds,
                      const RenoiseScalars& renoise, int threads) {
    const auto& [grid, batch, channels, patch] = shape;
    const NoiseFormula formula = renoise_formula(renoise);
    expect((x.data != nullptr && v.data != nullptr) || grid * batch * channels == 0, "x or v is missing");
    noise_rows(
        {{x, v, v_uncond, shape, euler}, formula, seeds, batch, channels, 2 * grid, 2 * grid, patch, out, x.dtype},
        threads);
}

}  // namespace msdd_fast
