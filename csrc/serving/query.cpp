#include "serving/query.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace mprec {
namespace {

// 10^k is exact in a double up to here, as are integers below 2^53: one multiplication or division of the two
// then gives the nearest double (Clinger, "How to read floating point numbers accurately", 1990).
constexpr int max_exact_power = 22;
constexpr double powers[max_exact_power + 1] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                                1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                                1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
constexpr uint64_t max_exact_integer = 1ull << 53;
constexpr int max_digits = 18;  // that fit 64 bits whatever they are

class Reader {
 public:
  Reader(std::string_view body, const QueryShape& shape, Query& out)
      : p_(body.data()), end_(p_ + body.size()), shape_(shape), out_(out) {}

  bool read() {
    if (!take('{')) return false;
    bool has_ids = false, has_dense = false, has_sla = false;
    do {
      if (key("\"ids\"")) {
        if (has_ids || !ids()) return false;
        has_ids = true;
      } else if (key("\"dense\"")) {
        if (has_dense || !dense()) return false;
        has_dense = true;
      } else if (key("\"sla_ms\"")) {
        if (has_sla || !number(out_.sla_ms) || !(out_.sla_ms > 0)) return false;
        has_sla = true;
      } else {
        return false;
      }
    } while (take(','));
    if (!take('}')) return false;
    space();
    const auto numbers = static_cast<int64_t>(out_.dense.size());
    return p_ == end_ && has_ids && out_.samples > 0 && has_dense == (shape_.num_dense > 0) &&
           numbers == out_.samples * shape_.num_dense;
  }

 private:
  void space() {
    while (*p_ == ' ' || *p_ == '\n' || *p_ == '\r' || *p_ == '\t') ++p_;
  }

  bool take(char c) {
    if (*p_ != c) {
      space();
      if (*p_ != c) return false;
    }
    ++p_;
    return true;
  }

  bool key(std::string_view name) {
    space();
    if (std::string_view(p_, end_ - p_).substr(0, name.size()) != name) return false;
    p_ += name.size();
    return take(':');
  }

  static unsigned digit(char c) { return static_cast<unsigned>(c) - '0'; }  // above 9 for any other character

  bool id(int64_t vocabulary) {
    space();
    const char* start = p_;
    uint64_t value = 0;
    while (digit(*p_) <= 9) value = 10 * value + digit(*p_++);
    const auto digits = p_ - start;
    if (digits < 1 || digits > max_digits || (digits > 1 && *start == '0')) return false;
    if (value >= static_cast<uint64_t>(vocabulary)) return false;
    if (static_cast<int64_t>(out_.ids.size()) >= shape_.max_ids) return false;
    out_.ids.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool bag(int64_t vocabulary) {
    const size_t before = out_.ids.size();
    if (out_.lengths.empty()) out_.lengths.assign(bags_, 1);  // those before had one ID each
    if (!take(']')) {
      do {
        if (!id(vocabulary)) return false;
      } while (take(','));
      if (!take(']')) return false;
    }
    out_.lengths.push_back(static_cast<int64_t>(out_.ids.size() - before));
    has_lengths_ = true;
    return true;
  }

  bool ids() {
    if (!take('[')) return false;
    do {
      if (!take('[') || ++out_.samples > shape_.max_samples) return false;
      for (int64_t t = 0; t < shape_.features; ++t) {
        if (t && !take(',')) return false;
        if (take('[')) {
          if (!bag(shape_.vocabularies[t])) return false;
        } else {
          if (!id(shape_.vocabularies[t])) return false;
          if (has_lengths_) out_.lengths.push_back(1);
        }
        ++bags_;
      }
      if (!take(']')) return false;
    } while (take(','));
    return take(']');
  }

  bool dense() {
    if (!take('[')) return false;
    const auto most = static_cast<size_t>(shape_.max_samples * shape_.num_dense);
    do {
      if (!take('[')) return false;
      for (int64_t i = 0; i < shape_.num_dense; ++i) {
        double value;
        if ((i && !take(',')) || !number(value) || out_.dense.size() >= most) return false;
        const auto rounded = static_cast<float>(value);
        if (!std::isfinite(rounded)) return false;
        out_.dense.push_back(rounded);
      }
      if (!take(']')) return false;
    } while (take(','));
    return take(']');
  }

  // A number of JSON's grammar, which is narrower than that of from_chars.
  bool number(double& value) {
    space();
    const char* start = p_;
    const bool negative = *p_ == '-';
    p_ += negative;
    const char* whole = p_;
    uint64_t mantissa = 0;
    while (digit(*p_) <= 9) mantissa = 10 * mantissa + digit(*p_++);
    auto digits = p_ - whole;
    if (digits < 1 || (digits > 1 && *whole == '0')) return false;
    int exponent = 0;
    if (*p_ == '.') {
      const char* fraction = ++p_;
      while (digit(*p_) <= 9) mantissa = 10 * mantissa + digit(*p_++);
      const auto more = p_ - fraction;
      if (more < 1) return false;
      digits += more;
      exponent = more > max_digits ? max_exact_power + 1 : -static_cast<int>(more);
    }
    bool plain = digits <= max_digits && mantissa <= max_exact_integer && exponent >= -max_exact_power;
    if (*p_ == 'e' || *p_ == 'E') {
      ++p_;
      p_ += *p_ == '+' || *p_ == '-';
      if (digit(*p_) > 9) return false;
      while (digit(*p_) <= 9) ++p_;
      plain = false;
    }
    if (plain) {
      value = static_cast<double>(mantissa) / powers[-exponent];
      if (negative) value = -value;
      return true;
    }
    const auto [stop, error] = std::from_chars(start, p_, value);
    return error == std::errc() && stop == p_;
  }

  const char *p_, *end_;
  const QueryShape& shape_;
  Query& out_;
  int64_t bags_ = 0;
  bool has_lengths_ = false;
};

}  // namespace

bool read_query(std::string_view body, const QueryShape& shape, Query& out) {
  out = {};
  const size_t likely = body.size() / 8;  // numbers, of eight characters with their comma
  out.ids.reserve(likely);
  if (shape.num_dense) out.dense.reserve(likely);
  return Reader(body, shape, out).read();
}

void write_bags(const Query& query, int64_t features, int64_t* ids, int64_t* offsets) {
  const int64_t samples = query.samples;
  if (query.lengths.empty()) {
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t t = 0; t < features; ++t) ids[t * samples + b] = query.ids[b * features + t];
    for (int64_t i = 0; i <= features * samples; ++i) offsets[i] = i;
    return;
  }
  offsets[0] = 0;  // offsets[t, b] is where the bag ends, until its IDs are in their places
  for (int64_t t = 0, total = 0; t < features; ++t)
    for (int64_t b = 0; b < samples; ++b)
      offsets[t * samples + b + 1] = total += query.lengths[b * features + t];
  const int64_t* from = query.ids.data();
  for (int64_t b = 0; b < samples; ++b)
    for (int64_t t = 0; t < features; ++t) {
      const int64_t length = query.lengths[b * features + t];
      std::copy(from, from + length, ids + offsets[t * samples + b]);
      from += length;
    }
}

}  // namespace mprec
