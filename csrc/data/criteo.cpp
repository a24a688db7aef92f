#include "data/criteo.h"

#include <array>
#include <cmath>
#include <cstring>

namespace mprec {
namespace {

constexpr uint8_t no_digit = 255;

constexpr std::array<uint8_t, 256> digits_of(int base) {
  std::array<uint8_t, 256> table{};
  for (auto& value : table) value = no_digit;
  for (int i = 0; i < 10; ++i) table['0' + i] = i;
  for (int i = 10; i < base; ++i) table['a' + i - 10] = table['A' + i - 10] = i;
  return table;
}

constexpr auto decimal = digits_of(10), hexadecimal = digits_of(16);
constexpr int max_decimals = 18, max_hexadecimals = 8;

float log1p_of(int64_t x) { return static_cast<float>(std::log1p(static_cast<double>(x))); }

// Counts are small: most of them are looked up.
struct Logarithms {
  std::array<float, 4096> values;
  Logarithms() {
    for (size_t x = 0; x < values.size(); ++x) values[x] = log1p_of(static_cast<int64_t>(x));
  }
  float operator()(int64_t x) const {
    if (x <= 0) return 0;
    return x < static_cast<int64_t>(values.size()) ? values[x] : log1p_of(x);
  }
};

// At a field's end, `at` points to the separator; false if the field is not what it should be.
bool read_integer(const char*& at, int64_t& value) {
  const bool negative = *at == '-';
  at += negative;
  const char* begin = at;
  value = 0;
  for (uint8_t digit; (digit = decimal[static_cast<uint8_t>(*at)]) != no_digit; ++at) {
    if (at - begin == max_decimals) return false;
    value = value * 10 + digit;
  }
  const bool empty = at == begin;
  if (negative) value = -value;
  return !(empty && negative);
}

bool read_category(const char*& at, const char* end, uint32_t& value, bool& missing) {
  const char* begin = at;
  value = 0;
  if (end - at >= max_hexadecimals) {  // the common case: all eight, which do not wait for each other
    uint32_t digit[max_hexadecimals], all = 0;
    for (int i = 0; i < max_hexadecimals; ++i) all |= digit[i] = hexadecimal[static_cast<uint8_t>(at[i])];
    if (all < 16) {
      for (int i = 0; i < max_hexadecimals; ++i) value |= digit[i] << (28 - 4 * i);
      at += max_hexadecimals;
      missing = false;
      return true;
    }
  }
  for (uint8_t digit; (digit = hexadecimal[static_cast<uint8_t>(*at)]) != no_digit; ++at) {
    if (at - begin == max_hexadecimals) return false;
    value = value << 4 | digit;
  }
  missing = at == begin;
  return true;
}

// One line, whose newline is at `end`; every loop stops there, as a newline is no digit.
bool read_line(const char* at, const char* end, const Logarithms& logarithm, const CriteoRows& rows,
               int64_t row) {
  if ((*at != '0' && *at != '1') || at[1] != '\t') return false;
  rows.labels[row] = static_cast<float>(*at - '0');
  at += 2;
  float* dense = rows.dense + row * criteo_integers;
  for (int i = 0; i < criteo_integers; ++i) {
    int64_t value;
    if (!read_integer(at, value) || *at != '\t') return false;
    ++at;
    dense[i] = logarithm(value);
  }
  uint32_t all_missing = 0;
  for (int c = 0; c < criteo_categories; ++c) {
    uint32_t value;
    bool missing;
    if (!read_category(at, end, value, missing)) return false;
    all_missing |= static_cast<uint32_t>(missing) << c;
    rows.categories[c * rows.capacity + row] = value;
    if (c + 1 < criteo_categories && *at++ != '\t') return false;
  }
  rows.missing[row] = all_missing;
  return at == end || (at + 1 == end && *at == '\r');
}

}  // namespace

int64_t read_criteo(std::string_view text, const CriteoRows& rows, int64_t& lines,
                    std::vector<BadLine>& bad) {
  static const Logarithms logarithm;
  const char* const begin = text.data();
  int64_t good = 0;
  lines = 0;
  for (const char *at = begin, *stop = begin + text.size(); at < stop; ++lines) {
    const char* end = static_cast<const char*>(std::memchr(at, '\n', stop - at));
    if (!end) break;
    if (read_line(at, end, logarithm, rows, good))
      ++good;
    else
      bad.push_back({lines, at - begin, end - begin});
    at = end + 1;
  }
  return good;
}

}  // namespace mprec
