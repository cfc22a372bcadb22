// The body of the context attention kernel, in terms of the instructions of warp.h (or their emulation on a CPU).
//
// A thread block of 4 warps serves one image and head. It copies K and V to shared memory once, where they stay; each
// warp then takes 16 queries at a time and goes over the keys in chunks of 64:
//
//   S = q K^T    16 x 64 scores in registers, 32 a thread (K: matrices as they lie are the column-major operand)
//   P = exp2(c S - c max S), c = log2(e) / 8; the row's maximum by two shuffles among the 4 lanes that share it
//   O = O exp2(c (old max - max)) + P V    (P's accumulators, packed in pairs, are already the left operand of the
//                                           product; V's matrices are loaded transposed)
//   out = O / sum (+ accumulate), rounded once, through the warp's 2 KiB of shared memory to 16-byte stores
//
// Why chunks of 64: all 128 scores at once save a second maximum and one rescaling of O, but took 166 registers (nvcc
// 13.0), 3 blocks on a multiprocessor, and spilled at 128. Two halves, unrolled, take 128 without: 4 blocks, 16 warps.
//
// Shared memory: K, V, then 16 rows for each warp, which hold its queries, then `accumulate`, then the result. A row is
// 128 bytes, 8 segments of 16; segment s of row r lies at s ^ (r mod 8), so that 8 lanes that touch one segment of 8
// consecutive rows, or the 8 segments of a row, cover all 32 banks.
#pragma once

#include <cstdint>

#include "msdd_fast/context_attention.h"
#ifdef MSDD_EMULATE
#include "emulated_warp.h"
#else
#include "msdd_fast/detail/warp.h"
#endif

namespace msdd_fast {
namespace context {

constexpr int kHeadSize = 64, kWarps = 4, kThreads = 32 * kWarps;
constexpr int kChunk = 64;                              // keys whose scores are in registers at once
constexpr int kTile = 16;                               // queries of a warp
constexpr Word kSegment = 16, kRow = 2 * kHeadSize;     // bytes
constexpr float kScale = 0.125f * 1.4426950408889634f;  // log2(e) / sqrt(64)

// Chunks of the kernel that takes so many keys: 128 are the context's tokens, 144 and 192 those of a joint block with
// 4 x 4 and 8 x 8 image tokens beside them.
constexpr int chunks_for(std::int64_t keys) { return keys > 192 ? 4 : keys > 128 ? 3 : 2; }

// Bytes of shared memory for `chunks` times 64 keys.
constexpr int shared_bytes(int chunks) { return static_cast<int>(kRow) * (2 * chunks * kChunk + kWarps * kTile); }

// Thread blocks that one multiprocessor holds: what __launch_bounds__ asks of the compiler.
constexpr int resident_blocks(int chunks) { return chunks <= 2 ? 4 : 3; }

struct Arguments {
    ContextAttention tensors;
    int splits;
};

// Offset of a segment in a matrix of rows.
MSDD_DEVICE Word swizzled(unsigned row, unsigned segment) { return row * kRow + (segment ^ row % 8) * kSegment; }

// First element of the rows of one image and head.
MSDD_DEVICE char* rows_of(const HeadsView& x, std::int64_t image, std::int64_t head) {
    return static_cast<char*>(x.data) + 2 * (image * x.batch + head * x.head);
}

// Starts copying `count` rows to shared memory, 8 lanes a row; with `bounded`, rows at and beyond `limit` become zeros.
// `worker` is one of `workers` threads, 32 or a multiple of 64: then a thread's rows are 4, 8 or 16 apart.
template <int count, int workers, bool bounded>
MSDD_DEVICE void copy_rows(Word shared, const char* global, std::int64_t stride, int limit, unsigned worker) {
    constexpr unsigned apart = workers / 8;
    const unsigned first = worker / 8, segment = worker % 8;
    const char* source = global + 2 * first * stride + segment * kSegment;
#pragma unroll
    for (unsigned i = 0; i < count / apart; ++i) {
        const unsigned row = first + i * apart;
        copy_async(shared + swizzled(row, segment), source, !bounded || static_cast<int>(row) < limit);
        source += 2 * apart * stride;
    }
}

// Reduces over the four lanes that hold the same rows.
MSDD_DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

MSDD_DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// One thread of one thread block. `shared` is the address of shared_bytes(chunks) bytes, 128-byte aligned.
// masked: there may be fewer keys than chunks * 64.
template <class T, int chunks, bool masked>
MSDD_DEVICE void attend(const Arguments& a, unsigned block, unsigned thread, Word shared) {
    const ContextAttention& x = a.tensors;
    const unsigned lane = thread % 32;
    const int warp = static_cast<int>(thread / 32);
    const unsigned pair = block / static_cast<unsigned>(a.splits);
    const int split = static_cast<int>(block - pair * static_cast<unsigned>(a.splits));
    const unsigned image = pair / static_cast<unsigned>(x.heads);
    const unsigned head = pair - image * static_cast<unsigned>(x.heads);
    const int queries = static_cast<int>(x.queries), keys = static_cast<int>(x.keys);
    const int tiles = (queries + kTile - 1) / kTile;

    constexpr int capacity = chunks * kChunk;
    const Word shared_k = shared, shared_v = shared + capacity * kRow;
    const Word shared_tile = shared_v + capacity * kRow + static_cast<Word>(warp) * (kTile * kRow);

    // Addresses of this lane's rows. The segment's number is xored in, so each next one is the first xored with a
    // constant, and whole matrices further on are constant distances.
    Word left[4];    // 16 rows x segments 2i and 2i + 1: q's fragments, and V's transposed
    Word column[2];  // 8 rows x segments 4i to 4i + 3: K's fragments
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = swizzled(lane % 16, 2 * i + lane / 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) column[i] = swizzled(lane % 8, 4 * i + lane / 8);

    // Starts the copy of a tile of `rows`. Where it lies is computed anew each time: registers are scarce.
    const auto copy_tile = [&](const HeadsView& rows, int tile) {
        const int start = tile * kTile;
        const char* first = rows_of(rows, hide(image), hide(head)) + 2 * start * rows.token;
        copy_rows<kTile, 32, true>(shared_tile, first, rows.token, queries - start, hide(lane));
    };

    // The queries and K are one group of copies, V the next: scores are computed while V arrives.
    copy_tile(x.q, min(split * kWarps + warp, tiles - 1));
    copy_rows<capacity, kThreads, masked>(shared_k, rows_of(x.k, image, head), x.k.token, keys, thread);
    commit_group();
    copy_rows<capacity, kThreads, masked>(shared_v, rows_of(x.v, image, head), x.v.token, keys, thread);
    commit_group();
    wait_groups<1>();
    sync_block();

    bool have_v = false;
    for (int base = split * kWarps; base < tiles; base += a.splits * kWarps) {
        // A warp beyond the last tile repeats that and stores nothing: no branch divides the block.
        const int tile = min(base + warp, tiles - 1);
        if (have_v) {
            copy_tile(x.q, tile);
            commit_group();
            wait_groups<0>();
            sync_warp();
        }
        Word query[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_matrices(query[i], shared_tile + left[i]);
        sync_warp();  // every lane has its queries: their place is free
        if (x.accumulate.data) copy_tile(x.accumulate, tile);
        commit_group();

        float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};  // rows lane / 4 and 8 more
        float output[kHeadSize / 8][4] = {};
#pragma unroll(chunks <= 2 ? chunks : 1)
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const Word offset = static_cast<Word>(chunk) * (kChunk * kRow);
            float score[kChunk / 8][4] = {};
#pragma unroll
            for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    Word k[4];
                    load_matrices(k, shared_k + offset + static_cast<Word>(j) * (8 * kRow) + column[i]);
                    multiply_add<T>(score[j], query[2 * i], k[0], k[1]);
                    multiply_add<T>(score[j], query[2 * i + 1], k[2], k[3]);
                }
            }
            if (masked) {
                const int left_over = keys - chunk * kChunk - 2 * static_cast<int>(lane % 4);
#pragma unroll
                for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (8 * j + i % 2 >= left_over) score[j][i] = -INFINITY;
                    }
                }
            }

            Word weight[kChunk / 16][4];  // P, the left operand of its product with V
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float highest = score[0][2 * r];
#pragma unroll
                for (int j = 0; j < kChunk / 8; ++j) {
                    highest = fmaxf(highest, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
                }
                highest = fmaxf(maximum[r], quad_max(highest));
                if (chunk > 0) {
                    const float shrink = fast_exp2((maximum[r] - highest) * kScale);
                    sum[r] *= shrink;
#pragma unroll
                    for (int j = 0; j < kHeadSize / 8; ++j) {
                        output[j][2 * r] *= shrink;
                        output[j][2 * r + 1] *= shrink;
                    }
                }
                maximum[r] = highest;
                const float shift = -highest * kScale;
#pragma unroll
                for (int j = 0; j < kChunk / 8; ++j) {
                    const float low = fast_exp2(fmaf(score[j][2 * r], kScale, shift));
                    const float high = fast_exp2(fmaf(score[j][2 * r + 1], kScale, shift));
                    sum[r] += low + high;
                    weight[j / 2][2 * (j % 2) + r] = pack<T>(low, high);
                }
            }

            if (chunk == 0 && !have_v) {
                wait_groups<1>();  // all but the copy of `accumulate`
                sync_block();
                have_v = true;
            }

#pragma unroll
            for (int j = 0; j < kChunk / 16; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    Word v[4];
                    load_matrices_transposed(v, shared_v + offset + static_cast<Word>(j) * (16 * kRow) + left[i]);
                    multiply_add<T>(output[2 * i], weight[j], v[0], v[1]);
                    multiply_add<T>(output[2 * i + 1], weight[j], v[2], v[3]);
                }
            }
        }

        wait_groups<0>();
        sync_warp();  // `accumulate` is there for every lane
        const unsigned mine = hide(lane);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float inverse = fast_reciprocal(quad_sum(sum[r]));
#pragma unroll
            for (int j = 0; j < kHeadSize / 8; ++j) {
                const Word place = shared_tile + swizzled(mine / 4 + 8 * r, j) + mine % 4 * 4;
                float low = 0.0f, high = 0.0f;
                if (x.accumulate.data) unpack<T>(load_shared(place), low, high);
                low = fmaf(output[j][2 * r], inverse, low);
                high = fmaf(output[j][2 * r + 1], inverse, high);
                store_shared(place, pack<T>(low, high));
            }
        }
        sync_warp();
        const int end = base + warp < tiles ? queries - tile * kTile : 0;  // rows that are ours
        char* to = rows_of(x.out, hide(image), hide(head));
        to += 2 * (tile * kTile + static_cast<int>(mine / 8)) * x.out.token + mine % 8 * kSegment;
#pragma unroll
        for (int i = 0; i < kTile / 4; ++i) {
            const unsigned row = mine / 8 + 4 * i;
            store_global(to, shared_tile + swizzled(row, mine % 8), static_cast<int>(row) < end);
            to += 8 * x.out.token;
        }
        sync_warp();  // the tile's place may take the next queries
    }
}

}  // namespace context
}  // namespace msdd_fast
