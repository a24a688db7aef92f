// Tensors and strings as torch's stable ABI passes them, checked. What is wrong is said as mprec says it in
// Python.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"

namespace mprec::stable {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What an error calls an argument: "indices", "weights[2]", "decoder 1: biases[0]". A text only when it is
// needed.
struct Name {
  const char* word;
  int64_t item = -1, decoder = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  if (name.decoder >= 0) out << "decoder " << name.decoder << ": ";
  out << name.word;
  if (name.item >= 0) out << '[' << name.item << ']';
  return out;
}

template <class... Parts>
std::invalid_argument refusal(const Parts&... parts) {
  return std::invalid_argument(message(parts...));
}

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    default: return std::string("torch's ") + torch::headeronly::toString(type);
  }
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// "[2, 3]"
inline std::string list(Sizes sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}
// "(2, 3)", "(2,)"
inline std::string tuple(Sizes sizes) {
  std::string text = list(sizes);
  text.front() = '(';
  text.back() = sizes.size() == 1 ? ',' : ')';
  return sizes.size() == 1 ? text + ")" : text;
}

// A tensor of numbers in memory, and what there is to know of it. Owns a reference to it.
struct View {
  Tensor tensor;
  ScalarType dtype;
  Sizes shape, strides;  // strides in elements
  const char* data;

  size_t ndim() const { return shape.size(); }
  int64_t item_bytes() const { return static_cast<int64_t>(tensor.element_size()); }
  template <class T>
  const T* ptr() const {
    return reinterpret_cast<const T*>(data);
  }
};

// Refuses a tensor without memory for its elements (a resized storage), or whose elements are not aligned.
inline View view(const Tensor& tensor, const Name& name) {
  View v{tensor, tensor.scalar_type(), tensor.sizes(), tensor.strides(), nullptr};
  v.data = static_cast<const char*>(tensor.const_data_ptr());
  int64_t last = tensor.storage_offset();
  for (size_t i = 0; i < v.ndim(); ++i) {
    if (v.shape[i] == 0) return v;
    last += (v.shape[i] - 1) * v.strides[i];
  }
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const int64_t item = v.item_bytes();
  if (!v.data || (last + 1) * item > bytes)
    throw refusal(name, ": expected memory for all elements, got a storage of ", bytes, " bytes");
  if (reinterpret_cast<uintptr_t>(v.data) % item != 0)
    throw refusal(name, ": expected elements aligned to their ", item, " bytes");
  return v;
}

// As view(), of a copy where the tensor is not contiguous.
inline View contiguous(const Tensor& tensor, const Name& name) {
  View v = view(tensor, name);
  return tensor.is_contiguous() ? v : view(torch::stable::contiguous(tensor), name);
}

inline void check_ndim(const View& v, const Name& name, size_t ndim) {
  if (v.ndim() != ndim)
    throw refusal(name, " has to be a ", ndim, "D Tensor, but got Tensor of dimension ", v.ndim());
}

inline void check_floats(const View& v, const Name& name) {
  if (!is_float(v.dtype))
    throw refusal(name, ": expected float32, float64, float16 or bfloat16, got ", dtype_name(v.dtype));
}

// Kernels of decoders and dense layers compute in float32. In Python, torch computes the rest.
inline void check_float32(const View& v, const Name& name) {
  if (v.dtype != ScalarType::Float)
    throw refusal(name, ": without Python only float32 is served, got ", dtype_name(v.dtype));
}

// A new tensor [rows, columns]. `data` may be written.
struct Matrix {
  Tensor tensor;
  char* data;
};

inline Matrix new_matrix(int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  return {tensor, static_cast<char*>(tensor.mutable_data_ptr())};
}

inline Matrix new_floats(int64_t rows, int64_t columns) {
  return new_matrix(rows, columns, aoti_torch_dtype_float32());
}

// torch's threads, of which kernels take no more than 1024.
inline int threads() {
  uint32_t count;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return static_cast<int>(std::clamp<uint32_t>(count, 1, 1024));
}

// The text of a string that torch hands over. (Its own conversion to std::string leaks one a call.)
inline std::string taken(StringHandle handle) {
  const char* data;
  size_t length;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// The place of `text` among the `count` names that name_of(i) gives; a refusal that lists them.
template <class NameOf>
int code(int count, const NameOf& name_of, const std::string& text, const Name& argument) {
  std::string choices;
  for (int i = 0; i < count; ++i) {
    if (text == name_of(i)) return i;
    choices += message(i ? ", '" : "'", name_of(i), "'");
  }
  throw refusal(argument, ": expected one of ", choices, ", got '", text, "'");
}

}  // namespace mprec::stable
