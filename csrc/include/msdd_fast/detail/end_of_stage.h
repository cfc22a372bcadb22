// The Euler step at the end of a stage, LANES pixels at a time, for any way of reading the operands.
#pragma once

#include <algorithm>
#include <cstring>

#include "msdd_fast/detail/noise.h"
#include "msdd_fast/patch_rows.h"

namespace msdd_fast {

// A patch width of 8 is the usual case: a copy of constant length compiles to a few instructions instead of a call.
template <class T>
MSDD_INLINE void copy(T* target, const T* source, std::int64_t count) {
    if (count == 8)
        std::memcpy(target, source, 8 * sizeof(T));
    else
        std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(T));
}

struct EndOfStage {
    PatchRows x, v, v_uncond;  // x absent: there is no stage before, E = 0
    PatchShape shape;
    EulerScalars scalars;
};

// E of LANES pixels; read(rows, target) loads the pixels of one operand.
template <class Read>
MSDD_INLINE void euler(const EndOfStage& end, const Read& read, float (&pixels)[LANES]) {
    float v[LANES], uncond[LANES];
    const float dt = end.scalars.dt, scale = end.scalars.scale;
    read(end.x, pixels);
    read(end.v, v);
    if (end.v_uncond.data != nullptr) {
        read(end.v_uncond, uncond);
        for (int i = 0; i < LANES; ++i) v[i] = uncond[i] + scale * (v[i] - uncond[i]);
    }
    for (int i = 0; i < LANES; ++i) pixels[i] += dt * v[i];
}

// Noise with the upsampled E below it, as contiguous patch rows of `rows` x `columns` tokens.
struct NoiseRows {
    EndOfStage end;
    NoiseFormula formula;
    const std::int64_t* seeds;
    std::int64_t batch, channels, rows, columns, patch;
    void* out;
    DType dtype;
};

// In csrc/cpu/stage_transition.cpp.
void noise_rows(const NoiseRows& job, int threads);

}  // namespace msdd_fast
