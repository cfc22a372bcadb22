// Scratch memory that each thread keeps between calls: page faults of a fresh allocation cost as much as a small
// attention.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace msdd_fast {

// At least `floats` floats, aligned to 64 bytes, uninitialised.
inline float* scratch_of(std::int64_t floats) {
    thread_local std::unique_ptr<float[]> memory;
    thread_local std::int64_t size = 0;
    if (size < floats + 16) {
        size = 0;
        memory.reset(new float[static_cast<std::size_t>(floats + 16)]);
        size = floats + 16;
    }
    return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(memory.get()) + 63) / 64 * 64);
}

}  // namespace msdd_fast
