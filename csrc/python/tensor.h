// Views of torch tensors and numpy arrays, checked where they enter the native code.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
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
  bool contiguous() const;
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

// Any CPU torch tensor or numpy array of at most 4 dimensions. `name` is the argument's name, for errors.
// TypeError: neither of the two. ValueError: on another device, more dimensions, without memory (a resized
// storage), or elements that are not aligned.
Tensor view(PyObject* object, const char* name);

// As view(), and: exactly this dtype and number of dimensions, contiguous.
Tensor view(PyObject* object, const char* name, DType dtype, int ndim);

// As view(), and: one-dimensional, contiguous, int32 or int64.
Tensor view_ids(PyObject* object, const char* name);

// ValueError if `t`, contiguous or a matrix of adjacent values in each row, cannot be written without harm:
// read-only memory, or rows that overlap.
void check_output(const Tensor& t, const char* name);

const char* dtype_name(DType);

// Registers the Python exception classes of mprec.errors for mprec's C++ errors.
void register_exceptions();

}  // namespace mprec::python
