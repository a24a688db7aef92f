// The deep hash embedding's definition: exact integers for the hashes, float64 for the decoder.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "dhe/decoder.h"
#include "dhe/dhe.h"

namespace mprec::test {

constexpr double eps = std::numeric_limits<float>::epsilon();
constexpr double pi = 3.14159265358979323846;
constexpr int64_t largest_id = std::numeric_limits<int64_t>::max();

inline const char* family_name(HashFamily family) { return traits(family).name; }
#define MPREC_NAME(name, Family) HashFamily::name,
constexpr HashFamily all_families[] = {MPREC_HASH_FAMILIES(MPREC_NAME)};
#undef MPREC_NAME

inline bool is_artifact(HashFamily f) {
  return f == HashFamily::artifact || f == HashFamily::artifact_gaussian;
}

// IDs at the edges of every limb, of both moduli and of the range in which artifact's sums do not wrap.
inline const std::vector<int64_t> edge_ids{0,
                                           1,
                                           artifact_m - 1,
                                           artifact_m,
                                           artifact_p - 1,
                                           artifact_p,
                                           artifact_p + 1,
                                           (1 << 30) - 1,
                                           1 << 30,
                                           mersenne_p - 1,
                                           mersenne_p,
                                           mersenne_p + 1,
                                           mersenne_p + 2,
                                           largest_id / artifact_p - 2,
                                           largest_id / artifact_p - 1,
                                           largest_id / artifact_p,
                                           largest_id / artifact_p + 1,
                                           (int64_t{1} << 60) - 1,
                                           int64_t{1} << 60,
                                           largest_id - 1,
                                           largest_id};

struct Coefficients {
  std::vector<int32_t> values;
  int64_t rows, k;
  int64_t at(int64_t row, int64_t j) const { return values[row * k + j]; }
  CoefficientMatrix matrix() const { return {values.data(), rows, k, k, 1}; }
};

inline Coefficients random_coefficients(HashFamily family, int64_t k, Random& random) {
  Coefficients c{{}, is_artifact(family) ? 2 : 4, k};
  const int64_t p = is_artifact(family) ? artifact_p : mersenne_p;
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t least = row == 0;
      const int64_t edge = random.below(8);  // the ends of the range, too
      c.values.push_back(static_cast<int32_t>(edge == 0   ? least
                                              : edge == 1 ? p - 1
                                                          : least + random.below(p - least)));
    }
  return c;
}

inline int64_t expected_hash(const Coefficients& c, HashFamily family, int64_t id, int64_t j) {
  const auto x = static_cast<uint64_t>(id);
  if (is_artifact(family)) {  // wraps around in 64 bits; C's remainders
    const uint64_t sum = static_cast<uint64_t>(c.at(0, j)) * x + static_cast<uint64_t>(c.at(1, j));
    return static_cast<int64_t>(sum) % artifact_p % artifact_m;
  }
  constexpr uint64_t limb = (uint64_t{1} << 30) - 1;
  using Wide = unsigned __int128;
  const Wide sum = Wide(c.at(0, j)) * (x & limb) + Wide(c.at(2, j)) * (x >> 30 & limb) +
                   Wide(c.at(3, j)) * (x >> 60) + Wide(c.at(1, j));
  return static_cast<int64_t>(sum % mersenne_p);
}

// u of hash j, and how far a kernel may be from it: not at all, except for the Gaussian transform.
struct Unit {
  double value, bound;
};

inline Unit expected_unit(const Coefficients& c, HashFamily family, int64_t id, int64_t j) {
  const auto h = static_cast<float>(expected_hash(c, family, id, j));
  if (const int bits = traits(family).level_bits) {
    const int64_t level = expected_hash(c, family, id, j) >> (31 - bits), most = (1 << bits) - 1;
    return {static_cast<float>(2 * level - most) / static_cast<float>(most), 0};
  }
  switch (family) {
    case HashFamily::universal: return {h * 0x1p-30f - 1.0f, 0};
    case HashFamily::sign:
      return {expected_hash(c, family, id, j) >= int64_t{1} << 30 ? sign_magnitude : -sign_magnitude, 0};
    case HashFamily::artifact: return {h / static_cast<float>(artifact_m - 1) * 2.0f - 1.0f, 0};
    default: break;  // artifact_gaussian
  }
  const int64_t even = j / 2 * 2;
  const double u1 = static_cast<double>(expected_hash(c, family, id, even) + 1) / artifact_m,
               u2 = static_cast<double>(expected_hash(c, family, id, even + 1) + 1) / artifact_m;
  const double radius = std::sqrt(-2 * std::log(u1));
  // u1 and u2 round to float32 first: that moves the logarithm by eps / 2, and the angle by pi eps.
  const double bound = 4 * eps * (1 + radius) + (radius > 0 ? eps / radius : 0);
  return {radius * (j % 2 ? std::sin(2 * pi * u2) : std::cos(2 * pi * u2)), bound};
}

inline double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return std::max(x, 0.0);
    case Activation::sigmoid: return 1 / (1 + std::exp(-x));
    case Activation::mish: return x * std::tanh(std::log1p(std::exp(x)));
  }
  return NAN;
}

inline double slope(Activation activation, double x) {
  switch (activation) {
    case Activation::none: return 1;
    case Activation::relu: return x > 0;
    case Activation::sigmoid: return activate(activation, x) * (1 - activate(activation, x));
    case Activation::mish: {
      const double t = std::tanh(std::log1p(std::exp(x)));
      return t + x * (1 - t * t) / (1 + std::exp(-x));
    }
  }
  return NAN;
}

// Gradients of a layer, and the sum of the magnitudes of their terms.
struct LayerSums {
  std::vector<double> weight, bias, weight_magnitude, bias_magnitude;
};

// A decoder with random weights, its value and its gradients in float64.
class Network {
 public:
  Network(HashFamily family, const std::vector<int64_t>& sizes, Activation activation, Activation last,
          Random& random, Precision precision = Precision::float32)
      : family_(family),
        precision_(precision),
        sizes_(sizes),
        activation_(activation),
        last_(last),
        coefficients_(random_coefficients(family, sizes[0], random)) {
    for (size_t l = 0; l + 1 < sizes.size(); ++l) {
      const float scale = 1.5f / std::sqrt(static_cast<float>(sizes[l]));
      weights_.emplace_back(sizes[l] * sizes[l + 1]);
      biases_.emplace_back(sizes[l + 1]);
      for (float& w : weights_.back()) w = random.normal_ish() * scale;
      for (float& b : biases_.back()) b = random.normal_ish();
    }
  }

  std::vector<LinearWeights> layers() const {
    std::vector<LinearWeights> layers;
    for (size_t l = 0; l < weights_.size(); ++l)
      layers.push_back({weights_[l].data(), sizes_[l + 1], sizes_[l], sizes_[l], 1, biases_[l].data(), 1});
    return layers;
  }
  Encoder encoder() const { return Encoder(coefficients_.matrix(), family_); }
  Decoder decoder() const { return Decoder(encoder(), layers(), activation_, last_, precision_); }

  int64_t dim() const { return sizes_.back(); }

  // The vector of an ID; each value with a bound for float32's rounding on the way to it.
  std::vector<Unit> vector(int64_t id) const {
    std::vector<Unit> x;
    for (int64_t j = 0; j < sizes_[0]; ++j) x.push_back(expected_unit(coefficients_, family_, id, j));
    for (size_t l = 0; l < weights_.size(); ++l) {
      const Activation f = l + 1 == weights_.size() ? last_ : activation_;
      std::vector<Unit> y;
      for (int64_t o = 0; o < sizes_[l + 1]; ++o) {
        double sum = biases_[l][o], magnitude = std::fabs(sum), inherited = 0;
        for (int64_t i = 0; i < sizes_[l]; ++i) {
          const double w = weights_[l][o * sizes_[l] + i];
          sum += w * x[i].value;
          magnitude += std::fabs(w * x[i].value);
          inherited += w * x[i].bound * w * x[i].bound;
        }
        inherited += quantisation_variance(l, o, x);
        // Errors add up like a random walk; no activation is steeper than 1.09.
        const double rounding = eps * (2 + std::sqrt(static_cast<double>(sizes_[l])) / 4) * magnitude;
        const double value = activate(f, sum);
        y.push_back(
            {value, 1.09 * (std::sqrt(inherited) + rounding) + 4 * eps * std::max(std::fabs(value), 1e-3)});
      }
      x = y;
    }
    return x;
  }

  Activation activation() const { return activation_; }
  Activation last() const { return last_; }

  // Adds the gradients of one ID, whose vector has the gradient `grad`, to `sums` (one for each layer).
  void add_gradients(int64_t id, const float* grad, std::vector<LayerSums>& sums) const {
    const size_t layers = weights_.size();
    std::vector<std::vector<double>> x(layers + 1), z(layers);
    for (int64_t j = 0; j < sizes_[0]; ++j)
      x[0].push_back(expected_unit(coefficients_, family_, id, j).value);
    for (size_t l = 0; l < layers; ++l)
      for (int64_t o = 0; o < sizes_[l + 1]; ++o) {
        double sum = biases_[l][o];
        for (int64_t i = 0; i < sizes_[l]; ++i) sum += double{weights_[l][o * sizes_[l] + i]} * x[l][i];
        z[l].push_back(sum);
        x[l + 1].push_back(activate(l + 1 == layers ? last_ : activation_, sum));
      }
    std::vector<double> dy(grad, grad + dim()), magnitude;
    for (double g : dy) magnitude.push_back(std::fabs(g));
    for (size_t l = layers; l-- > 0;) {
      std::vector<double> before(sizes_[l]), before_magnitude(sizes_[l]);
      for (int64_t o = 0; o < sizes_[l + 1]; ++o) {
        const double steepness = slope(l + 1 == layers ? last_ : activation_, z[l][o]),
                     dz = dy[o] * steepness;
        const double size = magnitude[o] * (std::fabs(steepness) + 0.1);  // a slope is rounded absolutely
        sums[l].bias[o] += dz;
        sums[l].bias_magnitude[o] += size;
        for (int64_t i = 0; i < sizes_[l]; ++i) {
          const double w = weights_[l][o * sizes_[l] + i];
          sums[l].weight[o * sizes_[l] + i] += dz * x[l][i];
          sums[l].weight_magnitude[o * sizes_[l] + i] += size * (std::fabs(x[l][i]) + 0.01);
          before[i] += dz * w;
          before_magnitude[i] += size * std::fabs(w);
        }
      }
      dy = before;
      magnitude = before_magnitude;
    }
  }

 private:
  // Square of six standard deviations of what an output of layer l loses by the precision of its weights and
  // inputs: each is off by up to half a step, evenly.
  double quantisation_variance(size_t l, int64_t output, const std::vector<Unit>& x) const {
    const float* w = weights_[l].data() + output * sizes_[l];
    const int64_t inputs = sizes_[l];
    double variance = 0;
    if (precision_ == Precision::float16) {
      for (int64_t i = 0; i < inputs; ++i) variance += std::pow(w[i] * 0x1p-10 * x[i].value, 2) / 12;
    } else if (precision_ == Precision::bfloat16) {  // the input is rounded as the weight is
      for (int64_t i = 0; i < inputs; ++i) variance += 2 * std::pow(w[i] * 0x1p-7 * x[i].value, 2) / 12;
    } else if (precision_ == Precision::int8 && l == 0) {
      float largest = 0;
      for (int64_t i = 0; i < inputs; ++i) largest = std::max(largest, std::fabs(w[i]));
      const double step = largest / 127, input_step = family_ == HashFamily::universal ? 1.0 / 64 : 0;
      for (int64_t i = 0; i < inputs; ++i)
        variance += (std::pow(step * x[i].value, 2) + std::pow(w[i] * input_step, 2)) / 12;
    } else if (precision_ == Precision::lut && l == 0) {
      double largest = 0;  // sum of four signed weights
      for (int64_t i = 0; i < inputs; i += 4) {
        double sum = 0;
        for (int64_t j = i; j < std::min(i + 4, inputs); ++j) sum += std::fabs(w[j]);
        largest = std::max(largest, sum);
      }
      variance = static_cast<double>((inputs + 3) / 4) * std::pow(2 * largest / 255 * sign_magnitude, 2) / 12;
    }
    return 36 * variance;
  }

  HashFamily family_;
  Precision precision_;
  std::vector<int64_t> sizes_;
  Activation activation_, last_;
  Coefficients coefficients_;
  std::vector<std::vector<float>> weights_, biases_;
};

}  // namespace mprec::test
