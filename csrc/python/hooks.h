// Notices that hooks were registered on modules of torch.
#pragma once
#include <pybind11/pybind11.h>

namespace mprec::python {

// The number that torch gives to the next hook, of whatever object: while it is the same, no dict of hooks
// has grown. Each number is an object of its own as long as somebody keeps it. Borrowed.
inline PyObject* latest_hook() {
  static PyObject* const handle =
      pybind11::object(pybind11::module_::import("torch.utils.hooks").attr("RemovableHandle"))
          .release()
          .ptr();
  static PyObject* const key = PyUnicode_InternFromString("next_id");
  return PyDict_GetItemWithError(reinterpret_cast<PyTypeObject*>(handle)->tp_dict, key);
}

}  // namespace mprec::python
