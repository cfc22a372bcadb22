// The ops with C names, for tests/native/test_cpu_ops.py: built for one SIMD level by -march, loaded with ctypes and
// compared with the extension, which chooses its level itself.
#include "msdd_fast/cfg_euler.h"
#include "msdd_fast/final_step.h"
#include "msdd_fast/norm_modulate.h"
#include "msdd_fast/qk_norm_rope.h"
#include "msdd_fast/renoise_upsample.h"
#include "msdd_fast/sde_step.h"
#include "msdd_fast/sigma_gate.h"
#include "msdd_fast/stage_transition.h"

extern "C" void renoise_upsample(void* out, const void* x, int dtype, int channels_last, const std::int64_t* seeds,
                                 std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
                                 float alpha, float beta, std::int64_t stage, double correlation) {
    msdd_fast::renoise_upsample(out, x, static_cast<msdd_fast::DType>(dtype), channels_last != 0, seeds, batch,
                                channels, height, width, {alpha, beta, stage, correlation}, 1);
}

extern "C" void cfg_euler(void* out, const void* x, const void* v_cond, const void* v_uncond, int dtype,
                          std::int64_t count, float scale, float dt) {
    const auto type = static_cast<msdd_fast::DType>(dtype);
    msdd_fast::cfg_euler(out, type, {{x, type}}, {{v_cond, type}}, {{v_uncond, type}}, 1, count, scale, dt, 1);
}

static msdd_fast::PatchRows patch_rows(const void* data, int dtype, std::int64_t batch, std::int64_t features) {
    return {data, static_cast<msdd_fast::DType>(dtype), batch * features, features};
}

// Guided, contiguous patch rows.
extern "C" void stage_transition(void* out, const void* x, const void* v, const void* v_uncond, int dtype,
                                 const std::int64_t* seeds, std::int64_t grid, std::int64_t batch,
                                 std::int64_t channels, std::int64_t patch) {
    const auto rows = [&](const void* data) { return patch_rows(data, dtype, batch, channels * patch * patch); };
    msdd_fast::stage_transition(out, rows(x), rows(v), rows(v_uncond), {grid, batch, channels, patch}, {-0.25f, 1.7f},
                                seeds, {0.625f, 0.7f, 2, -1.0 / 3.0}, 1);
}

// The same, to pixels of `type` in NCHW order.
extern "C" void final_step(void* out, const void* x, const void* v, const void* v_uncond, int dtype, int type,
                           std::int64_t grid, std::int64_t batch, std::int64_t channels, std::int64_t patch) {
    const auto rows = [&](const void* data) { return patch_rows(data, dtype, batch, channels * patch * patch); };
    msdd_fast::final_step(out, static_cast<msdd_fast::PixelType>(type), false, rows(x), rows(v), rows(v_uncond),
                          {grid, batch, channels, patch}, {-0.25f, 1.7f}, 1);
}

// With noise of seeds, v as pixels of tokens.
extern "C" void sde_step(void* out, const void* x, const void* v, int dtype, const std::int64_t* seeds,
                         std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
                         std::int64_t patch) {
    const auto type = static_cast<msdd_fast::DType>(dtype);
    msdd_fast::sde_step(out, {x, type}, {v, type}, {}, seeds, {batch, channels, height, width, patch},
                        {0.866f, 0.634f, 2, true, false}, 1);
}

// A gate per row, the same tables for all rows.
extern "C" void sigma_gate(void* x_new, void* h, const void* x, const void* y, const void* offset, const void* shift,
                           const void* scale, const void* rms_weight, const void* weight, int dtype, std::int64_t rows,
                           std::int64_t width) {
    const auto type = static_cast<msdd_fast::DType>(dtype);
    const msdd_fast::SigmaGate operands{
        {x, type},      {y, type},          {{offset, type}, 1, false}, {},
        {weight, type}, {{shift, type}, 0}, {{scale, type}, 0},         {rms_weight, type}};
    msdd_fast::sigma_gate(x_new, h, operands, {rows, width, rows, 1, 1e-6f}, 1);
}

// With a gated residual, the same tables for all rows; RMSNorm if rms_weight is given.
extern "C" void norm_modulate(void* x_new, void* h, const void* x, const void* y, const void* gate, const void* shift,
                              const void* scale, const void* rms_weight, int dtype, std::int64_t rows,
                              std::int64_t width) {
    const auto type = static_cast<msdd_fast::DType>(dtype);
    const auto table = [&](const void* data) { return msdd_fast::Table{{data, type}, width}; };
    msdd_fast::norm_modulate(h, x_new, x, type, {y, type}, table(gate), table(shift), table(scale), table(rms_weight),
                             {rows, width, rows, 1, 1e-6f}, 1);
}

// Of contiguous qkv (batch, tokens, 3, heads, size), with one entry of weights.
extern "C" void qk_norm_rope(void* out, const void* x, const float* weight, const float* bias, const float* cos,
                             const float* sin, int dtype, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                             int size) {
    msdd_fast::qk_norm_rope(
        out, x, static_cast<msdd_fast::DType>(dtype), {weight, bias, cos, sin},
        {batch, tokens, 2, heads, size, tokens * 3 * heads * size, 3 * heads * size, false, tokens, 1e-6f}, 1);
}
