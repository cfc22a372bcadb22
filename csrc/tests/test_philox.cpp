// Known-answer vectors and invariances of the noise, with no framework: prints what failed, exits 1.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "msdd_fast/philox.h"
#include "msdd_fast/renoise_upsample.h"
#include "msdd_fast/start_noise.h"

namespace {

int failures = 0;

void check(bool condition, const char* what) {
    if (condition) return;
    std::printf("FAILED: %s\n", what);
    ++failures;
}

bool known_answer(std::uint32_t word, const std::uint32_t (&expected)[4]) {
    std::uint32_t w[4][1] = {{word}, {word}, {word}, {word}};
    msdd_fast::philox<1>(w, word, word);
    return w[0][0] == expected[0] && w[1][0] == expected[1] && w[2][0] == expected[2] && w[3][0] == expected[3];
}

template <class Call>
bool refuses(const Call& call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

}  // namespace

int main() {
    check(known_answer(0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}), "Philox of zeros");
    check(known_answer(0xFFFFFFFF, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}), "Philox of ones");

    const std::int64_t seeds[] = {7, 1234567890123456789};
    constexpr std::int64_t channels = 3, height = 19, width = 35, image = channels * 4 * height * width;
    const std::vector<float> x(2 * channels * height * width, 0.0f);
    const auto noise = [&](std::vector<float>& out, const std::int64_t* first, std::int64_t batch, int threads) {
        msdd_fast::renoise_upsample(out.data(), x.data(), msdd_fast::DType::float32, false, first, batch, channels,
                                    height, width, {0.0f, 1.0f, 2, -1.0 / 3.0}, threads);
    };
    std::vector<float> one(2 * image, NAN), many(2 * image, NAN), alone(image, NAN);
    noise(one, seeds, 2, 1);
    noise(many, seeds, 2, 5);
    noise(alone, seeds + 1, 1, 1);
    check(one == many, "the number of threads changes nothing");
    check(std::vector<float>(one.begin() + image, one.end()) == alone, "an image does not depend on its batch");

    double worst = 0;
    for (std::int64_t row = 0; row < 2 * channels * 2 * height; row += 2)
        for (std::int64_t column = 0; column < 2 * width; column += 2) {
            const float* p = &one[static_cast<std::size_t>(row * 2 * width + column)];
            worst = std::fmax(worst, std::fabs(p[0] + p[1] + p[2 * width] + p[2 * width + 1]));
        }
    check(worst < 1e-5, "a block sums to zero at correlation -1/3");

    const auto f32 = msdd_fast::DType::float32;
    check(refuses([&] { msdd_fast::start_noise(one.data(), f32, seeds, 1, 1, 3, 2, 1); }), "odd height is refused");
    check(refuses([&] {
              msdd_fast::renoise_upsample(one.data(), x.data(), f32, false, seeds, 1, 1, 1, 1, {0, 1, 0, 1.0}, 1);
          }),
          "correlation 1 is refused");
    if (failures == 0) std::printf("all passed\n");
    return failures != 0;
}
