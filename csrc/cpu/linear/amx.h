// Tiles of AMX: 16 x 64 sums in tiles 0 to 3, 16 rows of x in tile 4, 16 columns of a panel in tile 5. The level's file
// defines the instructions (tile_zero, tile_load, tile_dot, tile_store; numbers of tiles are literals).

namespace msdd_fast {
namespace {

constexpr std::int64_t ROWS = 16;
constexpr std::int64_t TILE_COLUMNS = 16;
static_assert(PANEL == 4 * TILE_COLUMNS);

constexpr std::int64_t DEPTH = 64 / static_cast<std::int64_t>(sizeof(Element));  // elements of a row of a tile

// Rows at `x`, of DEPTH elements each, times DEPTH elements of all columns.
MSDD_SIMD inline void dot_tiles(const void* x, std::int64_t row_bytes, const float* words) {
    constexpr std::int64_t bytes = PANEL * sizeof(float);
    tile_load(4, x, row_bytes);
    tile_load(5, words, bytes);
    tile_dot(0, 4, 5);
    tile_load(5, words + TILE_COLUMNS, bytes);
    tile_dot(1, 4, 5);
    tile_load(5, words + 2 * TILE_COLUMNS, bytes);
    tile_dot(2, 4, 5);
    tile_load(5, words + 3 * TILE_COLUMNS, bytes);
    tile_dot(3, 4, 5);
}

// A tile is always whole: rows and elements that are not there are copied in as zeros.
MSDD_SIMD inline void tile(const Element* x, std::int64_t stride, std::int64_t rows, const float* words,
                           std::int64_t in, float* out) {
    constexpr std::int64_t STEP_WORDS = TILE_WORDS * PANEL;
    alignas(64) Element copy[ROWS][DEPTH];
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (std::int64_t k = 0; k < in; k += DEPTH, words += STEP_WORDS) {
        const std::int64_t count = in - k < DEPTH ? in - k : DEPTH;
        if (rows == ROWS && count == DEPTH) {
            dot_tiles(x + k, stride * static_cast<std::int64_t>(sizeof(Element)), words);
            continue;
        }
        std::memset(copy, 0, sizeof copy);
        for (std::int64_t r = 0; r < rows; ++r)
            std::memcpy(copy[r], x + r * stride + k, static_cast<std::size_t>(count) * sizeof(Element));
        dot_tiles(copy, sizeof copy[0], words);
    }
    constexpr std::int64_t bytes = PANEL * sizeof(float);
    tile_store(0, out, bytes);
    tile_store(1, out + TILE_COLUMNS, bytes);
    tile_store(2, out + 2 * TILE_COLUMNS, bytes);
    tile_store(3, out + 3 * TILE_COLUMNS, bytes);
}

}  // namespace
}  // namespace msdd_fast
