// The only pybind11 file. Tensors come as integer addresses and sizes: no torch headers, so one build serves every
// torch version. The Python wrappers (msdd_fast/native.py) check dtype, device and layout before they call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>

#include "msdd_fast/attention.h"
#include "msdd_fast/cfg_euler.h"
#include "msdd_fast/check.h"
#include "msdd_fast/noise.h"
#include "msdd_fast/norm_modulate.h"
#include "msdd_fast/philox.h"
#include "msdd_fast/qk_norm_rope.h"
#include "msdd_fast/swiglu.h"

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

using Operand = std::tuple<Address, int>;  // address (0: absent) and dtype

msdd_fast::Operand operand_of(const Operand& operand) {
    return {pointer<const void>(std::get<0>(operand)), dtype_of(std::get<1>(operand))};
}

void cfg_euler(const Operand& out, const Operand& x, const Operand& v_cond, const Operand& v_uncond, std::int64_t count,
               float scale, float dt, int threads) {
    msdd_fast::cfg_euler(pointer<void>(std::get<0>(out)), dtype_of(std::get<1>(out)), operand_of(x), operand_of(v_cond),
                         operand_of(v_uncond), count, scale, dt, threads);
}

using Table = std::tuple<Address, int, std::int64_t>;  // address (0: absent), dtype and stride between rows

msdd_fast::Table table_of(const Table& table) {
    return {operand_of({std::get<0>(table), std::get<1>(table)}), std::get<2>(table)};
}

void norm_modulate(Address h, Address x_new, const Operand& x, const Operand& y, const Table& gate, const Table& shift,
                   const Table& scale, std::int64_t rows, std::int64_t width, std::int64_t run, std::int64_t groups,
                   float eps, int threads) {
    msdd_fast::norm_modulate(pointer<void>(h), pointer<void>(x_new), pointer<const void>(std::get<0>(x)),
                             dtype_of(std::get<1>(x)), operand_of(y), table_of(gate), table_of(shift), table_of(scale),
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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of msdd-fast. Call them through msdd_fast.native or the ops, not directly.";
    // pybind11 turns std::invalid_argument into ValueError, after the GIL is taken back.
    const py::call_guard<py::gil_scoped_release> no_gil;

    m.def("philox", &philox, py::arg("counter"), py::arg("key"), "The four words of Philox4x32-10.");
    m.def("start_noise", &start_noise, no_gil, py::arg("out"), py::arg("dtype"), py::arg("seeds"), py::arg("batch"),
          py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("threads") = 1,
          "White normals into (batch, channels, height, width) at address `out`; see noise.h.");
    m.def("renoise_upsample", &renoise_upsample, no_gil, py::arg("out"), py::arg("x"), py::arg("dtype"),
          py::arg("channels_last"), py::arg("seeds"), py::arg("batch"), py::arg("channels"), py::arg("height"),
          py::arg("width"), py::arg("alpha"), py::arg("beta"), py::arg("stage"), py::arg("correlation"),
          py::arg("threads") = 1,
          "alpha * nearest_x2(x) + beta * noise into `out`; the sizes are those of x; see noise.h.");
    m.def("cfg_euler", &cfg_euler, no_gil, py::arg("out"), py::arg("x"), py::arg("v_cond"), py::arg("v_uncond"),
          py::arg("count"), py::arg("scale"), py::arg("dt"), py::arg("threads") = 1,
          "x + dt * (v_uncond + scale * (v_cond - v_uncond)); operands are (address or 0, dtype); see cfg_euler.h.");
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
    m.def("attention_level", &msdd_fast::attention_level, "SIMD level that attention takes here; see attention.h.");
}
