// The deep-hash-embedding kernels against their definition, in exact integers for the hashes and in float64
// for the decoder.
#include "dhe/dhe.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "check.h"
#include "dhe/bag.h"
#include "dhe/decoder.h"
#include "dhe/gradient.h"
#include "dhe_network.h"
#include "guarded.h"
#include "registry.h"
#include "suites.h"

namespace mprec::test {
namespace {

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
                           Kind{"bfloat16", Precision::bfloat16, HashFamily::universal},
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
                                        weighted ? weights.data() : nullptr, static_cast<Mode>(mode)};
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
  const int64_t columns[] = {13, 0}, stride = 20;  // the second's result stands first; column 12 is nobody's
  const DheFeature parts[] = {{decoders[0].view(), columns[0]}, {decoders[1].view(), columns[1]}};
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
          const Bags batch{{id_data, n, wide},
                           {offsets.data(), offsets.size(), true},
                           nullptr,
                           features,
                           bags,
                           weighted ? weights.data() : nullptr,
                           static_cast<Mode>(mode),
                           padding};
          dhe_bag_forward({batch, out.data(), stride}, parts, dedupe, threads);
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

void test_backward(const std::string& isa, int threads) {
  Case c(isa + " dhe backward, driver with " + std::to_string(threads) + " thread(s)");
  Random random(16);
  const auto check = [&](const std::vector<int64_t>& sizes, Activation activation, Activation last,
                         int64_t n) {
    const Network network(HashFamily::universal, sizes, activation, last, random);
    Guarded<int64_t> ids(n);
    Guarded<float> grad(n * network.dim());
    for (int64_t i = 0; i < n; ++i) ids[i] = random.below(1 << 30);
    for (int64_t i = 0; i < grad.size(); ++i) grad[i] = random.normal_ish();
    std::vector<LayerSums> want;
    std::vector<std::unique_ptr<Guarded<float>>> weights, biases;
    std::vector<LayerGradient> to;
    for (size_t l = 0; l + 1 < sizes.size(); ++l) {
      const std::vector<double> w(sizes[l] * sizes[l + 1]), b(sizes[l + 1]);
      want.push_back({w, b, w, b});
      weights.push_back(std::make_unique<Guarded<float>>(sizes[l] * sizes[l + 1]));
      biases.push_back(std::make_unique<Guarded<float>>(sizes[l + 1]));
      to.push_back({weights[l]->data(), biases[l]->data()});
    }
    dhe_backward(network.decoder().view(), network.layers(), ids.data(), n, nullptr, 0, grad.data(), to,
                 threads);
    for (int64_t i = 0; i < n; ++i) network.add_gradients(ids[i], grad.data() + i * network.dim(), want);
    for (size_t l = 0; l < want.size(); ++l) {
      for (size_t i = 0; i < want[l].weight.size(); ++i)
        c.close(to[l].weight[i], want[l].weight[i], 32 * eps * want[l].weight_magnitude[i], "weight ", i,
                " of layer ", l);
      for (size_t i = 0; i < want[l].bias.size(); ++i)
        c.close(to[l].bias[i], want[l].bias[i], 32 * eps * want[l].bias_magnitude[i], "bias ", i,
                " of layer ", l);
    }
  };
  for (Activation activation : {Activation::none, Activation::relu, Activation::sigmoid, Activation::mish})
    check({18, 9, 7, 3}, activation, Activation::sigmoid, 5);
  for (int64_t width : {1, 7, 15, 16, 17, 31, 33})
    check({width, 34 - width, width % 5 + 1}, Activation::relu, Activation::none, 4);
  for (int64_t n : {0, 1, 2, 66, 67}) check({20, 6, 2}, Activation::relu, Activation::mish, n);
  check({258, 19, 3}, Activation::relu, Activation::none, 3);
  check({6, 260, 3}, Activation::relu, Activation::none, 3);
  if (threads > 1) check({300, 64, 8}, Activation::relu, Activation::none, 400);  // enough to be shared
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
  test_backward(isa, threads);
}

}  // namespace mprec::test
