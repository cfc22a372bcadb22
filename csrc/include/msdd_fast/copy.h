// Copies between tensors of any strides and float dtypes, and to the bytes of pixels.
#pragma once

#include <cstdint>

#include "msdd_fast/detail/pixels.h"
#include "msdd_fast/dtype.h"

namespace msdd_fast {

constexpr int MAX_COPY_DIMENSIONS = 8;

struct CopyShape {
    int dimensions = 0;
    std::int64_t sizes[MAX_COPY_DIMENSIONS] = {}, to[MAX_COPY_DIMENSIONS] = {}, from[MAX_COPY_DIMENSIONS] = {};
};

// out[i] = x[i], rounded to out's dtype or made a pixel's byte, for every index i; `to` and `from` are the strides of
// out and x in elements (0 in `from` repeats x). A null x stands for zeros. The two must not overlap.
void copy(void* out, PixelType out_type, const void* x, DType x_dtype, const CopyShape& shape, int threads);

}  // namespace msdd_fast
