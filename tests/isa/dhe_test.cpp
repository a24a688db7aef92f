// The deep-hash-embedding kernels against their definition, in exact integers for the hashes and in float64
// for the decoder.
#include "dhe/dhe.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "dhe/bag.h"
#include "dhe/decoder.h"
#include "guarded.h"
#include "registry.h"
#include "suites.h"

namespace mprec::test {
namespace {

constexpr double eps = std::numeric_limits<float>::epsilon();
constexpr double pi = 3.14159265358979323846;
constexpr int64_t largest_id = std::numeric_limits<int64_t>::max();

const char* family_name(HashFamily family) {
  static const char* const names[] = {"universal", "artifact", "artifact_gaussian", "sign", "u7"};
  return names[static_cast<int>(family)];
}
constexpr HashFamily all_families[] = {HashFamily::universal, HashFamily::artifact,
                                       HashFamily::artifact_gaussian, HashFamily::sign, HashFamily::u7};

bool is_artifact(HashFamily f) { return f == HashFamily::artifact || f == HashFamily::artifact_gaussian; }

// IDs at the edges of every limb, of both moduli and of the range in which artifact's sums do not wrap.
const std::vector<int64_t> edge_ids{0,
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

Coefficients random_coefficients(HashFamily family, int64_t k, Random& random) {
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

int64_t expected_hash(const Coefficients& c, HashFamily family, int64_t id, int64_t j) {
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

Unit expected_unit(const Coefficients& c, HashFamily family, int64_t id, int64_t j) {
  const auto h = static_cast<float>(expected_hash(c, family, id, j));
  switch (family) {
    case HashFamily::universal: return {h * 0x1p-30f - 1.0f, 0};
    case HashFamily::sign:
      return {expected_hash(c, family, id, j) >= int64_t{1} << 30 ? sign_magnitude : -sign_magnitude, 0};
    case HashFamily::u7:
      return {static_cast<float>(2 * (expected_hash(c, family, id, j) >> 24) - 127) / 127.0f, 0};
    case HashFamily::artifact: return {h / static_cast<float>(artifact_m - 1) * 2.0f - 1.0f, 0};
    case HashFamily::artifact_gaussian: break;
  }
  const int64_t even = j / 2 * 2;
  const double u1 = static_cast<double>(expected_hash(c, family, id, even) + 1) / artifact_m,
               u2 = static_cast<double>(expected_hash(c, family, id, even + 1) + 1) / artifact_m;
  const double radius = std::sqrt(-2 * std::log(u1));
  // u1 and u2 round to float32 first: that moves the logarithm by eps / 2, and the angle by pi eps.
  const double bound = 4 * eps * (1 + radius) + (radius > 0 ? eps / radius : 0);
  return {radius * (j % 2 ? std::sin(2 * pi * u2) : std::cos(2 * pi * u2)), bound};
}

void test_hashes(const std::string& isa, HashFamily family) {
  Case c(isa + " dhe hash and encode, " + family_name(family));
  Random random(4);
  std::vector<int64_t> ids = edge_ids;
  for (int i = 0; i < 12; ++i) ids.push_back(static_cast<int64_t>(random.bits() >> (1 + 5 * i)));
  const auto all = static_cast<int64_t>(ids.size());
  for (int64_t k : {1, 2, 7, 8, 14, 16, 17, 18, 33, 64, 256, 258, 530}) {
    if (family == HashFamily::artifact_gaussian && k % 2) continue;
    const Coefficients coefficients = random_coefficients(family, k, random);
    const Encoder encoder(coefficients.matrix(), family);
    // Whole groups of IDs, a lone one, and one limb only (the last 4 are small).
    for (const auto& [first, n] : std::vector<std::pair<int64_t, int64_t>>{
             {0, k < 100 ? all : 9}, {all - 4, 4}, {7, 3}, {all - 1, 1}, {0, 0}}) {
      Guarded<int64_t> some(n);
      std::copy_n(ids.begin() + first, n, some.data());
      Guarded<int64_t> hashes(n * k);
      kernels().dhe->hash(encoder.view(), some.data(), n, hashes.data());
      constexpr float untouched = -12345.0f;
      const int64_t stride = k + 3;
      Guarded<float> units(n ? n * stride - 3 : 0);
      std::fill(units.data(), units.data() + units.size(), untouched);
      kernels().dhe->encode(encoder.view(), some.data(), n, units.data(), stride);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < stride && i * stride + j < units.size(); ++j) {
          if (j >= k) {
            c.expect(units[i * stride + j] == untouched, "encode wrote beyond its ", k, " columns");
            continue;
          }
          c.expect(hashes[i * k + j] == expected_hash(coefficients, family, some[i], j), "hash ", j, " of ",
                   k, " of ID ", some[i], ": got ", hashes[i * k + j], ", want ",
                   expected_hash(coefficients, family, some[i], j));
          const Unit want = expected_unit(coefficients, family, some[i], j);
          if (std::isfinite(want.value))
            c.close(units[i * stride + j], want.value, want.bound, "u ", j, " of ", k, " of ID ", some[i]);
          else  // a negative hash, where artifact's sum has wrapped, has no logarithm
            c.expect(!std::isfinite(units[i * stride + j]), "u ", j, " of ID ", some[i]);
        }
    }
  }
}

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return std::max(x, 0.0);
    case Activation::sigmoid: return 1 / (1 + std::exp(-x));
    case Activation::mish: return x * std::tanh(std::log1p(std::exp(x)));
  }
  return NAN;
}

// A decoder with random weights, and its value in float64.
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

 private:
  // Square of six standard deviations of what an output of layer l loses by the precision of its weights and
  // inputs: each is off by up to half a step, evenly.
  double quantisation_variance(size_t l, int64_t output, const std::vector<Unit>& x) const {
    const float* w = weights_[l].data() + output * sizes_[l];
    const int64_t inputs = sizes_[l];
    double variance = 0;
    if (precision_ == Precision::float16) {
      for (int64_t i = 0; i < inputs; ++i) variance += std::pow(w[i] * 0x1p-10 * x[i].value, 2) / 12;
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

void check_forward(Case& c, const Network& network, int n, Random& random) {
  const Decoder decoder = network.decoder();
  Guarded<int64_t> ids(n);
  for (int64_t i = 0; i < n; ++i)
    ids[i] = i % 3 == 2 ? static_cast<int64_t>(random.bits() >> 1) : random.below(1 << 30);
  constexpr float untouched = -12345.0f;
  const int64_t dim = network.dim(), stride = dim + 2;
  Guarded<float> out(n * stride - 2), scratch(scratch_floats(decoder.view()));
  std::fill(out.data(), out.data() + out.size(), untouched);
  kernels().dhe->forward(decoder.view(), ids.data(), n, out.data(), stride, scratch.data());
  for (int64_t i = 0; i < n; ++i) {
    const std::vector<Unit> want = network.vector(ids[i]);
    for (int64_t d = 0; d < stride && i * stride + d < out.size(); ++d)
      if (d < dim)
        c.close(out[i * stride + d], want[d].value, want[d].bound, "n ", n, " ID ", ids[i], " column ", d);
      else
        c.expect(out[i * stride + d] == untouched, "wrote beyond its ", dim, " columns");
  }
}

void test_counts(const std::string& isa) {
  Case c(isa + " dhe forward, every number of IDs");
  Random random(5);
  const Network network(HashFamily::universal, {20, 19, 5}, Activation::relu, Activation::none, random);
  for (int n = 1; n <= max_ids; ++n) check_forward(c, network, n, random);
}

void test_shapes(const std::string& isa) {
  Case c(isa + " dhe forward, shapes");
  Random random(6);
  for (int64_t width = 1; width <= 49; ++width)
    check_forward(c,
                  Network(HashFamily::universal, {width, 50 - width, width % 7 + 1}, Activation::relu,
                          Activation::sigmoid, random),
                  1 + static_cast<int>(width % 5), random);
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{16, 1},
                                                                             {7, 70},
                                                                             {255, 16, 16},
                                                                             {256, 17, 8},
                                                                             {257, 100, 33},
                                                                             {530, 33, 64},
                                                                             {9, 257, 3},
                                                                             {33, 300, 20, 4},
                                                                             {5, 4, 3, 2, 1},
                                                                             {10, 8, 520},
                                                                             {6, 260, 270, 1}})
    for (int n : {1, 7, 17})
      check_forward(c, Network(HashFamily::universal, sizes, Activation::relu, Activation::none, random), n,
                    random);
}

void test_activations(const std::string& isa) {
  Case c(isa + " dhe forward, families and activations");
  Random random(7);
  for (HashFamily family : all_families)
    for (Activation activation : {Activation::none, Activation::relu, Activation::sigmoid, Activation::mish})
      for (Activation last : {Activation::none, Activation::relu, Activation::sigmoid, Activation::mish}) {
        // Without IDs above artifact's range: a Gaussian has NaNs there.
        const Network network(family == HashFamily::artifact_gaussian ? HashFamily::artifact : family,
                              {24, 21, 18, 6}, activation, last, random);
        check_forward(c, network, 7, random);
      }
}

void test_precisions(const std::string& isa) {
  struct Kind {
    const char* name;
    Precision precision;
    HashFamily family;
  };
  for (const Kind& kind : {Kind{"float16", Precision::float16, HashFamily::universal},
                           Kind{"int8, u7", Precision::int8, HashFamily::u7},
                           Kind{"int8, universal", Precision::int8, HashFamily::universal},
                           Kind{"lut, sign", Precision::lut, HashFamily::sign}}) {
    Case c(isa + " dhe forward, " + kind.name);
    Random random(14);
    const auto check = [&](const std::vector<int64_t>& sizes, int n) {
      check_forward(c,
                    Network(kind.family, sizes, Activation::relu, Activation::none, random, kind.precision),
                    n, random);
    };
    for (int64_t width = 1; width <= 40; ++width)
      check({width, 41 - width, width % 5 + 1}, 1 + static_cast<int>(width % 9));
    for (int n : {5, 6, 7, 11, 12, 13, 14, 15, 33, 65, max_ids}) check({48, 17}, n);
    check({300, 80, 9}, 13);
    check({1100, 65}, 5);  // more than one block of inputs in 8 bits
    check({1030, 130, 3}, 2);
    check({33, 260, 20}, 3);
  }
}

void test_pool(const std::string& isa) {
  Case c(isa + " dhe pool");
  Random random(15);
  for (int64_t dim = 1; dim <= 40; ++dim)
    for (int mode : {0, 1, 2})
      for (bool weighted : {false, true})
        for (bool mapped : {false, true}) {
          if (weighted && mode == 2) continue;
          constexpr int64_t rows = 6, entries = 9;
          Guarded<float> vectors(rows * dim), weights(weighted ? entries : 0), out(dim);
          Guarded<int32_t> row_of_entry(mapped ? entries : 0);
          for (int64_t i = 0; i < vectors.size(); ++i) vectors[i] = random.normal_ish();
          for (int64_t i = 0; i < weights.size(); ++i) weights[i] = random.normal_ish();
          for (int64_t i = 0; i < row_of_entry.size(); ++i)
            row_of_entry[i] = static_cast<int32_t>(random.below(rows + 1) - 1);
          const PoolArguments arguments{vectors.data(), dim, mapped ? row_of_entry.data() : nullptr,
                                        weighted ? weights.data() : nullptr, mode};
          for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{
                   {0, 0}, {2, 3}, {0, rows}, {1, mapped ? entries : 5}}) {
            kernels().dhe->pool(arguments, begin, end, out.data());
            for (int64_t d = 0; d < dim; ++d) {
              double sum = 0, magnitude = 0, largest = -HUGE_VAL, count = 0;
              for (int64_t i = begin; i < end; ++i) {
                const int64_t row = mapped ? row_of_entry[i] : i;
                if (row < 0) continue;
                const double x = vectors[row * dim + d], w = weighted ? weights[i] : 1;
                sum += w * x, magnitude += std::fabs(w * x), largest = std::max(largest, x), ++count;
              }
              const double want = count == 0 ? 0 : mode == 2 ? largest : mode == 1 ? sum / count : sum;
              c.close(out[d], want, mode == 2 ? 0 : eps * (count + 2) * magnitude, "mode ", mode, " dim ",
                      dim, " column ", d);
            }
          }
        }
}

double pooled(const std::vector<std::vector<Unit>>& vectors, const std::vector<double>& weights, int mode,
              int64_t d, double& bound) {
  double sum = 0, magnitude = 0, inherited = 0, largest = -HUGE_VAL;
  for (size_t i = 0; i < vectors.size(); ++i) {
    const Unit& x = vectors[i][d];
    sum += weights[i] * x.value;
    magnitude += std::fabs(weights[i] * x.value);
    inherited += mode == 2 ? 0 : std::fabs(weights[i]) * x.bound;
    if (mode == 2) inherited = std::max(inherited, x.bound);
    largest = std::max(largest, x.value);
  }
  const auto count = static_cast<double>(vectors.size());
  bound = inherited + eps * (count + 1) * magnitude;
  if (vectors.empty()) return 0;
  if (mode == 2) return largest;
  if (mode == 1) bound /= count;
  return mode == 1 ? sum / count : sum;
}

void test_bags(const std::string& isa, int threads) {
  Case c(isa + " dhe bags, driver with " + std::to_string(threads) + " thread(s)");
  Random random(8);
  const Network first(HashFamily::universal, {40, 18, 5}, Activation::relu, Activation::sigmoid, random),
      second(HashFamily::sign, {33, 12}, Activation::mish, Activation::none, random);
  const Decoder decoders[] = {first.decoder(), second.decoder()};
  const Network* const networks[] = {&first, &second};
  const DecoderView views[] = {decoders[0].view(), decoders[1].view()};
  const int64_t columns[] = {13, 0}, stride = 20;  // the second's result stands first; column 12 is nobody's
  const std::vector<int64_t> lengths{2, 0, 1, 90, 3, 0, 20, threads > 1 ? 600 : 1};
  const auto bags = static_cast<int64_t>(lengths.size());
  for (int features : {1, 2})
    for (int mode : {0, 1, 2})
      for (bool weighted : {false, true})
        for (Dedupe dedupe : {Dedupe::automatic, Dedupe::never, Dedupe::always}) {
          if (weighted && mode == 2) continue;
          const int64_t padding = features == 1 ? 3 : -1;
          std::vector<int64_t> ids, ends{0};
          for (int t = 0; t < features; ++t)
            for (int64_t length : lengths) {
              for (int64_t i = 0; i < length; ++i) ids.push_back(random.below(8));  // many repeated
              ends.push_back(static_cast<int64_t>(ids.size()));
            }
          const bool wide = mode != 1;
          const auto n = static_cast<int64_t>(ids.size());
          Guarded<int64_t> wide_ids(wide ? n : 0), offsets(static_cast<int64_t>(ends.size()));
          Guarded<int32_t> narrow_ids(wide ? 0 : n);
          std::copy(ends.begin(), ends.end(), offsets.data());
          if (wide)
            std::copy(ids.begin(), ids.end(), wide_ids.data());
          else
            std::copy(ids.begin(), ids.end(), narrow_ids.data());
          Guarded<float> weights(weighted ? n : 0);
          for (int64_t i = 0; i < weights.size(); ++i) weights[i] = random.normal_ish();
          constexpr float untouched = -12345.0f;
          Guarded<float> out(bags * stride - 2);
          std::fill(out.data(), out.data() + out.size(), untouched);
          const void* const id_data = wide ? static_cast<const void*>(wide_ids.data()) : narrow_ids.data();
          dhe_bag_forward({views,
                           features,
                           bags,
                           {id_data, n, wide},
                           {offsets.data(), offsets.size(), true},
                           weighted ? weights.data() : nullptr,
                           mode,
                           padding,
                           out.data(),
                           stride,
                           columns,
                           dedupe},
                          threads);
          for (int t = 0; t < features; ++t) {
            std::vector<std::vector<Unit>> vector_of_id;
            for (int64_t id = 0; id < 8; ++id) vector_of_id.push_back(networks[t]->vector(id));
            for (int64_t b = 0; b < bags; ++b) {
              std::vector<std::vector<Unit>> entries;
              std::vector<double> factors;
              for (int64_t i = ends[t * bags + b]; i < ends[t * bags + b + 1]; ++i)
                if (ids[i] != padding) {
                  entries.push_back(vector_of_id[ids[i]]);
                  factors.push_back(weighted ? weights[i] : 1.0);
                }
              for (int64_t d = 0; d < networks[t]->dim(); ++d) {
                double bound;
                const double want = pooled(entries, factors, mode, d, bound);
                c.close(out[b * stride + columns[t] + d], want, bound, "mode ", mode, " feature ", t, " bag ",
                        b, " column ", d);
              }
            }
          }
          for (int64_t b = 0; b < bags; ++b)
            c.expect(out[b * stride + 12] == untouched, "wrote to a column of no feature");
        }
}

}  // namespace

void dhe_suite(const std::string& isa, int threads) {
  for (HashFamily family : all_families) test_hashes(isa, family);
  test_counts(isa);
  test_shapes(isa);
  test_activations(isa);
  test_precisions(isa);
  test_pool(isa);
  test_bags(isa, threads);
}

}  // namespace mprec::test
