// Functions of the module with everything fixed but addresses and the number of threads.
//
// A call of `f` reads dtypes, shapes and strides from Python. Who calls it again and again with the same ones prepares
// it: `prepare_f` takes the arguments of f but `threads`, with GIVEN for every address that differs from call to call,
// and returns a function of these addresses, in the order of f's parameters, and the number of threads. It holds no
// tensor, and several threads may call it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tensor.h"

namespace binding {

constexpr int MAX_GIVEN = 32;

// Where an argument of a function keeps its address: nullptr if it has none.
inline Address* address_in(Address& address) { return &address; }
inline Address* address_in(Tensor& tensor) { return &tensor.address; }
inline Address* address_in(Seeds& seeds) { return &std::get<0>(seeds); }
inline Address* address_in(Rows& rows) { return &std::get<0>(rows); }
template <class T>
Address* address_in(T&) {
    return nullptr;
}

class Prepared {
  public:
    virtual ~Prepared() = default;
    // `addresses` holds as many as `given` says.
    virtual void operator()(const Address* addresses, int threads) const = 0;
    int given = 0;
};

template <class... Args>
class PreparedFunction final : public Prepared {
  public:
    using Arguments = std::tuple<std::decay_t<Args>...>;  // the last is the number of threads

    PreparedFunction(void (*function)(Args...), Arguments arguments) : function_(function), arguments_(arguments) {
        for_each_given(arguments_, [&](Address&) { ++given; });
        if (given > MAX_GIVEN) throw std::invalid_argument("too many addresses");
    }

    void operator()(const Address* addresses, int threads) const override {
        Arguments arguments = arguments_;
        for_each_given(arguments, [&](Address& address) { address = *addresses++; });
        std::get<sizeof...(Args) - 1>(arguments) = threads;
        std::apply(function_, arguments);
    }

  private:
    template <class Visit>
    static void for_each_given(Arguments& arguments, Visit visit) {
        const auto consider = [&](auto& argument) {
            Address* const address = address_in(argument);
            if (address != nullptr && *address == GIVEN) visit(*address);
        };
        std::apply([&](auto&... each) { (consider(each), ...); }, arguments);
    }

    void (*function_)(Args...);
    Arguments arguments_;
};

// What Python calls. `self` is a capsule that owns the Prepared.
inline PyObject* call_prepared(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    const auto& prepared = *static_cast<const Prepared*>(PyCapsule_GetPointer(self, nullptr));
    if (count != prepared.given + 1)
        return PyErr_Format(PyExc_TypeError, "expected %d addresses and the number of threads, got %zd arguments",
                            prepared.given, count);
    Address addresses[MAX_GIVEN];
    for (int i = 0; i < prepared.given; ++i) addresses[i] = PyLong_AsSize_t(arguments[i]);
    const auto threads = static_cast<int>(PyLong_AsLong(arguments[prepared.given]));
    if (PyErr_Occurred() != nullptr) return nullptr;
    try {
        const pybind11::gil_scoped_release no_gil;
        prepared(addresses, threads);
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

inline pybind11::object as_python(Prepared* prepared) {
    static PyMethodDef method = {"prepared", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_prepared)),
                                 METH_FASTCALL, "A function of addresses and the number of threads."};
    const pybind11::capsule owner(prepared, [](void* p) { delete static_cast<Prepared*>(p); });
    return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, owner.ptr()));
}

template <class... Args, std::size_t... I>
void define_prepare(pybind11::module_& m, const std::string& name, void (*function)(Args...),
                    std::index_sequence<I...>) {
    using Arguments = typename PreparedFunction<Args...>::Arguments;
    m.def(("prepare_" + name).c_str(), [function](std::tuple_element_t<I, Arguments>... fixed) {
        return as_python(new PreparedFunction<Args...>(function, {std::move(fixed)..., 1}));
    });
}

// Defines `function`, whose last parameter is the number of threads, and its `prepare_` function.
template <class... Args, class... Extra>
void define(pybind11::module_& m, const char* name, void (*function)(Args...), const Extra&... extra) {
    m.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>(), extra...);
    define_prepare(m, name, function, std::make_index_sequence<sizeof...(Args) - 1>{});
}

}  // namespace binding
