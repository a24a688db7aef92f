// Notices when weights change between calls, without a copy of them.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "python/tensor.h"

namespace mprec::python {

// The bits of some elements, spread over a tensor: writes that raise no counter (through .data, NumPy,
// DLPack) show in them where they change a tensor as a whole, as optimizers' steps, averages and copies do.
class Sample {
 public:
  explicit Sample(const Tensor& t) {
    const int64_t n = t.numel();
    for (int i = 0; n > 0 && i < size; ++i) {
      int64_t element = (n - 1) * i / (size - 1), offset = 0;
      for (int d = t.ndim - 1; d >= 0; --d) {
        offset += element % t.shape[d] * t.strides[d];
        element /= t.shape[d];
      }
      offsets_[i] = offset;
    }
    if (n > 0) bits_ = read(t);
  }
  // Of a tensor of the same shape and strides.
  bool matches(const Tensor& t) const { return t.numel() == 0 || read(t) == bits_; }

 private:
  static constexpr int size = 4;
  using Bits = std::array<uint64_t, size>;
  Bits read(const Tensor& t) const {
    Bits bits{};  // zeros of types that no decoder is made of
    for (int i = 0; i < size; ++i) {
      if (t.dtype == DType::f32) bits[i] = t.ptr<uint32_t>()[offsets_[i]];
      if (t.dtype == DType::i64) bits[i] = t.ptr<uint64_t>()[offsets_[i]];
    }
    return bits;
  }
  std::array<int64_t, size> offsets_{};  // in elements
  Bits bits_{};
};

// Which tensor it was, its view of its storage, its version counter, which in-place operations raise, and a
// sample of its elements. The storage is kept: no other can take its address meanwhile.
class TensorMark {
 public:
  // TypeError for what is no torch tensor on the CPU, RuntimeError for one made in inference mode, which has
  // no counter.
  explicit TensorMark(PyObject* tensor)
      : tensor_(tensor), view_(view(tensor, "weights")), sample_(view_), version_(version(tensor)) {
    storage_ = pybind11::handle(tensor).attr("detach")();
  }
  static bool is_torch(PyObject* object) { return pybind11::hasattr(object, "__dlpack_c_exchange_api__"); }
  // The counters of torch's own tensors only rise, so the object may be compared by address.
  bool matches(PyObject* tensor) const {
    if (tensor != tensor_) return false;
    const Tensor now = view(tensor, "weights");
    if (now.data != view_.data || now.ndim != view_.ndim) return false;
    for (int i = 0; i < now.ndim; ++i)
      if (now.shape[i] != view_.shape[i] || now.strides[i] != view_.strides[i]) return false;
    return version(tensor) == version_ && sample_.matches(view_);
  }

 private:
  // The getter itself: looking it up by name costs more than what it does.
  static long version(PyObject* tensor) {
    static const auto* const getter = [] {
      const auto tensors = pybind11::module_::import("torch").attr("Tensor");
      return reinterpret_cast<PyGetSetDescrObject*>(
          pybind11::object(tensors.attr("_version")).release().ptr());
    }();
    if (!PyObject_TypeCheck(tensor, getter->d_common.d_type))
      throw pybind11::type_error(message("weights: expected torch tensors, got ", Py_TYPE(tensor)->tp_name));
    const auto v = pybind11::reinterpret_steal<pybind11::object>(
        getter->d_getset->get(tensor, getter->d_getset->closure));
    if (!v) throw pybind11::error_already_set();
    return PyLong_AsLong(v.ptr());
  }
  PyObject* tensor_;  // not owned
  Tensor view_;
  Sample sample_;
  long version_;
  pybind11::object storage_;
};

// Remembers what stood at some places in modules' dicts: tensors, with their contents, or modules. A place is
// also taken for changed when its dict has grown or shrunk.
class WeightWatch {
 public:
  explicit WeightWatch(const std::vector<std::pair<pybind11::dict, pybind11::str>>& places)
      : epoch_(epoch()) {
    for (const auto& [dict, key] : places) {
      PyObject* object = PyDict_GetItemWithError(dict.ptr(), key.ptr());
      if (!object) throw pybind11::key_error(message("places: no '", std::string(key), "' in the dict"));
      Place place{dict, key, pybind11::reinterpret_borrow<pybind11::object>(object), dict.size(), {}};
      if (TensorMark::is_torch(object)) place.mark.emplace_back(object);
      places_.push_back(std::move(place));
    }
  }

  bool changed() const {
    if (epoch_ != epoch()) return true;
    for (const Place& p : places_) {
      PyObject* object = PyDict_GetItemWithError(p.dict.ptr(), p.key.ptr());
      if (object != p.object.ptr() || static_cast<size_t>(PyDict_GET_SIZE(p.dict.ptr())) != p.size)
        return true;
      if (!p.mark.empty() && !p.mark[0].matches(object)) return true;
    }
    return false;
  }

  // After writes that raise no counter: every watch made before now reports a change.
  static void forget_all() { ++epoch(); }

 private:
  struct Place {
    pybind11::dict dict;
    pybind11::str key;
    pybind11::object object;
    size_t size;
    std::vector<TensorMark> mark;  // one, of a tensor
  };
  static long& epoch() {  // guarded by the GIL
    static long count = 0;
    return count;
  }
  long epoch_;
  std::vector<Place> places_;
};

// Remembers the tensors of an encoder and a decoder that a caller passes again and again. Does not keep the
// tensor objects alive, only their storage.
class StackWatch {
 public:
  // coefficients: a tensor; weights, biases: lists or tuples of tensors.
  StackWatch(pybind11::handle coefficients, pybind11::handle weights, pybind11::handle biases) {
    visit(coefficients.ptr(), weights.ptr(), biases.ptr(), [&](PyObject* tensor) {
      marks_.emplace_back(tensor);
      return true;
    });
  }
  bool matches(PyObject* coefficients, PyObject* weights, PyObject* biases) const {
    size_t i = 0;
    return visit(coefficients, weights, biases,
                 [&](PyObject* tensor) { return i < marks_.size() && marks_[i++].matches(tensor); }) &&
           i == marks_.size();
  }

 private:
  template <class Check>
  static bool visit(PyObject* coefficients, PyObject* weights, PyObject* biases, const Check& check) {
    if (!check(coefficients)) return false;
    for (PyObject* group : {weights, biases}) {
      const auto items = pybind11::reinterpret_steal<pybind11::object>(
          PySequence_Fast(group, "weights, biases: expected sequences of tensors"));
      if (!items) throw pybind11::error_already_set();
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i)
        if (!check(PySequence_Fast_GET_ITEM(items.ptr(), i))) return false;
    }
    return true;
  }
  std::vector<TensorMark> marks_;
};

}  // namespace mprec::python
