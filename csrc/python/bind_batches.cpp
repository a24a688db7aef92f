// Feature-major batches joined and cut. The bags of a feature lie together in them, so that neither is a
// plain concatenation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "common/error.h"
#include "python/make_tensor.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// Integers of either width.
class Numbers {
 public:
  Numbers(py::handle object, const char* name) : tensor_(view_ids(object.ptr(), name)) {}
  int64_t size() const { return tensor_.shape[0]; }
  bool wide() const { return tensor_.dtype == DType::i64; }
  int64_t operator[](int64_t i) const {
    return wide() ? tensor_.ptr<int64_t>()[i] : tensor_.ptr<int32_t>()[i];
  }
  // Copies [begin, end) to `out`, which is of the same width or wider.
  template <class Out>
  void copy(int64_t begin, int64_t end, Out* out) const {
    if (wide())
      std::copy(tensor_.ptr<int64_t>() + begin, tensor_.ptr<int64_t>() + end, out);
    else
      std::copy(tensor_.ptr<int32_t>() + begin, tensor_.ptr<int32_t>() + end, out);
  }

 private:
  Tensor tensor_;
};

// Samples `start` to `stop` of a batch of `samples`.
struct Part {
  Numbers indices, offsets;
  int64_t samples, start, stop;

  int64_t bag(int64_t feature, int64_t sample) const { return feature * samples + sample; }
  int64_t begin(int64_t feature) const { return offsets[bag(feature, start)]; }
  int64_t end(int64_t feature) const { return offsets[bag(feature, stop)]; }
};

template <class Id, class Offset>
void fill(const std::vector<Part>& parts, int64_t features, Id* ids, Offset* offsets) {
  int64_t total = 0;
  for (int64_t t = 0; t < features; ++t)
    for (const Part& p : parts) {
      const int64_t begin = p.begin(t);
      for (int64_t b = p.start; b < p.stop; ++b)
        *offsets++ = static_cast<Offset>(p.offsets[p.bag(t, b)] - begin + total);
      p.indices.copy(begin, p.end(t), ids + total);
      total += p.end(t) - begin;
    }
  *offsets = static_cast<Offset>(total);
}

py::tuple join_bags(const py::list& indices, const py::list& offsets, const std::vector<int64_t>& samples,
                    const std::vector<int64_t>& starts, const std::vector<int64_t>& stops, int64_t features) {
  const size_t count = indices.size();
  if (!count || offsets.size() != count || samples.size() != count || starts.size() != count ||
      stops.size() != count)
    throw py::value_error("indices, offsets, samples, starts, stops: expected equally many, at least one");
  if (features < 1) throw py::value_error(message("features: expected at least 1, got ", features));
  std::vector<Part> parts;
  bool wide_ids = false, wide_offsets = false;
  int64_t ids = 0, total = 0;
  for (size_t i = 0; i < count; ++i) {
    const Part p{{indices[i], "indices"}, {offsets[i], "offsets"}, samples[i], starts[i], stops[i]};
    if (p.samples < 0 || p.offsets.size() != features * p.samples + 1)
      throw OffsetsError(message("offsets: expected ", features, " features of ", p.samples,
                                 " samples each, so ", features * p.samples + 1, ", got ", p.offsets.size()));
    if (p.start < 0 || p.start > p.stop || p.stop > p.samples)
      throw py::value_error(message("starts, stops: expected samples within 0 to ", p.samples, ", got ",
                                    p.start, " to ", p.stop));
    for (int64_t t = 0; t < features; ++t) {
      const int64_t begin = p.begin(t), end = p.end(t);
      if (begin < 0 || end < begin || end > p.indices.size())
        throw OffsetsError(message("offsets of feature ", t,
                                   ": expected to rise from 0 to the number of indices, ", p.indices.size(),
                                   ", got ", begin, " to ", end));
      ids += end - begin;
    }
    total += p.stop - p.start;
    wide_ids |= p.indices.wide();
    wide_offsets |= p.offsets.wide();
    parts.push_back(p);
  }
  const auto dtype = [](bool wide) { return wide ? DType::i64 : DType::i32; };
  const py::object out_ids = make_tensor(ids, dtype(wide_ids));
  const py::object out_offsets = make_tensor(features * total + 1, dtype(wide_offsets));
  const Tensor to = view_ids(out_ids.ptr(), "indices"), ends = view_ids(out_offsets.ptr(), "offsets");
  const auto write = [&](auto* id) {
    if (wide_offsets)
      fill(parts, features, id, ends.ptr<int64_t>());
    else
      fill(parts, features, id, ends.ptr<int32_t>());
  };
  if (wide_ids)
    write(to.ptr<int64_t>());
  else
    write(to.ptr<int32_t>());
  return py::make_tuple(out_ids, out_offsets);
}

}  // namespace

void bind_batches(py::module_& m) {
  m.def("join_bags", &join_bags, py::arg("indices"), py::arg("offsets"), py::arg("samples"),
        py::arg("starts"), py::arg("stops"), py::arg("features"),
        "(indices, offsets) of samples starts[i] to stops[i] of feature-major batch i, of all batches in "
        "order.\n"
        "int32 where all of them are, int64 otherwise.");
}

}  // namespace mprec::python
