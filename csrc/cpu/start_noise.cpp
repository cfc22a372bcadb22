#include "msdd_fast/start_noise.h"

#include <string>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/end_of_stage.h"
#include "msdd_fast/detail/noise.h"

namespace msdd_fast {

void start_noise(void* out, DType dtype, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels,
                 std::int64_t height, std::int64_t width, int threads) {
    expect(height % 2 == 0 && width % 2 == 0, "height and width must be even (noise comes in 2x2 blocks), got " +
                                                  std::to_string(height) + "x" + std::to_string(width));
    noise_image(out, nullptr, dtype, false, seeds, batch, channels, height / 2, width / 2, START_FORMULA, threads);
}

void start_noise_rows(void* out, DType dtype, const std::int64_t* seeds, std::int64_t batch, std::int64_t channels,
                      std::int64_t height, std::int64_t width, std::int64_t patch, int threads) {
    expect(patch >= 1 && height % patch == 0 && width % patch == 0,
           "height and width must be multiples of patch_size, got " + std::to_string(height) + "x" +
               std::to_string(width) + " and " + std::to_string(patch));
    noise_rows({{}, START_FORMULA, seeds, batch, channels, height / patch, width / patch, patch, out, dtype}, threads);
}

}  // namespace msdd_fast
