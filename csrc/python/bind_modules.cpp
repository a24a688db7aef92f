// Tensors out of torch modules, without a Python step for each.
#include <pybind11/pybind11.h>

#include "python/arguments.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// dict[key], borrowed.
PyObject* item_of(PyObject* dict, PyObject* key) {
  if (!PyDict_Check(dict))
    throw py::type_error(message("modules: expected a dict, got ", Py_TYPE(dict)->tp_name));
  PyObject* const item = PyDict_GetItemWithError(dict, key);
  if (!item && PyErr_Occurred()) throw py::error_already_set();
  if (!item) throw NotTaken(NotTaken::value, "modules: a key is not there");
  return item;
}

constexpr Signature<5> owned{"tensors_of", {"modules", "names", "owner", "key", "type"}};

// Read at each call, so that whatever replaced a module or a tensor is seen.
py::object tensors_of(const Arguments<5>& a) {
  if (!PyTuple_Check(a[1])) throw py::type_error("names: expected a tuple");
  const Py_ssize_t modules = PyTuple_GET_SIZE(a[1]);
  auto found = py::reinterpret_steal<py::object>(PyTuple_New(modules));
  if (!found) throw py::error_already_set();
  for (Py_ssize_t i = 0; i < modules; ++i) {
    PyObject* const module = item_of(a[0], PyTuple_GET_ITEM(a[1], i));
    const auto owner = py::reinterpret_steal<py::object>(PyObject_GenericGetAttr(module, a[2]));
    if (!owner) throw py::error_already_set();
    PyObject* const tensor = item_of(owner.ptr(), a[3]);
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != a[4])
      throw NotTaken(NotTaken::type,
                     message("modules: expected a plain tensor, got ", Py_TYPE(tensor)->tp_name));
    PyTuple_SET_ITEM(found.ptr(), i, Py_NewRef(tensor));
  }
  return found;
}

PyMethodDef methods[] = {
    method<owned, tensors_of, false>(
        "tensors_of",
        "tensors_of(modules, names, owner, key, type)\n\ntuple(getattr(modules[name], owner)[key] for name "
        "in "
        "names): say, owner \"_parameters\" and key \"weight\".\nNone if there is none somewhere, or one is "
        "not exactly of `type`."),
    {}};

}  // namespace

void bind_modules(py::module_& m) { add_methods(m, methods); }

}  // namespace mprec::python
