#include "msdd_fast/pixel_block.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "linear/job.h"
#include "msdd_fast/check.h"
#include "msdd_fast/detail/erf.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/layer_norm.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr std::int64_t TILE_TOKENS = 96;    // rows of features, which stay in L2 while panels of the weight pass
constexpr std::int64_t TILE_COLUMNS = 256;  // of the modulation, or the next multiple of whole pixels and panels
constexpr std::int64_t MAX_TILE_COLUMNS = 16 * MAX_PIXEL_CHANNELS;

// The modulation of some pixels of some tokens, in float32, `stride` numbers from token to token.
struct PixelTile {
    const float* modulation;
    std::int64_t stride, token, tokens, pixel, pixels;
};

struct PixelJob {
    void* out;
    DType out_dtype;
    Operand x, y;
    PixelShape shape;
    const float *rms_weight, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;  // transposed: (in, out)
    std::int64_t hidden;
};

constexpr int PIXEL_LANES = 4;  // of the sum of squares: channels are a multiple of 4

MSDD_SIMD_CLONES void modulate_tile(const PixelJob& job, const PixelTile& tile) {
    alignas(64) float xs[MAX_TILE_COLUMNS / 2], results[MAX_TILE_COLUMNS / 2];
    const std::int64_t channels = job.shape.channels, count = tile.pixels * channels;
    for (std::int64_t t = 0; t < tile.tokens; ++t) {
        const std::int64_t at = ((tile.token + t) * job.shape.pixels + tile.pixel) * channels;
        const float* x = floats(job.x, at, count, xs);
        const float* shift = tile.modulation + t * tile.stride;
        float* const out = place(job.out, job.out_dtype, at, results);
        for (std::int64_t i = 0; i < count; i += channels, shift += 2 * channels) {
            const float factor = rms_factor<PIXEL_LANES>(x + i, channels, job.shape.eps), *scale = shift + channels;
            for (std::int64_t c = 0; c < channels; ++c)
                out[i + c] = x[i + c] * factor * job.rms_weight[c] * (1.0f + scale[c]) + shift[c];
        }
        store(out, count, job.out, job.out_dtype, at);
    }
}

// Sixteen numbers that stay in registers, whatever the SIMD level; the compiler keeps no array there.
constexpr int WIDE = 16;
#if defined(__GNUC__)
using Wide = float __attribute__((vector_size(WIDE * sizeof(float))));
MSDD_INLINE void multiply_add(Wide& sum, float factor, const Wide& x) { sum += factor * x; }
#else
struct Wide {
    float lane[WIDE];
};
MSDD_INLINE void multiply_add(Wide& sum, float factor, const Wide& x) {
    for (int k = 0; k < WIDE; ++k) sum.lane[k] += factor * x.lane[k];
}
#endif

// out[i][o] = bias[o] + sum over `in` of x[i][j] * weight[j][o] for COUNT pixels, in the order of j.
template <int COUNT>
MSDD_INLINE void small_linear(const float* x, std::int64_t x_stride, const float* weight, const float* bias,
                              std::int64_t in, std::int64_t out_size, float* out, std::int64_t out_stride) {
    std::int64_t o = 0;
    for (; o + WIDE <= out_size; o += WIDE) {
        Wide sums[COUNT], row;
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) std::memcpy(&sums[i], bias + o, sizeof(Wide));
        for (std::int64_t j = 0; j < in; ++j) {
            std::memcpy(&row, weight + j * out_size + o, sizeof(Wide));
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; ++i) multiply_add(sums[i], x[i * x_stride + j], row);
        }
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) std::memcpy(out + i * out_stride + o, &sums[i], sizeof(Wide));
    }
    for (; o < out_size; ++o)
        for (int i = 0; i < COUNT; ++i) {
            float sum = bias[o];
            for (std::int64_t j = 0; j < in; ++j) sum += x[i * x_stride + j] * weight[j * out_size + o];
            out[i * out_stride + o] = sum;
        }
}

constexpr int PIXELS_AT_ONCE = 4;  // independent sums: enough to hide the latency of addition

template <int COUNT>
MSDD_INLINE void pixel_mlp(const PixelJob& job, const float* h, std::int64_t channels, float* __restrict hidden,
                           float* __restrict out) {
    const std::int64_t width = job.hidden;
    small_linear<COUNT>(h, channels, job.fc1_weight, job.fc1_bias, channels, width, hidden, width);
    for (std::int64_t i = 0; i < COUNT * width; ++i) hidden[i] = gelu(hidden[i]);
    small_linear<COUNT>(hidden, width, job.fc2_weight, job.fc2_bias, width, channels, out, channels);
}

MSDD_SIMD_CLONES void block_tile(const PixelJob& job, const PixelTile& tile) {
    constexpr std::int64_t ROW = MAX_TILE_COLUMNS / 4;
    alignas(64) float xs[ROW], ys[ROW], x1[ROW], h[ROW], mlp[ROW], results[ROW];
    alignas(64) float hidden[PIXELS_AT_ONCE * MAX_PIXEL_HIDDEN];
    const std::int64_t channels = job.shape.channels, count = tile.pixels * channels;
    for (std::int64_t t = 0; t < tile.tokens; ++t) {
        const std::int64_t at = ((tile.token + t) * job.shape.pixels + tile.pixel) * channels;
        const float* x = floats(job.x, at, count, xs);
        const float* y = floats(job.y, at, count, ys);
        const float* const modulation = tile.modulation + t * tile.stride;
        for (std::int64_t p = 0; p < tile.pixels; ++p) {
            const std::int64_t i = p * channels;
            const float *gate1 = modulation + 4 * i, *shift = gate1 + channels, *scale = shift + channels;
            for (std::int64_t c = 0; c < channels; ++c) x1[i + c] = x[i + c] + gate1[c] * y[i + c];
            const float factor = rms_factor<PIXEL_LANES>(x1 + i, channels, job.shape.eps);
            for (std::int64_t c = 0; c < channels; ++c)
                h[i + c] = x1[i + c] * factor * job.rms_weight[c] * (1.0f + scale[c]) + shift[c];
        }
        std::int64_t p = 0;
        for (; p + PIXELS_AT_ONCE <= tile.pixels; p += PIXELS_AT_ONCE)
            pixel_mlp<PIXELS_AT_ONCE>(job, h + p * channels, channels, hidden, mlp + p * channels);
        for (; p < tile.pixels; ++p) pixel_mlp<1>(job, h + p * channels, channels, hidden, mlp + p * channels);
        float* const out = place(job.out, job.out_dtype, at, results);
        for (p = 0; p < tile.pixels; ++p) {
            const std::int64_t i = p * channels;
            const float* const gate2 = modulation + 4 * i + 3 * channels;
            for (std::int64_t c = 0; c < channels; ++c) out[i + c] = x1[i + c] + gate2[c] * mlp[i + c];
        }
        store(out, count, job.out, job.out_dtype, at);
    }
}

namespace {

Operand advance(const Operand& x, std::int64_t elements) {
    return {static_cast<const char*>(x.data) + elements * size_of(x.dtype), x.dtype};
}

// Calls finish(job, tile) for tiles that cover all pixels of all tokens; `parts` numbers per channel.
void for_tiles(void (*finish)(const PixelJob&, const PixelTile&), const PixelJob& job, std::int64_t parts,
               const PixelModulation& modulation, int threads) {
    const PixelShape& shape = job.shape;
    const std::int64_t per_pixel = parts * shape.channels, width = shape.pixels * per_pixel;
    const LinearPlan plan = linear_plan({width, shape.in, false}, modulation.features.values.dtype, modulation.level);
    const std::int64_t whole = std::lcm(per_pixel, plan.panel);  // pixels and panels end together
    const std::int64_t columns = std::max<std::int64_t>(1, TILE_COLUMNS / whole) * whole;
    const std::int64_t products = shape.tokens * width * shape.in;
    threads = threads_for(products, GRAIN_PRODUCTS, threads);
    const std::int64_t across = ceil_div(width, columns), rows = std::min(TILE_TOKENS, shape.tokens);
    const std::int64_t tasks = ceil_div(shape.tokens, rows) * across;
    // All tiles of some tokens before those of the next.
    share_tasks(tasks, threads, [&](std::int64_t, std::int64_t task) {
        thread_local std::vector<float> sums;
        if (static_cast<std::int64_t>(sums.size()) < rows * columns)
            sums.resize(static_cast<std::size_t>(rows * columns));
        const std::int64_t token = task / across * rows, tokens = std::min(rows, shape.tokens - token);
        const std::int64_t first = task % across * columns, count = std::min(columns, width - first);
        const Rows& features = modulation.features;
        const LinearJob linear{
            sums.data(), DType::float32,
            columns,     {advance(features.values, token * features.stride), features.stride},
            nullptr,     static_cast<const float*>(modulation.packed) + first / plan.panel * plan.words,
            plan.words,  advance(modulation.bias, first),
            shape.in,    count,
            false};
        plan.run(linear, {0, tokens, 0, ceil_div(count, plan.panel)});
        finish(job, {sums.data(), columns, token, tokens, first / per_pixel, count / per_pixel});
    });
}

// Checks what both halves need; whether there is anything to do.
bool check(const void* out, const PixelJob& job, const PixelModulation& modulation, const Operand& rms_weight,
           int threads) {
    const PixelShape& shape = job.shape;
    expect(shape.tokens >= 0 && shape.pixels >= 0 && shape.in >= 0, "sizes must not be negative");
    expect(shape.channels >= 4 && shape.channels <= MAX_PIXEL_CHANNELS && shape.channels % 4 == 0,
           "channels must be a multiple of 4 up to " + std::to_string(MAX_PIXEL_CHANNELS) + ", got " +
               std::to_string(shape.channels));
    expect_threads(threads);
    if (shape.tokens == 0 || shape.pixels == 0) return false;
    expect(out != nullptr, "out is missing");
    expect(job.x.data != nullptr && rms_weight.data != nullptr, "x or rms_weight is missing");
    expect(modulation.bias.data != nullptr && modulation.packed != nullptr, "bias or packed is missing");
    return true;
}

std::vector<float> as_float32(const Operand& x, std::int64_t count) {
    std::vector<float> result(static_cast<std::size_t>(count));
    const float* from = floats(x, 0, count, result.data());
    if (from != result.data()) std::copy(from, from + count, result.data());
    return result;
}

// Contiguous (rows, columns) as float32, transposed: (columns, rows).
std::vector<float> transposed(const Operand& x, std::int64_t rows, std::int64_t columns) {
    const std::vector<float> from = as_float32(x, rows * columns);
    std::vector<float> result(from.size());
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < columns; ++j)
            result[static_cast<std::size_t>(j * rows + i)] = from[static_cast<std::size_t>(i * columns + j)];
    return result;
}

}  // namespace

void pixel_modulate(void* out, DType out_dtype, const Operand& x, const PixelModulation& modulation,
                    const Operand& rms_weight, const PixelShape& shape, int threads) {
    PixelJob job{};
    job.out = out;
    job.out_dtype = out_dtype;
    job.x = x;
    job.shape = shape;
    if (!check(out, job, modulation, rms_weight, threads)) return;
    const std::vector<float> weight = as_float32(rms_weight, shape.channels);
    job.rms_weight = weight.data();
    for_tiles(modulate_tile, job, 2, modulation, threads);
}

void pixel_block(void* out, const Operand& x, const Operand& y, const PixelModulation& modulation,
                 const Operand& rms_weight, const PixelMlp& mlp, const PixelShape& shape, int threads) {
    PixelJob job{};
    job.out = out;
    job.out_dtype = x.dtype;
    job.x = x;
    job.y = y;
    job.shape = shape;
    job.hidden = mlp.hidden;
    expect(mlp.hidden >= 0 && mlp.hidden <= MAX_PIXEL_HIDDEN,
           "hidden must be at most " + std::to_string(MAX_PIXEL_HIDDEN) + ", got " + std::to_string(mlp.hidden));
    if (!check(out, job, modulation, rms_weight, threads)) return;
    expect(y.data != nullptr && mlp.fc2_bias.data != nullptr, "y or fc2_bias is missing");
    expect(mlp.hidden == 0 ||
               (mlp.fc1_weight.data != nullptr && mlp.fc1_bias.data != nullptr && mlp.fc2_weight.data != nullptr),
           "a weight is missing");
    const std::int64_t channels = shape.channels, hidden = mlp.hidden;
    const std::vector<float> weight = as_float32(rms_weight, channels);
    const std::vector<float> fc1 = transposed(mlp.fc1_weight, hidden, channels);
    const std::vector<float> fc1_bias = as_float32(mlp.fc1_bias, hidden);
    const std::vector<float> fc2 = transposed(mlp.fc2_weight, channels, hidden);
    const std::vector<float> fc2_bias = as_float32(mlp.fc2_bias, channels);
    job.rms_weight = weight.data();
    job.fc1_weight = fc1.data();
    job.fc1_bias = fc1_bias.data();
    job.fc2_weight = fc2.data();
    job.fc2_bias = fc2_bias.data();
    for_tiles(block_tile, job, 4, modulation, threads);
}

}  // namespace msdd_fast
