// A model's whole path as Python holds it: a program, and what its weights are read from.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/error.h"
#include "program/program.h"
#include "python/cached_decoders.h"
#include "python/tensor.h"
#include "python/weight_watch.h"

namespace mprec::python {

namespace py = pybind11;

// A table that is read where it lies: the dict and key where a module keeps its tensor, which may be written
// to but neither replaced nor moved.
class TablePlace {
 public:
  TablePlace(py::dict dict, py::str key) : dict_(std::move(dict)), key_(std::move(key)) {
    PyObject* const found = PyDict_GetItemWithError(dict_.ptr(), key_.ptr());
    if (!found) throw py::key_error(message("tables: no '", std::string(key_), "' in the dict"));
    tensor_ = py::reinterpret_borrow<py::object>(found);
    view_ = view(found, "tables");
    if (TensorMark::is_torch(found)) storage_ = tensor_.attr("detach")();  // keeps what is read
  }
  PyObject* tensor() const { return tensor_.ptr(); }
  bool changed() const {
    PyObject* const found = PyDict_GetItemWithError(dict_.ptr(), key_.ptr());
    if (found != tensor_.ptr()) return true;
    if (storage_) return !is_at(found, view_);
    const Tensor now = view(found, "tables");
    return now.data != view_.data || now.ndim != view_.ndim || now.shape[0] != view_.shape[0] ||
           now.shape[1] != view_.shape[1] || now.strides[0] != view_.strides[0];
  }

 private:
  py::dict dict_;
  py::str key_;
  py::object tensor_, storage_;
  Tensor view_;
};

struct PathProgram {
  std::optional<Program> program;  // there, once this is made
  std::vector<TablePlace> tables;
  std::vector<const CachedDecoders*> cached;
  std::vector<py::object> owned;  // decoders
  py::object watch;               // of all that is packed
  int64_t num_features = 0;
  int num_dense = 0;
  mutable bool stale = false;  // a change was seen; guarded by the GIL

  // Looked at before a call of so many samples. Reading all weights takes as long as scoring some tens of
  // samples by them, so that this takes a hundredth of the call's time.
  bool changed(int64_t samples) const {
    const int64_t ids = samples / 4;
    stale = stale || watch.cast<const WeightWatch&>().changed(Share::before(ids)) ||
            std::any_of(tables.begin(), tables.end(), [](const TablePlace& t) { return t.changed(); }) ||
            std::any_of(cached.begin(), cached.end(), [&](const auto* c) { return c->stale(ids); });
    return stale;
  }
};

}  // namespace mprec::python
