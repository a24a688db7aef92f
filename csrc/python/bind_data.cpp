// Logs in text become arrays. Python's lock is given away meanwhile, so that threads can share a file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "data/criteo.h"
#include "data/dictionary.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

Tensor output(py::handle object, const char* name, DType dtype, int ndim) {
  const Tensor t = view(object.ptr(), name, dtype, ndim);
  check_output(t, name);
  return t;
}

void check_shape(const Tensor& t, const char* name, int axis, int64_t expected) {
  if (t.shape[axis] != expected)
    throw py::value_error(
        message(name, ": expected shape[", axis, "] to be ", expected, ", got ", t.shape[axis]));
}

py::tuple read_criteo_text(py::handle text, py::handle labels, py::handle dense, py::handle categories,
                           py::handle missing) {
  const Tensor bytes = view(text.ptr(), "text", DType::u8, 1);
  const Tensor out_labels = output(labels, "labels", DType::f32, 1),
               out_dense = output(dense, "dense", DType::f32, 2),
               out_categories = output(categories, "categories", DType::i32, 2),
               out_missing = output(missing, "missing", DType::i32, 1);
  const std::string_view whole(bytes.ptr<char>(), bytes.shape[0]);
  const auto lines = static_cast<int64_t>(std::count(whole.begin(), whole.end(), '\n'));
  const CriteoRows rows{out_labels.shape[0], out_labels.ptr<float>(), out_dense.ptr<float>(),
                        out_categories.ptr<uint32_t>(), out_missing.ptr<uint32_t>()};
  if (rows.capacity < lines)
    throw py::value_error(message("labels: expected room for ", lines, " lines, got ", rows.capacity));
  check_shape(out_dense, "dense", 0, rows.capacity);
  check_shape(out_dense, "dense", 1, criteo_integers);
  check_shape(out_categories, "categories", 0, criteo_categories);
  check_shape(out_categories, "categories", 1, rows.capacity);
  check_shape(out_missing, "missing", 0, rows.capacity);
  int64_t found = 0, good;
  std::vector<BadLine> bad;
  {
    const py::gil_scoped_release unlocked;
    good = read_criteo(whole, rows, found, bad);
  }
  py::list told;
  for (const BadLine& each : bad) told.append(py::make_tuple(each.line, each.begin, each.end));
  return py::make_tuple(good, found, told);
}

int64_t distinct_values(py::handle values, py::handle missing, int bit, int64_t counted, py::list results) {
  const Tensor column = output(values, "values", DType::i32, 1);
  const uint32_t* masks = nullptr;
  if (!missing.is_none()) {
    const Tensor mask = view(missing.ptr(), "missing", DType::i32, 1);
    check_shape(mask, "missing", 0, column.shape[0]);
    masks = mask.ptr<uint32_t>();
  }
  if (bit < 0 || bit > 31) throw py::value_error(message("bit: expected 0 to 31, got ", bit));
  std::vector<int64_t> distinct, counts;
  {
    const py::gil_scoped_release unlocked;
    encode_values(column.ptr<uint32_t>(), masks, bit, column.shape[0], counted, distinct, counts);
  }
  for (const auto* each : {&distinct, &counts})
    results.append(py::bytes(reinterpret_cast<const char*>(each->data()), each->size() * sizeof(int64_t)));
  return static_cast<int64_t>(distinct.size());
}

uint64_t checksum_of(py::handle data) {
  const Tensor bytes = view(data.ptr(), "data", DType::u8, 1);
  const py::gil_scoped_release unlocked;
  return checksum(bytes.data, bytes.shape[0]);
}

}  // namespace

void bind_data(py::module_& m) {
  m.def("read_criteo", &read_criteo_text, py::arg("text"), py::arg("labels"), py::arg("dense"),
        py::arg("categories"), py::arg("missing"),
        "(good lines, lines, [(line, begin, end) of bad ones]) of uint8 text of whole lines in Criteo's "
        "format;\n"
        "the good ones fill labels float32 [n], dense float32 [n, 13], categories int32 [26, n] (bits of "
        "uint32)\nand missing int32 [n] (bit c: category c), where n is at least the number of lines.");
  m.def(
      "encode_values", &distinct_values, py::arg("values"), py::arg("missing"), py::arg("bit"),
      py::arg("counted"), py::arg("results"),
      "Replaces values int32 [n] (bits of uint32) by codes in the order of first occurrence; returns how "
      "many\nthere are. Appends to results the bytes of int64 values by code (-1 where bit `bit` of missing "
      "int32 [n] is\nset; None: nowhere) and of their int64 counts in the first `counted` rows.");
  m.def("checksum", &checksum_of, py::arg("data"), "64 bits that change with the bytes of data uint8 [n].");
}

}  // namespace mprec::python
