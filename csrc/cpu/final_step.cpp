#include "msdd_fast/final_step.h"

#include <algorithm>
#include <string>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/end_of_stage.h"
#include "msdd_fast/detail/lanes_avx2.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr std::int64_t GRAIN_PIXELS = 1 << 15;  // of final_step: about 0.05 ms of memory traffic

template <class T>
MSDD_INLINE void read_of(const T* source, std::int64_t count, float (&pixels)[LANES]) {
    if (count == LANES) return widen(source, LANES, pixels);
    T raw[LANES] = {};
    copy(raw, source, count);
    widen(raw, LANES, pixels);
}

// `count` elements from `offset` on, then zeros.
MSDD_INLINE void read_row(const PatchRows& rows, std::int64_t offset, std::int64_t count, float (&pixels)[LANES]) {
    switch (rows.dtype) {
        case DType::float32:
            return read_of(static_cast<const float*>(rows.data) + offset, count, pixels);
        case DType::bfloat16:
            return read_of(static_cast<const BFloat16*>(rows.data) + offset, count, pixels);
        case DType::float16:
            return read_of(static_cast<const Float16*>(rows.data) + offset, count, pixels);
    }
}

MSDD_INLINE void quantise(const float* source, std::int64_t count, std::uint8_t* target) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = to_byte(source[i]);
}

MSDD_INLINE void to_pixels(const float* source, float* target) { std::memcpy(target, source, LANES * sizeof(float)); }
MSDD_INLINE void to_pixels(const float* source, BFloat16* target) { narrow(source, LANES, target); }
MSDD_INLINE void to_pixels(const float* source, Float16* target) { narrow(source, LANES, target); }
MSDD_INLINE void to_pixels(const float* source, std::uint8_t* target) { quantise(source, LANES, target); }

struct FinalStep {
    EndOfStage end;
    void* out;
    PixelType type;
    bool channels_last;
};

// A row of tokens of one image. Features are read in memory order, so the hardware prefetches them; the image lines
// that they scatter to stay in the cache.
template <class T>
MSDD_INLINE void final_tokens_of(const FinalStep& job, std::int64_t index) {
    const auto& [grid, batch, channels, patch] = job.end.shape;
    const std::int64_t image = index % batch, token_row = index / batch, side = grid * patch;
    const std::int64_t features = channels * patch * patch;
    const std::int64_t step = job.channels_last ? channels : 1;  // from pixel to pixel
    const std::int64_t plane = job.channels_last ? 1 : side * side;
    T* const out = static_cast<T*>(job.out) + image * channels * side * side + token_row * patch * side * step;
    for (std::int64_t column = 0; column < grid; ++column) {
        std::int64_t channel = 0, y = 0,
                     inside = 0;  // of the next feature: counted, since to divide costs more than to copy
        for (std::int64_t begin = 0; begin < features; begin += LANES) {
            const std::int64_t count = std::min<std::int64_t>(LANES, features - begin);
            float pixels[LANES];
            const auto read = [&](const PatchRows& rows, float (&target)[LANES]) {
                const std::int64_t token = token_row * job.end.shape.grid + column;
                read_row(rows, token * rows.token_stride + image * rows.image_stride + begin, count, target);
            };
            euler(job.end, read, pixels);
            T values[LANES];
            to_pixels(pixels, values);
            for (std::int64_t i = 0; i < count;) {
                const std::int64_t pieces = std::min(patch - inside, count - i);
                T* target = out + channel * plane + (y * side + column * patch + inside) * step;
                if (step == 1)
                    copy(target, values + i, pieces);
                else
                    for (std::int64_t k = 0; k < pieces; ++k) target[k * step] = values[i + k];
                i += pieces;
                inside += pieces;
                if (inside == patch) {
                    inside = 0;
                    if (++y == patch) {
                        y = 0;
                        ++channel;
                    }
                }
            }
        }
    }
}

MSDD_SIMD_CLONES void final_tokens(const FinalStep& job, std::int64_t index) {
    switch (job.type) {
        case PixelType::float32:
            return final_tokens_of<float>(job, index);
        case PixelType::bfloat16:
            return final_tokens_of<BFloat16>(job, index);
        case PixelType::float16:
            return final_tokens_of<Float16>(job, index);
        case PixelType::uint8:
            return final_tokens_of<std::uint8_t>(job, index);
    }
}

#ifdef MSDD_SIMD_DISPATCH
namespace {

MSDD_AVX2 inline void store_pixels(float* to, __m256 values) { avx2::store(to, values); }
MSDD_AVX2 inline void store_pixels(BFloat16* to, __m256 values) { avx2::store(to, values); }
MSDD_AVX2 inline void store_pixels(Float16* to, __m256 values) { avx2::store(to, values); }
MSDD_AVX2 inline void store_pixels(std::uint8_t* to, __m256 values) {
    values = _mm256_add_ps(_mm256_mul_ps(values, _mm256_set1_ps(127.5f)), _mm256_set1_ps(128.0f));
    values = _mm256_max_ps(values, _mm256_setzero_ps());  // NaN, too: the second operand is taken
    values = _mm256_min_ps(values, _mm256_set1_ps(255.0f));
    const __m128i halves = avx2::low_halves(_mm256_cvttps_epi32(values));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
}

// Patches of 8: a line of a patch is one vector. Two tokens at a time write the lines of the image in whole cache
// lines, image after image, so that the tokens are read in the order of memory.
template <class T, class Pixel, bool GUIDED>
MSDD_AVX2 void token_row_avx2(const FinalStep& job, std::int64_t row) {
    const std::int64_t grid = job.end.shape.grid, batch = job.end.shape.batch, channels = job.end.shape.channels;
    const std::int64_t side = 8 * grid;
    const PatchRows &x = job.end.x, &v = job.end.v, &uncond = job.end.v_uncond;
    const __m256 dt = _mm256_set1_ps(job.end.scalars.dt), scale = _mm256_set1_ps(job.end.scalars.scale);
    for (std::int64_t column = 0; column < grid; column += 2) {
        const std::int64_t tokens = std::min<std::int64_t>(2, grid - column);
        for (std::int64_t image = 0; image < batch; ++image) {
            for (std::int64_t line = 0; line < 8 * channels; ++line) {
                const std::int64_t channel = line / 8, y = 8 * row + line % 8;
                Pixel* to =
                    static_cast<Pixel*>(job.out) + ((image * channels + channel) * side + y) * side + 8 * column;
                __builtin_prefetch(to + 16, 1);  // what the next two tokens will write: lines apart by a power of two
                for (std::int64_t k = 0; k < tokens; ++k) {
                    const std::int64_t token = row * grid + column + k;
                    const auto at = [&](const PatchRows& rows) {
                        const std::int64_t offset = token * rows.token_stride + image * rows.image_stride;
                        return static_cast<const T*>(rows.data) + offset + 8 * line;
                    };
                    __m256 velocity = avx2::load(at(v));
                    if constexpr (GUIDED) {
                        const __m256 base = avx2::load(at(uncond));
                        velocity = _mm256_add_ps(base, _mm256_mul_ps(scale, _mm256_sub_ps(velocity, base)));
                    }
                    store_pixels(to + 8 * k, _mm256_add_ps(avx2::load(at(x)), _mm256_mul_ps(dt, velocity)));
                }
            }
        }
    }
}

using TokenRow = void (*)(const FinalStep&, std::int64_t);

template <class T, class Pixel>
TokenRow token_row_of(const FinalStep& job) {
    return job.end.v_uncond.data == nullptr ? token_row_avx2<T, Pixel, false> : token_row_avx2<T, Pixel, true>;
}

template <class T>
TokenRow token_row_of(const FinalStep& job) {
    switch (job.type) {
        case PixelType::float32:
            return token_row_of<T, float>(job);
        case PixelType::bfloat16:
            return token_row_of<T, BFloat16>(job);
        case PixelType::float16:
            return token_row_of<T, Float16>(job);
        case PixelType::uint8:
            return token_row_of<T, std::uint8_t>(job);
    }
    return nullptr;
}

// The fast code, null where it does not apply.
TokenRow token_row_for(const FinalStep& job) {
    const EndOfStage& end = job.end;
    const bool same = end.v.dtype == end.x.dtype && (end.v_uncond.data == nullptr || end.v_uncond.dtype == end.x.dtype);
    if (!has_avx2() || !same || job.channels_last || end.shape.patch != 8) return nullptr;
    switch (end.x.dtype) {
        case DType::float32:
            return token_row_of<float>(job);
        case DType::bfloat16:
            return token_row_of<BFloat16>(job);
        case DType::float16:
            return token_row_of<Float16>(job);
    }
    return nullptr;
}

}  // namespace
#endif

void final_step(void* out, PixelType type, bool channels_last, const PatchRows& x, const PatchRows& v,
                const PatchRows& v_uncond, const PatchShape& shape, const EulerScalars& euler, int threads) {
    const auto& [grid, batch, channels, patch] = shape;
    expect(grid >= 0 && batch >= 0 && channels >= 0, "sizes must not be negative");
    expect(patch >= 1, "patch_size must be at least 1, got " + std::to_string(patch));
    expect_threads(threads);
    const std::int64_t side = grid * patch;
    if (side * batch * channels == 0) return;
    expect(x.data != nullptr && v.data != nullptr, "x or v is missing");
    expect(out != nullptr, "out is missing");
    const FinalStep job{{x, v, v_uncond, shape, euler}, out, type, channels_last};
    const std::int64_t grain = GRAIN_PIXELS / (side * patch * channels);
#ifdef MSDD_SIMD_DISPATCH
    if (const TokenRow token_row = token_row_for(job)) {
        parallel_for(grid, std::max<std::int64_t>(1, grain / batch), threads,
                     [&](std::int64_t begin, std::int64_t end) {
                         for (std::int64_t i = begin; i < end; ++i) token_row(job, i);
                     });
        return;
    }
#endif
    parallel_for(batch * grid, std::max<std::int64_t>(1, grain), threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) final_tokens(job, i);
    });
}

}  // namespace msdd_fast
