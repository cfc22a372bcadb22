// The interface between csrc/cpu/attention/attention.cpp and the code of each SIMD level.
#pragma once

#include "msdd_fast/attention.h"

namespace msdd_fast {

// Sizes of blocks. Keys and values of a block and the scores of a tile lie in L2 together (0.24 MB at head size 64), a
// panel of keys in L1. The queries and sums of a task (up to 0.6 MB) are gone through once for each block, while every
// task packs all keys and values anew: at 1152 tokens, tasks of 384 queries were up to 6 % slower.
constexpr std::int64_t BLOCK_KEYS = 384;
constexpr std::int64_t TASK_QUERIES = 1152;
constexpr std::int64_t TILE_QUERIES = 24;

struct AttentionJob {
    HeadsView out, q, k, v, accumulate;
    DType dtype;
    AttentionShape shape;
};

// Rows [first, first + count) of one head of one image, count <= TASK_QUERIES. `scratch` holds `scratch_floats`
// aligned to 64 bytes.
using AttentionTask = void (*)(const AttentionJob& job, std::int64_t image, std::int64_t head, std::int64_t first,
                               std::int64_t count, float* scratch);

// Head size of packed queries and keys: zeros beyond the end.
constexpr std::int64_t padded_size(std::int64_t head_size) { return (head_size + 15) / 16 * 16; }

// Floats of scratch for this head size; enough for every level.
constexpr std::int64_t scratch_floats(std::int64_t head_size) {
    const std::int64_t width = (head_size + 31) / 32 * 32;  // values and sums fill whole panels of up to 32
    const std::int64_t size = padded_size(head_size);
    return BLOCK_KEYS * (size + width) + TASK_QUERIES * (size + width + 2) + TILE_QUERIES * BLOCK_KEYS;
}

void attention_task_plain(const AttentionJob&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float*);
void attention_task_plain_bf16(const AttentionJob&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float*);

#if defined(__x86_64__) && defined(__GNUC__)
#define MSDD_X86_LEVELS
void attention_task_avx2(const AttentionJob&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float*);
void attention_task_avx512(const AttentionJob&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float*);
void attention_task_avx512bf16(const AttentionJob&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float*);
#endif

}  // namespace msdd_fast
