// The only pybind11 file. Tensors come as integer addresses and sizes: no torch headers, so one build serves every
// torch version. The Python wrappers (msdd_fast/native.py) check dtype, device and layout before they call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "msdd_fast/noise.h"
#include "msdd_fast/philox.h"

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

void start_noise(Address out, Address seeds, std::int64_t batch, std::int64_t channels, std::int64_t height,
                 std::int64_t width, int threads) {
    msdd_fast::start_noise(pointer<float>(out), pointer<const std::int64_t>(seeds), batch, channels, height, width,
                           threads);
}

void renoise_noise(Address out, Address seeds, std::int64_t batch, std::int64_t channels, std::int64_t height,
                   std::int64_t width, std::int64_t stage, double correlation, int threads) {
    msdd_fast::renoise_noise(pointer<float>(out), pointer<const std::int64_t>(seeds), batch, channels, height, width,
                             stage, correlation, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of msdd-fast. Call them through msdd_fast.native or the ops, not directly.";
    // pybind11 turns std::invalid_argument into ValueError, after the GIL is taken back.
    const py::call_guard<py::gil_scoped_release> no_gil;

    m.def("philox", &philox, py::arg("counter"), py::arg("key"), "The four words of Philox4x32-10.");
    m.def("start_noise", &start_noise, no_gil, py::arg("out"), py::arg("seeds"), py::arg("batch"), py::arg("channels"),
          py::arg("height"), py::arg("width"), py::arg("threads") = 1,
          "White normals into float32 (batch, channels, height, width) at address `out`.");
    m.def("renoise_noise", &renoise_noise, no_gil, py::arg("out"), py::arg("seeds"), py::arg("batch"),
          py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("stage"), py::arg("correlation"),
          py::arg("threads") = 1, "Block-correlated normals into float32 (batch, channels, height, width) at `out`.");
}
