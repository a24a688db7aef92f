// MLPs, the dot interaction and whole paths against their formulas in float64.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "dense/mlp.h"
#include "dhe_network.h"
#include "guarded.h"
#include "program/program.h"
#include "registry.h"
#include "suites.h"

namespace mprec::test {
namespace {

// A value in float64 and what float32 may be off by.
struct Bounded {
  double value, bound;
};
using Row = std::vector<Bounded>;

struct Layers {
  std::vector<int64_t> sizes;
  std::vector<std::vector<float>> weights, biases;
  Activation between, last;
  Precision precision = Precision::float32;

  Layers(const std::vector<int64_t>& s, Activation between_, Activation last_, Random& random)
      : sizes(s), between(between_), last(last_) {
    for (size_t l = 0; l + 1 < s.size(); ++l) {
      weights.emplace_back(s[l] * s[l + 1]);
      biases.emplace_back(s[l + 1]);
      for (float& w : weights[l]) w = random.normal_ish() / std::sqrt(static_cast<float>(s[l]));
      for (float& b : biases[l]) b = random.normal_ish();
    }
  }
  bool quantised(size_t l) const {
    return precision == Precision::int8 && sizes[l] >= 32 && sizes[l + 1] > 1;
  }
  Activation after(size_t l) const { return l + 1 == weights.size() ? last : between; }
  Mlp mlp() const {
    std::vector<LinearWeights> linear;
    std::vector<Activation> activations;
    for (size_t l = 0; l < weights.size(); ++l) {
      linear.push_back(
          {weights[l].data(), sizes[l + 1], sizes[l], sizes[l], 1, l % 2 ? nullptr : biases[l].data(), 1});
      activations.push_back(after(l));
    }
    return Mlp(linear, activations, precision);
  }
  // Errors add up like a random walk, as in dhe_network.h; no activation is steeper than 1.09.
  Row operator()(Row x) const {
    for (size_t l = 0; l < weights.size(); ++l) {
      Row y;
      double low = 0, high = 0;
      for (const Bounded& b : x) {
        low = std::min(low, b.value - b.bound);
        high = std::max(high, b.value + b.bound);
      }
      const double input_step = (high - low) / 127;
      for (int64_t o = 0; o < sizes[l + 1]; ++o) {
        double sum = l % 2 ? 0 : biases[l][o], magnitude = std::fabs(sum), inherited = 0;
        double weight_step = 0;
        for (int64_t i = 0; i < sizes[l]; ++i)
          weight_step = std::max(weight_step, std::fabs(double{weights[l][o * sizes[l] + i]}) / 127);
        for (int64_t i = 0; i < sizes[l]; ++i) {
          const double w = weights[l][o * sizes[l] + i];
          sum += w * x[i].value;
          magnitude += std::fabs(w * x[i].value);
          inherited += w * x[i].bound * w * x[i].bound;
          // As in dhe_network.h: six standard deviations of two roundings.
          if (precision == Precision::bfloat16 && sizes[l + 1] > 1)
            inherited += 36 * 2 * std::pow(w * 0x1p-7 * x[i].value, 2) / 12;
          if (quantised(l))
            inherited += 36 * (std::pow(w * input_step, 2) + std::pow(weight_step * x[i].value, 2)) / 12;
        }
        const double value = activate(after(l), sum);
        const double rounding = eps * (2 + std::sqrt(static_cast<double>(sizes[l])) / 4) * magnitude;
        y.push_back(
            {value, 1.09 * (std::sqrt(inherited) + rounding) + 4 * eps * std::max(std::fabs(value), 1e-3)});
      }
      x = y;
    }
    return x;
  }
};

Row exact(const float* values, int64_t count) {
  Row row;
  for (int64_t i = 0; i < count; ++i) row.push_back({values[i], 0});
  return row;
}

void check_mlp(Case& c, const Layers& layers, int samples, Random& random) {
  const Mlp mlp = layers.mlp();
  const int64_t inputs = layers.sizes.front(), outputs = layers.sizes.back(), stride = inputs + 3,
                out_stride = outputs + 1, activations = blocks_of(mlp.view().widest) * sample_block_stride;
  Guarded<float> in(samples * stride - 3), out(samples * out_stride - 1), blocks(activations),
      spare(activations);
  for (int64_t i = 0; i < in.size(); ++i) in[i] = random.normal_ish();
  constexpr float untouched = -12345.0f;
  std::fill(out.data(), out.data() + out.size(), untouched);
  const DenseKernels& k = *kernels().dense;
  k.gather(in.data(), stride, samples, static_cast<int>(inputs), blocks.data(), sample_block_stride, 0);
  const float* result =
      k.mlp(mlp.view(), samples, samples % 2, blocks.data(), spare.data(), sample_block_stride);
  k.scatter(result, sample_block_stride, samples, static_cast<int>(outputs), out.data(), out_stride);
  for (int s = 0; s < samples; ++s) {
    const Row want = layers(exact(in.data() + s * stride, inputs));
    for (int64_t o = 0; o < outputs; ++o)
      c.close(out[s * out_stride + o], want[o].value, want[o].bound, samples, " samples, ", inputs,
              " inputs: sample ", s, " output ", o);
    if (s + 1 < samples)
      c.expect(out[s * out_stride + outputs] == untouched, "wrote beyond its ", outputs, " outputs");
  }
}

void test_mlp(const std::string& isa) {
  Case c(isa + " dense mlp");
  Random random(11);
  const Layers narrow({5, 18, 3, 1}, Activation::relu, Activation::sigmoid, random);
  for (int samples = 1; samples <= max_samples; samples += samples < 20 ? 1 : 14)
    check_mlp(c, narrow, samples, random);
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{1, 1},
                                                                             {16, 1},
                                                                             {257, 1},
                                                                             {530, 1},
                                                                             {13, 70, 2},
                                                                             {256, 33, 256},
                                                                             {260, 1, 9},
                                                                             {33, 300, 20, 4},
                                                                             {3, 520}})
    for (int samples : {1, 4, 5, 9})
      check_mlp(c, Layers(sizes, Activation::relu, samples % 2 ? Activation::none : Activation::mish, random),
                samples, random);
}

void test_bfloat16(const std::string& isa) {
  Case c(isa + " dense mlp in bfloat16");
  Random random(15);
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{
           {1, 1}, {5, 18, 3, 1}, {13, 70, 2}, {257, 33, 256}, {33, 300, 21, 4}}) {
    Layers layers(sizes, Activation::relu, Activation::none, random);
    layers.precision = Precision::bfloat16;
    for (int samples : {1, 4, 5, 30}) check_mlp(c, layers, samples, random);
  }
}

void test_int8(const std::string& isa) {
  Case c(isa + " dense mlp in int8");
  Random random(17);
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{5, 18, 3, 1},
                                                                             {32, 1},
                                                                             {32, 17},
                                                                             {63, 33, 2},
                                                                             {257, 70, 256},
                                                                             {13, 300, 64, 21, 4},
                                                                             {1030, 40, 1},
                                                                             {2050, 5}}) {
    Layers layers(sizes, Activation::relu, Activation::none, random);
    layers.precision = Precision::int8;
    for (int samples : {1, 4, 5, 16, 31}) check_mlp(c, layers, samples, random);
  }
}

// Its integers: numbers that are their own levels come out as in exact arithmetic, on every ISA alike.
void test_int8_is_exact(const std::string& isa) {
  Case c(isa + " dense mlp in int8, exact");
  Random random(18);
  for (const auto& [inputs, outputs] : {std::pair{32, 16}, {100, 33}, {367, 40}, {1500, 17}}) {
    std::vector<float> weights(inputs * outputs), bias(outputs);
    for (float& w : weights) w = static_cast<float>(random.below(255) - 127);
    for (int o = 0; o < outputs; ++o) weights[o * inputs + o % inputs] = 127;  // the step is 1
    for (float& b : bias) b = static_cast<float>(random.below(100));
    const Mlp mlp({{weights.data(), outputs, inputs, inputs, 1, bias.data(), 1}}, {Activation::none},
                  Precision::int8);
    for (int samples : {1, 5, 20, 40}) {
      const int64_t activations = blocks_of(mlp.view().widest) * sample_block_stride;
      Guarded<float> in(samples * inputs), out(samples * outputs), blocks(activations), spare(activations);
      for (int64_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(random.below(128) - 50);
      for (int s = 0; s < samples; ++s) {
        in[s * inputs] = -50;  // the ends of the range
        in[s * inputs + inputs - 1] = 77;
      }
      const DenseKernels& k = *kernels().dense;
      k.gather(in.data(), inputs, samples, inputs, blocks.data(), sample_block_stride, 0);
      k.scatter(k.mlp(mlp.view(), samples, false, blocks.data(), spare.data(), sample_block_stride),
                sample_block_stride, samples, outputs, out.data(), outputs);
      for (int s = 0; s < samples; ++s)
        for (int o = 0; o < outputs; ++o) {
          double want = bias[o], magnitude = std::fabs(bias[o]);
          for (int i = 0; i < inputs; ++i) {
            want += double{weights[o * inputs + i]} * in[s * inputs + i];
            magnitude = std::max(magnitude, 50 * 127.0 * inputs);
          }
          c.close(out[s * outputs + o], want, 4 * eps * magnitude, samples, " samples, ", inputs,
                  " inputs: ", s, " output ", o);
        }
    }
  }
}

// The lower triangle of a sample's products, in order.
Row expected_products(const Row& vectors, int64_t dim, bool self) {
  const auto n = static_cast<int64_t>(vectors.size()) / dim;
  Row products;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i + self; ++j) {
      double sum = 0, bound = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const Bounded &a = vectors[i * dim + d], &b = vectors[j * dim + d];
        sum += a.value * b.value;
        bound += std::fabs(a.value) * b.bound + std::fabs(b.value) * a.bound + a.bound * b.bound +
                 eps / 2 * static_cast<double>(dim + 1) * std::fabs(a.value * b.value);
      }
      products.push_back({sum, bound});
    }
  return products;
}

void test_interaction(const std::string& isa) {
  Case c(isa + " dense interaction");
  Random random(12);
  for (int n : {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 27, 33, 41})
    for (int dim : {1, 7, 8, 16, 20, 33})
      for (bool self : {false, true})
        for (int first : {0, 5, 250}) {
          const InteractionView view{n, dim, self};
          const int samples = 3;
          const int64_t stride = n * dim, products = view.products(),
                        blocks = blocks_of(static_cast<int>(first + products) + 1);
          Guarded<float> vectors(samples * stride), transposed(view.transposed_floats()),
              out(blocks * sample_block_stride);
          for (int64_t i = 0; i < vectors.size(); ++i) vectors[i] = random.normal_ish();
          constexpr float untouched = -12345.0f;
          std::fill(out.data(), out.data() + out.size(), untouched);
          kernels().dense->interact(view, vectors.data(), stride, samples, transposed.data(), out.data(),
                                    sample_block_stride, first);
          const auto at = [&](int s, int64_t column) {
            return out[column / block_columns * sample_block_stride + s * block_pitch +
                       column % block_columns];
          };
          for (int s = 0; s < samples; ++s) {
            const Row want = expected_products(exact(vectors.data() + s * stride, stride), dim, self);
            for (int64_t i = 0; i < products; ++i)
              c.close(at(s, first + i), want[i].value, want[i].bound, n, " vectors of ", dim, ": sample ", s,
                      " product ", i);
            for (int64_t column = 0; column < first; ++column)
              c.expect(at(s, column) == untouched, "wrote before its columns");
            c.expect(at(s, first + products) == untouched, "wrote beyond its columns");
          }
        }
}

void test_interaction_backward(const std::string& isa) {
  Case c(isa + " dense interaction, backward");
  Random random(16);
  for (int n : {1, 2, 5, 9, 17, 27})
    for (int dim : {1, 8, 16, 21})
      for (bool self : {false, true}) {
        const InteractionView view{n, dim, self};
        const int64_t products = view.products();
        Guarded<float> vectors(2 * n * dim), grad(2 * products), out(2 * n * dim);
        for (int64_t i = 0; i < vectors.size(); ++i) vectors[i] = random.normal_ish();
        for (int64_t i = 0; i < grad.size(); ++i) grad[i] = random.normal_ish();
        for (int s = 0; s < 2; ++s) {
          const float* const all = vectors.data() + s * n * dim;
          float* const into = out.data() + s * n * dim;
          kernels().dense->interact_backward(view, {all, all + dim}, grad.data() + s * products,
                                             {into, into + dim});
          std::vector<double> want(n * dim), magnitude(n * dim);
          const float* g = grad.data() + s * products;
          for (int i = 0; i < n; ++i)
            for (int j = 0; j < i + self; ++j, ++g)
              for (int d = 0; d < dim; ++d)
                for (const auto& [to, from] : {std::pair{i, j}, std::pair{j, i}}) {
                  const double term = double{*g} * vectors[(s * n + from) * dim + d];
                  want[to * dim + d] += term;
                  magnitude[to * dim + d] += std::fabs(term);
                }
          for (int i = 0; i < n * dim; ++i)
            c.close(out[s * n * dim + i], want[i], eps / 2 * (n + 2) * magnitude[i], n, " vectors of ", dim,
                    ": sample ", s, " number ", i);
        }
      }
}

void test_mix(const std::string& isa) {
  Case c(isa + " dense mix");
  Random random(13);
  const std::vector<MixTerm> terms{{1, 0, 0.5f}, {1, 2, 0.25f}, {2, 1, -1.0f}};
  for (int dim : {1, 8, 15, 16, 33}) {
    Guarded<float> parts(5 * 3 * dim), vectors(5 * 3 * dim);
    for (int64_t i = 0; i < parts.size(); ++i) parts[i] = random.normal_ish();
    constexpr float untouched = -12345.0f;
    std::fill(vectors.data(), vectors.data() + vectors.size(), untouched);
    kernels().dense->mix(terms.data(), 3, dim, parts.data(), 3 * dim, 5, vectors.data(), 3 * dim);
    for (int s = 0; s < 5; ++s)
      for (int d = 0; d < dim; ++d) {
        const float* p = parts.data() + s * 3 * dim + d;
        const double first = 0.5 * p[0] + 0.25 * p[2 * dim];
        c.expect(vectors[s * 3 * dim + d] == untouched, "wrote the first vector");
        c.close(vectors[s * 3 * dim + dim + d], first, eps, "sample ", s, " vector 1");
        c.close(vectors[s * 3 * dim + 2 * dim + d], -p[dim], 0, "sample ", s, " vector 2");
      }
  }
}

// Two tables, of which the second is pooled by mean, and a decoder.
void test_program(const std::string& isa, int threads) {
  Case c(isa + " program");
  Random random(14);
  constexpr int64_t dim = 9, num_dense = 5, rows[] = {50, 7};
  std::vector<float> tables[2];
  for (int t = 0; t < 2; ++t) {
    tables[t].resize(rows[t] * dim);
    for (float& x : tables[t]) x = random.normal_ish();
  }
  const Network network(HashFamily::universal, {20, 12, dim}, Activation::relu, Activation::none, random);
  const Decoder decoder = network.decoder();
  const Layers bottom({num_dense, 30, dim}, Activation::relu, Activation::relu, random);
  const Layers top({dim + 6, 600, 40, 1}, Activation::relu, Activation::sigmoid, random);
  Program::Parts parts;
  parts.num_features = 3;
  parts.num_dense = num_dense;
  parts.dim = dim;
  const auto row = [&](int t) { return reinterpret_cast<const char*>(tables[t].data()); };
  parts.tables = {{row(0), rows[0], dim * 4, Format::f32, 0, 0, Mode::sum},
                  {row(1), rows[1], dim * 4, Format::f32, 2, 2, Mode::mean}};
  parts.decoders = {{decoder.view(), 1, 1, Mode::sum}};
  parts.bottom.emplace(bottom.mlp());
  parts.top.emplace(top.mlp());
  const Program program(std::move(parts));

  for (int64_t samples : {1, 3, 40, 300}) {
    std::vector<int64_t> offsets{0}, ids;
    for (int64_t bag = 0; bag < 3 * samples; ++bag) {
      for (int64_t i = random.below(4); i > 0; --i) ids.push_back(random.below(bag >= 2 * samples ? 7 : 50));
      offsets.push_back(static_cast<int64_t>(ids.size()));
    }
    Guarded<int64_t> indices(static_cast<int64_t>(ids.size())), ends(3 * samples + 1);
    std::copy(ids.begin(), ids.end(), indices.data());
    std::copy(offsets.begin(), offsets.end(), ends.data());
    Guarded<float> dense(samples * num_dense), scores(samples);
    for (int64_t i = 0; i < dense.size(); ++i) dense[i] = random.normal_ish();
    const Bags bags{
        {indices.data(), indices.size(), true}, {ends.data(), ends.size(), true}, nullptr, 3, samples};
    program.run({dense.data(), num_dense, bags}, scores.data(), threads);
    for (int64_t s = 0; s < samples; s += samples > 50 ? 17 : 1) {
      Row vectors = bottom(exact(dense.data() + s * num_dense, num_dense));
      for (int f = 0; f < 3; ++f) {
        const int64_t begin = offsets[f * samples + s], end = offsets[f * samples + s + 1];
        Row pooled(dim, {0, 0});
        for (int64_t i = begin; i < end; ++i) {
          const std::vector<Unit> decoded = f == 1 ? network.vector(ids[i]) : std::vector<Unit>(dim, {0, 0});
          for (int64_t d = 0; d < dim; ++d) {
            const double x = f == 1 ? decoded[d].value : tables[f / 2][ids[i] * dim + d];
            pooled[d].value += x;
            pooled[d].bound += decoded[d].bound + 4 * eps * std::fabs(x);
          }
        }
        for (Bounded& x : pooled)
          if (f == 2 && end > begin)
            x = {x.value / static_cast<double>(end - begin), x.bound + eps * std::fabs(x.value)};
        vectors.insert(vectors.end(), pooled.begin(), pooled.end());
      }
      Row in(vectors.begin(), vectors.begin() + dim);
      const Row products = expected_products(vectors, dim, false);
      in.insert(in.end(), products.begin(), products.end());
      const Bounded want = top(in)[0];
      c.close(scores[s], want.value, want.bound, samples, " samples: ", s);
    }
  }
}

}  // namespace

void dense_suite(const std::string& isa, int threads) {
  test_mlp(isa);
  test_bfloat16(isa);
  test_int8(isa);
  test_int8_is_exact(isa);
  test_interaction(isa);
  test_interaction_backward(isa);
  test_mix(isa);
  test_program(isa, threads);
}

}  // namespace mprec::test
