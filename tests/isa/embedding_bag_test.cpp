// The embedding-bag kernels against their definition in float64: for each bag
//   sum w_i x_i,   the same / (number of entries that are no padding),   max x_i;   zeros for an empty bag.
#include "embedding_bag/embedding_bag.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "guarded.h"
#include "registry.h"
#include "suites.h"

namespace mprec::test {
namespace {

const char* mode_name(Mode mode) { return mode == Mode::sum ? "sum" : mode == Mode::mean ? "mean" : "max"; }

struct Table {
  Guarded<float> rows;
  int64_t num_rows, dim, row_floats;  // row_floats - dim values between rows belong to nobody
  Table(int64_t num_rows, int64_t dim, int64_t gap, Edge edge, Random& random)
      : rows(num_rows ? num_rows * (dim + gap) - gap : 0, edge),
        num_rows(num_rows),
        dim(dim),
        row_floats(dim + gap) {
    for (int64_t i = 0; i < rows.size(); ++i)
      rows[i] = i % row_floats < dim ? random.normal_ish() : std::numeric_limits<float>::quiet_NaN();
  }
  const float* row(int64_t id) const { return rows.data() + id * row_floats; }
};

// int32 or int64 values in memory that ends with them.
class GuardedIntegers {
 public:
  GuardedIntegers(const std::vector<int64_t>& values, bool wide)
      : wide_(wide),
        size_(static_cast<int64_t>(values.size())),
        narrow_(wide ? 0 : size_),
        full_(wide ? size_ : 0) {
    for (int64_t i = 0; i < size_; ++i)
      if (wide)
        full_[i] = values[i];
      else
        narrow_[i] = static_cast<int32_t>(values[i]);
  }
  Integers view() const {
    return {wide_ ? static_cast<const void*>(full_.data()) : narrow_.data(), size_, wide_};
  }

 private:
  bool wide_;
  int64_t size_;
  Guarded<int32_t> narrow_;
  Guarded<int64_t> full_;
};

struct Options {
  Mode mode = Mode::sum;
  bool weighted = false, padded = false, wide_indices = true, wide_offsets = true;
  bool implicit_end = false;  // the offsets lack their last entry
  Edge edge = Edge::end;
  int64_t gap = 0;  // floats between rows, and between rows of the result
  int threads = 0;  // 0: the kernel itself, over two ranges of bags; else the operator's driver
};

// Pools `lengths` IDs per bag from each of the tables (all have as many bags) and checks every output.
void check_forward(Case& c, const std::vector<Table*>& tables, const std::vector<int64_t>& lengths,
                   const Options& o, Random& random) {
  const auto batch = static_cast<int64_t>(lengths.size());
  const auto num_tables = static_cast<int64_t>(tables.size());
  constexpr int64_t padding = 1;
  std::vector<int64_t> indices, offsets{0};
  int64_t total = 0;
  for (const Table* t : tables) {
    for (int64_t length : lengths) {
      for (int64_t i = 0; i < length; ++i)
        indices.push_back(o.padded && random.below(3) == 0 ? padding : random.below(t->num_rows));
      offsets.push_back(static_cast<int64_t>(indices.size()));
    }
    total += t->dim + o.gap;
  }
  const std::vector<int64_t> ends(offsets.begin() + 1, offsets.end());
  if (o.implicit_end) offsets.pop_back();
  const GuardedIntegers guarded_indices(indices, o.wide_indices), guarded_offsets(offsets, o.wide_offsets);
  Guarded<float> weights(o.weighted ? static_cast<int64_t>(indices.size()) : 0, o.edge);
  for (int64_t i = 0; i < weights.size(); ++i) weights[i] = random.normal_ish();

  // The result's last row lacks its gap, so that the last value written is the last that may be.
  constexpr float untouched = -12345.0f;
  Guarded<float> out(std::max<int64_t>(0, batch * total - o.gap), o.edge);
  std::fill(out.data(), out.data() + out.size(), untouched);
  std::vector<Feature> features;
  int64_t column = 0;
  for (int64_t t = 0; t < num_tables; ++t) {
    const Table& table = *tables[t];
    features.push_back({reinterpret_cast<const char*>(table.rows.data()), table.num_rows, table.dim,
                        table.row_floats * static_cast<int64_t>(sizeof(float)), t * batch,
                        out.data() + column, total});
    column += table.dim + o.gap;
  }
  features.push_back({});
  features.back().first_bag = num_tables * batch;
  const BagRequest request{guarded_indices.view(),
                           guarded_offsets.view(),
                           features.data(),
                           num_tables,
                           num_tables * batch,
                           o.weighted ? weights.data() : nullptr,
                           o.mode,
                           o.padded ? padding : -1};
  if (o.threads) {
    embedding_bag_forward(request, o.threads);
  } else {
    const int64_t middle = request.num_bags / 3;
    c.expect(kernels().embedding_bag->forward(request, 0, middle, nullptr), "first range was refused");
    c.expect(kernels().embedding_bag->forward(request, middle, request.num_bags, nullptr),
             "second range was refused");
  }

  for (int64_t t = 0; t < num_tables; ++t)
    for (int64_t b = 0; b < batch; ++b) {
      const Table& table = *tables[t];
      const float* result = features[t].out + b * total;
      const int64_t end = ends[t * batch + b], begin = end - lengths[b];
      for (int64_t d = 0; d < table.dim; ++d) {
        double sum = 0, magnitude = 0, largest = -HUGE_VAL;
        int64_t count = 0;
        for (int64_t i = begin; i < end; ++i) {
          if (o.padded && indices[i] == padding) continue;
          const double x = table.row(indices[i])[d], w = o.weighted ? weights[i] : 1.0;
          sum += w * x;
          magnitude += std::fabs(w * x);
          largest = std::max(largest, x);
          ++count;
        }
        // Each of the `count` additions and products rounds once, relative to partial sums <= magnitude.
        const double eps = std::numeric_limits<float>::epsilon();
        if (count == 0)
          c.close(result[d], 0, 0, mode_name(o.mode), " of an empty bag ", b);
        else if (o.mode == Mode::max)
          c.close(result[d], largest, 0, "max dim ", table.dim, " bag ", b, " column ", d);
        else
          c.close(result[d], o.mode == Mode::mean ? sum / static_cast<double>(count) : sum,
                  eps * static_cast<double>(count + 1) * magnitude /
                      (o.mode == Mode::mean ? static_cast<double>(count) : 1.0),
                  mode_name(o.mode), " dim ", table.dim, " bag ", b, " column ", d);
      }
      const bool last = t == num_tables - 1 && b == batch - 1;
      for (int64_t d = table.dim; !last && d < table.dim + o.gap; ++d)
        c.expect(result[d] == untouched, "dim ", table.dim, ": wrote beyond its columns at bag ", b);
    }
}

const std::vector<int64_t> ragged{3, 0, 1, 17, 2, 40, 0};

void test_dims(const std::string& isa, Mode mode, bool weighted) {
  Case c(isa + " embedding_bag " + mode_name(mode) + (weighted ? " weighted" : "") + ", every dim");
  Random random(1);
  std::vector<int64_t> dims;
  for (int64_t dim = 1; dim <= 36; ++dim) dims.push_back(dim);
  for (int64_t dim : {47, 63, 64, 65, 96, 100, 127, 128, 129, 130, 256, 260}) dims.push_back(dim);
  for (int64_t dim : dims) {
    Options o;
    o.mode = mode;
    o.weighted = weighted;
    o.padded = dim % 3 == 1;
    o.wide_indices = dim % 2;
    o.wide_offsets = dim % 4 < 2;
    o.implicit_end = dim % 5 == 0;
    o.edge = dim % 7 < 4 ? Edge::end : Edge::begin;
    o.gap = dim % 3;
    Table table(11, dim, o.gap, o.edge, random);
    check_forward(c, {&table}, dim < 64 ? ragged : std::vector<int64_t>{1, 0, 18}, o, random);
  }
}

void test_many_tables(const std::string& isa, int threads) {
  Case c(isa + " embedding_bag, many tables, driver with " + std::to_string(threads) + " thread(s)");
  Random random(2);
  Table a(7, 16, 0, Edge::end, random), b(2, 1, 0, Edge::end, random), e(50, 33, 1, Edge::end, random),
      f(5, 64, 0, Edge::end, random);
  for (Mode mode : {Mode::sum, Mode::mean, Mode::max}) {
    Options o;
    o.mode = mode;
    o.threads = threads;
    o.gap = 2;
    check_forward(c, {&a, &b, &e, &f}, ragged, o, random);
    check_forward(c, {&a}, std::vector<int64_t>(threads > 1 ? 3000 : 100, 2), o,
                  random);  // enough to be split
    check_forward(c, {&b, &a, &a}, {}, o, random);
    check_forward(c, {&b, &a}, {0, 0}, o, random);
  }
}

template <class Error>
void expect_refusal(Case& c, const std::vector<int64_t>& indices, const std::vector<int64_t>& offsets,
                    bool wide_indices, int64_t num_rows = 4) {
  constexpr int64_t dim = 5;
  Random random(3);
  Table table(num_rows, dim, 0, Edge::end, random);
  const GuardedIntegers ids(indices, wide_indices), ends(offsets, true);
  const auto bags = static_cast<int64_t>(offsets.size()) - 1;
  Guarded<float> out(bags * dim);
  Feature features[2] = {
      {reinterpret_cast<const char*>(table.rows.data()), num_rows, dim, dim * 4, 0, out.data(), dim}, {}};
  features[1].first_bag = bags;
  for (Mode mode : {Mode::sum, Mode::mean, Mode::max})
    for (int64_t padding : {-1, 1}) {
      const BagRequest request{ids.view(), ends.view(), features, 1, bags, nullptr, mode, padding};
      const auto where = [&] {
        std::string text;
        for (int64_t i : indices) text += std::to_string(i) + ' ';
        text += "at offsets ";
        for (int64_t i : offsets) text += std::to_string(i) + ' ';
        return text;
      };
      try {
        embedding_bag_forward(request, 1);
        c.expect(false, "accepted ", where());
      } catch (const Error&) {
        c.expect(true);
      } catch (const std::exception& other) {
        c.expect(false, where(), "raised ", other.what());
      }
    }
}

void test_refusals(const std::string& isa) {
  Case c(isa + " embedding_bag refuses bad indices and offsets");
  constexpr int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  for (bool wide : {false, true})
    for (int64_t bad : {int64_t{-1}, int64_t{4}, int64_t{2147483647}, int64_t{-2147483648}})
      for (int64_t at : {0, 1, 20, 39}) {
        std::vector<int64_t> ids(40, 2);
        ids[at] = bad;
        expect_refusal<IdError>(c, ids, {0, 7, 7, 30, 40}, wide);
      }
  for (int64_t bad : {least, most, int64_t{1} << 32, int64_t{1} << 62})
    expect_refusal<IdError>(c, {0, bad, 1}, {0, 3}, true);
  expect_refusal<IdError>(c, {0}, {0, 1}, true, 0);  // a table without rows
  for (const std::vector<int64_t>& offsets : std::vector<std::vector<int64_t>>{{0, 2, 1, 3},
                                                                               {1, 2, 3},
                                                                               {-1, 2, 3},
                                                                               {0, -1, 3},
                                                                               {0, 4, 3},
                                                                               {0, 1, 2},
                                                                               {0, 1, 4},
                                                                               {0, most, 3},
                                                                               {0, least, 3},
                                                                               {least, 0, 3},
                                                                               {0, 3, most},
                                                                               {0, 1, least}})
    expect_refusal<OffsetsError>(c, {0, 1, 2}, offsets, true);
}

}  // namespace

void embedding_bag_suite(const std::string& isa, int threads) {
  for (Mode mode : {Mode::sum, Mode::mean, Mode::max}) test_dims(isa, mode, false);
  for (Mode mode : {Mode::sum, Mode::mean}) test_dims(isa, mode, true);
  test_many_tables(isa, threads);
  test_refusals(isa);
}

}  // namespace mprec::test
