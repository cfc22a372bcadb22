// Attention of each pixel over the square window around it, on the CPU (docs/spec.md#ssdd-network).
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

// (2 window - 1, 2 window - 1, heads) in any memory order: strides in elements.
struct BiasTable {
    Operand values;
    std::int64_t row = 0, column = 0, head = 0;
};

struct WindowShape {
    std::int64_t batch, height, width, heads, head_size;  // height * width tokens, row by row
    std::int64_t window;
};

// out = softmax(q k^T / sqrt(head size) + table[qy - ky + window - 1, qx - kx + window - 1]) v over the keys with
// |qy - ky| < window and |qx - kx| < window. q, k, v and out of `dtype`, float32 inside, rounded once; `out` must not
// overlap the others. Results are bitwise independent of the number of threads and of other images and heads. Keeps
// about 4 (2 window + 1) head_size (width + 2 window) x 2 bytes per thread, independent of the image height.
// Throws std::invalid_argument on negative sizes, window < 1 or threads < 1.
void window_attention(HeadsView out, HeadsView q, HeadsView k, HeadsView v, const BiasTable& table, DType dtype,
                      const WindowShape& shape, int threads);

}  // namespace msdd_fast
