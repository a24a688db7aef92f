// A model's whole path as Python holds it: a program, and what its weights are read from.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/error.h"
#include "program/program.h"
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
  Program program;
  std::vector<TablePlace> tables;
  std::vector<py::object> decoders;  // owned
  py::object watch;                  // of all that is packed
  int64_t num_features;
  int num_dense;
  mutable bool stale = false;  // a change was seen; guarded by the GIL

  // Looked at before a call of so many samples. Reading all weights takes as long as scoring some tens of
  // samples by them, so that this takes a hundredth of the call's time.
  bool changed(int64_t samples) const {
    stale = stale || watch.cast<const WeightWatch&>().changed(Share::before(samples / 4)) ||
            std::any_of(tables.begin(), tables.end(), [](const TablePlace& t) { return t.changed(); });
    return stale;
  }
};

}  // namespace mprec::python
