// IDs and offsets as callers have them.
#pragma once
#include <cstdint>

namespace mprec {

// int32 or int64 values, read as int64. Always inlined: files compiled for several ISAs must not share a
// copy.
struct Integers {
  const void* data;
  int64_t size;
  bool wide;  // int64
  __attribute__((always_inline)) int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace mprec
