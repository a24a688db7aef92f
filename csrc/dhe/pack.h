// Weights into the panels that the kernels read (LayerView in dhe.h).
#pragma once
#include <cstdint>

#include "common/aligned.h"
#include "dhe/decoder.h"

namespace mprec {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

AlignedBuffer<char> pack_float32(const LinearWeights&);

bool fits_float16(const LinearWeights&);  // no finite value becomes infinite
AlignedBuffer<char> pack_float16(const LinearWeights&);

// Rounded to nearest, ties to even; beyond bfloat16's largest value, infinite.
AlignedBuffer<char> pack_bfloat16(const LinearWeights&);

// Weights as step * q, q from -127 to 127, and of each output the step and the sum of its q. Both are NaN if
// a weight of it is not finite.
AlignedBuffer<char> pack_int8(const LinearWeights&, float* steps, float* sums);

// For inputs +-magnitude, by four: the output is scale * sum entries + bias. Fills in scale and adds to bias.
// An output with a weight that is not finite becomes NaN.
AlignedBuffer<char> pack_tables(const LinearWeights&, float magnitude, float* scale, float* bias);

}  // namespace mprec
