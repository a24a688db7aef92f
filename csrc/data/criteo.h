// Criteo's text: label \t 13 integers \t 26 hexadecimal categories, any of the 39 may be missing.
//
// One pass over the bytes, field by field, a digit a step: 1 to 2 cycles a byte, so that a core reads about a
// GB/s. A line is good or not; why it is not is said by Python, which reads bad lines once more.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace mprec {

constexpr int criteo_integers = 13, criteo_categories = 26;

// Where good lines go, row after row.
struct CriteoRows {
  int64_t capacity;      // rows there is room for
  float* labels;         // [capacity] 0 or 1
  float* dense;          // [capacity, 13] log(1 + x); 0 where x is missing or negative
  uint32_t* categories;  // [26, capacity]; 0 where missing
  uint32_t* missing;     // [capacity] bit c: category c is missing
};

struct BadLine {
  int64_t line, begin, end;  // counted from 0; bytes of the text, without the newline
};

// Reads whole lines (the text ends with a newline); returns the number of good ones. `lines`: of all.
// There is room for every line.
int64_t read_criteo(std::string_view text, const CriteoRows& rows, int64_t& lines, std::vector<BadLine>& bad);

}  // namespace mprec
