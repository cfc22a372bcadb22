#include "msdd_fast/sigma_gate.h"

#include <algorithm>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/exp.h"
#include "msdd_fast/detail/floats.h"
#include "msdd_fast/detail/layer_norm.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/simd.h"

namespace msdd_fast {

constexpr int GATE_LANES = 32;
constexpr std::int64_t GATE_GRAIN_ELEMENTS = 1 << 15;

struct SigmaGateJob {
    void *x_new, *h;
    SigmaGate operands;
    NormShape shape;
};

// 0 and 1 at the infinities; a NaN stays one, which exp_float does not see to.
MSDD_INLINE float sigmoid(float x) {
    const float y = 1.0f / (1.0f + exp_float(-x));
    return x == x ? y : x;
}

// Sum of products in lanes that are added up as a tree: the same bits at every SIMD level.
MSDD_INLINE float product_of(const float* a, const float* b, std::int64_t count) {
    const std::int64_t whole = count - count % GATE_LANES;
    float lanes[GATE_LANES] = {}, rest = 0.0f;
    for (std::int64_t i = 0; i < whole; i += GATE_LANES)
        for (int j = 0; j < GATE_LANES; ++j) lanes[j] += a[i + j] * b[i + j];
    for (std::int64_t i = whole; i < count; ++i) rest += a[i] * b[i];
    return detail::add_up(lanes) + rest;
}

MSDD_SIMD_CLONES void sigma_gate_rows(const SigmaGateJob& job, std::int64_t begin, std::int64_t end) {
    alignas(64) float weights[MAX_NORM_WIDTH], offsets[MAX_NORM_WIDTH], logits[MAX_NORM_WIDTH];
    alignas(64) float factors[MAX_NORM_WIDTH], shifts[MAX_NORM_WIDTH];
    alignas(64) float sums[MAX_NORM_WIDTH], ys[MAX_NORM_WIDTH], results[MAX_NORM_WIDTH];
    const auto [rows, width, run, groups, eps] = job.shape;
    const SigmaGate& in = job.operands;
    const DType dtype = in.x.dtype;
    const float *weight = floats(in.weight, 0, width, weights), *shift = nullptr;
    std::int64_t known = -1;  // group whose rows of the tables are at hand
    for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t at = r * width;
        const float* x = floats(in.x, at, width, sums);
        const float* y = floats(in.y, at, width, ys);
        const float* offset = floats(in.offset.values, r * in.offset.stride, in.offset.wide ? width : 1, offsets);
        const float product = weight == nullptr ? 0.0f : product_of(x, weight, width);
        const float* logit = &product;
        if (weight == nullptr) logit = floats(in.logit.values, r * in.logit.stride, in.logit.wide ? width : 1, logits);
        float* sum = place(job.x_new, dtype, at, sums);
        if (in.offset.wide && in.logit.wide) {
            for (std::int64_t i = 0; i < width; ++i) sum[i] = x[i] + sigmoid(logit[i] + offset[i]) * y[i];
        } else if (in.offset.wide || in.logit.wide) {
            const float *wide = in.offset.wide ? offset : logit, one = in.offset.wide ? *logit : *offset;
            for (std::int64_t i = 0; i < width; ++i) sum[i] = x[i] + sigmoid(wide[i] + one) * y[i];
        } else {
            const float gate = sigmoid(*logit + *offset);
            for (std::int64_t i = 0; i < width; ++i) sum[i] = x[i] + gate * y[i];
        }
        store(sum, width, job.x_new, dtype, at);
        if (in.shift.values.data == nullptr) continue;
        const std::int64_t group = std::min(r / run, groups - 1);
        if (group != known) {
            shift = floats(in.shift.values, group * in.shift.stride, width, shifts);
            const float* scale = floats(in.scale.values, group * in.scale.stride, width, results);
            const float* rms_weight = floats(in.rms_weight, 0, width, ys);
            for (std::int64_t i = 0; i < width; ++i) factors[i] = rms_weight[i] * (1.0f + scale[i]);
            known = group;
        }
        const float* x_new = floats({job.x_new, dtype}, at, width, sums);  // as rounded
        const float factor = rms_factor<GATE_LANES>(x_new, width, eps);
        float* __restrict h = place(job.h, dtype, at, results);
        for (std::int64_t i = 0; i < width; ++i) h[i] = x_new[i] * factor * factors[i] + shift[i];
        store(h, width, job.h, dtype, at);
    }
}

void sigma_gate(void* x_new, void* h, const SigmaGate& operands, const NormShape& shape, int threads) {
    expect(shape.rows >= 0 && shape.width >= 0, "sizes must not be negative");
    expect(shape.width <= MAX_NORM_WIDTH, "width must be at most " + std::to_string(MAX_NORM_WIDTH));
    expect_threads(threads);
    if (shape.rows == 0 || shape.width == 0) return;
    const bool normed = operands.shift.values.data != nullptr;
    expect(!normed || (shape.run >= 1 && shape.groups >= 1), "run and groups must be at least 1");
    expect(operands.x.data != nullptr && operands.y.data != nullptr, "x or y is missing");
    expect(operands.offset.values.data != nullptr, "offset is missing");
    expect((operands.logit.values.data == nullptr) != (operands.weight.data == nullptr),
           "either logit or weight must be given");
    expect(!normed || (operands.scale.values.data != nullptr && operands.rms_weight.data != nullptr),
           "scale or rms_weight is missing");
    expect(x_new != nullptr && (!normed || h != nullptr), "x_new or h is missing");
    const SigmaGateJob job{x_new, h, operands, shape};
    parallel_for(shape.rows, std::max<std::int64_t>(1, GATE_GRAIN_ELEMENTS / shape.width), threads,
                 [&](std::int64_t begin, std::int64_t end) { sigma_gate_rows(job, begin, end); });
}

}  // namespace msdd_fast
