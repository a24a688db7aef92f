// The tables of one call, found where modules keep them. Where they were found is kept from call to call.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "common/error.h"
#include "embedding_bag/embedding_bag.h"
#include "python/bags.h"
#include "python/hooks.h"
#include "python/tables.h"
#include "python/tensor.h"

namespace mprec::python {

// Knows whether a dict is as it was. Python 3.11 numbers the states of all dicts, no number twice (PEP 509).
// Later versions do not (PEP 699): there one cannot tell.
class DictState {
 public:
  DictState() = default;
  explicit DictState(PyObject* dict) : number_(number(dict)) {}
  bool holds(PyObject* dict) const { return number_ != 0 && number(dict) == number_; }

 private:
  static uint64_t number([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
    return 0;
#endif
  }
  uint64_t number_ = 0;  // no dict's
};

// Tables as one call reads them.
struct ReadTables {
  std::vector<PooledTable> pooled;  // and one more, which ends the last one's bags
  std::vector<Tensor> views;
  std::vector<pybind11::object> owned;  // what holds the memory: other threads may replace it meanwhile
};

// Tables modules[name].owner[key], say of owner "_parameters" and key "weight", that serve features of a
// batch. A call asks each place whether another tensor stands there, and each tensor where its elements lie:
// whatever was replaced, moved, or given another shape or dtype is seen. So is a module that does more than
// its table says (hooks, a forward pass of its own, another type, padding): it is to be called. Used under
// the GIL.
class TableGroup {
 public:
  // `arguments` are those of Python's constructor.
  explicit TableGroup(pybind11::tuple arguments) : arguments_(std::move(arguments)) {
    namespace py = pybind11;
    if (arguments_.size() != 10)
      throw py::value_error(message("TableGroup: expected 10 arguments, got ", arguments_.size()));
    const auto argument = [&](int i, PyTypeObject* type, const char* name) {
      PyObject* const object = PyTuple_GET_ITEM(arguments_.ptr(), i);
      if (!PyObject_TypeCheck(object, type))
        throw py::type_error(
            message(name, ": expected a ", type->tp_name, ", got ", Py_TYPE(object)->tp_name));
      return object;
    };
    names_ = argument(0, &PyTuple_Type, "names");
    owner_ = argument(1, &PyUnicode_Type, "owner");
    key_ = argument(2, &PyUnicode_Type, "key");
    type_ = reinterpret_cast<PyTypeObject*>(argument(3, &PyType_Type, "type"));
    if (!arguments_[4].is_none()) bits_ = argument(4, &PyUnicode_Type, "bits");
    mode_ = pooling_mode(integer(arguments_[5].ptr(), "mode"));
    const Py_ssize_t count = PyTuple_GET_SIZE(names_);
    if (count == 0) throw py::value_error("names: expected at least one");
    for (Py_ssize_t t = 0; t < count; ++t)
      if (!PyUnicode_Check(name(t)))
        throw py::type_error(message("names: expected strings, got ", Py_TYPE(name(t))->tp_name));
    const List columns(arguments_[6].ptr(), "columns", count), named(arguments_[7].ptr(), "features", count);
    for (Py_ssize_t t = 0; columns && t < count; ++t) columns_.push_back(columns.up_to(INT64_MAX, t));
    num_features_ = integer(arguments_[8].ptr(), "num_features");
    features_ = features_of(named, num_features_);
    if (!named && num_features_ != count)
      throw py::value_error(
          message("num_features: expected ", count, " without features, got ", num_features_));
    modules_of_ = argument(9, &PyTuple_Type, "module_types");
    places_.resize(count);
  }
  const pybind11::tuple& arguments() const { return arguments_; }

  // NotTaken: a place is empty, or holds no tensor of the type, or one in a form that kernels do not take; or
  // a module is to be called.
  ReadTables read(PyObject* modules) {
    if (!PyDict_Check(modules))
      throw pybind11::type_error(message("modules: expected a dict, got ", Py_TYPE(modules)->tp_name));
    const DictState state(modules);
    const bool same_modules = modules_.holds(modules);
    modules_ = {};
    const auto hook = pybind11::reinterpret_borrow<pybind11::object>(latest_hook());
    const bool new_hooks = !hook.is(seen_);
    ReadTables tables;
    tables.pooled.reserve(places_.size() + 1);
    tables.views.reserve(places_.size());
    tables.owned.reserve(places_.size());
    for (size_t t = 0; t < places_.size(); ++t) {
      Place& place = places_[t];
      if (!same_modules) place.module = item_of(modules, name(t));
      find(place, new_hooks);
      tables.owned.push_back(pybind11::reinterpret_borrow<pybind11::object>(place.tensor));
      PyObject* const bits = place.bits;
      tables.views.push_back(matrix(tables.owned.back().ptr(), "weights", Sign::remember));
      tables.pooled.push_back(table(tables.views.back(), "weights", bits));
    }
    tables.pooled.emplace_back();
    modules_ = state;
    seen_ = hook;
    return tables;
  }

  Mode mode() const { return mode_; }
  int64_t num_features() const { return num_features_; }
  const std::vector<int64_t>& features() const { return features_; }  // each table's; empty: all, in order
  const int64_t* columns() const { return columns_.empty() ? nullptr : columns_.data(); }

 private:
  // What was found where. Not owned: a dict that has not changed holds what it held.
  struct Place {
    PyObject *module = nullptr, *owner = nullptr, *tensor = nullptr, *bits = Py_None;
    DictState attributes, owned;  // of the module's attributes, and of `owner`
  };

  PyObject* name(size_t t) const { return PyTuple_GET_ITEM(names_, t); }

  void find(Place& place, bool new_hooks) const {
    // A reference of its own, but the module keeps the dict.
    const auto held =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(place.module, nullptr));
    if (!held) throw pybind11::error_already_set();
    PyObject* const attributes = held.ptr();
    if (!PySequence_Contains(modules_of_, reinterpret_cast<PyObject*>(Py_TYPE(place.module))))
      throw NotTaken(NotTaken::type, message("modules: another type, ", Py_TYPE(place.module)->tp_name));
    const bool same = place.attributes.holds(attributes);
    if (!same || new_hooks) {
      if (!same) place.attributes = {};
      check_hooks(attributes);
    }
    if (!same) {
      const DictState state(attributes);
      place.owned = {};
      check_attributes(attributes);
      place.owner = item_of(attributes, owner_);
      if (bits_) place.bits = item_of(attributes, bits_);
      if (!PyDict_Check(place.owner))
        throw pybind11::type_error(message("owner: expected a dict, got ", Py_TYPE(place.owner)->tp_name));
      place.attributes = state;
    }
    if (!place.owned.holds(place.owner)) {
      const DictState state(place.owner);
      place.owned = {};
      place.tensor = item_of(place.owner, key_);
      place.owned = state;
    }
    if (Py_TYPE(place.tensor) != type_)
      throw NotTaken(NotTaken::type,
                     message("modules: expected a plain tensor, got ", Py_TYPE(place.tensor)->tp_name));
  }

  // Hooks are run by calls.
  static void check_hooks(PyObject* attributes) {
    static PyObject* const kinds[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                      interned("_backward_hooks"), interned("_backward_pre_hooks")};
    for (PyObject* kind : kinds) {
      PyObject* const hooks = item_of(attributes, kind);
      if (!PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0)
        throw NotTaken(NotTaken::value, "modules: one has hooks");
    }
  }
  // Nothing that changes which rows are pooled. How they are is the group's to say.
  static void check_attributes(PyObject* attributes) {
    static PyObject* const forward = interned("forward");
    static PyObject* const options[] = {interned("max_norm"), interned("padding_idx")};
    if (find_in(attributes, forward))
      throw NotTaken(NotTaken::value, "modules: one has a forward pass of its own");
    for (PyObject* option : options)
      if (PyObject* const value = find_in(attributes, option); value && value != Py_None)
        throw NotTaken(NotTaken::value, "modules: one pads, or bounds its rows");
  }
  static PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }
  // dict[key], borrowed; null if there is none.
  static PyObject* find_in(PyObject* dict, PyObject* key) {
    PyObject* const item = PyDict_GetItemWithError(dict, key);
    if (!item && PyErr_Occurred()) throw pybind11::error_already_set();
    return item;
  }
  // dict[key], borrowed.
  static PyObject* item_of(PyObject* dict, PyObject* key) {
    if (PyObject* const item = find_in(dict, key)) return item;
    throw NotTaken(NotTaken::value, "modules: a key is not there");
  }

  pybind11::tuple arguments_;
  PyObject *names_, *owner_, *key_, *bits_ = nullptr, *modules_of_;  // in `arguments_`
  PyTypeObject* type_;
  Mode mode_;
  int64_t num_features_;
  std::vector<int64_t> features_, columns_;
  DictState modules_;
  pybind11::object seen_;  // the latest hook when modules were last looked at
  std::vector<Place> places_;
};

}  // namespace mprec::python
