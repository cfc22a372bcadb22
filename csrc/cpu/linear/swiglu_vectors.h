// SwiGLU of a row of sums by vectors. The level's file defines
//
//   Floats, FLOATS          vector of floats and how many there are in it
//   load_floats store_floats set_floats add sub mul fma fnma min max (fnma: c - a * b)
//   round_floats            to the nearest whole numbers
//   times_power_of_two      (a, n): a * 2^n for whole n in [-126, 126]
//   reciprocal              to 2e-7 relative
//   where_at_most           (a, b, value): value where a <= b, else 0
//   SWIGLU_PANEL            columns of a panel
//
// No include guard: each level includes this exactly once.

#define MSDD_SWIGLU

namespace msdd_fast {
namespace {

// a x + b.
MSDD_SIMD inline Floats line(float a, Floats x, float b) { return fma(set_floats(a), x, set_floats(b)); }

// 2^y to 1.1e-7 relative for y in [-126, 126]: 2^n 2^r with |r| <= 1/2, 2^r by a polynomial (minimax, 1 at 0).
MSDD_SIMD inline Floats exp2_bounded(Floats y) {
    const Floats n = round_floats(y), r = sub(y, n), r2 = mul(r, r);
    const Floats high = fma(line(0.001326472731307149f, r, 0.009671512991189957f), r2,
                            line(0.05550733581185341f, r, 0.24022242426872253f));
    return times_power_of_two(fma(high, r2, line(0.6931470036506653f, r, 1.0f)), n);
}

// a / (1 + e^-a) to 5e-7 relative; where e^-a exceeds 2^126 as if it were infinite.
MSDD_SIMD inline Floats silu_of(Floats a) {
    const Floats limit = set_floats(126.0f), power = mul(a, set_floats(-1.4426950408889634f));
    const Floats d = add(set_floats(1.0f), exp2_bounded(max(min(power, limit), set_floats(-126.0f))));
    return mul(a, where_at_most(power, limit, reciprocal(d)));
}

// The first half of a row becomes silu(first half) * second half; `bias` of both is added before, if there is one.
MSDD_SIMD inline void swiglu_sums(float* sums, const float* bias) {
    constexpr std::int64_t half = SWIGLU_PANEL / 2;
#pragma GCC unroll 2
    for (std::int64_t i = 0; i < half; i += FLOATS) {
        Floats a = load_floats(sums + i), b = load_floats(sums + half + i);
        if (bias != nullptr) {
            a = add(a, load_floats(bias + i));
            b = add(b, load_floats(bias + half + i));
        }
        store_floats(sums + i, mul(silu_of(a), b));
    }
}

}  // namespace
}  // namespace msdd_fast
