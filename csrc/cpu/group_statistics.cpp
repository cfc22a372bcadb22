#include "msdd_fast/detail/group_statistics.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t PIECE = 8192;  // elements that are summed at a time: 32 KiB as float32
constexpr std::int64_t PIECES = 8;    // of a part
constexpr std::int64_t GRAIN_ELEMENTS = 1 << 15;

// Of one channel: the mean, and the sum of the squares about it.
struct ChannelPart {
    float mean, squares;
};

std::int64_t pixels_of_piece(const PixelMap& map) { return std::max<std::int64_t>(1, PIECE / map.channels); }

// `count` pixels of `channels` channels, into `means` and `squares`. The sum of the centred values corrects the mean,
// which may be some units in the last place off: as much as the deviation of a channel that hardly varies.
MSDD_INLINE void piece_moments(const float* x, std::int64_t count, std::int64_t channels, float* means,
                               float* squares) {
    alignas(64) float rest[MAX_NORM_CHANNELS];
    const float share = 1.0f / static_cast<float>(count);
    std::fill(means, means + channels, 0.0f);
    std::int64_t p = 0;
    for (; p + 4 <= count; p += 4) {
        const float* r = x + p * channels;
        for (std::int64_t c = 0; c < channels; ++c)
            means[c] += (r[c] + r[channels + c]) + (r[2 * channels + c] + r[3 * channels + c]);
    }
    for (; p < count; ++p)
        for (std::int64_t c = 0; c < channels; ++c) means[c] += x[p * channels + c];
    for (std::int64_t c = 0; c < channels; ++c) means[c] *= share;
    std::fill(squares, squares + channels, 0.0f);
    std::fill(rest, rest + channels, 0.0f);
    for (p = 0; p + 4 <= count; p += 4) {
        const float* r = x + p * channels;
        for (std::int64_t c = 0; c < channels; ++c) {
            const float mean = means[c], first = r[c] - mean, second = r[channels + c] - mean;
            const float third = r[2 * channels + c] - mean, fourth = r[3 * channels + c] - mean;
            rest[c] += (first + second) + (third + fourth);
            squares[c] += (first * first + second * second) + (third * third + fourth * fourth);
        }
    }
    for (; p < count; ++p)
        for (std::int64_t c = 0; c < channels; ++c) {
            const float centred = x[p * channels + c] - means[c];
            rest[c] += centred;
            squares[c] += centred * centred;
        }
    for (std::int64_t c = 0; c < channels; ++c) {
        const float off = rest[c] * share;
        means[c] += off;
        squares[c] = std::max(squares[c] - rest[c] * off, 0.0f);
    }
}

// Pixels [begin, end) of all images, piece by piece.
MSDD_SIMD_CLONES void part_moments(const PixelMap& map, std::int64_t begin, std::int64_t end, ChannelPart* part) {
    alignas(64) float wide[std::max(PIECE, MAX_NORM_CHANNELS)], means[MAX_NORM_CHANNELS], squares[MAX_NORM_CHANNELS];
    alignas(64) float mean[MAX_NORM_CHANNELS], sum[MAX_NORM_CHANNELS];
    const std::int64_t channels = map.channels, step = pixels_of_piece(map);
    for (std::int64_t at = begin; at < end; at += step) {
        const std::int64_t count = std::min(step, end - at), before = at - begin;
        const float* x = floats(map.values, at * channels, count * channels, wide);
        if (before == 0) {
            piece_moments(x, count, channels, mean, sum);
            continue;
        }
        piece_moments(x, count, channels, means, squares);
        const float share = static_cast<float>(count) / static_cast<float>(before + count);
        const float weight = share * static_cast<float>(before);
        for (std::int64_t c = 0; c < channels; ++c) {
            const float apart = means[c] - mean[c];
            mean[c] += apart * share;
            sum[c] += squares[c] + apart * apart * weight;
        }
    }
    for (std::int64_t c = 0; c < channels; ++c) part[c] = {mean[c], sum[c]};
}

}  // namespace

void group_statistics(const PixelMap* maps, int count, std::int64_t batch, std::int64_t pixels, std::int64_t groups,
                      float eps, GroupNorm* norms, int threads) {
    struct Parts {
        std::int64_t size, count;  // pixels of one, parts of an image
        std::vector<ChannelPart> values;
    };
    std::vector<Parts> found(static_cast<std::size_t>(count));
    std::int64_t channels = 0;
    for (int m = 0; m < count; ++m) {
        const PixelMap& map = maps[m];
        Parts& parts = found[static_cast<std::size_t>(m)];
        parts.size = PIECES * pixels_of_piece(map);
        parts.count = (pixels + parts.size - 1) / parts.size;
        parts.values.resize(static_cast<std::size_t>(batch * parts.count * map.channels));
        channels += map.channels;
        const std::int64_t grain =
            std::max<std::int64_t>(1, GRAIN_ELEMENTS / (std::min(parts.size, pixels) * map.channels));
        parallel_for(batch * parts.count, grain, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                const std::int64_t image = i / parts.count, first = i % parts.count * parts.size;
                part_moments(map, image * pixels + first, image * pixels + std::min(first + parts.size, pixels),
                             parts.values.data() + i * map.channels);
            }
        });
    }
    const std::int64_t per_group = channels / groups;
    const auto elements = static_cast<double>(pixels * per_group);
    for (std::int64_t image = 0; image < batch; ++image) {
        // Calls body(part, pixels of the part) for all parts of the channels of a group.
        const auto each = [&](std::int64_t group, const auto& body) {
            std::int64_t first = 0;  // channel of the map
            for (int m = 0; m < count; first += maps[m].channels, ++m) {
                const Parts& parts = found[static_cast<std::size_t>(m)];
                const std::int64_t own = maps[m].channels;
                const std::int64_t begin = std::max(group * per_group, first) - first;
                const std::int64_t end = std::min((group + 1) * per_group, first + own) - first;
                for (std::int64_t i = 0; i < parts.count; ++i) {
                    const ChannelPart* const part = parts.values.data() + (image * parts.count + i) * own;
                    const auto n = static_cast<double>(std::min(parts.size, pixels - i * parts.size));
                    for (std::int64_t c = begin; c < end; ++c) body(part[c], n);
                }
            }
        };
        for (std::int64_t group = 0; group < groups; ++group) {
            double sum = 0, squares = 0;
            each(group, [&](const ChannelPart& part, double n) { sum += n * static_cast<double>(part.mean); });
            const double mean = sum / elements;
            each(group, [&](const ChannelPart& part, double n) {
                const double apart = static_cast<double>(part.mean) - mean;
                squares += static_cast<double>(part.squares) + n * apart * apart;
            });
            norms[image * groups + group] = {static_cast<float>(mean),
                                             static_cast<float>(1.0 / std::sqrt(squares / elements + eps))};
        }
    }
}

}  // namespace msdd_fast
