// Rounding of sums. MSDD_NARROW: the level has its own `narrow_sums` from float to bfloat16.
//
// No include guard: each level includes this exactly once.

#include <cstring>
#include <type_traits>

#include "msdd_fast/detail/bits.h"
#include "msdd_fast/dtype.h"

namespace msdd_fast {
namespace {

template <class T>
MSDD_SIMD MSDD_INLINE void write(const float* values, std::int64_t count, T* out) {
    if constexpr (std::is_same_v<T, float>) {
        std::memcpy(out, values, static_cast<std::size_t>(count) * sizeof(float));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
#ifdef MSDD_NARROW
        narrow_sums(values, count, out);
#else
        narrow(values, count, out);
#endif
    } else {
        narrow(values, count, out);
    }
}

}  // namespace
}  // namespace msdd_fast
