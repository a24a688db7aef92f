#include "python/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "common/error.h"
#include "python/dlpack.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

DType from_dlpack(dlpack::DataType t) {
  if (t.lanes != 1) return DType::other;
  switch (t.code << 8 | t.bits) {
    case dlpack::float_code << 8 | 32: return DType::f32;
    case dlpack::float_code << 8 | 16: return DType::f16;
    case dlpack::float_code << 8 | 64: return DType::f64;
    case dlpack::bfloat_code << 8 | 16: return DType::bf16;
    case dlpack::int_code << 8 | 64: return DType::i64;
    case dlpack::int_code << 8 | 32: return DType::i32;
    case dlpack::int_code << 8 | 8: return DType::i8;
    case dlpack::uint_code << 8 | 8: return DType::u8;
    default: return DType::other;
  }
}

DType from_buffer(const char* format, Py_ssize_t itemsize) {
  const char kind = format ? format[format[0] == '<' || format[0] == '=' || format[0] == '@'] : 'B';
  switch (kind) {
    case 'f': return DType::f32;
    case 'e': return DType::f16;
    case 'd': return DType::f64;
    case 'i':
    case 'l':
    case 'q': return itemsize == 8 ? DType::i64 : itemsize == 4 ? DType::i32 : DType::other;
    case 'b': return DType::i8;
    case 'B': return DType::u8;
    default: return DType::other;
  }
}

// The exchange API of `type`, remembered for the last type seen (torch.Tensor, in practice; Parameter is
// another type with the same API). Guarded by the GIL.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* known_types[2] = {nullptr, nullptr};
  static const dlpack::ExchangeApi* known_apis[2] = {nullptr, nullptr};
  for (int i = 0; i < 2; ++i)
    if (known_types[i] == type) return known_apis[i];
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  while (api && api->version.major != 1) api = api->previous;
  if (!api) {
    PyErr_Clear();
    return nullptr;
  }
  static int next = 0;
  Py_INCREF(type);
  Py_XDECREF(known_types[next]);
  known_types[next] = type;
  known_apis[next] = api;
  next ^= 1;
  return api;
}

dlpack::Tensor described(const dlpack::ExchangeApi& api, PyObject* tensor, const char* name,
                         const char* expected) {
  dlpack::Tensor d;
  try {  // torch throws through this C function what it cannot describe: meta or sparse tensors
    if (api.tensor_from_object(tensor, &d) != 0) throw py::error_already_set();
  } catch (const std::exception& error) {
    const std::string why = error.what();
    throw NotTaken(NotTaken::value, message(name, ": expected ", expected, " with plain storage (",
                                            why.substr(0, why.find('\n')), ")"));
  }
  return d;
}

void check_ndim(int ndim, const char* name) {
  if (ndim > Tensor::max_ndim)
    throw NotTaken(NotTaken::value,
                   message(name, ": expected at most ", Tensor::max_ndim, " dimensions, got ", ndim));
}

void check_memory(const Tensor& t, int64_t item_bytes, const char* name) {
  if (!t.data && t.numel() > 0)
    throw NotTaken(NotTaken::value, message(name, ": the tensor's storage is empty"));
  if (item_bytes > 0 && reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(item_bytes) != 0)
    throw NotTaken(NotTaken::value,
                   message(name, ": expected elements aligned to their ", item_bytes, " bytes"));
}

// The method itself: looking it up by name costs as much as what it does.
bool is_negation(PyObject* tensor) {
  static PyObject* const method =
      py::object(py::module_::import("torch").attr("Tensor").attr("is_neg")).release().ptr();
  const auto answer = py::reinterpret_steal<py::object>(PyObject_Vectorcall(method, &tensor, 1, nullptr));
  if (!answer) throw py::error_already_set();
  return answer.is(py::handle(Py_True));
}

// As is_negation(), remembering which tensors are none: tables are asked about at each call. An entry is
// dropped when its tensor dies. Guarded by the GIL.
bool is_known_negation(PyObject* tensor, const void* data) {
  struct Entry {
    PyObject* tensor;  // not owned
    const void* data;
    PyObject* weak;  // whose callback empties the entry
  };
  static constexpr uintptr_t size = 1024;
  static Entry known[size] = {};
  static PyMethodDef forget = {"forget",
                               [](PyObject*, PyObject* weak) -> PyObject* {
                                 for (Entry& e : known)
                                   if (e.weak == weak) {
                                     e = {nullptr, nullptr, nullptr};
                                     Py_DECREF(weak);
                                     break;
                                   }
                                 Py_RETURN_NONE;
                               },
                               METH_O, nullptr};
  static PyObject* const callback = PyCFunction_New(&forget, nullptr);
  Entry& e = known[(reinterpret_cast<uintptr_t>(tensor) >> 4) * 0x9E3779B1u % size];
  if (e.tensor == tensor && e.data == data) return false;
  if (is_negation(tensor)) return true;
  PyObject* const weak = PyWeakref_NewRef(tensor, callback);
  if (!weak) throw py::error_already_set();
  Py_XDECREF(e.weak);
  e = {tensor, data, weak};
  return false;
}

void set_contiguous_strides(Tensor& t) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.strides[i] = stride;
    stride *= t.shape[i];
  }
}

}  // namespace

int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

int64_t Tensor::item_bytes() const {
  static constexpr int64_t bytes[] = {4, 2, 2, 8, 8, 4, 1, 1, 1};
  return bytes[static_cast<int>(dtype)];
}

bool Tensor::contiguous() const {
  if (numel() == 0) return true;
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

const char* dtype_name(DType dtype) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "float64",      "int64",
                                      "int32",   "int8",    "uint8",    "another dtype"};
  return names[static_cast<int>(dtype)];
}

std::optional<Layout> layout(PyObject* object) {
  const auto* api = exchange_api(Py_TYPE(object));
  if (!api) return std::nullopt;
  const dlpack::Tensor d = described(*api, object, "places", "a tensor");
  if (d.ndim > Layout::max_ndim)
    throw NotTaken(NotTaken::value,
                   message("places: expected at most ", Layout::max_ndim, " dimensions, got ", d.ndim));
  Layout found{};
  found.data = static_cast<const char*>(d.data) + d.byte_offset;
  found.device_type = d.device.type;
  found.device_id = d.device.id;
  found.dtype =
      static_cast<uint32_t>(d.dtype.code) << 24 | static_cast<uint32_t>(d.dtype.bits) << 16 | d.dtype.lanes;
  found.ndim = d.ndim;
  std::copy_n(d.shape, d.ndim, found.shape.begin());
  if (d.strides) std::copy_n(d.strides, d.ndim, found.strides.begin());
  return found;
}

Tensor view(PyObject* object, const char* name, Sign sign) {
  Tensor t;
  if (const auto* api = exchange_api(Py_TYPE(object))) {
    const dlpack::Tensor d = described(*api, object, name, "a CPU tensor");
    if (d.device.type != dlpack::cpu_device && d.device.type != dlpack::cuda_host_device)
      throw NotTaken(NotTaken::value,
                     message(name, ": expected a CPU tensor, got one on DLPack device type ", d.device.type));
    check_ndim(d.ndim, name);
    t.data = static_cast<char*>(d.data) + d.byte_offset;
    t.dtype = from_dlpack(d.dtype);
    t.ndim = d.ndim;
    t.writable = true;
    for (int i = 0; i < d.ndim; ++i) t.shape[i] = d.shape[i];
    if (d.strides)
      for (int i = 0; i < d.ndim; ++i) t.strides[i] = d.strides[i];
    else
      set_contiguous_strides(t);
    check_memory(t, t.dtype == DType::other ? 1 : d.dtype.bits / 8, name);
    if (sign != Sign::ignore && (sign == Sign::ask ? is_negation(object) : is_known_negation(object, t.data)))
      throw NotTaken(NotTaken::value, message(name, ": expected a tensor without the negative bit"));
    return t;
  }
  Py_buffer buffer;
  if (!PyObject_CheckBuffer(object) ||
      PyObject_GetBuffer(object, &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    throw NotTaken(NotTaken::type, message(name, ": expected a torch tensor or a numpy array, got ",
                                           Py_TYPE(object)->tp_name));
  }
  t.data = buffer.buf;
  t.dtype = from_buffer(buffer.format, buffer.itemsize);
  t.ndim = buffer.ndim;
  t.writable = !buffer.readonly;
  const Py_ssize_t item = buffer.itemsize;
  bool whole_strides = true;
  for (int i = 0; i < t.ndim && i < Tensor::max_ndim; ++i) {
    t.shape[i] = buffer.shape[i];
    t.strides[i] = item ? buffer.strides[i] / item : 0;
    whole_strides &= t.shape[i] <= 1 || t.strides[i] * item == buffer.strides[i];
  }
  PyBuffer_Release(&buffer);  // the array itself keeps the memory, and the caller keeps the array
  check_ndim(t.ndim, name);
  if (!whole_strides) throw NotTaken(NotTaken::value, message(name, ": expected strides of whole elements"));
  check_memory(t, t.dtype == DType::other ? 1 : item, name);
  return t;
}

bool is_at(PyObject* tensor, const Tensor& before) {
  const auto* api = exchange_api(Py_TYPE(tensor));
  if (!api) return false;
  dlpack::Tensor d;
  try {
    d = described(*api, tensor, "weights", "a CPU tensor");
  } catch (const NotTaken&) {  // it has no plain storage any more
    return false;
  }
  if (static_cast<char*>(d.data) + d.byte_offset != before.data || d.ndim != before.ndim ||
      (d.device.type != dlpack::cpu_device && d.device.type != dlpack::cuda_host_device) ||
      from_dlpack(d.dtype) != before.dtype)
    return false;
  for (int i = 0; i < d.ndim; ++i)
    if (d.shape[i] != before.shape[i] || (d.strides && d.strides[i] != before.strides[i])) return false;
  return true;
}

Tensor view(PyObject* object, const char* name, DType dtype, int ndim) {
  Tensor t = view(object, name);
  if (t.dtype != dtype)
    throw NotTaken(NotTaken::type,
                   message(name, ": expected ", dtype_name(dtype), ", got ", dtype_name(t.dtype)));
  if (t.ndim != ndim)
    throw NotTaken(NotTaken::value, message(name, ": expected ", ndim, " dimension(s), got ", t.ndim));
  if (!t.contiguous()) throw NotTaken(NotTaken::value, message(name, ": expected a contiguous tensor"));
  return t;
}

Tensor view_ids(PyObject* object, const char* name) {
  Tensor t = view(object, name);
  if (t.dtype != DType::i64 && t.dtype != DType::i32)
    throw NotTaken(NotTaken::type, message(name, ": expected int32 or int64, got ", dtype_name(t.dtype)));
  if (t.ndim != 1) throw NotTaken(NotTaken::value, message(name, ": expected 1 dimension, got ", t.ndim));
  if (!t.contiguous()) throw NotTaken(NotTaken::value, message(name, ": expected a contiguous tensor"));
  return t;
}

Extent::Extent(const Tensor& t) {
  int64_t low = 0, high = t.numel() > 0 ? 1 : 0;  // in elements
  for (int i = 0; high && i < t.ndim; ++i) (t.strides[i] < 0 ? low : high) += (t.shape[i] - 1) * t.strides[i];
  const auto at = reinterpret_cast<uintptr_t>(t.data);
  begin = at + low * t.item_bytes();
  end = at + high * t.item_bytes();
}

void check_output(const Tensor& t, const char* name) {
  if (!t.writable) throw NotTaken(NotTaken::value, message(name, ": the array is read-only"));
  if (t.ndim == 2 && t.shape[0] > 1 && std::abs(t.strides[0]) < t.shape[1])
    throw NotTaken(NotTaken::value, message(name, ": rows of ", t.shape[1], " values overlap, ", t.strides[0],
                                            " values from one to the next"));
}

void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  if (t.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), t.shape)) return;
  const auto list = [](const int64_t* begin, const int64_t* end) {
    std::string text;
    for (const int64_t* size = begin; size != end; ++size)
      text += (size == begin ? "" : ", ") + std::to_string(*size);
    return "[" + text + "]";
  };
  throw py::value_error(message(name, ": expected shape ", list(shape.begin(), shape.end()), ", got ",
                                list(t.shape, t.shape + t.ndim)));
}

py::object new_tensor(std::initializer_list<int64_t> shape, DType dtype) {
  // Never let go of: modules are gone by the time that static objects are.
  static const auto torch = py::module_::import("torch").release();
  static PyObject* const empty = py::object(torch.attr("empty")).release().ptr();
  static PyObject* const keywords = py::make_tuple("dtype").release().ptr();
  static PyObject* const dtypes[] = {
      py::object(torch.attr("float32")).release().ptr(),  py::object(torch.attr("float16")).release().ptr(),
      py::object(torch.attr("bfloat16")).release().ptr(), py::object(torch.attr("float64")).release().ptr(),
      py::object(torch.attr("int64")).release().ptr(),    py::object(torch.attr("int32")).release().ptr()};
  py::int_ sizes[2];
  PyObject* arguments[3];
  size_t count = 0;
  for (const int64_t size : shape) {
    sizes[count] = py::int_(size);
    arguments[count] = sizes[count].ptr();
    ++count;
  }
  arguments[count] = dtypes[static_cast<int>(dtype)];
  const auto make = [&](PyObject* names) {
    auto made = py::reinterpret_steal<py::object>(PyObject_Vectorcall(empty, arguments, count, names));
    if (!made) throw py::error_already_set();
    return made;
  };
  if (dtype == DType::f32) {  // to name the usual default costs 0.2 microseconds
    auto made = make(nullptr);
    if (view(made.ptr(), "out", Sign::ignore).dtype == dtype) return made;
  }
  return make(keywords);
}

void count_write(PyObject* tensor) {
  static PyObject* const increment =
      py::object(py::module_::import("torch").attr("_C").attr("_increment_version")).release().ptr();
  if (!exchange_api(Py_TYPE(tensor))) return;
  const auto list = py::make_tuple(py::handle(tensor));
  PyObject* const arguments[] = {list.ptr()};
  const auto done = py::reinterpret_steal<py::object>(PyObject_Vectorcall(increment, arguments, 1, nullptr));
  if (!done) PyErr_Clear();  // made in inference mode: it has no counter
}

void register_exceptions() {
  // Defined in mprec/errors.py, which needs nothing native. Kept for the life of the process.
  static PyObject *id_error, *offsets_error;
  const auto errors = py::module_::import("mprec.errors");
  id_error = py::object(errors.attr("IdOutOfRangeError")).release().ptr();
  offsets_error = py::object(errors.attr("InvalidOffsetsError")).release().ptr();
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const IdError& e) {
      PyErr_SetString(id_error, e.what());
    } catch (const OffsetsError& e) {
      PyErr_SetString(offsets_error, e.what());
    } catch (const NotTaken& e) {
      PyErr_SetString(e.kind == NotTaken::type ? PyExc_TypeError : PyExc_ValueError, e.what());
    }
  });
}

}  // namespace mprec::python
