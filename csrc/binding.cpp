// The only pybind11 file. Tensors come as integer addresses and sizes: no torch headers, so one build serves every
// torch version. The Python wrappers (msdd_fast/native/_call.py) check dtype, device and layout before they call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>

#include "msdd_fast/attention.h"
#include "msdd_fast/cfg_euler.h"
#include "msdd_fast/check.h"
#include "msdd_fast/context_attention.h"
#include "msdd_fast/final_step.h"
#include "msdd_fast/group_norm_modulate_silu.h"
#include "msdd_fast/norm_modulate.h"
#include "msdd_fast/philox.h"
#include "msdd_fast/qk_norm_rope.h"
#include "msdd_fast/renoise_upsample.h"
#include "msdd_fast/stage_transition.h"
#include "msdd_fast/start_noise.h"
#include "msdd_fast/swiglu.h"
#include "msdd_fast/window_attention.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

std::array<std::uint32_t, 4> philox(const std::array<std::uint32_t, 4>& counter,
                                    const std::array<std::uint32_t, 2>& key) {
    std::uint32_t words[4][1] = {{counter[0]}, {counter[1]}, {counter[2]}, {counter[3]}};
    msdd_fast::philox<1>(words, key[0], key[1]);
    return {words[0][0], words[1][0], words[2][0], words[3][0]};
}

msdd_fast::DType dtype_of(int code) {
    msdd_fast::expect(code >= 0 && code <= 2,
                      "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(code));
    return static_cast<msdd_fast::DType>(code);
}

void start_noise(Address out, int dtype, Address seeds, std::int64_t batch, std::int64_t channels, std::int64_t height,
                 std::int64_t width, int threads) {
    msdd_fast::start_noise(pointer<void>(out), dtype_of(dtype), pointer<const std::int64_t>(seeds), batch, channels,
                           height, width, threads);
}

void renoise_upsample(Address out, Address x, int dtype, bool channels_last, Address seeds, std::int64_t batch,
                      std::int64_t channels, std::int64_t height, std::int64_t width, float alpha, float beta,
                      std::int64_t stage, double correlation, int threads) {
    msdd_fast::renoise_upsample(pointer<void>(out), pointer<const void>(x), dtype_of(dtype), channels_last,
                                pointer<const std::int64_t>(seeds), batch, channels, height, width,
                                {alpha, beta, stage, correlation}, threads);
}

using Operand = std::tuple<Address, int>;             // address (0: absent) and dtype
using Rows = std::tuple<Address, int, std::int64_t>;  // the same and the stride between rows

msdd_fast::Operand operand_of(const Operand& operand) {
    return {pointer<const void>(std::get<0>(operand)), dtype_of(std::get<1>(operand))};
}

msdd_fast::Rows rows_of(const Rows& rows) {
    const auto& [address, dtype, stride] = rows;
    return {operand_of({address, dtype}), stride};
}

void cfg_euler(Address out, int dtype, const Rows& x, const Rows& v_cond, const Rows& v_uncond, std::int64_t rows,
               std::int64_t columns, float scale, float dt, int threads) {
    msdd_fast::cfg_euler(pointer<void>(out), dtype_of(dtype), rows_of(x), rows_of(v_cond), rows_of(v_uncond), rows,
                         columns, scale, dt, threads);
}

using PatchRows = std::tuple<Address, int, std::int64_t, std::int64_t>;  // address (0: absent), dtype, two strides
using PatchShape = std::array<std::int64_t, 4>;                          // grid, batch, channels, patch

msdd_fast::PatchRows patch_rows_of(const PatchRows& rows) {
    const auto& [address, dtype, token_stride, image_stride] = rows;
    return {pointer<const void>(address), dtype_of(dtype), token_stride, image_stride};
}

void stage_transition(Address out, const PatchRows& x, const PatchRows& v, const PatchRows& v_uncond,
                      const PatchShape& shape, float dt, float scale, Address seeds, float alpha, float beta,
                      std::int64_t stage, double correlation, int threads) {
    msdd_fast::stage_transition(pointer<void>(out), patch_rows_of(x), patch_rows_of(v), patch_rows_of(v_uncond),
                                {shape[0], shape[1], shape[2], shape[3]}, {dt, scale},
                                pointer<const std::int64_t>(seeds), {alpha, beta, stage, correlation}, threads);
}

void final_step(Address out, int type, bool channels_last, const PatchRows& x, const PatchRows& v,
                const PatchRows& v_uncond, const PatchShape& shape, float dt, float scale, int threads) {
    msdd_fast::expect(type >= 0 && type <= 3, "type must be 0 to 3, got " + std::to_string(type));
    msdd_fast::final_step(pointer<void>(out), static_cast<msdd_fast::PixelType>(type), channels_last, patch_rows_of(x),
                          patch_rows_of(v), patch_rows_of(v_uncond), {shape[0], shape[1], shape[2], shape[3]},
                          {dt, scale}, threads);
}

void start_noise_rows(Address out, int dtype, Address seeds, std::int64_t batch, std::int64_t channels,
                      std::int64_t height, std::int64_t width, std::int64_t patch, int threads) {
    msdd_fast::start_noise_rows(pointer<void>(out), dtype_of(dtype), pointer<const std::int64_t>(seeds), batch,
                                channels, height, width, patch, threads);
}

void norm_modulate(Address h, Address x_new, const Operand& x, const Operand& y, const Rows& gate, const Rows& shift,
                   const Rows& scale, std::int64_t rows, std::int64_t width, std::int64_t run, std::int64_t groups,
                   float eps, int threads) {
    msdd_fast::norm_modulate(pointer<void>(h), pointer<void>(x_new), pointer<const void>(std::get<0>(x)),
                             dtype_of(std::get<1>(x)), operand_of(y), rows_of(gate), rows_of(shift), rows_of(scale),
                             {rows, width, run, groups, eps}, threads);
}

void qk_norm_rope(Address out, Address x, int dtype, Address weight, Address bias, Address cos, Address sin,
                  std::int64_t batch, std::int64_t tokens, std::int64_t parts, std::int64_t heads, int head_dim,
                  std::int64_t stride_batch, std::int64_t stride_token, bool token_major, std::int64_t split, float eps,
                  int threads) {
    msdd_fast::qk_norm_rope(
        pointer<void>(out), pointer<const void>(x), dtype_of(dtype),
        {pointer<const float>(weight), pointer<const float>(bias), pointer<const float>(cos),
         pointer<const float>(sin)},
        {batch, tokens, parts, heads, head_dim, stride_batch, stride_token, token_major, split, eps}, threads);
}

void swiglu(Address out, Address a, Address b, int dtype, std::int64_t rows, std::int64_t width, std::int64_t stride_a,
            std::int64_t stride_b, int threads) {
    msdd_fast::swiglu(pointer<void>(out), pointer<const void>(a), pointer<const void>(b), dtype_of(dtype), rows, width,
                      stride_a, stride_b, threads);
}

using Heads = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;  // address (0: absent) and three strides

msdd_fast::HeadsView heads_of(const Heads& heads) {
    const auto& [address, batch, token, head] = heads;
    return {pointer<void>(address), batch, token, head};
}

void attention(const Heads& out, const Heads& q, const Heads& k, const Heads& v, const Heads& accumulate, int dtype,
               std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t head_size,
               const std::string& level, int threads) {
    msdd_fast::attention(heads_of(out), heads_of(q), heads_of(k), heads_of(v), heads_of(accumulate), dtype_of(dtype),
                         {batch, queries, keys, heads, head_size}, level, threads);
}

using Cells = std::tuple<Address, int, std::array<std::int64_t, 4>>;      // address (0: absent), dtype, strides
using BiasTable = std::tuple<Address, int, std::array<std::int64_t, 3>>;  // the same

msdd_fast::Cells cells_of(const Cells& cells) {
    const auto& [address, dtype, strides] = cells;
    return {operand_of({address, dtype}), strides[0], strides[1], strides[2], strides[3]};
}

void group_norm_modulate_silu(Address out, Address x, int dtype, const Operand& weight, const Operand& bias,
                              const Cells& scale, const Cells& shift, const std::array<std::int64_t, 4>& shape,
                              std::int64_t groups, std::int64_t rows, std::int64_t columns, bool channels_last,
                              bool silu, float eps, int threads) {
    msdd_fast::group_norm_modulate_silu(
        pointer<void>(out), pointer<const void>(x), dtype_of(dtype), operand_of(weight), operand_of(bias),
        cells_of(scale), cells_of(shift),
        {shape[0], shape[1], shape[2], shape[3], groups, rows, columns, channels_last, silu, eps}, threads);
}

void window_attention(const Heads& out, const Heads& q, const Heads& k, const Heads& v, const BiasTable& table,
                      int dtype, std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t heads,
                      std::int64_t head_size, std::int64_t window, int threads) {
    const auto& [address, kind, strides] = table;
    msdd_fast::window_attention(heads_of(out), heads_of(q), heads_of(k), heads_of(v),
                                {operand_of({address, kind}), strides[0], strides[1], strides[2]}, dtype_of(dtype),
                                {batch, height, width, heads, head_size, window}, threads);
}

#ifdef MSDD_FAST_CUDA

void context_attention(const Heads& q, const Heads& k, const Heads& v, const Heads& accumulate, const Heads& out,
                       int dtype, std::int64_t images, std::int64_t heads, std::int64_t queries, std::int64_t keys,
                       Address stream, int device) {
    msdd_fast::context_attention(
        {heads_of(q), heads_of(k), heads_of(v), heads_of(accumulate), heads_of(out), images, heads, queries, keys},
        dtype_of(dtype), stream, device);
}

std::tuple<int, int> cuda_versions() {
    const msdd_fast::CudaVersions versions = msdd_fast::cuda_versions();
    return {versions.driver, versions.runtime};
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of msdd-fast. Call them through msdd_fast.native._call or the ops, not directly.";
    // pybind11 turns std::invalid_argument into ValueError, after the GIL is taken back.
    const py::call_guard<py::gil_scoped_release> no_gil;

    m.def("philox", &philox, py::arg("counter"), py::arg("key"), "The four words of Philox4x32-10.");
    m.def("start_noise", &start_noise, no_gil, py::arg("out"), py::arg("dtype"), py::arg("seeds"), py::arg("batch"),
          py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("threads") = 1,
          "White normals into (batch, channels, height, width) at address `out`; see start_noise.h.");
    m.def("renoise_upsample", &renoise_upsample, no_gil, py::arg("out"), py::arg("x"), py::arg("dtype"),
          py::arg("channels_last"), py::arg("seeds"), py::arg("batch"), py::arg("channels"), py::arg("height"),
          py::arg("width"), py::arg("alpha"), py::arg("beta"), py::arg("stage"), py::arg("correlation"),
          py::arg("threads") = 1,
          "alpha * nearest_x2(x) + beta * noise into `out`; the sizes are those of x; see renoise_upsample.h.");
    m.def(
        "norm_modulate", &norm_modulate, no_gil, py::arg("h"), py::arg("x_new"), py::arg("x"), py::arg("y"),
        py::arg("gate"), py::arg("shift"), py::arg("scale"), py::arg("rows"), py::arg("width"), py::arg("run"),
        py::arg("groups"), py::arg("eps"), py::arg("threads") = 1,
        "LayerNorm and adaLN of x, or of x + gate * y; tables are (address or 0, dtype, stride); see norm_modulate.h.");
    m.def("qk_norm_rope", &qk_norm_rope, no_gil, py::arg("out"), py::arg("x"), py::arg("dtype"), py::arg("weight"),
          py::arg("bias"), py::arg("cos"), py::arg("sin"), py::arg("batch"), py::arg("tokens"), py::arg("parts"),
          py::arg("heads"), py::arg("head_dim"), py::arg("stride_batch"), py::arg("stride_token"),
          py::arg("token_major"), py::arg("split"), py::arg("eps"), py::arg("threads") = 1,
          "Per-head LayerNorm and rotary embedding of the leading parts of x; see qk_norm_rope.h.");
    m.def("swiglu", &swiglu, no_gil, py::arg("out"), py::arg("a"), py::arg("b"), py::arg("dtype"), py::arg("rows"),
          py::arg("width"), py::arg("stride_a"), py::arg("stride_b"), py::arg("threads") = 1,
          "silu(a) * b; see swiglu.h.");
    m.def("attention", &attention, no_gil, py::arg("out"), py::arg("q"), py::arg("k"), py::arg("v"),
          py::arg("accumulate"), py::arg("dtype"), py::arg("batch"), py::arg("queries"), py::arg("keys"),
          py::arg("heads"), py::arg("head_size"), py::arg("level") = "", py::arg("threads") = 1,
          "softmax(q k^T / sqrt(d)) v; tensors are (address, strides of batch, token, head); see attention.h.");
    m.def("group_norm_modulate_silu", &group_norm_modulate_silu, no_gil, py::arg("out"), py::arg("x"), py::arg("dtype"),
          py::arg("weight"), py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("shape"), py::arg("groups"),
          py::arg("rows"), py::arg("columns"), py::arg("channels_last"), py::arg("silu"), py::arg("eps"),
          py::arg("threads") = 1,
          "GroupNorm, affine, modulation by cells of (rows, columns), SiLU; see group_norm_modulate_silu.h.");
    m.def("window_attention", &window_attention, no_gil, py::arg("out"), py::arg("q"), py::arg("k"), py::arg("v"),
          py::arg("table"), py::arg("dtype"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("heads"),
          py::arg("head_size"), py::arg("window"), py::arg("threads") = 1,
          "Attention over the window round each pixel, with a bias by displacement; see window_attention.h.");
    m.def("attention_level", &msdd_fast::attention_level, "SIMD level that attention takes here; see attention.h.");
    m.def("cfg_euler", &cfg_euler, no_gil, py::arg("out"), py::arg("dtype"), py::arg("x"), py::arg("v_cond"),
          py::arg("v_uncond"), py::arg("rows"), py::arg("columns"), py::arg("scale"), py::arg("dt"),
          py::arg("threads") = 1,
          "x + dt * (v_uncond + scale * (v_cond - v_uncond)); operands are (address or 0, dtype, row stride); see "
          "cfg_euler.h.");
    m.def("stage_transition", &stage_transition, no_gil, py::arg("out"), py::arg("x"), py::arg("v"),
          py::arg("v_uncond"), py::arg("shape"), py::arg("dt"), py::arg("scale"), py::arg("seeds"), py::arg("alpha"),
          py::arg("beta"), py::arg("stage"), py::arg("correlation"), py::arg("threads") = 1,
          "Euler step, upsampling and renoising of patch rows: operands (address or 0, dtype, token stride, image "
          "stride), shape (grid, batch, channels, patch); see stage_transition.h.");
    m.def("final_step", &final_step, no_gil, py::arg("out"), py::arg("type"), py::arg("channels_last"), py::arg("x"),
          py::arg("v"), py::arg("v_uncond"), py::arg("shape"), py::arg("dt"), py::arg("scale"), py::arg("threads") = 1,
          "Euler step of patch rows to an image; type 3 is uint8; see final_step.h.");
    m.def("start_noise_rows", &start_noise_rows, no_gil, py::arg("out"), py::arg("dtype"), py::arg("seeds"),
          py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("patch"),
          py::arg("threads") = 1, "The numbers of start_noise as patch rows; see start_noise.h.");

#ifdef MSDD_FAST_CUDA
    m.def("cuda_versions", &cuda_versions, "Versions of the driver (0: none) and of the linked runtime.");
    m.def(
        "context_attention", &context_attention, no_gil, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("accumulate"), py::arg("out"), py::arg("dtype"), py::arg("images"), py::arg("heads"),
        py::arg("queries"), py::arg("keys"), py::arg("stream"), py::arg("device"),
        "softmax(q k^T / 8) v (+ accumulate) on a GPU; tensors are (address or 0, strides of image, token, head); see "
        "context_attention.h.");
    m.def("context_attention_splits", &msdd_fast::context_attention_splits, py::arg("pairs"), py::arg("queries"),
          py::arg("keys"), py::arg("multiprocessors"), "Thread blocks for one image and head.");
#endif
}
