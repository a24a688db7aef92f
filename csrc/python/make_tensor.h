// New torch tensors, without linking to torch.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "python/tensor.h"

namespace mprec::python {

// An uninitialised CPU tensor [size] of int32, int64 or float32.
inline pybind11::object make_tensor(int64_t size, DType dtype) {
  namespace py = pybind11;
  // Never let go of: modules are gone by the time that static objects are.
  static PyObject* const torch = py::module_::import("torch").release().ptr();
  static PyObject* const make = py::getattr(torch, "empty").release().ptr();
  static PyObject* const i32 = py::getattr(torch, "int32").release().ptr();
  static PyObject* const i64 = py::getattr(torch, "int64").release().ptr();
  static PyObject* const f32 = py::getattr(torch, "float32").release().ptr();
  static PyObject* const keywords = py::make_tuple("dtype").release().ptr();
  const py::int_ length(size);
  PyObject* const arguments[] = {length.ptr(), dtype == DType::f32 ? f32 : (dtype == DType::i64 ? i64 : i32)};
  auto made = py::reinterpret_steal<py::object>(PyObject_Vectorcall(make, arguments, 1, keywords));
  if (!made) throw py::error_already_set();
  return made;
}

}  // namespace mprec::python
