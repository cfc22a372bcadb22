// A part of a convolution: line by line, the sums of tiles of up to ROWS pixels with a panel of the weight, then what
// is added to them. Lines that go in are normalised and laid out, with a zero at either end, in a ring of three; so the
// three taps of a line are neighbours, and a tile reads three rows of numbers. Each SIMD level's file defines what
// step.h needs, and
//
//   PANEL, ROWS         columns and pixels of a tile
//   MSDD_NARROW         if it has its own `narrow_sums` from float to bfloat16
//   MSDD_SWIGLU         if it has the vectors of swiglu_vectors.h
//
// No include guard: each level includes this exactly once.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../linear/step.h"
#include "../linear/write.h"
#include "job.h"
#include "msdd_fast/detail/exp.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/scratch.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t CHUNK = 4096;  // elements that are normalised at a time: half of L1 as float32
constexpr int MAX_SEGMENTS = 4;

// Neighbouring elements that a pixel meets in the sum; those of the next pixel are `stride` further.
struct Segment {
    const Element* x;
    std::int64_t stride, length;  // a multiple of STEP
};

// `bias` plus the sums of COUNT pixels with a panel.
template <int COUNT>
MSDD_SIMD MSDD_NOINLINE void sums_of(const Segment* segments, int count, const float* words, const float* bias,
                                     float* out) {
    Vec sums[COUNT][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = load(bias + v * LANES);
    for (int s = 0; s < count; ++s) {
        const auto [x, stride, length] = segments[s];
        for (std::int64_t k = 0; k < length; k += STEP, words += PANEL) step<COUNT, false>(sums, x + k, stride, words);
    }
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(out + r * PANEL + v * LANES, sums[r][v]);
}

using SumsOf = void (*)(const Segment* segments, int count, const float* words, const float* bias, float* out);

template <int... COUNTS>
constexpr SumsOf sums_of_rows(std::int64_t rows, std::integer_sequence<int, COUNTS...>) {
    constexpr SumsOf all[] = {sums_of<COUNTS + 1>...};
    return all[rows - 1];
}

// The memory of a part.
struct Ring {
    Element* lines[3];  // of (width + 2) pixels; line y of the map is in place (y + 1) % 3
    Element* sum;       // one line of the maps that a shortcut reads
    // Of every channel: the group's mean, rstd * weight and bias; and in every column of scale and shift, for their row
    // `row`, what these make of the two.
    float *means, *weights, *biases, *factors, *offsets;
    std::int64_t row;  // -1 if there is none

    Element* line(std::int64_t y) const { return lines[(y + 1) % 3]; }
};

// Elements of all channels as float32: `otherwise` where there is no operand.
MSDD_SIMD inline void read_channels(const Operand& operand, std::int64_t at, std::int64_t stride, std::int64_t channels,
                                    float otherwise, float* out) {
    if (operand.data == nullptr) return std::fill(out, out + channels, otherwise), void();
    if (stride != 1) {
        for (std::int64_t c = 0; c < channels; ++c) out[c] = element(operand, at + c * stride);
        return;
    }
    const float* const from = floats(operand, at, channels, out);
    if (from != out) std::copy(from, from + channels, out);
}

MSDD_SIMD inline void read_norm(const ConvolutionJob& job, std::int64_t image, Ring& ring) {
    const ConvolutionNorm& norm = job.norm;
    const std::int64_t channels = job.maps.all(), per_group = channels / norm.groups;
    read_channels(norm.weight, 0, 1, channels, 1.0f, ring.weights);
    read_channels(norm.bias, 0, 1, channels, 0.0f, ring.biases);
    for (std::int64_t c = 0; c < channels; ++c) {
        const GroupNorm& of_group = job.norms[image * norm.groups + c / per_group];
        ring.means[c] = of_group.mean;
        ring.weights[c] *= of_group.rstd;
    }
}

// Norm, affine and modulation as one factor and one offset for every channel.
MSDD_SIMD inline void modulate_norm(const ConvolutionJob& job, std::int64_t image, std::int64_t row, Ring& ring) {
    if (ring.row == row) return;
    ring.row = row;
    const ConvolutionNorm& norm = job.norm;
    const std::int64_t channels = job.maps.all();
    for (std::int64_t column = 0; column < norm.columns; ++column) {
        float *const factors = ring.factors + column * channels, *const offsets = ring.offsets + column * channels;
        const auto read = [&](const Cells& cells, float* out) {
            const std::int64_t at = image * cells.image + row * cells.row + column * cells.column;
            read_channels(cells.values, at, cells.channel, channels, 0.0f, out);
        };
        read(norm.scale, factors);
        read(norm.shift, offsets);
        for (std::int64_t c = 0; c < channels; ++c) {
            const float factor = 1.0f + factors[c];
            factors[c] = ring.weights[c] * factor;
            offsets[c] += ring.biases[c] * factor;
        }
    }
}

// values = silu((values - mean) * factor + offset) for one pixel; without means only the SiLU.
template <bool NORM, bool SILU>
MSDD_SIMD inline void activate(float* values, std::int64_t channels, const float* means, const float* factors,
                               const float* offsets) {
    std::int64_t c = 0;
#ifdef MSDD_SWIGLU
    for (; c + FLOATS <= channels; c += FLOATS) {
        Floats y = load_floats(values + c);
        if (NORM) y = fma(sub(y, load_floats(means + c)), load_floats(factors + c), load_floats(offsets + c));
        store_floats(values + c, SILU ? silu_of(y) : y);
    }
#endif
    for (; c < channels; ++c) {
        float y = values[c];
        if (NORM) y = (y - means[c]) * factors[c] + offsets[c];
        values[c] = SILU ? y / (1.0f + exp_float(-y)) : y;
    }
}

// `count` pixels of joined maps from pixel `first` on, as float32, each of `channels` in `out`.
template <class T>
MSDD_SIMD inline void join(const JoinedMaps& maps, std::int64_t first, std::int64_t count, float* out) {
    const std::int64_t all = maps.all();
    std::int64_t to = 0;
    for (int m = 0; m < 2; ++m) {
        const std::int64_t own = maps.channels[m];
        if (own == 0) continue;
        const T* const from = static_cast<const T*>(maps.data[m]) + first * own;
        if (own == all) {
            for (std::int64_t i = 0; i < count * own; ++i) out[i] = to_float(from[i]);
            return;
        }
        for (std::int64_t p = 0; p < count; ++p)
            for (std::int64_t c = 0; c < own; ++c) out[p * all + to + c] = to_float(from[p * own + c]);
        to += own;
    }
}

MSDD_SIMD inline void join_any(const JoinedMaps& maps, DType dtype, std::int64_t first, std::int64_t count,
                               float* out) {
    switch (dtype) {
        case DType::float32:
            return join<float>(maps, first, count, out);
        case DType::bfloat16:
            return join<BFloat16>(maps, first, count, out);
        case DType::float16:
            return join<Float16>(maps, first, count, out);
    }
}

// `count` pixels as the tiles read them, each in `padded` elements of `out`, whose last may be a zero that stays.
MSDD_SIMD inline void lay_out(const float* values, std::int64_t count, std::int64_t channels, std::int64_t padded,
                              Element* out) {
    if (channels == padded) return write(values, count * channels, out);
    for (std::int64_t p = 0; p < count; ++p) write(values + p * channels, channels, out + p * padded);
}

// A line of the maps without a norm: copied.
MSDD_SIMD inline void copy_line(const JoinedMaps& maps, DType dtype, std::int64_t first, std::int64_t width,
                                std::int64_t padded, Element* out) {
    alignas(64) float values[CHUNK + MAX_NORM_CHANNELS];
    const std::int64_t channels = maps.all(), step = std::max<std::int64_t>(1, CHUNK / channels);
    for (std::int64_t x = 0; x < width; x += step) {
        const std::int64_t count = std::min(step, width - x);
        join_any(maps, dtype, first + x, count, values);
        lay_out(values, count, channels, padded, out + x * padded);
    }
}

template <bool NORM, bool SILU>
MSDD_SIMD inline void norm_line(const ConvolutionJob& job, std::int64_t first, const Ring& ring, Element* out) {
    alignas(64) float values[CHUNK + MAX_NORM_CHANNELS];
    const std::int64_t channels = job.maps.all(), width = job.shape.width;
    const std::int64_t step = std::max<std::int64_t>(1, CHUNK / channels), cell = width / job.norm.columns;
    for (std::int64_t x = 0; x < width; x += step) {
        const std::int64_t count = std::min(step, width - x);
        join_any(job.maps, job.dtype, first + x, count, values);
        for (std::int64_t p = 0; p < count; ++p) {
            const std::int64_t column = NORM ? (x + p) / cell * channels : 0;
            activate<NORM, SILU>(values + p * channels, channels, ring.means, ring.factors + column,
                                 ring.offsets + column);
        }
        lay_out(values, count, channels, job.padded, out + x * job.padded);
    }
}

// Line y of the maps into the ring; zeros beyond the image.
MSDD_SIMD inline void read_line(const ConvolutionJob& job, std::int64_t image, std::int64_t y, Ring& ring) {
    const auto& [kind, batch, height, width, out] = job.shape;
    Element* const line = ring.line(y) + job.padded;
    if (y < 0 || y >= height) {
        std::memset(line, 0, static_cast<std::size_t>(width * job.padded) * sizeof(Element));
        return;
    }
    const std::int64_t first = (image * height + y) * width;
    if (job.norm.groups > 0) {
        modulate_norm(job, image, y * job.norm.rows / height, ring);
        return job.norm.silu ? norm_line<true, true>(job, first, ring, line)
                             : norm_line<true, false>(job, first, ring, line);
    }
    if (job.norm.silu) return norm_line<false, true>(job, first, ring, line);
    copy_line(job.maps, job.dtype, first, width, job.padded, line);
}

// A row of sums to a pixel of the result.
template <class T>
MSDD_SIMD inline void finish(float* sums, const T* added, std::int64_t count, T* out) {
    if (added != nullptr) {
        if (count == PANEL)
            for (std::int64_t i = 0; i < PANEL; ++i) sums[i] += to_float(added[i]);
        else
            for (std::int64_t i = 0; i < count; ++i) sums[i] += to_float(added[i]);
    }
    if (count == PANEL)
        write(sums, PANEL, out);  // of a size that the compiler knows
    else
        write(sums, count, out);
}

// One line of the result, or every second pixel of it: pixel i is `pixel_stride` elements after pixel i - 1.
template <class T>
MSDD_SIMD void multiply_line(const ConvolutionJob& job, const Segment* segments, int count, const float* packed,
                             std::int64_t pixels, std::int64_t pixel_stride, std::int64_t first) {
    alignas(64) float sums[ROWS * PANEL], bias[PANEL];
    const std::int64_t tiles = (pixels + ROWS - 1) / ROWS, columns = job.shape.out;
    const bool added = job.sum.maps.data[0] != nullptr && !job.sum.shortcut;
    for (std::int64_t panel = 0; panel < job.panels; ++panel) {
        const std::int64_t begin_column = panel * PANEL, width = std::min(PANEL, columns - begin_column);
        std::fill(bias, bias + PANEL, 0.0f);
        const float* const from = floats(job.bias, begin_column, width, bias);
        if (from != nullptr && from != bias) std::copy(from, from + width, bias);
        for (std::int64_t i = 0; i < tiles; ++i) {
            const std::int64_t begin = pixels * i / tiles, rows = pixels * (i + 1) / tiles - begin;
            Segment here[MAX_SEGMENTS];
            for (int s = 0; s < count; ++s) {
                here[s] = segments[s];
                here[s].x += begin * here[s].stride;
            }
            sums_of_rows(rows, std::make_integer_sequence<int, ROWS>())(here, count, packed + panel * job.panel_words,
                                                                        bias, sums);
            for (std::int64_t r = 0; r < rows; ++r) {
                const std::int64_t at = first + (begin + r) * pixel_stride + begin_column;
                finish<T>(sums + r * PANEL, added ? static_cast<const T*>(job.sum.maps.data[0]) + at : nullptr, width,
                          static_cast<T*>(job.out) + at);
            }
        }
    }
}

MSDD_SIMD inline void multiply_any(const ConvolutionJob& job, const Segment* segments, int count, const float* packed,
                                   std::int64_t pixels, std::int64_t pixel_stride, std::int64_t first) {
    switch (job.dtype) {
        case DType::float32:
            return multiply_line<float>(job, segments, count, packed, pixels, pixel_stride, first);
        case DType::bfloat16:
            return multiply_line<BFloat16>(job, segments, count, packed, pixels, pixel_stride, first);
        case DType::float16:
            return multiply_line<Float16>(job, segments, count, packed, pixels, pixel_stride, first);
    }
}

MSDD_SIMD inline Ring make_ring(const ConvolutionJob& job) {
    const auto floats_of = [](std::int64_t elements) {  // whole cache lines
        return (elements * static_cast<std::int64_t>(sizeof(Element)) + 63) / 64 * 16;
    };
    const std::int64_t line = floats_of((job.shape.width + 2) * job.padded);
    const std::int64_t sum = floats_of(job.shape.width * job.sum_padded);
    const std::int64_t channels = (job.maps.all() + 15) / 16 * 16, table = channels * job.norm.columns;
    float* const memory = scratch_of(3 * line + sum + 3 * channels + 2 * table);
    std::memset(memory, 0, static_cast<std::size_t>(3 * line + sum) * sizeof(float));  // the zeros that stay
    Ring ring{};
    for (int i = 0; i < 3; ++i) ring.lines[i] = reinterpret_cast<Element*>(memory + i * line);
    ring.sum = reinterpret_cast<Element*>(memory + 3 * line);
    ring.means = memory + 3 * line + sum;
    ring.weights = ring.means + channels;
    ring.biases = ring.weights + channels;
    ring.factors = ring.biases + channels;
    ring.offsets = ring.factors + table;
    ring.row = -1;
    return ring;
}

MSDD_SIMD void run_part(const ConvolutionJob& job, const ConvolutionPart& part) {
    const auto& [kind, batch, height, width, columns] = job.shape;
    const std::int64_t padded = job.padded, image = part.image;
    Ring ring = make_ring(job);
    if (job.norm.groups > 0) read_norm(job, image, ring);
    std::int64_t known = -2;  // the last line that was read
    for (std::int64_t at = part.begin; at < part.end; ++at) {
        const std::int64_t y = kind == ConvolutionKind::down ? 2 * at : at;
        for (std::int64_t line = std::max(known + 1, y - 1); line <= y + 1; ++line) read_line(job, image, line, ring);
        known = y + 1;
        if (kind == ConvolutionKind::up) {
            for (int phase = 0; phase < 4; ++phase) {
                const int odd_line = phase / 2, odd_column = phase % 2;
                const Element* const upper = ring.line(y - 1 + odd_line) + odd_column * padded;
                const Element* const lower = ring.line(y + odd_line) + odd_column * padded;
                const Segment segments[] = {{upper, padded, 2 * padded}, {lower, padded, 2 * padded}};
                const std::int64_t first = ((image * height + y) * 2 + odd_line) * 2 * width + odd_column;
                multiply_any(job, segments, 2, job.packed + phase * job.panels * job.panel_words, width, 2 * columns,
                             first * columns);
            }
            continue;
        }
        const std::int64_t stride = kind == ConvolutionKind::down ? 2 : 1, lines = (height + stride - 1) / stride;
        const std::int64_t pixels = (width + stride - 1) / stride, first = (image * lines + at) * pixels;
        Segment segments[MAX_SEGMENTS];
        for (int i = 0; i < 3; ++i) segments[i] = {ring.line(y - 1 + i), stride * padded, 3 * padded};
        if (job.sum.shortcut) {
            copy_line(job.sum.maps, job.dtype, first, width, job.sum_padded, ring.sum);
            segments[3] = {ring.sum, job.sum_padded, job.sum_padded};
        }
        multiply_any(job, segments, job.sum.shortcut ? 4 : 3, job.packed, pixels, columns, first * columns);
    }
}

}  // namespace
}  // namespace msdd_fast
