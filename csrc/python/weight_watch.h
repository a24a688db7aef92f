// Notices when weights change between calls, without a copy of them.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "python/hooks.h"
#include "python/tensor.h"

namespace mprec::python {

// Checksums of a tensor's elements, block by block. Writes that raise no counter (through .data, NumPy or
// DLPack) show in the bytes alone, and to read all of them at each call would cost as much as a call. So a
// watch reads short tensors and a share of the long ones' blocks, in turn; see `Share`.
class Checksums {
 public:
  static constexpr int64_t block_bytes = 512;

  // Of a tensor of more than `most` blocks, so many spread over it.
  Checksums(const Tensor& t, int64_t most)
      : tensor_(t),
        contiguous_(t.contiguous()),
        elements_(block_bytes / t.item_bytes()),
        all_((t.numel() + elements_ - 1) / elements_) {
    const int64_t blocks = std::min(most, all_);
    sums_.resize(blocks);
    for (int64_t b = 0; b < blocks; ++b) sums_[b] = sum(b);
    if (contiguous_ && all_ > 1) spots_ = spots();
  }
  // A few elements of a long tensor, spread: a write to all of it shows in them at once.
  bool same_spots() const { return !contiguous_ || spots() == spots_; }
  int64_t blocks() const { return static_cast<int64_t>(sums_.size()); }
  bool same(int64_t block) const { return sum(block) == sums_[block]; }

 private:
  // The sum of the words, and the sum of its values on the way, which tells their order.
  struct Sum {
    uint64_t words[4] = {}, order[4] = {};
    void add(const uint64_t (&w)[4]) {
      for (int i = 0; i < 4; ++i) {
        words[i] += w[i];
        order[i] += words[i];
      }
    }
    bool operator==(const Sum& other) const { return std::memcmp(this, &other, sizeof(Sum)) == 0; }
  };
  uint64_t spots() const {
    const int64_t last = tensor_.numel() * tensor_.item_bytes() - 8;
    uint64_t mixed = 0;
    for (int64_t i = 0; i < 4; ++i) {
      uint64_t bits;
      std::memcpy(&bits, tensor_.ptr<char>() + last * i / 3, sizeof bits);
      mixed = (mixed ^ bits) * 0x9E3779B97F4A7C15u;
    }
    return mixed;
  }
  Sum sum(int64_t block) const {
    if (blocks() < all_ && blocks() > 1) block = (all_ - 1) * block / (blocks() - 1);
    const int64_t begin = block * elements_, count = std::min(elements_, tensor_.numel() - begin);
    Sum s;
    const int64_t item = tensor_.item_bytes();
    if (!contiguous_) {  // rare: element by element
      for (int64_t i = begin; i < begin + count; ++i) {
        int64_t element = i, offset = 0;
        for (int d = tensor_.ndim - 1; d >= 0; --d) {
          offset += element % tensor_.shape[d] * tensor_.strides[d];
          element /= tensor_.shape[d];
        }
        uint64_t w[4] = {};
        std::memcpy(w, tensor_.ptr<char>() + offset * item, item);
        s.add(w);
      }
      return s;
    }
    const char* p = tensor_.ptr<char>() + begin * item;
    int64_t bytes = count * item;
    for (uint64_t w[4]; bytes >= 32; p += 32, bytes -= 32) {
      std::memcpy(w, p, 32);
      s.add(w);
    }
    if (bytes > 0) {
      uint64_t w[4] = {};
      std::memcpy(w, p, bytes);
      s.add(w);
    }
    return s;
  }
  Tensor tensor_;
  bool contiguous_;
  int64_t elements_, all_;  // in a block; blocks that there are
  std::vector<Sum> sums_;
  uint64_t spots_ = 0;
};

// What part of the long tensors' blocks a check reads: parts / `of`, in the long run.
struct Share {
  static constexpr int64_t of = 2048;
  int64_t parts;
  // So many IDs are decoded next: reading takes some hundredth of that time.
  static constexpr Share before(int64_t ids) { return {std::min(1 + ids, of)}; }
  static constexpr Share all() { return {of}; }
};

// Which tensor it was, its view of its storage, its version counter, which in-place operations raise, and
// checksums of its elements. The storage is kept: no other can take its address meanwhile.
class TensorMark {
 public:
  // NotTaken: no torch tensor on the CPU, or one made in inference mode, which has no counter.
  TensorMark(PyObject* tensor, int64_t blocks)
      : tensor_(tensor),
        view_(view(tensor, "weights", Sign::ignore)),
        sums_(view_, blocks),
        version_(version(tensor)) {
    storage_ = pybind11::handle(tensor).attr("detach")();
  }
  static bool is_torch(PyObject* object) { return pybind11::hasattr(object, "__dlpack_c_exchange_api__"); }
  // The counters of torch's own tensors only rise, so the object may be compared by address.
  bool matches(PyObject* tensor, Share share) const {
    return tensor == tensor_ && is_at(tensor, view_) && version(tensor) == version_ && same_elements(share);
  }

 private:
  bool same_elements(Share share) const {
    const int64_t blocks = sums_.blocks();
    if (blocks > 1 && !sums_.same_spots()) return false;
    owed_ += blocks == 1 ? Share::of : blocks * share.parts;
    for (int64_t i = std::min(owed_ / Share::of, blocks); i > 0; --i) {
      owed_ -= Share::of;
      if (next_ >= blocks) next_ = 0;
      if (!sums_.same(next_++)) return false;
    }
    return true;
  }
  // The getter itself: looking it up by name costs more than what it does.
  static long version(PyObject* tensor) {
    static const auto* const getter = [] {
      const auto tensors = pybind11::module_::import("torch").attr("Tensor");
      return reinterpret_cast<PyGetSetDescrObject*>(
          pybind11::object(tensors.attr("_version")).release().ptr());
    }();
    if (!PyObject_TypeCheck(tensor, getter->d_common.d_type))
      throw NotTaken(NotTaken::type,
                     message("weights: expected torch tensors, got ", Py_TYPE(tensor)->tp_name));
    const auto v = pybind11::reinterpret_steal<pybind11::object>(
        getter->d_getset->get(tensor, getter->d_getset->closure));
    if (!v) {
      PyErr_Clear();
      throw NotTaken(NotTaken::value, "weights: made in inference mode, without a version counter");
    }
    return PyLong_AsLong(v.ptr());
  }
  PyObject* tensor_;  // not owned
  Tensor view_;
  Checksums sums_;
  mutable int64_t next_ = 0, owed_ = 0;  // the block to read next; parts of blocks to read. Under the GIL
  long version_;
  pybind11::object storage_;
};

// Remembers what stood at some places in modules' dicts: tensors, with their contents, or modules, with their
// types, which may be given another (`module.__class__ = ...`). A place is
// also taken for changed when its dict has grown or shrunk. A place whose key is None is its dict's size
// alone.
class WeightWatch {
 public:
  using Places = std::vector<std::pair<pybind11::dict, std::optional<pybind11::str>>>;

  WeightWatch(const Places& places, int64_t blocks) : epoch_(epoch()) {
    for (const auto& [dict, key] : places) {
      if (!key) {
        (PyDict_CheckExact(dict.ptr()) ? sizes_ : hooks_).emplace_back(dict, dict.size());
        continue;
      }
      PyObject* object = PyDict_GetItemWithError(dict.ptr(), key->ptr());
      if (!object) throw NotTaken(NotTaken::value, message("places: no '", std::string(*key), "'"));
      Place place{
          dict, *key, pybind11::reinterpret_borrow<pybind11::object>(object), dict.size(), Py_TYPE(object),
          {}};
      if (TensorMark::is_torch(object)) place.mark.emplace_back(object, blocks);
      places_.push_back(std::move(place));
    }
  }

  static std::unique_ptr<WeightWatch> of(const Places& places, int64_t blocks) {
    try {
      return std::make_unique<WeightWatch>(places, blocks);
    } catch (const NotTaken&) {
      return nullptr;
    }
  }

  bool changed(Share share) const {
    if (epoch_ != epoch()) return true;
    if (grown(sizes_)) return true;
    if (PyObject* latest = latest_hook(); latest != seen_.ptr()) {
      if (grown(hooks_)) return true;
      seen_ = pybind11::reinterpret_borrow<pybind11::object>(latest);
    }
    for (const Place& p : places_) {
      PyObject* object = PyDict_GetItemWithError(p.dict.ptr(), p.key.ptr());
      if (object != p.object.ptr() || Py_TYPE(object) != p.type ||
          static_cast<size_t>(PyDict_GET_SIZE(p.dict.ptr())) != p.size)
        return true;
      if (!p.mark.empty() && !p.mark[0].matches(object, share)) return true;
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
    PyTypeObject* type;            // of the object. Not owned: compared alone
    std::vector<TensorMark> mark;  // one, of a tensor
  };
  using Sizes = std::vector<std::pair<pybind11::dict, size_t>>;
  static bool grown(const Sizes& sizes) {
    for (const auto& [dict, size] : sizes)
      if (static_cast<size_t>(PyDict_GET_SIZE(dict.ptr())) != size) return true;
    return false;
  }
  static long& epoch() {  // guarded by the GIL
    static long count = 0;
    return count;
  }
  long epoch_;
  std::vector<Place> places_;
  Sizes sizes_, hooks_;            // of plain dicts; of nn.Module's hooks, which are OrderedDicts
  mutable pybind11::object seen_;  // the latest hook when hooks_ were last looked at. Under the GIL
};

// Remembers the tensors of an encoder and a decoder that a caller passes again and again. Does not keep the
// tensor objects alive, only their storage.
class StackWatch {
 public:
  // coefficients: a tensor; weights, biases: lists or tuples of tensors.
  StackWatch(pybind11::handle coefficients, pybind11::handle weights, pybind11::handle biases) {
    visit(coefficients.ptr(), weights.ptr(), biases.ptr(), [&](PyObject* tensor) {
      marks_.emplace_back(tensor, INT64_MAX);
      return true;
    });
  }
  static std::unique_ptr<StackWatch> of(pybind11::handle coefficients, pybind11::handle weights,
                                        pybind11::handle biases) {
    try {
      return std::make_unique<StackWatch>(coefficients, weights, biases);
    } catch (const NotTaken&) {
      return nullptr;
    }
  }
  bool matches(PyObject* coefficients, PyObject* weights, PyObject* biases, Share share) const {
    size_t i = 0;
    return visit(coefficients, weights, biases,
                 [&](PyObject* tensor) { return i < marks_.size() && marks_[i++].matches(tensor, share); }) &&
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
