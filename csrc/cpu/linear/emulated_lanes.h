// Vectors of AVX-512 in plain C++. The including file has Element, STEP and `add_products`, of a word of each operand
// and a sum.
#include <cstring>

namespace msdd_fast {
namespace {

constexpr int LANES = 16;

struct Vec {
    float lane[LANES];
};

inline Vec zero() { return {}; }
inline void store(float* to, const Vec& a) { std::memcpy(to, &a, sizeof a); }
inline Vec load(const float* from) {
    Vec result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Vec all_lanes(const Element (&word)[STEP]) {
    Vec result;
    for (auto& lane : result.lane) std::memcpy(&lane, word, sizeof word);
    return result;
}

inline Vec broadcast(const Element* from) {
    Element word[STEP];
    std::memcpy(word, from, sizeof word);
    return all_lanes(word);
}

inline Vec broadcast_last(const Element* from) { return all_lanes({*from}); }

inline Vec multiply_add(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < LANES; ++i) c.lane[i] = add_products(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}

}  // namespace
}  // namespace msdd_fast
