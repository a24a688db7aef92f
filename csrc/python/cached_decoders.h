// Decoders with row caches before them, as Python holds them: for a call of their own, or as a stage of a
// whole path.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cache/cached_dhe.h"
#include "cache/row_cache.h"
#include "common/error.h"
#include "dhe/decoder.h"
#include "python/output.h"
#include "python/tensor.h"
#include "python/weight_watch.h"

namespace mprec::python {

// codes uint8 [count, stages] and centroids float32 [256 * stages, dim].
inline CodebookView codebook_view(pybind11::handle codes, pybind11::handle centroids) {
  const Tensor c = view(codes.ptr(), "codes", DType::u8, 2),
               r = view(centroids.ptr(), "centroids", DType::f32, 2);
  if (c.shape[1] < 1 || c.shape[1] > 8)
    throw pybind11::value_error(message("codes: expected 1 to 8 stages, got ", c.shape[1]));
  if (r.shape[0] != 256 * c.shape[1])
    throw pybind11::value_error(message("centroids: expected ", 256 * c.shape[1], " rows, got ", r.shape[0]));
  return {c.ptr<uint8_t>(), c.shape[0], static_cast<int>(c.shape[1]), r.ptr<float>(), r.shape[1]};
}

// Decoders of some features of a batch, each with a cache or none. The caches' generations are those of the
// moment when this was made: rows of these decoders are never mixed with those of others.
class CachedDecoders {
 public:
  CachedDecoders(const pybind11::list& decoders, const pybind11::list& caches,
                 const std::vector<int64_t>& positions, const std::vector<int64_t>& columns,
                 int64_t num_features, const WeightWatch* watch,
                 const std::optional<pybind11::list>& codebooks)
      : num_features_(num_features), watch_(watch) {
    const size_t count = decoders.size();
    if (count == 0) throw pybind11::value_error("decoders: expected at least one");
    if (caches.size() != count || positions.size() != count || columns.size() != count)
      throw pybind11::value_error(message("caches, positions, columns: expected one for each of ", count,
                                          " decoders, got ", caches.size(), ", ", positions.size(), ", ",
                                          columns.size()));
    if (codebooks && codebooks->size() != count)
      throw pybind11::value_error(message("codebooks: expected ", count, ", got ", codebooks->size()));
    std::vector<Columns> blocks;
    for (size_t t = 0; t < count; ++t) {
      const Decoder& decoder = pybind11::cast<const Decoder&>(decoders[t]);
      RowCache* cache = caches[t].is_none() ? nullptr : &pybind11::cast<RowCache&>(caches[t]);
      if (cache && cache->dim() != decoder.view().dim)
        throw pybind11::value_error(message("caches[", t, "]: has rows of ", cache->dim(), ", but decoders[",
                                            t, "] makes ", decoder.view().dim));
      if (positions[t] < (t ? positions[t - 1] + 1 : 0) || positions[t] >= num_features)
        throw pybind11::value_error(message("positions[", t, "] is ", positions[t],
                                            ", expected rising numbers from 0 to ", num_features - 1));
      blocks.push_back(
          columns_within(columns[t], decoder.view().dim, INT64_MAX, message("columns[", t, "]")));
      CodebookView book{};
      if (codebooks && !(*codebooks)[t].is_none()) {
        const auto parts = pybind11::cast<std::pair<pybind11::object, pybind11::object>>((*codebooks)[t]);
        book = codebook_view(parts.first, parts.second);
        if (book.dim != decoder.view().dim)
          throw pybind11::value_error(message("codebooks[", t, "]: has rows of ", book.dim, ", but decoders[",
                                              t, "] makes ", decoder.view().dim));
        owned_.push_back(parts.first);
        owned_.push_back(parts.second);
      }
      features_.push_back(
          {decoder.view(), cache, cache ? cache->generation() : 0, positions[t], columns[t], book});
      owned_.push_back(pybind11::reinterpret_borrow<pybind11::object>(decoders[t]));
      owned_.push_back(pybind11::reinterpret_borrow<pybind11::object>(caches[t]));
      columns_ = std::max(columns_, blocks.back().second);
    }
    int64_t used = 0;
    for (const Columns& c : blocks) used += c.second - c.first;
    gaps_ = used != columns_;
    check_apart(std::move(blocks), "columns");
  }

  bool stale(int64_t ids) const { return watch_ && watch_->changed(Share::before(ids)); }
  int64_t num_features() const { return num_features_; }
  int64_t columns() const { return columns_; }
  bool leaves_gaps() const { return gaps_; }

  void forward(const DheRequest& r, bool admit, int threads) {
    cached_dhe_bag_forward(r, features_, admit, threads, counters_);
  }
  const std::vector<CachedFeature>& features() const { return features_; }
  CachedDheCounters& counters() { return counters_; }

  pybind11::dict stats() const {
    pybind11::dict d;
    d["calls"] = counters_.calls.load();
    d["coded"] = counters_.coded.load();
    d["decoded"] = counters_.decoded.load();
    d["lookup_ns"] = counters_.lookup_ns.load();
    d["decode_ns"] = counters_.decode_ns.load();
    return d;
  }

 private:
  int64_t num_features_, columns_ = 0;
  bool gaps_;                 // columns between the features' own
  const WeightWatch* watch_;  // null: none; kept alive by pybind11
  std::vector<CachedFeature> features_;
  std::vector<pybind11::object> owned_;
  CachedDheCounters counters_;
};

}  // namespace mprec::python
