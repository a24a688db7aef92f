// Notices when modules or tensors are replaced, or tensors moved, on any device.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/error.h"
#include "python/tensor.h"

namespace mprec::python {

// Remembers what stood at some places in modules' dicts and, of tensors, where their elements lay and of what
// type they were. Elements themselves are not looked at. A place is also taken for changed when its dict has
// grown or shrunk; one whose key is None is its dict's size alone. Storages are kept: no other tensor can
// take their address meanwhile.
class PlaceWatch {
 public:
  explicit PlaceWatch(const std::vector<std::pair<pybind11::dict, std::optional<pybind11::str>>>& places) {
    for (const auto& [dict, key] : places) {
      if (!key) {
        sizes_.emplace_back(dict, PyDict_GET_SIZE(dict.ptr()));
        continue;
      }
      PyObject* const object = PyDict_GetItemWithError(dict.ptr(), key->ptr());
      if (!object) throw pybind11::key_error(message("places: no '", std::string(*key), "'"));
      Place place{dict,
                  *key,
                  pybind11::reinterpret_borrow<pybind11::object>(object),
                  {},
                  layout(object),
                  dict.size(),
                  Py_TYPE(object)};
      if (place.layout) place.storage = place.object.attr("detach")();
      places_.push_back(std::move(place));
    }
  }

  bool changed() const {
    for (const auto& [dict, size] : sizes_)
      if (PyDict_GET_SIZE(dict.ptr()) != size) return true;
    for (const Place& p : places_) {
      PyObject* const object = PyDict_GetItemWithError(p.dict.ptr(), p.key.ptr());
      if (object != p.object.ptr() || Py_TYPE(object) != p.type ||
          static_cast<size_t>(PyDict_GET_SIZE(p.dict.ptr())) != p.size)
        return true;
      if (p.layout && moved(object, *p.layout)) return true;
    }
    return false;
  }

 private:
  static bool moved(PyObject* tensor, const Layout& before) {
    try {
      const auto now = layout(tensor);
      return !now || !(*now == before);
    } catch (const NotTaken&) {  // it has no storage of its own any more
      return true;
    }
  }
  struct Place {
    pybind11::dict dict;
    pybind11::str key;
    pybind11::object object, storage;
    std::optional<Layout> layout;  // of a tensor
    size_t size;
    PyTypeObject* type;  // of the object. Not owned: compared alone
  };
  std::vector<Place> places_;
  std::vector<std::pair<pybind11::dict, Py_ssize_t>> sizes_;
};

}  // namespace mprec::python
