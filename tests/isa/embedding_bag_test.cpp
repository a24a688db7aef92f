// The embedding-bag kernels against their definition in float64: for each bag
//   sum w_i x_i,   the same / (number of entries that are no padding),   max x_i;   zeros for an empty bag.
#include "embedding_bag/embedding_bag.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "float16.h"
#include "guarded.h"
#include "registry.h"
#include "rows/rows.h"
#include "suites.h"

namespace mprec::test {
namespace {

const char* mode_name(Mode mode) { return mode == Mode::sum ? "sum" : mode == Mode::mean ? "mean" : "max"; }

const char* format_name(Format format) { return traits(format).name; }

int64_t item_bytes(Format format) { return format == Format::f32 ? 4 : 2; }  // of values that stand alone

template <class T>
void append(std::vector<char>& bytes, T value) {
  const char* p = reinterpret_cast<const char*>(&value);
  bytes.insert(bytes.end(), p, p + sizeof value);
}

uint16_t bfloat16_bits(float x) {  // of a value that bfloat16 can hold
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// Rows in one of the formats, and what they stand for.
struct Table {
  Format format;
  int64_t num_rows, dim, row_bytes;
  Guarded<char> rows;
  std::vector<double> values, magnitudes;  // [num_rows, dim]; magnitude: of the terms that make a value

  // `gap` elements between rows belong to nobody.
  Table(int64_t num_rows, int64_t dim, int64_t gap, Edge edge, Random& random, Format format = Format::f32)
      : format(format),
        num_rows(num_rows),
        dim(dim),
        row_bytes(traits(format).bytes(dim) + gap * (format >= Format::int8 ? 1 : item_bytes(format))),
        rows(num_rows ? (num_rows - 1) * row_bytes + traits(format).bytes(dim) : 0, edge) {
    for (int64_t r = 0; r < num_rows; ++r) {
      const std::vector<char> row = make_row(random);
      std::copy(row.begin(), row.end(), rows.data() + r * row_bytes);
    }
  }

 private:
  void add(double value, double magnitude) {
    values.push_back(value);
    magnitudes.push_back(magnitude);
  }

  std::vector<char> make_row(Random& random) {
    std::vector<char> row;
    const auto scale = static_cast<float>(1 + random.below(7)) / 64.0f,
               bias = -0.5f * scale * static_cast<float>(random.below(32));
    for (int64_t d = 0; d < dim; ++d) {
      if (format == Format::int8 || format == Format::int4) {
        const int64_t q = random.below(format == Format::int8 ? 256 : 16);
        add(scale * static_cast<double>(q) + bias, scale * static_cast<double>(q) - bias);
        if (format == Format::int8)
          append(row, static_cast<uint8_t>(q));
        else if (d % 2 == 0)
          append(row, static_cast<uint8_t>(q));
        else
          row.back() = static_cast<char>(row.back() | q << 4);
        continue;
      }
      if (format == Format::float8) {
        const auto size = static_cast<uint8_t>(random.below(127));  // 127 is NaN
        const bool negative = random.below(2);
        const double number = size < 8 ? std::ldexp(size, -9) : std::ldexp(8 + size % 8, size / 8 - 10),
                     value = scale * (negative ? -number : number);
        add(value, std::fabs(value));
        append(row, static_cast<uint8_t>(size | negative << 7));
        continue;
      }
      const float x = random.normal_ish();
      if (format == Format::f32) append(row, x);
      if (format == Format::f16) append(row, static_cast<Float16>(x));
      const float shorter = static_cast<float>(static_cast<int>(x * 64)) / 64.0f;  // 7 significant bits
      if (format == Format::bf16) append(row, bfloat16_bits(shorter));
      const double value = format == Format::f32   ? x
                           : format == Format::f16 ? static_cast<Float16>(x)
                                                   : shorter;
      add(value, std::fabs(value));
    }
    if (format == Format::int8) append(row, scale), append(row, bias);
    if (format == Format::float8) append(row, scale);
    if (format == Format::int4)
      append(row, static_cast<Float16>(scale)), append(row, static_cast<Float16>(bias));
    return row;
  }
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
  int64_t gap = 0;  // elements between rows, and between rows of the result
  Format out_format = Format::f32;
  int threads = 0;  // 0: the kernel itself, up to a cut and from there; else the operator's driver
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
  constexpr char untouched = 0x5A;
  const int64_t item = item_bytes(o.out_format);
  Guarded<char> out(std::max<int64_t>(0, batch * total - o.gap) * item, o.edge);
  std::fill(out.data(), out.data() + out.size(), untouched);
  std::vector<PooledTable> pooled;
  int64_t column = 0, widest = 0;
  for (int64_t t = 0; t < num_tables; ++t) {
    const Table& table = *tables[t];
    pooled.push_back({table.rows.data(), table.num_rows, table.dim, table.row_bytes, t * batch,
                      reinterpret_cast<float*>(out.data() + column * item), total, table.format,
                      o.out_format});
    column += table.dim + o.gap;
    widest = std::max(widest, table.dim);
  }
  Guarded<float> scratch(o.out_format == Format::f32 ? 0 : widest, o.edge);
  pooled.push_back({});
  pooled.back().first_bag = num_tables * batch;
  const Bags bags{guarded_indices.view(),
                  guarded_offsets.view(),
                  nullptr,
                  num_tables,
                  batch,
                  o.weighted ? weights.data() : nullptr,
                  o.mode,
                  o.padded ? padding : -1};
  PoolingRequest request{bags, pooled.data()};
  if (o.threads) {
    embedding_bag_forward(request, o.threads);
  } else {
    request.block_bags = 1 + random.below(batch + 2);
    const int64_t blocks = batch / request.block_bags + 1, block = random.below(blocks),
                  table = random.below(num_tables);
    const int64_t first = request.block_begin(pooled[table], block),
                  size = request.block_begin(pooled[table], block + 1) - first;
    const Cut start{0, 0, 0}, middle{block, table, first + random.below(size + 1)}, finish{blocks, 0, 0};
    const auto forward = kernels().embedding_bag->forward;
    float* const one_result = scratch.size() ? scratch.data() : nullptr;
    c.expect(forward(request, start, middle, one_result), "first range was refused");
    c.expect(forward(request, middle, finish, one_result), "second range was refused");
  }

  // A 16-bit result is rounded once more.
  const double rounding = o.out_format == Format::f32 ? 0 : o.out_format == Format::f16 ? 0x1p-11 : 0x1p-8;
  const auto value_at = [&](int64_t element) -> double {
    const char* p = out.data() + element * item;
    if (o.out_format == Format::f32) return *reinterpret_cast<const float*>(p);
    if (o.out_format == Format::f16) return *reinterpret_cast<const Float16*>(p);
    const uint32_t bits = static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(p)) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  column = 0;
  for (int64_t t = 0; t < num_tables; ++t) {
    const Table* const table = tables[t];
    const char* const name = format_name(table->format);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t end = ends[t * batch + b], begin = end - lengths[b];
      for (int64_t d = 0; d < table->dim; ++d) {
        double sum = 0, magnitude = 0, largest = -HUGE_VAL;
        int64_t count = 0;
        for (int64_t i = begin; i < end; ++i) {
          if (o.padded && indices[i] == padding) continue;
          const double x = table->values[indices[i] * table->dim + d], w = o.weighted ? weights[i] : 1.0;
          sum += w * x;
          magnitude += std::fabs(w) * table->magnitudes[indices[i] * table->dim + d];
          largest = std::max(largest, x);
          ++count;
        }
        const double got = value_at(b * total + column + d);
        // Each of the additions and products rounds once, relative to partial sums <= magnitude.
        const double eps = std::numeric_limits<float>::epsilon(), n = static_cast<double>(count);
        if (count == 0)
          c.close(got, 0, 0, mode_name(o.mode), " of an empty bag ", b);
        else if (o.mode == Mode::max)
          c.close(got, largest,
                  rounding * std::fabs(largest) + (table->format < Format::int8 ? 0 : eps * magnitude), name,
                  " max dim ", table->dim, " bag ", b, " column ", d);
        else {
          const double want = o.mode == Mode::mean ? sum / n : sum;
          c.close(got, want,
                  eps * (n + 2) * magnitude / (o.mode == Mode::mean ? n : 1.0) + rounding * std::fabs(want),
                  name, ' ', mode_name(o.mode), " dim ", table->dim, " bag ", b, " column ", d);
        }
      }
      const bool last = t == num_tables - 1 && b == batch - 1;
      const int64_t gap_begin = (b * total + column + table->dim) * item;
      for (int64_t i = 0; !last && i < o.gap * item; ++i)
        c.expect(out[gap_begin + i] == untouched, name, " dim ", table->dim,
                 ": wrote beyond its columns, bag ", b);
    }
    column += table->dim + o.gap;
  }
}

const std::vector<int64_t> ragged{3, 0, 1, 17, 2, 40, 0};

// Widths that fill any number of registers, whole or in part, and wider ones.
std::vector<int64_t> all_dims() {
  std::vector<int64_t> dims{256, 260};
  for (int64_t dim = 1; dim <= 130; ++dim) dims.push_back(dim);
  return dims;
}

void test_dims(const std::string& isa, Mode mode, bool weighted) {
  Case c(isa + " embedding_bag " + mode_name(mode) + (weighted ? " weighted" : "") + ", every dim");
  Random random(1);
  for (int64_t dim : all_dims()) {
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

void test_formats(const std::string& isa) {
  for (Format format : {Format::f16, Format::bf16, Format::int8, Format::int4, Format::float8}) {
    Case c(isa + " embedding_bag, rows in " + format_name(format));
    Random random(9);
    for (int64_t dim : all_dims()) {
      if (format == Format::int4 && dim % 2) continue;
      for (Mode mode : {Mode::sum, Mode::mean, Mode::max}) {
        Options o;
        o.mode = mode;
        o.weighted = mode != Mode::max && dim % 4 == 2;
        o.padded = dim % 3 == 1;
        o.wide_indices = dim % 8 < 4;
        o.edge = dim % 5 < 3 ? Edge::end : Edge::begin;
        o.gap = dim % 3;
        Table table(9, dim, o.gap, o.edge, random, format);
        check_forward(c, {&table}, {3, 0, 1, 18}, o, random);
      }
    }
  }
  for (Format out_format : {Format::f16, Format::bf16}) {
    Case c(isa + " embedding_bag, result in " + format_name(out_format));
    Random random(10);
    for (int64_t dim : {1, 3, 8, 15, 16, 17, 33, 64, 129})
      for (Mode mode : {Mode::sum, Mode::mean, Mode::max}) {
        Options o;
        o.mode = mode;
        o.out_format = out_format;
        o.gap = dim % 3;
        Table table(9, dim, 0, o.edge, random, dim % 2 ? Format::f32 : out_format);
        check_forward(c, {&table}, {3, 0, 1, 18}, o, random);
      }
  }
}

void test_many_tables(const std::string& isa, int threads) {
  Case c(isa + " embedding_bag, many tables, driver with " + std::to_string(threads) + " thread(s)");
  Random random(2);
  Table a(7, 16, 0, Edge::end, random), b(2, 1, 0, Edge::end, random),
      e(50, 33, 1, Edge::end, random, Format::int8), f(5, 64, 0, Edge::end, random, Format::f16);
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
  const auto batch = static_cast<int64_t>(offsets.size()) - 1;
  Guarded<float> out(batch * dim);
  PooledTable pooled[2] = {{table.rows.data(), num_rows, dim, table.row_bytes, 0, out.data(), dim}, {}};
  pooled[1].first_bag = batch;
  for (Mode mode : {Mode::sum, Mode::mean, Mode::max})
    for (int64_t padding : {-1, 1}) {
      const PoolingRequest request{{ids.view(), ends.view(), nullptr, 1, batch, nullptr, mode, padding},
                                   pooled};
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
  test_formats(isa);
  test_many_tables(isa, threads);
  test_refusals(isa);
}

}  // namespace mprec::test
