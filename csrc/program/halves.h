// The bags of features with hot rows, each divided in two: IDs that have a row, by its number, and the
// others.
#pragma once
#include <cstdint>
#include <vector>

#include "program/stages.h"

namespace mprec {

class Halves {
 public:
  // Divides the bags of the stages' features. False if an ID is out of bounds.
  bool divide(const std::vector<HotStage>&, const Bags&, int threads);
  // Of int64 indices. Feature h is stage h's, and has one bag more than the batch, which is not to be read:
  // what lies between the IDs of two features.
  Bags hot() const { return view(rows_, row_offsets_); }
  Bags rest() const { return view(ids_, id_offsets_); }

 private:
  bool divide(const HotStage&, const Bags&, int64_t first_bag, int64_t first_entry);
  Bags view(const std::vector<int64_t>& indices, const std::vector<int64_t>& offsets) const;

  int64_t features_ = 0, bags_ = 0;  // of each
  std::vector<int64_t> rows_, row_offsets_, ids_, id_offsets_;
};

// Of samples [begin, begin + samples): adds the rest's sums to those of the hot rows, in place, and divides
// where the stage gives means.
void add_halves(const HotStage&, const Bags& batch, int64_t begin, int samples, int dim, const float* rest,
                int64_t rest_stride, float* hot, int64_t hot_stride);

}  // namespace mprec
