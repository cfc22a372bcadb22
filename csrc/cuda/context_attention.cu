// Host side of the context attention kernel (detail/context_attention_kernel.h): kernel choice, setup and launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "msdd_fast/check.h"
#include "msdd_fast/context_attention.h"
#include "msdd_fast/detail/context_attention_kernel.h"
#include "msdd_fast/detail/device.h"
#include "msdd_fast/detail/warp.h"

namespace msdd_fast {
namespace {

using context::Arguments;
using context::kThreads;

// Blocks that the compiler leaves registers for. For sm_100 it would spill 4 bytes of the masked kernel at 4 blocks.
template <int chunks, bool masked>
constexpr int bound_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    if (masked) return 3;
#endif
    return context::resident_blocks(chunks);
}

// Up to 128 keys: 128 registers and 40 KiB of shared memory, 4 blocks, 16 warps, on a multiprocessor. Above: up to 168
// registers and 56 or 72 KiB, 3 blocks (2 where a multiprocessor has less than 171 or 219 KiB).
template <class T, int chunks, bool masked>
__global__ void __launch_bounds__(kThreads, bound_blocks<chunks, masked>())
    context_attention_kernel(const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(128) unsigned char memory[];
    context::attend<T, chunks, masked>(arguments, blockIdx.x, threadIdx.x, shared_address(memory));
}

using Kernel = void (*)(Arguments);

constexpr std::int64_t kMost = 256;  // keys

// Without a mask for the context's 128 tokens, and for the 192 of a joint block at the second scale.
template <class T>
Kernel kernel_for(std::int64_t keys) {
    switch (context::chunks_for(keys)) {
        case 2:
            return keys == 128 ? context_attention_kernel<T, 2, false> : context_attention_kernel<T, 2, true>;
        case 3:
            return keys == 192 ? context_attention_kernel<T, 3, false> : context_attention_kernel<T, 3, true>;
        default:
            return context_attention_kernel<T, 4, true>;
    }
}

Kernel kernel_for(DType dtype, std::int64_t keys) {
    return dtype == DType::bfloat16 ? kernel_for<BFloat16>(keys) : kernel_for<Float16>(keys);
}

// Loads every kernel on the current device, where CUDA would do it at its first launch, perhaps inside a capture, and
// raises the limit of shared memory where it is above the 48 KiB that every kernel may use.
void prepare() {
    for (const DType dtype : {DType::bfloat16, DType::float16}) {
        for (const std::int64_t keys : {127, 128, 191, 192, 256}) {  // one of each kernel
            const auto kernel = reinterpret_cast<const void*>(kernel_for(dtype, keys));
            cudaFuncAttributes attributes;
            cuda_check(cudaFuncGetAttributes(&attributes, kernel), "context_attention");
            const int bytes = context::shared_bytes(context::chunks_for(keys));
            cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                       "context_attention");
        }
    }
}

void expect_rows(const char* name, const HeadsView& x) {
    const bool aligned =
        reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.batch % 8 == 0 && x.token % 8 == 0 && x.head % 8 == 0;
    expect(x.data != nullptr && aligned, std::string(name) + " must have rows at multiples of 16 bytes, got address " +
                                             std::to_string(reinterpret_cast<std::uintptr_t>(x.data)) + ", strides " +
                                             std::to_string(x.batch) + ", " + std::to_string(x.token) + ", " +
                                             std::to_string(x.head));
}

}  // namespace

// K and V, 32 KiB, are read once by each block, mostly from L2: the more tiles of queries a block takes, the less of
// that. So a warp takes up to 4 tiles as long as the blocks still fill every multiprocessor. One block of 4 warps for
// fewer than 64 queries too: the idle warps help to load.
int context_attention_splits(std::int64_t pairs, std::int64_t queries, std::int64_t keys, int multiprocessors) {
    const std::int64_t per_block = context::kWarps * context::kTile;
    const std::int64_t most = (queries + per_block - 1) / per_block;
    const std::int64_t resident =
        static_cast<std::int64_t>(multiprocessors) * context::resident_blocks(context::chunks_for(keys));
    const std::int64_t rounds = std::clamp<std::int64_t>(pairs * most / std::max<std::int64_t>(resident, 1), 1, 4);
    return static_cast<int>((most + rounds - 1) / rounds);
}

CudaVersions cuda_versions() {
    CudaVersions versions{0, 0};
    // Without a driver the first may fail instead of answering 0.
    if (cudaDriverGetVersion(&versions.driver) != cudaSuccess) versions.driver = 0;
    cudaRuntimeGetVersion(&versions.runtime);
    cudaGetLastError();
    return versions;
}

void context_attention(const ContextAttention& x, DType dtype, std::uintptr_t stream, int device) {
    expect(dtype == DType::bfloat16 || dtype == DType::float16, "dtype must be bfloat16 or float16");
    expect(x.keys >= 1 && x.keys <= kMost, "keys must be 1 to 256, got " + std::to_string(x.keys));
    expect(x.images >= 0 && x.heads >= 0 && x.queries >= 0, "sizes must not be negative");
    const std::int64_t pairs = x.images * x.heads;
    if (pairs == 0 || x.queries == 0) return;
    expect(pairs < (1 << 24) && x.queries < (1 << 24), "images * heads and queries must be below 2^24");
    for (const auto& [name, rows] : {std::pair{"q", x.q}, {"k", x.k}, {"v", x.v}, {"out", x.out}}) {
        expect_rows(name, rows);
    }
    if (x.accumulate.data) expect_rows("accumulate", x.accumulate);

    const DeviceGuard guard(device);
    static OncePerDevice prepared;
    prepared.run(device, prepare);
    const int splits = context_attention_splits(pairs, x.queries, x.keys, multiprocessors(device));
    expect(pairs * splits < (std::int64_t{1} << 31), "images * heads * queries is too large for one launch");
    const Arguments arguments{x, splits};
    kernel_for(
        dtype,
        x.keys)<<<static_cast<unsigned>(pairs * splits), kThreads, context::shared_bytes(context::chunks_for(x.keys)),
                  reinterpret_cast<cudaStream_t>(stream)>>>(arguments);
    cuda_check(cudaGetLastError(), "context_attention");
}

}  // namespace msdd_fast
