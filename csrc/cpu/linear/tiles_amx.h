// The instructions of AMX but for its products. MSDD_SIMD is the level's attribute.
#include <cstdint>

#include "msdd_fast/detail/intrinsics.h"

namespace msdd_fast {
namespace {

// All tiles are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

MSDD_SIMD inline void begin_tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
}

MSDD_SIMD inline void end_tiles() { _tile_release(); }

}  // namespace
}  // namespace msdd_fast

// The compiler wants numbers of tiles as literals.
#define tile_zero(to) _tile_zero(to)
#define tile_load(to, from, row_bytes) _tile_loadd(to, from, row_bytes)
#define tile_store(from, to, row_bytes) _tile_stored(from, to, row_bytes)
