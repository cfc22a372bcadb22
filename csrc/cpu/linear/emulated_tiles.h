// Tiles of AMX in plain C++. The including file has `add_products`, of a word of each operand and a sum.
#include <cstdint>
#include <cstring>

namespace msdd_fast {
namespace {

// A register of AMX: 16 rows of 64 bytes.
struct Tile {
    float words[16][16];
};

thread_local Tile tiles[8];

inline void tile_zero(int to) { tiles[to] = {}; }

inline void tile_load(int to, const void* data, std::int64_t row_bytes) {
    for (int i = 0; i < 16; ++i)
        std::memcpy(tiles[to].words[i], static_cast<const char*>(data) + i * row_bytes, sizeof tiles[to].words[i]);
}

inline void tile_store(int from, void* data, std::int64_t row_bytes) {
    for (int i = 0; i < 16; ++i)
        std::memcpy(static_cast<char*>(data) + i * row_bytes, tiles[from].words[i], sizeof tiles[from].words[i]);
}

inline void tile_dot(int sums, int left, int right) {
    for (int i = 0; i < 16; ++i)
        for (int word = 0; word < 16; ++word)
            for (int j = 0; j < 16; ++j)
                tiles[sums].words[i][j] =
                    add_products(tiles[left].words[i][word], tiles[right].words[word][j], tiles[sums].words[i][j]);
}

inline void begin_tiles() {}
inline void end_tiles() {}

}  // namespace
}  // namespace msdd_fast
