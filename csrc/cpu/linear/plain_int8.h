// Quads of bytes in plain C++, for the levels that emulate instructions.
#include <cstring>

namespace msdd_fast {
namespace {

using Element = std::uint8_t;
constexpr std::int64_t PANEL = PANEL_AVX512, STEP = 4;

// c + the sum of a_i * b_i for unsigned a and signed b; all three are bit patterns in words.
inline float add_products(float a, float b, float c) {
    std::uint8_t as[4];
    std::int8_t bs[4];
    std::int32_t sum;
    std::memcpy(as, &a, sizeof as);
    std::memcpy(bs, &b, sizeof bs);
    std::memcpy(&sum, &c, sizeof sum);
    for (int i = 0; i < 4; ++i) sum += as[i] * bs[i];
    std::memcpy(&c, &sum, sizeof sum);
    return c;
}

}  // namespace
}  // namespace msdd_fast
