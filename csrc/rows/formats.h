// The row formats: a line here and in rows.h, and a struct in a file of its own.
#pragma once
#include <cstdint>

// X(name, struct, the name that users write): what tables are stored in.
#define MPREC_ROW_FORMATS(X)          \
  X(f32, PlainRow<float>, float32)    \
  X(f16, PlainRow<Half>, float16)     \
  X(bf16, PlainRow<BFloat>, bfloat16) \
  X(int8, Int8Row, int8)              \
  X(int4, Int4Row, int4)              \
  X(float8, Float8Row, float8)
// And what other modules keep.
#define MPREC_ALL_FORMATS(X) \
  MPREC_ROW_FORMATS(X)       \
  X(code, CodeRow, code)

namespace mprec {

// How rows are stored. Results are never quantised.
#define MPREC_NAME(name, Row, users) name,
enum class Format : uint8_t { MPREC_ALL_FORMATS(MPREC_NAME) };
#undef MPREC_NAME

struct FormatTraits {
  const char* name;
  Format format;
  bool quantised;                   // rows of bytes, with a scale; else of numbers of that name's type
  int bits;                         // of a number
  int code;                         // what the argument `bits` of operators says, for quantised rows
  int64_t (*bytes)(int64_t dim);    // of a row
  int64_t (*dim)(int64_t columns);  // numbers in a row, from its bytes or numbers
  bool pairs;                       // two numbers in a byte: dim is even
};

// Of tables, the first ones.
constexpr int num_formats = 0
#define MPREC_COUNT(name, Row, users) +1
    MPREC_ROW_FORMATS(MPREC_COUNT);
#undef MPREC_COUNT

const FormatTraits& traits(Format);

}  // namespace mprec
