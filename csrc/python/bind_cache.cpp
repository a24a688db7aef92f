#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bags/check.h"
#include "cache/cached_dhe.h"
#include "cache/row_cache.h"
#include "common/distinct.h"
#include "common/error.h"
#include "dhe/decoder.h"
#include "python/bags.h"
#include "python/cached_decoders.h"
#include "python/output.h"
#include "python/tables.h"
#include "python/tensor.h"
#include "python/weight_watch.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// Below so many rows a call is over sooner than another thread could make use of the GIL.
constexpr int64_t release_gil_rows = 512;

// int64, one-dimensional, within the bound; below 0: none negative.
Tensor ids_view(const py::object& object, int64_t bound = -1) {
  const Tensor t = view(object.ptr(), "ids", DType::i64, 1);
  check_ids({t.data, t.shape[0], true}, bound, "ids");
  return t;
}

// Room for at least n int64, to be written.
int64_t* scratch(const py::object& object, const char* name, int64_t n) {
  const Tensor t = view(object.ptr(), name, DType::i64, 1);
  if (t.shape[0] < n) throw py::value_error(message(name, ": expected room for ", n, ", got ", t.shape[0]));
  check_output(t, name);
  return t.ptr<int64_t>();
}

py::tuple lookup(RowCache& cache, const py::object& ids, uint32_t generation, const py::object& out,
                 const py::object& positions, const py::object& distinct_ids, const py::object& inverse) {
  const Tensor i = ids_view(ids);
  const int64_t n = i.shape[0];
  const Tensor o = float_matrix(out.ptr(), "out", n, cache.dim());
  check_output(o, "out");
  int64_t* const p = scratch(positions, "positions", n);
  int64_t* const d = scratch(distinct_ids, "distinct_ids", n);
  int64_t* const v = scratch(inverse, "inverse", n);
  const auto [missing, different] = without_gil(n >= release_gil_rows, [&] {
    const int64_t missing = cache.lookup(i.ptr<int64_t>(), n, generation, o.ptr<float>(), o.strides[0], p);
    const int64_t different =
        find_distinct(missing, -1, [&](int64_t j) { return i.ptr<int64_t>()[p[j]]; }, d, v);
    return std::pair(missing, different);
  });
  return py::make_tuple(missing, different);
}

using Store = int64_t (RowCache::*)(const int64_t*, int64_t, uint32_t, const float*, int64_t);

template <Store store>
int64_t store_rows(RowCache& cache, const py::object& ids, const py::object& rows, uint32_t generation) {
  const Tensor i = ids_view(ids);
  const int64_t n = i.shape[0];
  const Tensor r = float_matrix(rows.ptr(), "rows", n, cache.dim());
  return without_gil(n >= release_gil_rows, [&] {
    return (cache.*store)(i.ptr<int64_t>(), n, generation, r.ptr<float>(), r.strides[0]);
  });
}

int64_t held_ids(const RowCache& cache, const py::object& out) {
  const Tensor o = view(out.ptr(), "out", DType::i64, 1);
  check_output(o, "out");
  return without_gil(true, [&] { return cache.ids(cache.generation(), o.ptr<int64_t>(), o.shape[0]); });
}

py::dict stats(const RowCache& cache) {
  const RowCacheStats s = cache.stats();
  py::dict d;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  d["admissions"] = s.admissions;
  d["evictions"] = s.evictions;
  d["rejections"] = s.rejections;
  return d;
}

void rows_by_code(const py::object& codes, const py::object& centroids, const py::object& ids,
                  const py::object& out) {
  const CodebookView book = codebook_view(codes, centroids);
  const Tensor i = ids_view(ids, book.count);
  const int64_t n = i.shape[0];
  const Tensor o = float_matrix(out.ptr(), "out", n, book.dim);
  check_output(o, "out");
  without_gil(n >= release_gil_rows,
              [&] { codebook_rows(book, i.ptr<int64_t>(), nullptr, n, o.ptr<float>(), o.strides[0]); });
}

constexpr Signature<11> cached{"cached_dhe_bag",
                               {"decoders", "indices", "offsets", "per_sample_weights", "mode",
                                "include_last_offset", "padding_idx", "bound", "out", "admit", "threads"}};

py::object cached_dhe_bag(const Arguments<11>& a) {
  auto& decoders = instance<CachedDecoders>(a[0], "decoders", "CachedDecoders");
  Bags bags = read_bags(a[1], a[2]);
  set_features(bags, decoders.num_features(), flag(a[5]));
  if (decoders.stale(bags.indices.size / bags.num_features)) return py::bool_(false);
  set_pooling(bags, a[4], a[3], bags.num_features == 1 ? a[6] : Py_None);
  const int64_t largest = largest_id(a[7]);
  const bool admit = flag(a[9]);
  const int threads = checked_threads(a[10]);
  if (a[8] == Py_None && decoders.leaves_gaps())
    throw py::value_error("out: expected a tensor, as the features' columns do not fill a new one");
  const Output out(a[8], bags.batch, decoders.columns(), DType::f32);
  const DheRequest request{bags, out.float32(), out.stride(), largest};
  out.check_apart_from(bags);
  columns_within(0, decoders.columns(), out.width(), "out");
  without_gil(true, [&] { decoders.forward(request, admit, threads); });
  return out.written();
}

PyMethodDef methods[] = {
    method<cached, cached_dhe_bag, false>(
        "cached_dhe_bag",
        "cached_dhe_bag(decoders, indices, offsets, per_sample_weights, mode, include_last_offset, "
        "padding_idx, bound, out, admit, threads)\n\nThe features' pooled vectors in their columns of out "
        "[B, total] (None: a new tensor), which is returned; False, with nothing done, if the watched "
        "weights have changed; None for tensors in a form that this does not take. bound: refuse IDs not "
        "below this (None: any)."),
    {}};

}  // namespace

void bind_cache(py::module_& m) {
  py::class_<RowCache>(m, "RowCache", "Rows of floats by ID, in a fixed number of bytes; for many threads.")
      .def(py::init<int64_t, int64_t>(), py::arg("dim"), py::arg("nbytes"))
      .def_static("bytes_for", &RowCache::bytes_for, py::arg("dim"), py::arg("rows"))
      .def_property_readonly("dim", &RowCache::dim)
      .def_property_readonly("capacity", &RowCache::capacity)
      .def_property_readonly("nbytes", &RowCache::nbytes)
      .def_property_readonly("generation", &RowCache::generation)
      .def("__len__", &RowCache::size)
      .def("invalidate", &RowCache::invalidate)
      .def("lookup", &lookup, py::arg("ids"), py::arg("generation"), py::arg("out"), py::arg("positions"),
           py::arg("distinct_ids"), py::arg("inverse"),
           "Copies the rows of hits into out [n, dim]; returns (m, d): positions[:m] are the misses, "
           "distinct_ids[:d] their distinct IDs, and ids[positions[i]] is distinct_ids[inverse[i]].")
      .def("admit", &store_rows<&RowCache::admit>, py::arg("ids"), py::arg("rows"), py::arg("generation"),
           "Offers rows [n, dim]; returns how many were stored.")
      .def("fill", &store_rows<&RowCache::fill>, py::arg("ids"), py::arg("rows"), py::arg("generation"),
           "Stores rows [n, dim] of the hottest IDs, hottest first, while there is room; returns how many.")
      .def("ids", &held_ids, py::arg("out"),
           "Writes the IDs held to out, as many as fit; returns their number.")
      .def("stats", &stats)
      .def("reset_stats", &RowCache::reset_stats);
  m.def("codebook_rows", &rows_by_code, py::arg("codes"), py::arg("centroids"), py::arg("ids"),
        py::arg("out"), "The rows of n IDs, each the sum of one centroid per stage, into out [n, dim].");
  py::class_<CachedDecoders>(m, "CachedDecoders",
                             "Decoders of a batch's features with row caches before them.")
      .def(
          py::init<const py::list&, const py::list&, const std::vector<int64_t>&, const std::vector<int64_t>&,
                   int64_t, const WeightWatch*, const std::optional<py::list>&>(),
          py::arg("decoders"), py::arg("caches"), py::arg("positions"), py::arg("columns"),
          py::arg("num_features"), py::arg("watch") = py::none(), py::arg("codebooks") = py::none(),
          py::keep_alive<1, 7>())
      .def("stale", &CachedDecoders::stale, py::arg("ids"), "Whether the watched weights have changed.")
      .def("stats", &CachedDecoders::stats);
  add_methods(m, methods);
}

}  // namespace mprec::python
