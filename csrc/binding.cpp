// The module. A tensor is a tuple of its address, dtype, shape and strides: no torch headers, so one build serves every
// torch version. Dtypes, shapes and strides are checked here; that a tensor is on the right device, and that its memory
// is as large as its shape and strides say, is up to the caller (msdd_fast/native).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "binding/prepared.h"
#include "binding/tensor.h"
#include "msdd_fast/attention.h"
#include "msdd_fast/cfg_euler.h"
#include "msdd_fast/check.h"
#include "msdd_fast/context_attention.h"
#include "msdd_fast/convolution.h"
#include "msdd_fast/copy.h"
#include "msdd_fast/final_step.h"
#include "msdd_fast/geglu.h"
#include "msdd_fast/group_norm_modulate_silu.h"
#include "msdd_fast/linear.h"
#include "msdd_fast/linear_int8.h"
#include "msdd_fast/norm_modulate.h"
#include "msdd_fast/philox.h"
#include "msdd_fast/pixel_block.h"
#include "msdd_fast/program.h"
#include "msdd_fast/qk_norm_rope.h"
#include "msdd_fast/renoise_upsample.h"
#include "msdd_fast/sde_step.h"
#include "msdd_fast/sigma_gate.h"
#include "msdd_fast/stage_transition.h"
#include "msdd_fast/start_noise.h"
#include "msdd_fast/swiglu.h"
#include "msdd_fast/window_attention.h"

namespace py = pybind11;

namespace {

using binding::Address;
using binding::define;
using binding::MAX_DIMENSIONS;
using binding::Rows;
using binding::Seeds;
using binding::Tensor;

// Keeps a parameter out of template argument deduction.
template <class T>
struct Identity {
    using type = T;
};
template <class T>
using Same = typename Identity<T>::type;

using msdd_fast::expect;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

msdd_fast::DType dtype_of(int code) {
    expect(code >= 0 && code <= 2,
           "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(code));
    return static_cast<msdd_fast::DType>(code);
}

std::array<std::uint32_t, 4> philox(const std::array<std::uint32_t, 4>& counter,
                                    const std::array<std::uint32_t, 2>& key) {
    std::uint32_t words[4][1] = {{counter[0]}, {counter[1]}, {counter[2]}, {counter[3]}};
    msdd_fast::philox<1>(words, key[0], key[1]);
    return {words[0][0], words[1][0], words[2][0], words[3][0]};
}

// --- Checks: nothing below lets an op read or write outside the tensors that it is given. ---

std::string text(const std::int64_t* values, int count) {
    std::string result = "(";
    for (int i = 0; i < count; ++i) result += (i == 0 ? "" : ", ") + std::to_string(values[i]);
    return result + ")";
}

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
    throw std::invalid_argument(std::string(name) + " must be " + expected + ", got " + got);
}

const char* name_of(int dtype) {
    constexpr const char* names[] = {"float32", "bfloat16", "float16"};
    return names[static_cast<int>(dtype_of(dtype))];
}

void expect_present(const char* name, const Tensor& x) {
    if (x.address == 0 && x.elements() != 0) throw std::invalid_argument(std::string(name) + " is missing");
    dtype_of(x.dtype);
}

void expect_dimensions(const char* name, const Tensor& x, int dimensions) {
    expect_present(name, x);
    if (x.dimensions == dimensions) return;
    refuse(name, "of " + std::to_string(dimensions) + " dimensions", "shape " + text(x.shape, x.dimensions));
}

void expect_shape(const char* name, const Tensor& x, std::initializer_list<std::int64_t> shape) {
    expect_present(name, x);
    const auto dimensions = static_cast<int>(shape.size());
    if (x.dimensions == dimensions && std::equal(shape.begin(), shape.end(), x.shape)) return;
    refuse(name, "of shape " + text(shape.begin(), dimensions), text(x.shape, x.dimensions));
}

void expect_like(const char* name, const Tensor& x, const Tensor& other) {
    expect_present(name, x);
    if (x.dimensions == other.dimensions && std::equal(x.shape, x.shape + x.dimensions, other.shape)) return;
    refuse(name, "of shape " + text(other.shape, other.dimensions), text(x.shape, x.dimensions));
}

void expect_dtype(const char* name, const Tensor& x, int dtype) {
    if (x.dtype != dtype) refuse(name, name_of(dtype), name_of(x.dtype));
}

// Whether dimensions order[0], order[1], ... of x are dense, the last of them innermost.
bool is_dense(const Tensor& x, const int* order, int count) {
    if (x.elements() == 0) return true;
    std::int64_t stride = 1;
    for (int i = count - 1; i >= 0; --i) {
        const int d = order[i];
        if (x.shape[d] != 1 && x.strides[d] != stride) return false;
        stride *= x.shape[d];
    }
    return true;
}

constexpr int ORDER[MAX_DIMENSIONS] = {0, 1, 2, 3, 4, 5, 6, 7};

// The innermost `count` dimensions are contiguous.
void expect_inner(const char* name, const Tensor& x, int count) {
    if (is_dense(x, ORDER + x.dimensions - count, count)) return;
    refuse(name, "contiguous in its last " + (count == 1 ? "dimension" : std::to_string(count) + " dimensions"),
           "strides " + text(x.strides, x.dimensions));
}

void expect_contiguous(const char* name, const Tensor& x) {
    if (is_dense(x, ORDER, x.dimensions)) return;
    refuse(name, "contiguous", "shape " + text(x.shape, x.dimensions) + ", strides " + text(x.strides, x.dimensions));
}

// The elements of the last dimension are adjacent, and one stride, which is returned, leads from each of its rows to
// the next through all other dimensions.
std::int64_t expect_rows(const char* name, const Tensor& x) {
    expect_present(name, x);
    if (x.dimensions < 1) refuse(name, "of one dimension or more", "shape ()");
    expect_inner(name, x, 1);
    std::int64_t stride = 0, rows = 1;
    if (x.elements() == 0) return stride;
    for (int d = x.dimensions - 2; d >= 0; --d) {
        if (x.shape[d] == 1) continue;
        if (rows == 1) stride = x.strides[d];
        if (x.strides[d] != rows * stride)
            refuse(name, "of rows at one stride",
                   "shape " + text(x.shape, x.dimensions) + ", strides " + text(x.strides, x.dimensions));
        rows *= x.shape[d];
    }
    return stride;
}

// (batch, channels, height, width), dense in NHWC memory order if `channels_last`, else NCHW.
void expect_image(const char* name, const Tensor& x, bool channels_last) {
    expect_dimensions(name, x, 4);
    constexpr int last[] = {0, 2, 3, 1};
    if (is_dense(x, channels_last ? last : ORDER, 4)) return;
    refuse(name, channels_last ? "channels-last" : "contiguous",
           "shape " + text(x.shape, 4) + ", strides " + text(x.strides, 4));
}

const std::int64_t* seeds_of(const Seeds& seeds, std::int64_t batch) {
    const auto& [address, count] = seeds;
    expect(batch < 0 || count == batch,
           "seeds must be one per image, " + std::to_string(batch) + ", got " + std::to_string(count));
    return pointer<const std::int64_t>(address);
}

msdd_fast::Operand operand_of(const Tensor& x) { return {pointer<const void>(x.address), dtype_of(x.dtype)}; }

// Calls the function; and adds the call to the program that this thread records, if it does.
template <class... Parameters>
void call(void (*function)(Parameters...), Same<std::decay_t<Parameters>>... arguments) {
    function(arguments...);
    if (msdd_fast::Program* const program = msdd_fast::recording())
        program->add([function, arguments...] { function(arguments...); });
}

// --- The ops. Results come as addresses where their shape and order follow from the operands: dense, no gaps. ---

void start_noise(Address out, const Seeds& seeds, int dtype, std::int64_t batch, std::int64_t channels,
                 std::int64_t height, std::int64_t width, int threads) {
    call(&msdd_fast::start_noise, pointer<void>(out), dtype_of(dtype), seeds_of(seeds, batch), batch, channels, height,
         width, threads);
}

void start_noise_rows(Address out, const Seeds& seeds, int dtype, std::int64_t batch, std::int64_t channels,
                      std::int64_t height, std::int64_t width, std::int64_t patch, int threads) {
    call(&msdd_fast::start_noise_rows, pointer<void>(out), dtype_of(dtype), seeds_of(seeds, batch), batch, channels,
         height, width, patch, threads);
}

// A float32 in memory, read when the op runs: a recorded program sees what is there at each replay. 0 is absent.
using Scalar = const float*;

Scalar scalar(const char* name, Address address) {
    if (address == 0) throw std::invalid_argument(std::string(name) + " is missing");
    return pointer<const float>(address);
}

float value(Scalar scalar) { return scalar == nullptr ? 0.0f : *scalar; }

struct RenoiseAt {
    Scalar alpha, beta;
    std::int64_t stage;
    double correlation;

    msdd_fast::RenoiseScalars values() const { return {value(alpha), value(beta), stage, correlation}; }
};

void renoise_upsample_at(void* out, const void* x, msdd_fast::DType dtype, bool channels_last,
                         const std::int64_t* seeds, std::array<std::int64_t, 4> shape, RenoiseAt scalars, int threads) {
    const auto& [batch, channels, height, width] = shape;
    msdd_fast::renoise_upsample(out, x, dtype, channels_last, seeds, batch, channels, height, width, scalars.values(),
                                threads);
}

void renoise_upsample(Address out, const Tensor& x, Address alpha, Address beta, const Seeds& seeds, bool channels_last,
                      std::int64_t stage, double correlation, int threads) {
    expect_image("x", x, channels_last);
    const auto* s = x.shape;
    call(&renoise_upsample_at, pointer<void>(out), pointer<const void>(x.address), dtype_of(x.dtype), channels_last,
         seeds_of(seeds, s[0]), {s[0], s[1], s[2], s[3]},
         {scalar("alpha", alpha), scalar("beta", beta), stage, correlation}, threads);
}

void cfg_euler_at(void* out, msdd_fast::DType dtype, const std::array<msdd_fast::Rows, 3>& operands, std::int64_t rows,
                  std::int64_t columns, Scalar scale, Scalar dt, int threads) {
    msdd_fast::cfg_euler(out, dtype, operands[0], operands[1], operands[2], rows, columns, value(scale), value(dt),
                         threads);
}

void cfg_euler(Address out, const Rows& x, const Rows& v_cond, const Rows& v_uncond, Address scale, Address dt,
               int dtype, std::int64_t rows, std::int64_t columns, int threads) {
    const auto rows_of = [&](const char* name, const Rows& operand) -> msdd_fast::Rows {
        const auto& [address, kind, stride, elements] = operand;
        if (address != 0 && (elements != rows * columns || stride < 0))
            refuse(name, std::to_string(rows) + " rows of " + std::to_string(columns),
                   std::to_string(elements) + " elements, rows " + std::to_string(stride) + " apart");
        return {{pointer<const void>(address), dtype_of(kind)}, stride};
    };
    call(&cfg_euler_at, pointer<void>(out), dtype_of(dtype),
         {rows_of("x", x), rows_of("v_cond", v_cond), rows_of("v_uncond", v_uncond)}, rows, columns,
         pointer<const float>(scale), pointer<const float>(dt), threads);
}

using PatchShape = std::array<std::int64_t, 4>;  // grid, batch, channels, patch

msdd_fast::PatchRows patch_rows_of(const char* name, const Tensor& x, const PatchShape& shape) {
    if (x.address == 0) return {};
    const auto& [grid, batch, channels, patch] = shape;
    expect_shape(name, x, {grid * grid, batch, channels * patch * patch});
    expect_inner(name, x, 1);
    return {pointer<const void>(x.address), dtype_of(x.dtype), x.strides[0], x.strides[1]};
}

// x, v and v_uncond of the end of a stage, with dt and, where there is guidance, its scale.
struct EndOfStage {
    msdd_fast::PatchRows x, v, v_uncond;
    msdd_fast::PatchShape grid;
    Scalar dt, scale;

    msdd_fast::EulerScalars euler() const { return {value(dt), value(scale)}; }
};

EndOfStage end_of_stage(const Tensor& x, const Tensor& v, const Tensor& v_uncond, const PatchShape& shape, Address dt,
                        Address scale) {
    return {patch_rows_of("x", x, shape),
            patch_rows_of("v", v, shape),
            patch_rows_of("v_uncond", v_uncond, shape),
            {shape[0], shape[1], shape[2], shape[3]},
            scalar("dt", dt),
            pointer<const float>(scale)};
}

void stage_transition_at(void* out, const EndOfStage& end, const std::int64_t* seeds, RenoiseAt scalars, int threads) {
    msdd_fast::stage_transition(out, end.x, end.v, end.v_uncond, end.grid, end.euler(), seeds, scalars.values(),
                                threads);
}

void stage_transition(Address out, const Tensor& x, const Tensor& v, Address dt, Address alpha, Address beta,
                      const Seeds& seeds, const Tensor& v_uncond, Address scale, const PatchShape& shape,
                      std::int64_t stage, double correlation, int threads) {
    call(&stage_transition_at, pointer<void>(out), end_of_stage(x, v, v_uncond, shape, dt, scale),
         seeds_of(seeds, shape[1]), {scalar("alpha", alpha), scalar("beta", beta), stage, correlation}, threads);
}

msdd_fast::PixelType pixel_type(int code) {
    expect(code >= 0 && code <= 3, "type must be 0 to 3, got " + std::to_string(code));
    return static_cast<msdd_fast::PixelType>(code);
}

void final_step_at(void* out, msdd_fast::PixelType type, bool channels_last, const EndOfStage& end, int threads) {
    msdd_fast::final_step(out, type, channels_last, end.x, end.v, end.v_uncond, end.grid, end.euler(), threads);
}

void final_step(Address out, const Tensor& x, const Tensor& v, Address dt, const Tensor& v_uncond, Address scale,
                const PatchShape& shape, int type, bool channels_last, int threads) {
    call(&final_step_at, pointer<void>(out), pixel_type(type), channels_last,
         end_of_stage(x, v, v_uncond, shape, dt, scale), threads);
}

void norm_modulate(Address x_new, Address h, const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift,
                   const Tensor& scale, const Tensor& rms_weight, std::int64_t run, float eps, int threads) {
    expect_present("x", x);
    expect(x.dimensions >= 1, "x must have a dimension");
    expect_contiguous("x", x);
    if (y.address != 0) {
        expect_like("y", y, x);
        expect_contiguous("y", y);
    }
    const std::int64_t width = x.shape[x.dimensions - 1], groups = shift.shape[0];
    const auto table_of = [&](const char* name, const Tensor& table) -> msdd_fast::Table {
        if (table.address == 0) return {};
        expect_shape(name, table, {groups, width});
        expect_inner(name, table, 1);
        return {operand_of(table), table.strides[0]};
    };
    const bool one = rms_weight.dimensions == 1;  // for all rows
    if (rms_weight.address != 0 && one) expect_shape("rms_weight", rms_weight, {width});
    if (rms_weight.address != 0 && one) expect_contiguous("rms_weight", rms_weight);
    const msdd_fast::Table weight =
        one ? msdd_fast::Table{operand_of(rms_weight), 0} : table_of("rms_weight", rms_weight);
    call(&msdd_fast::norm_modulate, pointer<void>(h), pointer<void>(x_new), pointer<const void>(x.address),
         dtype_of(x.dtype), operand_of(y), table_of("gate", gate), table_of("shift", shift), table_of("scale", scale),
         weight, {width == 0 ? 0 : x.elements() / width, width, run, groups, eps}, threads);
}

void qk_norm_rope(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& cos,
                  const Tensor& sin, std::int64_t split, float eps, int threads) {
    expect_dimensions("x", x, 5);
    expect_inner("x", x, 3);
    const std::int64_t batch = x.shape[0], tokens = x.shape[1], parts = x.shape[2] - 1, heads = x.shape[3];
    const std::int64_t size = x.shape[4];
    expect_shape("out", out, {batch, tokens, parts, heads, size});
    expect_dtype("out", out, x.dtype);
    constexpr int token_order[] = {1, 0, 2, 3, 4};
    const bool token_major = !is_dense(out, ORDER, 5);
    if (token_major && !is_dense(out, token_order, 5))
        refuse("out", "dense in (B, N, P, H, d) or (N, B, P, H, d) order", "strides " + text(out.strides, 5));
    const auto table_of = [&](const char* name, const Tensor& table, std::int64_t elements) {
        expect_present(name, table);
        expect_dtype(name, table, 0);
        expect_contiguous(name, table);
        if (table.elements() < elements)
            refuse(name, "at least " + std::to_string(elements) + " elements",
                   "shape " + text(table.shape, table.dimensions));
        return pointer<const float>(table.address);
    };
    const std::int64_t weights = (split >= tokens ? 1 : 2) * parts * size, angles = tokens * (size / 2);
    const msdd_fast::HeadsTables tables{
        table_of("weight", weight, weights), bias.address == 0 ? nullptr : table_of("bias", bias, weights),
        table_of("cos", cos, angles), sin.address == 0 ? nullptr : table_of("sin", sin, angles)};
    call(&msdd_fast::qk_norm_rope, pointer<void>(out.address), pointer<const void>(x.address), dtype_of(x.dtype),
         tables,
         {batch, tokens, parts, heads, static_cast<int>(size), x.strides[0], x.strides[1], token_major, split, eps},
         threads);
}

void geglu(Address out, const Tensor& value, const Tensor& gate, int threads) {
    const std::int64_t value_stride = expect_rows("value", value), gate_stride = expect_rows("gate", gate);
    expect_like("gate", gate, value);
    expect_dtype("gate", gate, value.dtype);
    const std::int64_t width = value.shape[value.dimensions - 1];
    call(&msdd_fast::geglu, pointer<void>(out), {operand_of(value), value_stride}, {operand_of(gate), gate_stride},
         width == 0 ? 0 : value.elements() / width, width, threads);
}

void swiglu(Address out, const Tensor& a, const Tensor& b, int threads) {
    expect_dimensions("a", a, 2);
    expect_inner("a", a, 1);
    expect_like("b", b, a);
    expect_dtype("b", b, a.dtype);
    expect_inner("b", b, 1);
    call(&msdd_fast::swiglu, pointer<void>(out), pointer<const void>(a.address), pointer<const void>(b.address),
         dtype_of(a.dtype), a.shape[0], a.shape[1], a.strides[0], b.strides[0], threads);
}

std::tuple<std::int64_t, int> linear_packed_size(std::int64_t out, std::int64_t in, bool swiglu, int dtype,
                                                 const std::string& level) {
    const auto [elements, type] = msdd_fast::linear_packed_size({out, in, swiglu}, dtype_of(dtype), level);
    return {elements, static_cast<int>(type)};
}

void expect_packed(const Tensor& packed, const msdd_fast::LinearShape& shape, int dtype, const std::string& level) {
    const auto [elements, type] = msdd_fast::linear_packed_size(shape, dtype_of(dtype), level);
    expect_shape("packed", packed, {elements});
    expect_dtype("packed", packed, static_cast<int>(type));
    expect_contiguous("packed", packed);
    expect(packed.address % 64 == 0, "packed must be aligned to 64 bytes");
}

void linear_pack(const Tensor& packed, const Tensor& weight, bool swiglu, const std::string& level, int threads) {
    expect_dimensions("weight", weight, 2);
    expect_inner("weight", weight, 1);
    const msdd_fast::LinearShape shape{weight.shape[0], weight.shape[1], swiglu};
    expect_packed(packed, shape, weight.dtype, level);
    msdd_fast::linear_pack(pointer<void>(packed.address), operand_of(weight), weight.strides[0], shape, level, threads);
}

void linear(const Tensor& out, const Tensor& x, const Tensor& packed, const Tensor& bias, std::int64_t features,
            bool swiglu, const std::string& level, int threads) {
    expect_dimensions("x", x, 2);
    expect_inner("x", x, 1);
    const msdd_fast::LinearShape shape{features, x.shape[1], swiglu};
    expect_packed(packed, shape, x.dtype, level);
    expect_shape("out", out, {x.shape[0], swiglu ? features / 2 : features});
    expect_inner("out", out, 1);
    if (bias.address != 0) {
        expect_shape("bias", bias, {features});
        expect_contiguous("bias", bias);
    }
    call(&msdd_fast::linear, pointer<void>(out.address), dtype_of(out.dtype), out.strides[0],
         {operand_of(x), x.strides[0]}, x.shape[0], pointer<const void>(packed.address), operand_of(bias), shape, level,
         threads);
}

// Bytes, code 3 as among final_step's pixels, of quantize_rows.
void expect_quantized(const Tensor& values, const Tensor& scales, std::int64_t rows, std::int64_t width) {
    constexpr std::int64_t depth = msdd_fast::QUANTIZED_DEPTH;
    expect(values.dtype == 3, "values must be uint8");
    expect(values.address != 0 || values.elements() == 0, "values is missing");
    const std::int64_t padded = (width + depth - 1) / depth * depth;
    const bool fits = values.dimensions == 2 && values.shape[0] == rows && values.shape[1] == padded;
    if (!fits) refuse("values", text(std::array{rows, padded}.data(), 2), text(values.shape, values.dimensions));
    expect_contiguous("values", values);
    expect_shape("scales", scales, {rows});
    expect_dtype("scales", scales, 0);
    expect_contiguous("scales", scales);
}

void quantize_rows(const Tensor& values, const Tensor& scales, const Tensor& x, int threads) {
    expect_dimensions("x", x, 2);
    expect_inner("x", x, 1);
    expect_quantized(values, scales, x.shape[0], x.shape[1]);
    call(&msdd_fast::quantize_rows, pointer<std::uint8_t>(values.address), values.shape[1],
         pointer<float>(scales.address), {operand_of(x), x.strides[0]}, x.shape[0], x.shape[1], threads);
}

std::int64_t linear_int8_packed_words(std::int64_t out, std::int64_t in, bool swiglu, const std::string& level) {
    return msdd_fast::linear_int8_packed_words({out, in, swiglu}, level);
}

void expect_packed_int8(const Tensor& packed, const msdd_fast::LinearShape& shape, const std::string& level) {
    expect_shape("packed", packed, {msdd_fast::linear_int8_packed_words(shape, level)});
    expect_dtype("packed", packed, 0);
    expect_contiguous("packed", packed);
    expect(packed.address % 64 == 0, "packed must be aligned to 64 bytes");
}

void linear_int8_pack(const Tensor& packed, const Tensor& weight, bool swiglu, const std::string& level, int threads) {
    expect_dimensions("weight", weight, 2);
    expect_inner("weight", weight, 1);
    const msdd_fast::LinearShape shape{weight.shape[0], weight.shape[1], swiglu};
    expect_packed_int8(packed, shape, level);
    msdd_fast::linear_int8_pack(pointer<void>(packed.address), operand_of(weight), weight.strides[0], shape, level,
                                threads);
}

void linear_int8(const Tensor& out, const Tensor& values, const Tensor& scales, const Tensor& packed,
                 const Tensor& bias, std::int64_t features, std::int64_t inputs, bool swiglu, const std::string& level,
                 int threads) {
    expect_dimensions("out", out, 2);
    expect_quantized(values, scales, out.shape[0], inputs);
    const msdd_fast::LinearShape shape{features, inputs, swiglu};
    expect_packed_int8(packed, shape, level);
    expect_shape("out", out, {out.shape[0], swiglu ? features / 2 : features});
    expect_inner("out", out, 1);
    if (bias.address != 0) {
        expect_shape("bias", bias, {features});
        expect_contiguous("bias", bias);
    }
    call(&msdd_fast::linear_int8, pointer<void>(out.address), dtype_of(out.dtype), out.strides[0],
         {pointer<const std::uint8_t>(values.address), values.shape[1], pointer<const float>(scales.address)},
         out.shape[0], pointer<const void>(packed.address), operand_of(bias), shape, level, threads);
}

void sigma_gate(Address x_new, Address h, const Tensor& x, const Tensor& y, const Tensor& offset, const Tensor& shift,
                const Tensor& scale, const Tensor& rms_weight, const Tensor& logit, const Tensor& weight,
                std::int64_t run, float eps, int threads) {
    expect_present("x", x);
    expect(x.dimensions >= 1, "x must have a dimension");
    expect_contiguous("x", x);
    expect_like("y", y, x);
    expect_contiguous("y", y);
    const int last = x.dimensions - 1;
    const std::int64_t width = x.shape[last], rows = width == 0 ? 0 : x.elements() / width;
    const auto logits_of = [&](const char* name, const Tensor& t) -> msdd_fast::Logits {
        if (t.address == 0) return {};
        Tensor expected = x;  // or one value per row
        const bool wide = t.dimensions != x.dimensions || t.shape[last] != 1;
        if (!wide) expected.shape[last] = 1;
        expect_like(name, t, expected);
        expect_contiguous(name, t);
        return {operand_of(t), t.shape[last], wide};
    };
    const auto vector_of = [&](const char* name, const Tensor& t) -> msdd_fast::Operand {
        if (t.address == 0) return {};
        expect_shape(name, t, {width});
        expect_contiguous(name, t);
        return operand_of(t);
    };
    const std::int64_t groups = shift.address == 0 ? 0 : shift.shape[0];
    const auto table_of = [&](const char* name, const Tensor& table) -> msdd_fast::Table {
        if (table.address == 0) return {};
        expect_shape(name, table, {groups, width});
        expect_inner(name, table, 1);
        return {operand_of(table), table.strides[0]};
    };
    call(&msdd_fast::sigma_gate, pointer<void>(x_new), pointer<void>(h),
         {operand_of(x), operand_of(y), logits_of("offset", offset), logits_of("logit", logit),
          vector_of("weight", weight), table_of("shift", shift), table_of("scale", scale),
          vector_of("rms_weight", rms_weight)},
         {rows, width, run, groups, eps}, threads);
}

// Rows of features and the packed layer that makes `parts` numbers for every channel of pixels x.
msdd_fast::PixelModulation modulation_of(const Tensor& x, const Tensor& s, const Tensor& packed, const Tensor& bias,
                                         std::int64_t parts, const std::string& level) {
    expect_dimensions("x", x, 3);
    expect_contiguous("x", x);
    expect_dimensions("s", s, 2);
    expect_shape("s", s, {x.shape[0], s.shape[1]});
    expect_inner("s", s, 1);
    const std::int64_t features = x.shape[1] * parts * x.shape[2];
    expect_packed(packed, {features, s.shape[1], false}, s.dtype, level);
    expect_shape("bias", bias, {features});
    expect_contiguous("bias", bias);
    return {{operand_of(s), s.strides[0]}, pointer<const void>(packed.address), operand_of(bias), level};
}

msdd_fast::Operand weight_of(const char* name, const Tensor& x, std::initializer_list<std::int64_t> shape) {
    expect_shape(name, x, shape);
    expect_contiguous(name, x);
    return operand_of(x);
}

void pixel_modulate(Address out, const Tensor& x, const Tensor& s, const Tensor& packed, const Tensor& bias,
                    const Tensor& rms_weight, float eps, const std::string& level, int threads) {
    const msdd_fast::PixelModulation modulation = modulation_of(x, s, packed, bias, 2, level);
    call(&msdd_fast::pixel_modulate, pointer<void>(out), dtype_of(s.dtype), operand_of(x), modulation,
         weight_of("rms_weight", rms_weight, {x.shape[2]}), {x.shape[0], x.shape[1], x.shape[2], s.shape[1], eps},
         threads);
}

void pixel_block(Address out, const Tensor& x, const Tensor& y, const Tensor& s, const Tensor& packed,
                 const Tensor& bias, const Tensor& rms_weight, const Tensor& fc1_weight, const Tensor& fc1_bias,
                 const Tensor& fc2_weight, const Tensor& fc2_bias, float eps, const std::string& level, int threads) {
    const msdd_fast::PixelModulation modulation = modulation_of(x, s, packed, bias, 4, level);
    expect_like("y", y, x);
    expect_contiguous("y", y);
    expect_dimensions("fc1_bias", fc1_bias, 1);
    const std::int64_t channels = x.shape[2], hidden = fc1_bias.shape[0];
    call(&msdd_fast::pixel_block, pointer<void>(out), operand_of(x), operand_of(y), modulation,
         weight_of("rms_weight", rms_weight, {channels}),
         {weight_of("fc1_weight", fc1_weight, {hidden, channels}), weight_of("fc1_bias", fc1_bias, {hidden}),
          weight_of("fc2_weight", fc2_weight, {channels, hidden}), weight_of("fc2_bias", fc2_bias, {channels}), hidden},
         {x.shape[0], x.shape[1], channels, s.shape[1], eps}, threads);
}

struct SdeScalars {
    Scalar t, t_next;
    std::int64_t stage;
    bool clamp;
};

void sde_step_at(void* out, const std::array<msdd_fast::Operand, 3>& operands, const std::int64_t* seeds,
                 const msdd_fast::SdeShape& shape, const SdeScalars& scalars, int threads) {
    msdd_fast::sde_step(
        out, operands[0], operands[1], operands[2], seeds, shape,
        {value(scalars.t), value(scalars.t_next), scalars.stage, scalars.t_next != nullptr, scalars.clamp}, threads);
}

void sde_step(Address out, const Tensor& x, const Tensor& v, Address t, Address t_next, const Seeds& seeds,
              const Tensor& noise, std::int64_t stage, std::int64_t patch, bool clamp, int threads) {
    expect_dimensions("x", x, 4);
    expect_contiguous("x", x);
    const auto* s = x.shape;
    if (patch == 0) {
        expect_like("v", v, x);
    } else {
        expect(patch > 0 && s[2] % patch == 0 && s[3] % patch == 0, "patch must divide height and width");
        expect_shape("v", v, {s[2] / patch * (s[3] / patch), s[0], patch * patch, s[1]});
    }
    expect_contiguous("v", v);
    if (noise.address != 0) {
        expect_like("noise", noise, x);
        expect_contiguous("noise", noise);
    }
    const bool seeded = std::get<0>(seeds) != 0;
    call(&sde_step_at, pointer<void>(out), {operand_of(x), operand_of(v), operand_of(noise)},
         seeded ? seeds_of(seeds, s[0]) : nullptr, {s[0], s[1], s[2], s[3], patch},
         {scalar("t", t), pointer<const float>(t_next), stage, clamp}, threads);
}

// A tensor of heads of this shape and dtype.
msdd_fast::HeadsView heads_of(const char* name, const Tensor& x, int dtype, std::initializer_list<std::int64_t> shape) {
    expect_shape(name, x, shape);
    expect_dtype(name, x, dtype);
    expect_inner(name, x, 1);
    return {pointer<void>(x.address), x.strides[0], x.strides[1], x.strides[2]};
}

void attention(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& accumulate,
               const std::string& level, int threads) {
    expect_dimensions("q", q, 4);
    expect_dimensions("k", k, 4);
    const std::int64_t batch = q.shape[0], queries = q.shape[1], keys = k.shape[1], heads = q.shape[2];
    const std::int64_t size = q.shape[3];
    const std::initializer_list<std::int64_t> ours = {batch, queries, heads, size}, theirs = {batch, keys, heads, size};
    call(&msdd_fast::attention, heads_of("out", out, q.dtype, ours), heads_of("q", q, q.dtype, ours),
         heads_of("k", k, q.dtype, theirs), heads_of("v", v, q.dtype, theirs),
         accumulate.address == 0 ? msdd_fast::HeadsView{} : heads_of("accumulate", accumulate, q.dtype, ours),
         dtype_of(q.dtype), {batch, queries, keys, heads, size}, level, threads);
}

// scale and shift of a norm: (batch, channels, rows, columns) in any order, or absent.
struct Modulation {
    std::int64_t rows = 1, columns = 1;
    msdd_fast::Cells scale, shift;
};

Modulation modulation_of(const Tensor& scale, const Tensor& shift, std::int64_t batch, std::int64_t channels) {
    const Tensor& given = scale.address != 0 ? scale : shift;
    if (given.address == 0) return {};
    expect_dimensions("scale", given, 4);
    const std::int64_t rows = given.shape[2], columns = given.shape[3];
    const auto cells_of = [&](const char* name, const Tensor& cells) -> msdd_fast::Cells {
        if (cells.address == 0) return {};
        expect_shape(name, cells, {batch, channels, rows, columns});
        return {operand_of(cells), cells.strides[0], cells.strides[1], cells.strides[2], cells.strides[3]};
    };
    return {rows, columns, cells_of("scale", scale), cells_of("shift", shift)};
}

// A table of one value for every channel, or absent.
void expect_channels(const char* name, const Tensor& table, std::int64_t channels) {
    if (table.address == 0) return;
    expect_shape(name, table, {channels});
    expect_contiguous(name, table);
}

void group_norm_modulate_silu(Address out, const Tensor& x, const Tensor& weight, const Tensor& bias,
                              const Tensor& scale, const Tensor& shift, std::int64_t groups, bool channels_last,
                              bool silu, float eps, int threads) {
    expect_image("x", x, channels_last);
    const std::int64_t batch = x.shape[0], channels = x.shape[1];
    expect_channels("weight", weight, channels);
    expect_channels("bias", bias, channels);
    const Modulation m = modulation_of(scale, shift, batch, channels);
    call(&msdd_fast::group_norm_modulate_silu, pointer<void>(out), pointer<const void>(x.address), dtype_of(x.dtype),
         operand_of(weight), operand_of(bias), m.scale, m.shift,
         {batch, channels, x.shape[2], x.shape[3], groups, m.rows, m.columns, channels_last, silu, eps}, threads);
}

// One or two channels-last maps of the size of the first.
msdd_fast::JoinedMaps maps_of(const char* name, const Tensor& x, const char* name_more, const Tensor& more, int dtype) {
    expect_image(name, x, true);
    expect_dtype(name, x, dtype);
    if (more.address == 0) return {{pointer<const void>(x.address), nullptr}, {x.shape[1], 0}};
    expect_image(name_more, more, true);
    expect_dtype(name_more, more, dtype);
    expect_shape(name_more, more, {x.shape[0], more.shape[1], x.shape[2], x.shape[3]});
    return {{pointer<const void>(x.address), pointer<const void>(more.address)}, {x.shape[1], more.shape[1]}};
}

void convolution(Address out, const Tensor& x, const Tensor& more, const Tensor& packed, const Tensor& bias,
                 const Tensor& weight, const Tensor& offset, const Tensor& scale, const Tensor& shift,
                 const Tensor& added, const Tensor& added_more, std::int64_t channels, int kind, std::int64_t groups,
                 bool silu, float eps, bool shortcut, const std::string& level, int threads) {
    expect(kind >= 0 && kind <= 2, "kind must be 0 to 2, got " + std::to_string(kind));
    const msdd_fast::JoinedMaps maps = maps_of("x", x, "more", more, x.dtype);
    const std::int64_t batch = x.shape[0], height = x.shape[2], width = x.shape[3];
    const auto sized = [&](std::int64_t size) { return kind == 1 ? (size + 1) / 2 : kind == 2 ? 2 * size : size; };
    expect_channels("bias", bias, channels);
    expect_channels("norm_weight", weight, maps.all());
    expect_channels("norm_bias", offset, maps.all());
    msdd_fast::ConvolutionSum sum{{}, shortcut};
    if (added.address != 0) {
        sum.maps = maps_of("added", added, "added_more", added_more, x.dtype);
        expect_shape("added", added, {batch, added.shape[1], sized(height), sized(width)});
        if (!shortcut) expect_shape("added", added, {batch, channels, sized(height), sized(width)});
    } else {
        expect(!shortcut, "added is missing");
    }
    expect(shortcut || added_more.address == 0, "only a shortcut joins maps");
    const auto [panel, per_word, packed_dtype] = msdd_fast::convolution_layout(dtype_of(x.dtype), level);
    const auto words = [&](std::int64_t count) { return (count + per_word - 1) / per_word; };
    const std::int64_t panels = (channels + panel - 1) / panel, taps = kind == 2 ? 4 : 9;
    const std::int64_t depth = taps * words(maps.all()) + (shortcut ? words(sum.maps.all()) : 0);
    expect_shape("packed", packed, {(kind == 2 ? 4 : 1) * panels * depth * panel * per_word});
    expect_dtype("packed", packed, static_cast<int>(packed_dtype));
    expect_contiguous("packed", packed);
    expect(packed.address % 64 == 0, "packed must be aligned to 64 bytes");
    const Modulation m = modulation_of(scale, shift, batch, maps.all());
    call(&msdd_fast::convolution, pointer<void>(out), dtype_of(x.dtype), maps, pointer<const void>(packed.address),
         operand_of(bias), {static_cast<msdd_fast::ConvolutionKind>(kind), batch, height, width, channels},
         {groups, m.rows, m.columns, eps, silu, operand_of(weight), operand_of(offset), m.scale, m.shift}, sum, level,
         threads);
}

std::tuple<std::int64_t, std::int64_t, int> convolution_layout(int dtype, const std::string& level) {
    const auto [panel, per_word, packed] = msdd_fast::convolution_layout(dtype_of(dtype), level);
    return {panel, per_word, static_cast<int>(packed)};
}

void window_attention(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table,
                      std::int64_t height, std::int64_t width, int threads) {
    expect_dimensions("q", q, 4);
    const std::int64_t batch = q.shape[0], heads = q.shape[2], size = q.shape[3];
    expect(height >= 0 && width >= 0, "sizes must not be negative");
    const std::initializer_list<std::int64_t> shape = {batch, height * width, heads, size};
    expect_dimensions("table", table, 3);
    const std::int64_t window = (table.shape[0] + 1) / 2;
    expect_shape("table", table, {2 * window - 1, 2 * window - 1, heads});
    call(&msdd_fast::window_attention, heads_of("out", out, q.dtype, shape), heads_of("q", q, q.dtype, shape),
         heads_of("k", k, q.dtype, shape), heads_of("v", v, q.dtype, shape),
         {operand_of(table), table.strides[0], table.strides[1], table.strides[2]}, dtype_of(q.dtype),
         {batch, height, width, heads, size, window}, threads);
}

// Bytes of pixels, too, if `out` is of uint8 and there is an x.
void copy(const Tensor& out, const Tensor& x, int threads) {
    const msdd_fast::PixelType type = pixel_type(out.dtype);
    if (out.address == 0 && out.elements() != 0) throw std::invalid_argument("out is missing");
    msdd_fast::CopyShape shape;
    shape.dimensions = out.dimensions;
    if (x.address != 0) {
        expect_dimensions("x", x, out.dimensions);
        for (int d = 0; d < x.dimensions; ++d)
            if (x.shape[d] != out.shape[d] && x.shape[d] != 1)
                refuse("x", "broadcastable to " + text(out.shape, out.dimensions), text(x.shape, x.dimensions));
    }
    for (int d = 0; d < out.dimensions; ++d) {
        shape.sizes[d] = out.shape[d];
        shape.to[d] = out.strides[d];
        shape.from[d] = x.address == 0 || (x.shape[d] == 1 && out.shape[d] != 1) ? 0 : x.strides[d];
    }
    call(&msdd_fast::copy, pointer<void>(out.address), type, pointer<const void>(x.address), dtype_of(x.dtype), shape,
         threads);
}

// A program that is recorded stays alive: the ops of this thread write to it.
void begin(const py::object& program) {
    expect(msdd_fast::recording() == nullptr, "this thread records a program already");
    msdd_fast::recording() = &program.cast<msdd_fast::Program&>();
    program.inc_ref();
}

void end(const py::object& program) {
    if (msdd_fast::recording() != &program.cast<msdd_fast::Program&>()) return;
    msdd_fast::recording() = nullptr;
    program.dec_ref();
}

// As msdd_fast::ImageBuffer: address of the program's, address of the batch's, bytes of an image.
using Buffer = std::tuple<Address, Address, std::size_t>;

// As msdd_fast::ImageProgram.
using ImageProgram = std::tuple<const msdd_fast::Program*, std::vector<Buffer>, std::vector<Buffer>>;

std::vector<msdd_fast::ImageBuffer> buffers_of(const std::vector<Buffer>& given) {
    std::vector<msdd_fast::ImageBuffer> result;
    for (const auto& [own, batch, bytes] : given) result.push_back({pointer<void>(own), pointer<void>(batch), bytes});
    return result;
}

void replay_images(const std::vector<ImageProgram>& given, std::int64_t images, int threads) {
    std::vector<msdd_fast::ImageProgram> programs;
    for (const auto& [program, inputs, results] : given)
        programs.push_back({program, buffers_of(inputs), buffers_of(results)});
    msdd_fast::replay_images(programs, images, threads);
}

#ifdef MSDD_FAST_CUDA

void context_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& accumulate, const Tensor& out,
                       std::uintptr_t stream, int device) {
    expect_dimensions("q", q, 4);
    expect_dimensions("k", k, 4);
    const std::int64_t images = q.shape[0], queries = q.shape[1], heads = q.shape[2], keys = k.shape[1];
    const std::initializer_list<std::int64_t> ours = {images, queries, heads, 64}, theirs = {images, keys, heads, 64};
    msdd_fast::context_attention(
        {heads_of("q", q, q.dtype, ours), heads_of("k", k, q.dtype, theirs), heads_of("v", v, q.dtype, theirs),
         accumulate.address == 0 ? msdd_fast::HeadsView{} : heads_of("accumulate", accumulate, q.dtype, ours),
         heads_of("out", out, q.dtype, ours), images, heads, queries, keys},
        dtype_of(q.dtype), stream, device);
}

std::tuple<int, int> cuda_versions() {
    const msdd_fast::CudaVersions versions = msdd_fast::cuda_versions();
    return {versions.driver, versions.runtime};
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of msdd-fast. Call them through msdd_fast.native or the ops, not directly.";
    // pybind11 turns std::invalid_argument into ValueError, after the GIL is taken back.
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.attr("GIVEN") = binding::GIVEN;

    py::class_<msdd_fast::Program>(m, "Program", "Calls of this module, recorded to be replayed; see program.h.")
        .def(py::init<>())
        .def("begin", &begin, "Calls of this thread are added to the program from now on.")
        .def("end", &end, "The end of that.")
        .def("replay", &msdd_fast::Program::replay, no_gil, py::arg("threads"), "Makes all calls, in order.")
        .def("__len__", &msdd_fast::Program::size);
    m.def("replay_images", &replay_images, no_gil, py::arg("programs"), py::arg("images"), py::arg("threads"),
          "Decodes the images of a batch by programs of one image each; see program.h.");

    m.def("copy", &copy, no_gil, py::arg("out"), py::arg("x"), py::arg("threads") = 1,
          "out[...] = x, broadcast and rounded to out's dtype; None for x is zero; see copy.h.");
    m.def("philox", &philox, py::arg("counter"), py::arg("key"), "The four words of Philox4x32-10.");
    define(m, "start_noise", &start_noise, py::arg("out"), py::arg("seeds"), py::arg("dtype"), py::arg("batch"),
           py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("threads") = 1,
           "White normals into (batch, channels, height, width) at address `out`; see start_noise.h.");
    define(m, "start_noise_rows", &start_noise_rows, py::arg("out"), py::arg("seeds"), py::arg("dtype"),
           py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("patch"),
           py::arg("threads") = 1, "The numbers of start_noise as patch rows; see start_noise.h.");
    define(m, "renoise_upsample", &renoise_upsample, py::arg("out"), py::arg("x"), py::arg("alpha"), py::arg("beta"),
           py::arg("seeds"), py::arg("channels_last"), py::arg("stage"), py::arg("correlation"), py::arg("threads") = 1,
           "alpha * nearest_x2(x) + beta * noise into `out`; see renoise_upsample.h.");
    define(m, "norm_modulate", &norm_modulate, py::arg("x_new"), py::arg("h"), py::arg("x"), py::arg("y"),
           py::arg("gate"), py::arg("shift"), py::arg("scale"), py::arg("rms_weight"), py::arg("run"), py::arg("eps"),
           py::arg("threads") = 1, "LayerNorm or RMSNorm and adaLN of x, or of x + gate * y; see norm_modulate.h.");
    define(m, "qk_norm_rope", &qk_norm_rope, py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("bias"),
           py::arg("cos"), py::arg("sin"), py::arg("split"), py::arg("eps"), py::arg("threads") = 1,
           "Per-head LayerNorm and rotary embedding of all parts of x but the last; see qk_norm_rope.h.");
    define(m, "sigma_gate", &sigma_gate, py::arg("x_new"), py::arg("h"), py::arg("x"), py::arg("y"), py::arg("offset"),
           py::arg("shift"), py::arg("scale"), py::arg("rms_weight"), py::arg("logit"), py::arg("weight"),
           py::arg("run"), py::arg("eps"), py::arg("threads") = 1,
           "x + sigmoid(logit + offset) * y, then RMSNorm and adaLN; see sigma_gate.h.");
    define(m, "pixel_modulate", &pixel_modulate, py::arg("out"), py::arg("x"), py::arg("s"), py::arg("packed"),
           py::arg("bias"), py::arg("rms_weight"), py::arg("eps"), py::arg("level") = "", py::arg("threads") = 1,
           "RMSNorm and adaLN of pixels by a layer of their tokens' features; see pixel_block.h.");
    define(m, "pixel_block", &pixel_block, py::arg("out"), py::arg("x"), py::arg("y"), py::arg("s"), py::arg("packed"),
           py::arg("bias"), py::arg("rms_weight"), py::arg("fc1_weight"), py::arg("fc1_bias"), py::arg("fc2_weight"),
           py::arg("fc2_bias"), py::arg("eps"), py::arg("level") = "", py::arg("threads") = 1,
           "Two gated residuals of pixels, modulated likewise; see pixel_block.h.");
    define(m, "sde_step", &sde_step, py::arg("out"), py::arg("x"), py::arg("v"), py::arg("t"), py::arg("t_next"),
           py::arg("seeds"), py::arg("noise"), py::arg("stage"), py::arg("patch"), py::arg("clamp"),
           py::arg("threads") = 1,
           "x - t * v, then noise; seeds (0, 0) for none, patch 0 for an image v; see sde_step.h.");
    define(m, "geglu", &geglu, py::arg("out"), py::arg("value"), py::arg("gate"), py::arg("threads") = 1,
           "value * gelu(gate); see geglu.h.");
    define(m, "swiglu", &swiglu, py::arg("out"), py::arg("a"), py::arg("b"), py::arg("threads") = 1,
           "silu(a) * b; see swiglu.h.");
    define(m, "linear", &linear, py::arg("out"), py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("features"),
           py::arg("swiglu"), py::arg("level") = "", py::arg("threads") = 1,
           "x W^T + bias, or swiglu of its halves, of a packed weight; see linear.h.");
    m.def("linear_pack", &linear_pack, no_gil, py::arg("packed"), py::arg("weight"), py::arg("swiglu"),
          py::arg("level") = "", py::arg("threads") = 1, "Packs a weight for `linear`; see linear.h.");
    m.def("linear_packed_size", &linear_packed_size, py::arg("out"), py::arg("inputs"), py::arg("swiglu"),
          py::arg("dtype"), py::arg("level") = "", "Elements and dtype of a packed weight.");
    m.def("linear_level", &msdd_fast::linear_level, "The SIMD level that linear uses on this machine.");
    define(m, "quantize_rows", &quantize_rows, py::arg("values"), py::arg("scales"), py::arg("x"),
           py::arg("threads") = 1, "Rows in 8 bits with a scale each; see linear_int8.h.");
    define(m, "linear_int8", &linear_int8, py::arg("out"), py::arg("values"), py::arg("scales"), py::arg("packed"),
           py::arg("bias"), py::arg("features"), py::arg("inputs"), py::arg("swiglu"), py::arg("level") = "",
           py::arg("threads") = 1, "`linear` of rows and a weight in 8 bits; see linear_int8.h.");
    m.def("linear_int8_pack", &linear_int8_pack, no_gil, py::arg("packed"), py::arg("weight"), py::arg("swiglu"),
          py::arg("level") = "", py::arg("threads") = 1, "Rounds and packs a weight for `linear_int8`.");
    m.def("linear_int8_packed_words", &linear_int8_packed_words, py::arg("out"), py::arg("inputs"), py::arg("swiglu"),
          py::arg("level") = "", "32-bit words of a packed weight.");
    m.def("linear_int8_level", &msdd_fast::linear_int8_level, "The SIMD level of linear_int8 on this machine.");
    define(m, "attention", &attention, py::arg("out"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("accumulate"),
           py::arg("level") = "", py::arg("threads") = 1,
           "softmax(q k^T / sqrt(d)) v (+ accumulate); see attention.h.");
    m.def("attention_level", &msdd_fast::attention_level, "The SIMD level that attention uses on this machine.");
    define(m, "group_norm_modulate_silu", &group_norm_modulate_silu, py::arg("out"), py::arg("x"), py::arg("weight"),
           py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("groups"), py::arg("channels_last"),
           py::arg("silu"), py::arg("eps"), py::arg("threads") = 1,
           "GroupNorm, affine, modulation by cells, SiLU; see group_norm_modulate_silu.h.");
    define(m, "convolution", &convolution, py::arg("out"), py::arg("x"), py::arg("more"), py::arg("packed"),
           py::arg("bias"), py::arg("weight"), py::arg("offset"), py::arg("scale"), py::arg("shift"), py::arg("added"),
           py::arg("added_more"), py::arg("channels"), py::arg("kind"), py::arg("groups"), py::arg("silu"),
           py::arg("eps"), py::arg("shortcut"), py::arg("level"), py::arg("threads") = 1, "See convolution.h.");
    m.def("convolution_layout", &convolution_layout, py::arg("dtype"), py::arg("level"), "See convolution.h.");
    define(m, "window_attention", &window_attention, py::arg("out"), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("table"), py::arg("height"), py::arg("width"), py::arg("threads") = 1,
           "Attention over the window round each pixel, with a bias by displacement; see window_attention.h.");
    define(m, "cfg_euler", &cfg_euler, py::arg("out"), py::arg("x"), py::arg("v_cond"), py::arg("v_uncond"),
           py::arg("scale"), py::arg("dt"), py::arg("dtype"), py::arg("rows"), py::arg("columns"),
           py::arg("threads") = 1,
           "x + dt * (v_uncond + scale * (v_cond - v_uncond)); operands are (address or 0, dtype, row stride, "
           "elements); see cfg_euler.h.");
    define(m, "stage_transition", &stage_transition, py::arg("out"), py::arg("x"), py::arg("v"), py::arg("dt"),
           py::arg("alpha"), py::arg("beta"), py::arg("seeds"), py::arg("v_uncond"), py::arg("scale"), py::arg("shape"),
           py::arg("stage"), py::arg("correlation"), py::arg("threads") = 1,
           "Euler step, upsampling and renoising of patch rows; shape is (grid, batch, channels, patch); see "
           "stage_transition.h.");
    define(m, "final_step", &final_step, py::arg("out"), py::arg("x"), py::arg("v"), py::arg("dt"), py::arg("v_uncond"),
           py::arg("scale"), py::arg("shape"), py::arg("type"), py::arg("channels_last"), py::arg("threads") = 1,
           "Euler step of patch rows to an image; type 3 is uint8; see final_step.h.");

#ifdef MSDD_FAST_CUDA
    m.def("cuda_versions", &cuda_versions, "Versions of the driver (0: none) and of the linked runtime.");
    m.def("context_attention", &context_attention, no_gil, py::arg("q"), py::arg("k"), py::arg("v"),
          py::arg("accumulate"), py::arg("out"), py::arg("stream"), py::arg("device"),
          "softmax(q k^T / 8) v (+ accumulate) on a GPU; see context_attention.h.");
    m.def("context_attention_splits", &msdd_fast::context_attention_splits, py::arg("pairs"), py::arg("queries"),
          py::arg("keys"), py::arg("multiprocessors"), "Thread blocks for one image and head.");
#endif
}
