// Vectors and steps of products of float32 for any machine. Four lanes are what NEON and SSE have; without vectors of
// the compiler's the lanes are plain numbers.
#include <cstring>

namespace msdd_fast {
namespace {

using Element = float;
constexpr int LANES = 4;
constexpr std::int64_t STEP = 1;

#if defined(__GNUC__)
using Vec = float __attribute__((vector_size(16)));
inline Vec broadcast(const float* from) { return Vec{*from, *from, *from, *from}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
#else
struct Vec {
    float lane[LANES];
};
inline Vec broadcast(const float* from) { return {{*from, *from, *from, *from}}; }
inline Vec multiply_add(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < LANES; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
#endif

inline Vec broadcast_last(const float* from) { return broadcast(from); }
inline Vec zero() { return Vec{}; }
inline void store(float* to, const Vec& a) { std::memcpy(to, &a, sizeof a); }
inline Vec load(const float* from) {
    Vec result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

}  // namespace
}  // namespace msdd_fast
