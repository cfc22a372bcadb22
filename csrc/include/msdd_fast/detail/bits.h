// What every kernel file needs: function attributes and the bit patterns of floats.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MSDD_HD __host__ __device__
#else
#define MSDD_HD
#endif

// Helpers must disappear into the function that calls them, or they would not follow it to its SIMD level.
#if defined(__CUDACC__)
#define MSDD_INLINE __forceinline__
#elif defined(__GNUC__)
#define MSDD_INLINE inline __attribute__((always_inline))
#else
#define MSDD_INLINE inline
#endif

#if defined(__GNUC__)
#define MSDD_NOINLINE __attribute__((noinline))
#else
#define MSDD_NOINLINE
#endif

namespace msdd_fast {
namespace detail {

MSDD_HD MSDD_INLINE float as_float(std::int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

MSDD_HD MSDD_INLINE std::int32_t as_int(float value) {
    std::int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

}  // namespace detail
}  // namespace msdd_fast
