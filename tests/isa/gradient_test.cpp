// Table gradients and the optimizers applied with them, against their formulas in float64.
#include "gradient/gradient.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "check.h"
#include "guarded.h"
#include "registry.h"
#include "rounding.h"
#include "suites.h"

namespace mprec::test {
namespace {

constexpr double eps = std::numeric_limits<float>::epsilon();

const char* rule_name(Rule rule) {
  static const char* const names[] = {"assign", "sgd", "adagrad", "rowwise_adagrad", "adam"};
  return names[static_cast<int>(rule)];
}
constexpr Rule all_rules[] = {Rule::assign, Rule::sgd, Rule::adagrad, Rule::rowwise_adagrad, Rule::adam};

bool has_first(Rule rule) { return rule > Rule::sgd; }
bool has_second(Rule rule) { return rule == Rule::adam; }
int64_t first_columns(Rule rule, int64_t dim) { return rule == Rule::rowwise_adagrad ? 1 : dim; }

void fill(Guarded<float>& values, Random& random, bool positive) {
  for (int64_t i = 0; i < values.size(); ++i) {
    const float x = random.normal_ish();
    values[i] = positive ? x * x + 0.01f : x;
  }
}

// One table with its optimizer state, and a float64 copy of both.
struct Table {
  Rule rule;
  int64_t num_rows, dim, state_stride;
  Guarded<float> weight, first, second;
  std::vector<double> old_weight, old_first, old_second;

  Table(Rule rule, int64_t num_rows, int64_t dim, Random& random)
      : rule(rule),
        num_rows(num_rows),
        dim(dim),
        state_stride(first_columns(rule, dim)),
        weight(num_rows * dim),
        first(has_first(rule) ? num_rows * state_stride : 0),
        second(has_second(rule) ? num_rows * state_stride : 0) {
    fill(weight, random, false);
    fill(first, random, rule != Rule::adam);
    fill(second, random, true);
    old_weight.assign(weight.data(), weight.data() + weight.size());
    old_first.assign(first.data(), first.data() + first.size());
    old_second.assign(second.data(), second.data() + second.size());
  }

  TableRows rows() {
    return {weight.data(), has_first(rule) ? first.data() : nullptr,
            has_second(rule) ? second.data() : nullptr, dim, state_stride};
  }
};

struct Sum {
  double value = 0, magnitude = 0;
  int64_t terms = 0;
};
using RowSums = std::map<int64_t, std::vector<Sum>>;

// Checks that rows with a gradient moved as the rule says, and that the others did not move.
void check_table(Case& c, const Table& t, const RowSums& gradients, const Update& u) {
  for (int64_t row = 0; row < t.num_rows; ++row) {
    const auto found = gradients.find(row);
    double mean_square = 0, mean_square_bound = 0;
    if (found != gradients.end())
      for (const Sum& g : found->second) {
        mean_square += g.value * g.value / static_cast<double>(t.dim);
        mean_square_bound += 4 * eps * static_cast<double>(g.terms + t.dim) * g.magnitude * g.magnitude /
                             static_cast<double>(t.dim);
      }
    for (int64_t d = 0; d < t.dim; ++d) {
      const int64_t i = row * t.dim + d, s = row * t.state_stride + (t.state_stride == 1 ? 0 : d);
      const double old = t.old_weight[i];
      if (found == gradients.end()) {
        c.close(t.weight[i], old, 0, rule_name(t.rule), ": a row without gradient, ", row);
        if (has_first(t.rule)) c.close(t.first[s], t.old_first[s], 0, rule_name(t.rule), ": its state");
        continue;
      }
      const Sum& sum = found->second[d];
      const double g = sum.value, bound = eps * static_cast<double>(sum.terms + 2) * sum.magnitude;
      double want = 0, step = 0, step_bound = 0;
      if (t.rule == Rule::assign) {
        want = g;
        step_bound = bound;
      } else if (t.rule == Rule::sgd) {
        step = u.lr * g;
        step_bound = u.lr * bound;
      } else if (t.rule == Rule::adam) {
        const double first = t.old_first[s] + (1 - double{u.beta1}) * (g - t.old_first[s]),
                     second = t.old_second[s] + (1 - double{u.beta2}) * (g * g - t.old_second[s]);
        const double first_bound = bound + 4 * eps * (std::fabs(t.old_first[s]) + std::fabs(g)),
                     second_bound = 2 * std::fabs(g) * bound + 6 * eps * (t.old_second[s] + g * g);
        c.close(t.first[s], first, first_bound, "adam's first moment, row ", row, " column ", d);
        c.close(t.second[s], second, second_bound, "adam's second moment, row ", row, " column ", d);
        const double root = std::sqrt(second) + u.eps;
        step = u.lr * first / root;
        step_bound = u.lr * (first_bound / root +
                             std::fabs(first) / (root * root) * second_bound / (2 * std::sqrt(second)));
      } else {
        const bool rowwise = t.rule == Rule::rowwise_adagrad;
        const double square = t.old_first[s] + (rowwise ? mean_square : g * g);
        const double square_bound =
            4 * eps * square + (rowwise ? mean_square_bound : 2 * std::fabs(g) * bound);
        c.close(t.first[s], square, square_bound, rule_name(t.rule), "'s sum, row ", row, " column ", d);
        const double root = std::sqrt(square) + u.eps;
        step = u.lr * g / root;
        step_bound =
            u.lr * (bound / root + std::fabs(g) / (root * root) * square_bound / (2 * std::sqrt(square)));
      }
      if (t.rule != Rule::assign) want = double{u.keep} * old - step;
      c.close(t.weight[i], want, step_bound + 4 * eps * (std::fabs(old) + std::fabs(step)), rule_name(t.rule),
              " dim ", t.dim, " row ", row, " column ", d);
    }
  }
}

constexpr Update update_of(Rule rule) { return {rule, 0.3f, 1e-3f, 0.9f, 0.99f, 0.97f}; }

// The kernel itself, over sorted keys.
void test_apply(const std::string& isa) {
  Case c(isa + " gradient apply, every dim");
  Random random(11);
  for (int64_t dim = 1; dim <= 130; dim += dim < 36 ? 1 : 31)
    for (Rule rule : all_rules) {
      constexpr int64_t num_rows = 6, num_bags = 4, count = 23;
      Table table(rule, num_rows, dim, random);
      const bool scaled = dim % 2, compact = rule == Rule::assign && dim % 3 == 0;
      const int64_t grad_stride = dim + dim % 3;
      Guarded<float> grad(num_bags * grad_stride - dim % 3), scales(scaled ? count : 0), scratch(dim);
      fill(grad, random, false);
      fill(scales, random, false);
      Guarded<int32_t> bags(count);
      Guarded<uint64_t> keys(count);
      RowSums gradients;
      for (int64_t e = 0; e < count; ++e) {
        const int64_t row = random.below(num_rows - 1);  // the last row has none
        bags[e] = static_cast<int32_t>(random.below(num_bags));
        keys[e] = static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(e);
        auto& sums = gradients.try_emplace(row, dim).first->second;
        for (int64_t d = 0; d < dim; ++d) {
          const double x = grad[bags[e] * grad_stride + d] * double{scaled ? scales[e] : 1.0f};
          sums[d].value += x;
          sums[d].magnitude += std::fabs(x);
          ++sums[d].terms;
        }
      }
      std::sort(keys.data(), keys.data() + count);
      const RowGradients g{keys.data(), count,       bags.data(), scaled ? scales.data() : nullptr,
                           grad.data(), grad_stride, dim};
      kernels().gradient->apply(g, table.rows(), update_of(rule), compact, scratch.data());
      if (compact) {  // the rows lie side by side: put them where they belong
        std::vector<float> written(table.weight.data(), table.weight.data() + table.weight.size());
        std::copy(table.old_weight.begin(), table.old_weight.end(), table.weight.data());
        int64_t i = 0;
        for (const auto& [row, sums] : gradients)
          std::copy_n(written.begin() + dim * i++, dim, table.weight.data() + row * dim);
      }
      check_table(c, table, gradients, update_of(rule));
    }
}

// A step of SGD that moves a row of zeros, or of what does not move, to numbers of every size.
void test_rounding(const std::string& isa) {
  Case c(isa + " gradient rounding to 16 bits");
  Random random(17);
  for (const Type16& type : types16)
    for (int64_t dim = 1; dim <= 70; dim += dim < 36 ? 1 : 17)
      for (bool stochastic : {false, true}) {
        constexpr int64_t count = 12;
        Guarded<uint16_t> weight(count * dim);
        Guarded<float> grad(count * dim), scratch(dim);
        Guarded<int32_t> bags(count);
        Guarded<uint64_t> keys(count);
        for (int64_t r = 0; r < count; ++r) {
          bags[r] = static_cast<int32_t>(r);
          keys[r] = static_cast<uint64_t>(r) << 32 | static_cast<uint64_t>(r);
        }
        for (int64_t i = 0; i < count * dim; ++i) {
          const uint64_t bits = random.bits();
          const bool moves = random.below(4) > 0;
          weight[i] = moves ? 0 : static_cast<uint16_t>(bits >> 32);
          uint32_t target = static_cast<uint32_t>(bits);
          if (type.format == Format::f16 && i % 2)  // from 2^-30 to 2^18
            target = (target & 0x807FFFFF) | static_cast<uint32_t>(97 + random.below(48)) << 23;
          if (!moves) target = 0;
          std::memcpy(&grad[i], &target, sizeof target);
        }
        std::vector<float> sums(count * dim);  // row - lr * gradient, as float32 has it
        for (int64_t i = 0; i < count * dim; ++i)
          sums[i] = 1.0f * static_cast<float>(type.value(weight[i])) - 1.0f * grad[i];
        const RowGradients g{keys.data(), count, bags.data(), nullptr, grad.data(), dim, dim};
        const uint64_t key = random.bits() >> 1;
        const TableRows rows{weight.data(), nullptr, nullptr, dim, 0, type.format, stochastic, key};
        kernels().gradient->apply(g, rows, {Rule::sgd, 1.0f, 0, 0, 0}, false, scratch.data());
        for (int64_t i = 0; i < count * dim; ++i) {
          const double want =
              stochastic ? type.rounded(sums[i], noise(key, i / dim, i % dim)) : type.nearest(sums[i]);
          c.close(type.value(weight[i]), want, 0, traits(type.format).name, stochastic ? " noise" : "",
                  " dim ", dim, " column ", i % dim, " of ", sums[i]);
        }
      }
}

// Every rule on 16-bit rows: states as those of the float32 rows, to the bit, and weights as their rounding.
void test_rules16(const std::string& isa) {
  Case c(isa + " gradient apply to 16 bits, every rule");
  Random random(18);
  for (const Type16& type : types16)
    for (int64_t dim = 1; dim <= 130; dim += dim < 36 ? 1 : 31)
      for (Rule rule : all_rules) {
        if (rule == Rule::assign) continue;
        constexpr int64_t num_rows = 5, count = 9;
        Table table(rule, num_rows, dim, random), same(rule, num_rows, dim, random);
        Guarded<uint16_t> weight(num_rows * dim);
        for (int64_t i = 0; i < weight.size(); ++i) {
          weight[i] = static_cast<uint16_t>(type.format == Format::f16 ? 0x3000 + random.below(0x0C00)
                                                                       : 0x3E00 + random.below(0x180));
          table.weight[i] = static_cast<float>(type.value(weight[i]));
        }
        std::copy_n(table.first.data(), table.first.size(), same.first.data());
        std::copy_n(table.second.data(), table.second.size(), same.second.data());
        Guarded<float> grad(count * dim), scratch(dim);
        fill(grad, random, false);
        const bool narrow_grad = dim % 2;
        Guarded<uint16_t> grad16(narrow_grad ? grad.size() : 0);
        for (int64_t i = 0; i < grad16.size(); ++i) {
          grad16[i] =
              static_cast<uint16_t>((type.format == Format::f16 ? 0x2E00 : 0x3D00) + random.below(0x600));
          grad[i] = static_cast<float>(type.value(grad16[i]));
        }
        Guarded<int32_t> bags(count);
        Guarded<uint64_t> keys(count);
        for (int64_t e = 0; e < count; ++e) {
          bags[e] = static_cast<int32_t>(e);
          keys[e] = static_cast<uint64_t>(random.below(num_rows)) << 32 | static_cast<uint64_t>(e);
        }
        std::sort(keys.data(), keys.data() + count);
        const RowGradients g{keys.data(), count, bags.data(), nullptr, grad.data(), dim, dim};
        const uint64_t key = random.bits() >> 1;
        TableRows narrow = same.rows();
        narrow.weight = weight.data();
        narrow.format = type.format;
        narrow.stochastic = true;
        narrow.noise = key;
        const std::vector<uint16_t> before(weight.data(), weight.data() + weight.size());
        kernels().gradient->apply(g, table.rows(), update_of(rule), false, scratch.data());
        RowGradients given = g;
        if (narrow_grad) given.grad = grad16.data(), given.narrow = true;
        kernels().gradient->apply(given, narrow, update_of(rule), false, scratch.data());
        for (int64_t i = 0; i < weight.size(); ++i)
          c.close(type.value(weight[i]), type.rounded(table.weight[i], noise(key, i / dim, i % dim)), 0,
                  rule_name(rule), " ", traits(type.format).name, " dim ", dim, " row ", i / dim, " column ",
                  i % dim);
        for (int64_t i = 0; i < same.first.size(); ++i)
          c.close(same.first[i], table.first[i], 0, rule_name(rule), "'s first state");
        for (int64_t i = 0; i < same.second.size(); ++i)
          c.close(same.second[i], table.second[i], 0, rule_name(rule), "'s second state");
        c.expect(!std::equal(before.begin(), before.end(), weight.data()), "nothing was written");
      }
}

// The operator: bags of IDs in, two tables updated.
void test_update_tables(const std::string& isa, int threads) {
  Case c(isa + " gradient update_tables, " + std::to_string(threads) + " thread(s)");
  Random random(12);
  for (Rule rule : all_rules)
    for (Mode mode : {Mode::sum, Mode::mean})
      for (bool weighted : {false, true}) {
        if (rule == Rule::assign) continue;
        Table tables[] = {Table(rule, 40, 17, random), Table(rule, 9, 5, random)};
        const int64_t batch = threads > 1 ? 1100 : 30, total = 24;
        std::vector<int64_t> ids, offsets{0};
        for (const Table& t : tables)
          for (int64_t b = 0; b < batch; ++b) {
            for (int64_t i = random.below(5); i > 0; --i) ids.push_back(random.below(t.num_rows - 1));
            offsets.push_back(static_cast<int64_t>(ids.size()));
          }
        Guarded<float> grad(batch * total - 2), weights(weighted ? static_cast<int64_t>(ids.size()) : 0);
        fill(grad, random, false);
        fill(weights, random, false);
        PooledGradient pooled[2];
        int64_t column = 0;
        RowSums gradients[2];
        for (int t = 0; t < 2; ++t) {
          pooled[t] = {grad.data() + column, total, tables[t].dim, tables[t].num_rows};
          for (int64_t b = 0; b < batch; ++b) {
            const int64_t begin = offsets[t * batch + b], end = offsets[t * batch + b + 1];
            for (int64_t i = begin; i < end; ++i) {
              auto& sums = gradients[t].try_emplace(ids[i], tables[t].dim).first->second;
              const double scale = (weighted ? double{weights[i]} : 1.0) /
                                   (mode == Mode::mean ? static_cast<double>(end - begin) : 1.0);
              for (int64_t d = 0; d < tables[t].dim; ++d) {
                const double x = scale * grad[b * total + column + d];
                sums[d].value += x;
                sums[d].magnitude += std::fabs(x);
                ++sums[d].terms;
              }
            }
          }
          column += tables[t].dim;
        }
        const Bags bags{{ids.data(), static_cast<int64_t>(ids.size()), true},
                        {offsets.data(), static_cast<int64_t>(offsets.size()), true},
                        nullptr,
                        2,
                        batch,
                        weighted ? weights.data() : nullptr,
                        mode};
        const TableRows rows[] = {tables[0].rows(), tables[1].rows()};
        update_tables(bags, pooled, rows, update_of(rule), threads);
        for (int t = 0; t < 2; ++t) check_table(c, tables[t], gradients[t], update_of(rule));
      }
}

void test_sparse_gradient(const std::string& isa, int threads) {
  Case c(isa + " gradient sparse_gradient, " + std::to_string(threads) + " thread(s)");
  Random random(13);
  for (int64_t num_rows : {1, 3, 300, 70000})
    for (int64_t n : {0, 1, 33, threads > 1 ? 5000 : 200}) {
      constexpr int64_t dim = 9;
      std::vector<int64_t> ids, offsets;
      for (int64_t i = 0; i < n; ++i) {
        ids.push_back(random.below(num_rows));
        offsets.push_back(i);
      }
      offsets.push_back(n);
      Guarded<float> grad(n * dim), values(n * dim);
      Guarded<int64_t> rows(n);
      fill(grad, random, false);
      RowSums gradients;
      for (int64_t i = 0; i < n; ++i) {
        auto& sums = gradients.try_emplace(ids[i], dim).first->second;
        for (int64_t d = 0; d < dim; ++d) {
          sums[d].value += grad[i * dim + d];
          sums[d].magnitude += std::fabs(grad[i * dim + d]);
        }
      }
      const Bags bags{{ids.data(), n, true}, {offsets.data(), n + 1, true}, nullptr, 1, n};
      const int64_t count =
          sparse_gradient(bags, {grad.data(), dim, dim, num_rows}, rows.data(), values.data(), threads);
      c.expect(count == static_cast<int64_t>(gradients.size()), "distinct rows: ", count, " of ",
               gradients.size());
      int64_t i = 0;
      for (const auto& [row, sums] : gradients) {
        c.expect(rows[i] == row, "row ", i, ": ", rows[i], ", want ", row);
        for (int64_t d = 0; d < dim; ++d)
          c.close(values[i * dim + d], sums[d].value, eps * 40 * sums[d].magnitude, "row ", row, " column ",
                  d);
        ++i;
      }
    }
}

}  // namespace

void gradient_suite(const std::string& isa, int threads) {
  test_apply(isa);
  test_rounding(isa);
  test_rules16(isa);
  test_update_tables(isa, threads);
  test_sparse_gradient(isa, threads);
}

}  // namespace mprec::test
