// A batch's bags as operators' arguments describe them, checked as mprec.bags.Bags checks them in Python: all
// but the values of offsets and IDs, which kernels look at.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bags/bags.h"
#include "torch_stable/tensors.h"

namespace mprec::stable {

struct BagArguments {
  const Tensor& indices;
  const Tensor& offsets;
  int64_t mode;
  const std::optional<Tensor>& per_sample_weights;
  std::optional<std::vector<int64_t>> features = std::nullopt;
  std::optional<int64_t> num_features = std::nullopt;
  bool include_last_offset = true;
  int64_t padding_idx = -1;
};

class CheckedBags {
 public:
  // For `count` tables or decoders. Per-sample weights are to be of `dtype`; `or_float32`: of float32 too
  // where that is a 16-bit type.
  CheckedBags(const BagArguments& a, int64_t count, ScalarType dtype, bool or_float32) {
    const int64_t num_features = a.num_features.value_or(count);
    check_features(a, num_features, count);
    if (a.mode < 0 || a.mode > 2) throw refusal("mode: expected 0 (sum), 1 (mean) or 2 (max), got ", a.mode);
    if (a.mode == 2 && a.per_sample_weights)
      throw refusal("per_sample_weights: only supported for mode='sum' and mode='mean', got mode='max'");
    const View indices = contiguous(a.indices, {"indices"}), offsets = contiguous(a.offsets, {"offsets"});
    check_ndim(indices, {"indices"}, 1);
    check_ndim(offsets, {"offsets"}, 1);
    if (a.per_sample_weights) set_weights(*a.per_sample_weights, indices, dtype, or_float32);
    set_features(offsets, num_features, a.include_last_offset);
    bags_.indices = integers(indices, {"indices"});
    bags_.offsets = integers(offsets, {"offsets"});
    bags_.mode = static_cast<Mode>(a.mode);
    bags_.padding_idx = a.padding_idx;
    kept_.push_back(indices);
    kept_.push_back(offsets);
  }
  CheckedBags(const CheckedBags&) = delete;  // bags point to what this holds

  const Bags& operator*() const { return bags_; }
  // Those that tables or decoders name; empty: all, in order.
  const std::vector<int64_t>& features() const { return features_; }

 private:
  void check_features(const BagArguments& a, int64_t num_features, int64_t count) {
    if (num_features < 1) throw refusal("num_features: expected at least 1, got ", num_features);
    if (!a.features) {
      if (num_features != count)
        throw refusal("num_features: ", num_features, ", but there are ", count, " parts and no features");
      return;
    }
    features_ = *a.features;
    if (static_cast<int64_t>(features_.size()) != count)
      throw refusal("features: expected one for each of ", count, " parts, got ", features_.size());
    for (int64_t t = 0; t < count; ++t)
      if (features_[t] < 0 || features_[t] >= num_features)
        throw refusal("features[", t, "]: expected in [0, ", num_features, "), got ", features_[t]);
  }

  // Features of as many bags each as there are offsets for.
  void set_features(const View& offsets, int64_t num_features, bool include_last_offset) {
    const int64_t bags = offsets.shape[0] - include_last_offset;
    if (bags < 0 && num_features == 1)
      throw OffsetsError(
          "offsets: with include_last_offset there must be at least one (1 + a multiple of the number of "
          "features, "
          "1), got none");
    if (bags < 0 || (num_features > 1 && bags % num_features != 0))
      throw OffsetsError(message("offsets: expected 1 + a multiple of the number of features, ", num_features,
                                 ", got ", offsets.shape[0]));
    bags_.num_features = num_features;
    bags_.batch = bags / num_features;
  }

  void set_weights(const Tensor& given, const View& indices, ScalarType dtype, bool or_float32) {
    const View weights = contiguous(given, {"per_sample_weights"});
    if (weights.shape != indices.shape)
      throw refusal("per_sample_weights: expected the shape of indices, ", tuple(indices.shape), ", got ",
                    tuple(weights.shape));
    const bool wider = or_float32 && (dtype == ScalarType::Half || dtype == ScalarType::BFloat16);
    if (weights.dtype != dtype && !(wider && weights.dtype == ScalarType::Float))
      throw refusal("per_sample_weights: expected to have the same type as weight, ", dtype_name(dtype),
                    ", got ", dtype_name(weights.dtype));
    const int64_t n = indices.shape[0];
    if (weights.dtype == ScalarType::Float) {
      bags_.per_sample_weights = weights.ptr<float>();
      kept_.push_back(weights);
      return;
    }
    if (weights.dtype == ScalarType::Half)
      floats_.assign(weights.ptr<c10::Half>(), weights.ptr<c10::Half>() + n);
    else
      floats_.assign(weights.ptr<c10::BFloat16>(), weights.ptr<c10::BFloat16>() + n);
    floats_.resize(n + 1);  // of no indices too, weights are not null: they have been given
    bags_.per_sample_weights = floats_.data();
  }

  static Integers integers(const View& v, const Name& name) {
    if (is_float(v.dtype)) throw refusal(name, ": expected integers, got ", dtype_name(v.dtype));
    if (v.dtype != ScalarType::Long && v.dtype != ScalarType::Int)
      throw refusal(name, ": without Python only int64 and int32 are served, got ", dtype_name(v.dtype));
    return {v.data, v.shape[0], v.dtype == ScalarType::Long};
  }

  Bags bags_;
  std::vector<View> kept_;
  std::vector<float> floats_;
  std::vector<int64_t> features_;
};

}  // namespace mprec::stable
