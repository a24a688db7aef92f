// The bags that tables or decoders pool: those of all features of a batch, or of the features that they name.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "bags/bags.h"
#include "bags/check.h"
#include "bags/select.h"

namespace mprec {

class ServedBags {
 public:
  // `features`: one of those of `whole` for each table or decoder; empty: all, in order. Where they are
  // others, offsets of the whole batch are checked (OffsetsError), and the thread's last ServedBags is
  // overwritten.
  ServedBags(const Bags& whole, std::vector<int64_t> features)
      : whole_(whole), bags_(whole), features_(std::move(features)) {
    bool as_they_are = static_cast<int64_t>(features_.size()) == whole.num_features;
    for (size_t t = 0; t < features_.size(); ++t) as_they_are &= features_[t] == static_cast<int64_t>(t);
    if (as_they_are) features_.clear();
    if (features_.empty()) return;
    check_offsets(whole);
    static thread_local SelectedBags selected;
    select_features(whole, features_, selected);
    bags_ = selected.bags;
  }
  const Bags& operator*() const { return bags_; }
  const Bags* operator->() const { return &bags_; }

  // Runs `call`. If it meets an invalid ID, the error says where in the whole batch that is; bound_of(t) is
  // the bound of what the t-th of the served features is read by, or -1.
  template <class Call, class BoundOf>
  void run(const Call& call, const BoundOf& bound_of) const {
    try {
      call();
    } catch (const IdError&) {
      Bounds bounds;
      for (size_t t = 0; t < features_.size(); ++t) bounds.emplace_back(features_[t], bound_of(t));
      check_ids(whole_, bounds);
      throw;
    }
  }

 private:
  Bags whole_, bags_;
  std::vector<int64_t> features_;  // empty: all
};

}  // namespace mprec
