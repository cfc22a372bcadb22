// Mean and deviation of the groups of channels-last maps.
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

constexpr std::int64_t MAX_NORM_CHANNELS = 4096;  // the buffers of one pixel are on the stack

struct GroupNorm {
    float mean, rstd;
};

// The channels of a map (batch, pixels, channels), dense.
struct PixelMap {
    Operand values;
    std::int64_t channels = 0;
};

// norms[image * groups + group] of `count` maps joined along their channels. In pieces of the image the mean of every
// channel, then the squares about it, and the pieces put together about the common mean: a large mean costs no
// accuracy. Bitwise independent of the number of threads and of other images.
void group_statistics(const PixelMap* maps, int count, std::int64_t batch, std::int64_t pixels, std::int64_t groups,
                      float eps, GroupNorm* norms, int threads);

}  // namespace msdd_fast
