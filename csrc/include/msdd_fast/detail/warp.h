// Warp instructions that CUDA C++ does not expose: asynchronous copies, matrix loads, tensor cores (sm_80 on).
//
// Shared memory is addressed by 32-bit numbers (shared_address). csrc/tests/emulated_warp.h defines the same functions
// for the CPU, so that kernels can be tested without a GPU.
#pragma once

#include <cstdint>

#include "msdd_fast/dtype.h"

#define MSDD_DEVICE __device__ __forceinline__

namespace msdd_fast {

using Word = std::uint32_t;  // two 16-bit elements, the lower index in the lower half

MSDD_DEVICE Word shared_address(const void* pointer) { return static_cast<Word>(__cvta_generic_to_shared(pointer)); }

// Returns `value` opaquely to the compiler, so that expressions of it are recomputed inside a loop instead of being
// hoisted and kept in registers.
MSDD_DEVICE unsigned hide(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}

MSDD_DEVICE void sync_block() { __syncthreads(); }
MSDD_DEVICE void sync_warp() { __syncwarp(); }
MSDD_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

// Copies 16 bytes from global to shared memory, bypassing registers; writes zeros and reads nothing if not `valid`.
MSDD_DEVICE void copy_async(Word shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Ends a group of copies. wait_groups<n>: all of this thread's groups but the newest n have arrived.
MSDD_DEVICE void commit_group() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int n>
MSDD_DEVICE void wait_groups() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(n) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane 8i + r gives the address of row r of matrix i (16 bytes); lane 4r + c
// receives in to[i] the elements 2c and 2c + 1 of its row r.
MSDD_DEVICE void load_matrices(Word (&to)[4], Word address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// The same, each matrix transposed: lane 4r + c receives rows 2c and 2c + 1 of column r.
MSDD_DEVICE void load_matrices_transposed(Word (&to)[4], Word address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

MSDD_DEVICE Word load_shared(Word address) {
    Word value;
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
    return value;
}

MSDD_DEVICE void store_shared(Word address, Word value) {
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(value) : "memory");
}

// 16 bytes from shared to global memory, through registers; nothing is written if not `valid`.
MSDD_DEVICE void store_global(void* global, Word shared, bool valid) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(shared)
                 : "memory");
    if (valid) *static_cast<uint4*>(global) = value;
}

// c (16x8, float32) += a (16x16) b (16x8). With lane = 4r + t:
//   a[0], a[2]: row r, columns 2t and 8 + 2t, each with its right neighbour; a[1], a[3]: the same of row r + 8;
//   b0, b1: rows 2t and 8 + 2t of column r, each with the row below it;
//   c[0], c[1]: columns 2t and 2t + 1 of row r; c[2], c[3]: of row r + 8.
template <class T>
MSDD_DEVICE void multiply_add(float (&c)[4], const Word (&a)[4], Word b0, Word b1);

template <>
MSDD_DEVICE void multiply_add<BFloat16>(float (&c)[4], const Word (&a)[4], Word b0, Word b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
MSDD_DEVICE void multiply_add<Float16>(float (&c)[4], const Word (&a)[4], Word b0, Word b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even, and back.
template <class T>
MSDD_DEVICE Word pack(float low, float high);

template <>
MSDD_DEVICE Word pack<BFloat16>(float low, float high) {
    Word word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <>
MSDD_DEVICE Word pack<Float16>(float low, float high) {
    Word word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <class T>
MSDD_DEVICE void unpack(Word word, float& low, float& high);

template <>
MSDD_DEVICE void unpack<BFloat16>(Word word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xFFFF0000u);
}

template <>
MSDD_DEVICE void unpack<Float16>(Word word, float& low, float& high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }\n"
        : "=f"(low), "=f"(high)
        : "r"(word));
}

// 2^x and 1/x, to 2 and 1 units in the last place.
MSDD_DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

MSDD_DEVICE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace msdd_fast
