// Functions called once per forward pass go to Python as METH_FASTCALL: pybind11's dispatcher costs more than
// a small kernel.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>

#include "common/error.h"
#include "python/tensor.h"

namespace mprec::python {

// A function's name and those of its arguments. Those from `required` on may be left out and are None then.
template <int count>
struct Signature {
  const char* function;
  const char* names[count];
  int required = count;
};

// The arguments of a call, by position or by keyword. Borrowed references.
template <int count>
struct Arguments {
  PyObject* value[count] = {};
  PyObject* operator[](int i) const { return value[i]; }

  Arguments(const Signature<count>& s, PyObject* const* args, Py_ssize_t positional, PyObject* keywords) {
    namespace py = pybind11;
    if (positional > count)
      throw py::type_error(message(s.function, ": expected ", count, " arguments, got ", positional));
    for (Py_ssize_t i = 0; i < positional; ++i) value[i] = args[i];
    const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t k = 0; k < named; ++k) {
      PyObject* keyword = PyTuple_GET_ITEM(keywords, k);
      int i = 0;
      while (i < count && PyUnicode_CompareWithASCIIString(keyword, s.names[i]) != 0) ++i;
      if (i == count || value[i])
        throw py::type_error(message(s.function, ": unexpected or repeated argument '",
                                     py::cast<std::string>(py::handle(keyword)), "'"));
      value[i] = args[positional + k];
    }
    for (int i = s.required; i < count; ++i)
      if (!value[i]) value[i] = Py_None;
    for (int i = 0; i < count; ++i)
      if (!value[i]) throw py::type_error(message(s.function, ": missing argument '", s.names[i], "'"));
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

inline bool flag(PyObject* object) {
  const int set = PyObject_IsTrue(object);
  if (set < 0) throw pybind11::error_already_set();
  return set;
}

// More threads than any machine has would end the process when they cannot be started.
inline int checked_threads(long long threads) {
  if (threads < 1 || threads > 1024)
    throw pybind11::value_error(message("threads: expected 1 to 1024, got ", threads));
  return static_cast<int>(threads);
}
inline int checked_threads(PyObject* threads) { return checked_threads(integer(threads, "threads")); }

// The object of a class that pybind11 knows. TypeError for any other.
template <class T>
T& instance(PyObject* object, const char* name, const char* type) {
  if (!pybind11::isinstance<T>(object))
    throw pybind11::type_error(message(name, ": expected a ", type, ", got ", Py_TYPE(object)->tp_name));
  return *pybind11::handle(object).cast<T*>();
}

// The items of a sequence, owned: they outlive a call even if another thread empties a list.
class List {
 public:
  // At least one item.
  List(PyObject* object, const char* name) : name_(name) {
    take(object);
    if (size() == 0) throw pybind11::value_error(message(name, ": expected at least one"));
  }
  // One item for each of `size` tables or decoders; None gives null.
  List(PyObject* object, const char* name, Py_ssize_t size) : name_(name) {
    if (object == Py_None) return;
    take(object);
    if (this->size() != size)
      throw pybind11::value_error(message(name, ": expected one for each of ", size, ", got ", this->size()));
  }
  explicit operator bool() const { return static_cast<bool>(items_); }
  Py_ssize_t size() const { return items_ ? PyTuple_GET_SIZE(items_.ptr()) : 0; }
  // Borrowed; of null, None.
  PyObject* operator[](Py_ssize_t t) const { return items_ ? PyTuple_GET_ITEM(items_.ptr(), t) : Py_None; }
  // Item t, an int in [0, most].
  int64_t up_to(int64_t most, Py_ssize_t t) const {
    const int64_t value = integer((*this)[t], name_);
    if (value < 0 || value > most)
      throw pybind11::value_error(
          message(name_, "[", t, "]: expected ", value < 0 ? ">= 0" : message("<= ", most), ", got ", value));
    return value;
  }

 private:
  void take(PyObject* object) {
    items_ = pybind11::reinterpret_steal<pybind11::object>(PySequence_Tuple(object));
    if (!items_ && PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Clear();
      throw pybind11::type_error(message(name_, ": expected a list, got ", Py_TYPE(object)->tp_name));
    }
    if (!items_) throw pybind11::error_already_set();
  }

  const char* name_;
  pybind11::object items_;
};

// Runs `call` without the interpreter's lock, if it takes long enough for another thread to make use of it.
template <class Call>
auto without_gil(bool is_long, const Call& call) {
  std::optional<pybind11::gil_scoped_release> release;
  if (is_long) release.emplace();
  return call();
}

// A function for METH_FASTCALL. It returns what `body` does, or raises the Python exception that pybind11
// would raise for the C++ one. Unless `strict`, it returns None for what `body` does not take.
template <const auto& signature, auto body, bool strict>
PyObject* fastcall(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  try {
    try {
      return body(Arguments(signature, args, count, keywords)).release().ptr();
    } catch (const NotTaken&) {
      if (strict) throw;
      return Py_NewRef(Py_None);
    }
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (...) {
    pybind11::detail::try_translate_exceptions();
  }
  return nullptr;
}

// Its entry in a module's list of methods.
template <const auto& signature, auto body, bool strict = true>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&fastcall<signature, body, strict>)),
          METH_FASTCALL | METH_KEYWORDS, doc};
}

// `methods` ends with an entry of nulls.
inline void add_methods(pybind11::module_& m, PyMethodDef* methods) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace mprec::python
