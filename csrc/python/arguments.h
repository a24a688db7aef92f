// Functions called once per forward pass go to Python as METH_FASTCALL: pybind11's dispatcher costs more than
// a small kernel.
#pragma once
#include <pybind11/pybind11.h>

#include "common/error.h"
#include "python/tensor.h"

namespace mprec::python {

// The arguments of a call, by position or by keyword. Those from `required` on may be left out and are None
// then. Borrowed references.
template <int count, int required = count>
struct Arguments {
  PyObject* value[count] = {};
  PyObject* operator[](int i) const { return value[i]; }

  Arguments(const char* function, const char* const (&names)[count], PyObject* const* args,
            Py_ssize_t positional, PyObject* keywords) {
    namespace py = pybind11;
    if (positional > count)
      throw py::type_error(message(function, ": expected ", count, " arguments, got ", positional));
    for (Py_ssize_t i = 0; i < positional; ++i) value[i] = args[i];
    const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t k = 0; k < named; ++k) {
      PyObject* keyword = PyTuple_GET_ITEM(keywords, k);
      int i = 0;
      while (i < count && PyUnicode_CompareWithASCIIString(keyword, names[i]) != 0) ++i;
      if (i == count || value[i])
        throw py::type_error(message(function, ": unexpected or repeated argument '",
                                     py::cast<std::string>(py::handle(keyword)), "'"));
      value[i] = args[positional + k];
    }
    for (int i = required; i < count; ++i)
      if (!value[i]) value[i] = Py_None;
    for (int i = 0; i < count; ++i)
      if (!value[i]) throw py::type_error(message(function, ": missing argument '", names[i], "'"));
  }
};

inline long long integer(PyObject* object, const char* name) {
  const long long x = PyLong_AsLongLong(object);
  if (x == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw pybind11::type_error(message(name, ": expected an int of 64 bits, got ", Py_TYPE(object)->tp_name));
  }
  return x;
}

// More threads than any machine has would end the process when they cannot be started.
inline int checked_threads(long long threads) {
  if (threads < 1 || threads > 1024)
    throw pybind11::value_error(message("threads: expected 1 to 1024, got ", threads));
  return static_cast<int>(threads);
}

// Runs `call` and turns a C++ exception into the Python exception that pybind11 would raise.
template <class Call>
PyObject* guarded(const Call& call) {
  try {
    call();
    Py_RETURN_NONE;
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (...) {
    pybind11::detail::try_translate_exceptions();
  }
  return nullptr;
}

// As guarded(), of a call that returns what Python gets: an owned reference. Unless `strict`, None for what
// the call does not take.
template <bool strict = true, class Call>
PyObject* guarded_object(const Call& call) {
  PyObject* result = nullptr;
  PyObject* const none = guarded([&] {
    try {
      result = call().release().ptr();
    } catch (const NotTaken&) {
      if (strict) throw;
      result = Py_NewRef(Py_None);
    }
  });
  if (!none) return nullptr;
  Py_DECREF(none);
  return result;
}

template <auto function>
inline PyCFunction fastcall() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace mprec::python
