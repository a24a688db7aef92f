// Errors that kernels' callers raise. The binding layer maps each to one Python exception.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace mprec {

// An ID outside [0, bound): IndexError and RuntimeError at once in Python (torch raises either, by path).
struct IdError : std::out_of_range {
  using std::out_of_range::out_of_range;
};
// Offsets that do not describe bags: ValueError and RuntimeError at once in Python.
struct OffsetsError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace mprec
