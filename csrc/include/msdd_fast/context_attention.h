// Attention of image tokens over a short context on an NVIDIA GPU: host side, without CUDA headers.
//
//   out = softmax(q k^T / 8) v (+ accumulate),   head size 64, 1 to 256 context tokens
//
// Every tensor is (images, tokens, heads, 64) with strides in elements, the last dimension contiguous, every row of 64
// at a multiple of 16 bytes. bfloat16 or float16, float32 inside, rounded once.
#pragma once

#include <cstdint>

#include "msdd_fast/operand.h"

namespace msdd_fast {

struct ContextAttention {
    HeadsView q, k, v, accumulate, out;  // accumulate may be absent; out must not overlap another
    std::int64_t images, heads, queries, keys;
};

// Enqueues the kernel on `stream` (a CUstream) of `device` and returns. Safe under stream capture after a first call on
// that device, which loads the kernels. Throws std::invalid_argument for what it cannot do, std::runtime_error with
// CUDA's text when CUDA refuses.
void context_attention(const ContextAttention& arguments, DType dtype, std::uintptr_t stream, int device);

// Versions of the driver and of the linked runtime, 1000 * major + 10 * minor; the driver's is 0 if there is none.
// Starts no context.
struct CudaVersions {
    int driver, runtime;
};
CudaVersions cuda_versions();

// Thread blocks among which the queries of one image and head are divided (see context_attention.cu).
int context_attention_splits(std::int64_t pairs, std::int64_t queries, std::int64_t keys, int multiprocessors);

}  // namespace msdd_fast
