// What stands where in torch modules.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/place_watch.h"

namespace py = pybind11;

namespace mprec::python {

void bind_modules(py::module_& m) {
  py::class_<PlaceWatch>(m, "PlaceWatch",
                         "Notices when what stood at places in modules' dicts is replaced or moved.")
      .def(py::init<const std::vector<std::pair<py::dict, std::optional<py::str>>>&>(), py::arg("places"),
           "Watches the modules and tensors at places (dict, key), on any device; ValueError for a tensor "
           "without plain storage. A key of None watches the size of the dict.")
      .def("changed", &PlaceWatch::changed,
           "Whether another object stands somewhere, or a tensor's elements lie elsewhere, in another shape "
           "or "
           "of another type. What was written to them makes no difference.");
}

}  // namespace mprec::python
