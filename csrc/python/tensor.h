// Views of torch tensors and numpy arrays, checked where they enter the native code.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace mprec::python {

enum class DType : uint8_t { f32, f16, bf16, f64, i64, i32, i8, u8, other };

// Does not own; valid while the Python object it came from lives and keeps its storage.
struct Tensor {
  static constexpr int max_ndim = 4;
  void* data;
  DType dtype;
  int ndim;
  int64_t shape[max_ndim], strides[max_ndim];  // strides in elements
  bool writable;

  int64_t numel() const;
  int64_t item_bytes() const;
  bool contiguous() const;
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

// An argument in a form that native code does not take. To Python it is None from functions named try_...,
// whose callers serve it in another way, and a TypeError or ValueError from others.
struct NotTaken : std::runtime_error {
  enum Kind { type, value } kind;
  NotTaken(Kind k, const std::string& why) : std::runtime_error(why), kind(k) {}
};

// How to learn whether a torch tensor stands for the negation of what its memory holds.
enum class Sign { ask, remember, ignore };

// Any CPU torch tensor or numpy array of at most 4 dimensions. `name` is the argument's name, for errors.
// NotTaken: neither of the two, on another device, more dimensions, without memory (a resized storage),
// elements that are not aligned, a lazy negation. `remember`: of a tensor that is passed again and again.
Tensor view(PyObject* object, const char* name, Sign sign = Sign::ask);

// Whether a torch tensor's elements still lie where `before` says, which view() gave of it.
bool is_at(PyObject* tensor, const Tensor& before);

// A tensor's memory, gaps between rows included.
struct Extent {
  uintptr_t begin, end;
  explicit Extent(const Tensor&);
  Extent(const void* data, int64_t bytes) : begin(reinterpret_cast<uintptr_t>(data)), end(begin + bytes) {}
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// Where a torch tensor's elements lie, on whatever device, and of what type they are.
struct Layout {
  static constexpr int max_ndim = 8;
  const void* data;
  int32_t device_type, device_id;
  uint32_t dtype;  // DLPack's code, bits and lanes
  int32_t ndim;
  std::array<int64_t, max_ndim> shape, strides;  // zeros beyond ndim
  bool operator==(const Layout& other) const {
    return data == other.data && device_type == other.device_type && device_id == other.device_id &&
           dtype == other.dtype && ndim == other.ndim && shape == other.shape && strides == other.strides;
  }
};

// Of no torch tensor, null. NotTaken: a tensor without plain storage (on the meta device, sparse), or of more
// than 8 dimensions.
std::optional<Layout> layout(PyObject* object);

// As view(), and: exactly this dtype and number of dimensions, contiguous.
Tensor view(PyObject* object, const char* name, DType dtype, int ndim);

// As view(), and: one-dimensional, contiguous, int32 or int64.
Tensor view_ids(PyObject* object, const char* name);

// NotTaken if `t`, contiguous or a matrix of adjacent values in each row, cannot be written without harm:
// read-only memory, or rows that overlap.
void check_output(const Tensor& t, const char* name);

// ValueError unless `t` has this shape.
void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape);

const char* dtype_name(DType);

// torch.empty(*shape, dtype=...), called from here: Python's own way to it costs as much as torch's. One or
// two dimensions; not of 8 bits.
pybind11::object new_tensor(std::initializer_list<int64_t> shape, DType dtype);

// Raises a torch tensor's version counter, as a write by torch does. Nothing of a numpy array.
void count_write(PyObject* tensor);

// Registers the Python exception classes of mprec.errors for mprec's C++ errors.
void register_exceptions();

}  // namespace mprec::python
