// How Python passes tensors, seeds and numbers in memory to the functions of the module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

namespace binding {

using Address = std::uintptr_t;  // 0: absent, or empty

// Stands for an address that each call of a prepared function gives; see prepared.h.
constexpr Address GIVEN = 1;

constexpr int MAX_DIMENSIONS = 8;

// A tensor as Python passes it: (address, dtype, shape, strides in elements), or None where it is absent.
struct Tensor {
    Address address = 0;
    int dtype = 0, dimensions = 0;
    std::int64_t shape[MAX_DIMENSIONS] = {}, strides[MAX_DIMENSIONS] = {};

    std::int64_t elements() const {
        std::int64_t count = 1;
        for (int i = 0; i < dimensions; ++i) count *= shape[i];
        return count;
    }
};

using Seeds = std::tuple<Address, std::int64_t>;  // address and count

// Rows of a tensor: address, dtype, stride between rows, elements of the tensor.
using Rows = std::tuple<Address, int, std::int64_t, std::int64_t>;

inline bool read_integers(PyObject* tuple, std::int64_t* to, int count) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != count) return false;
    for (int i = 0; i < count; ++i) to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    return true;
}

}  // namespace binding

template <>
struct pybind11::detail::type_caster<binding::Tensor> {
    PYBIND11_TYPE_CASTER(binding::Tensor, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]] | None"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        PyObject* const tuple = source.ptr();
        if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 4) return false;
        PyObject* const shape = PyTuple_GET_ITEM(tuple, 2);
        if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) > binding::MAX_DIMENSIONS) return false;
        value.address = PyLong_AsSize_t(PyTuple_GET_ITEM(tuple, 0));
        value.dtype = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, 1)));
        value.dimensions = static_cast<int>(PyTuple_GET_SIZE(shape));
        const bool read = binding::read_integers(shape, value.shape, value.dimensions) &&
                          binding::read_integers(PyTuple_GET_ITEM(tuple, 3), value.strides, value.dimensions);
        if (PyErr_Occurred() == nullptr) return read;
        PyErr_Clear();
        return false;
    }
};
