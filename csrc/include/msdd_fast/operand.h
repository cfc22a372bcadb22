// Views of tensors: address, element type and strides.
#pragma once

#include <cstdint>

#include "msdd_fast/dtype.h"

namespace msdd_fast {

struct Operand {
    const void* data = nullptr;  // null where the operand is absent
    DType dtype = DType::float32;
};

// Rows of adjacent elements, `stride` elements from one to the next.
struct Rows {
    Operand values;
    std::int64_t stride = 0;
};

// (batch, tokens, heads, head size) in any memory order: the strides of the first three in elements, the last is 1.
struct HeadsView {
    void* data = nullptr;  // null where the tensor is absent
    std::int64_t batch = 0, token = 0, head = 0;
};

}  // namespace msdd_fast
