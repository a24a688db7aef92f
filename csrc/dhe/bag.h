// Bags of IDs to pooled vectors, for one or several features, over threads.
#pragma once
#include <cstdint>
#include <vector>

#include "bags/bags.h"
#include "dhe/dhe.h"

namespace mprec {

enum class Dedupe { automatic, never, always };

// Bags of IDs to decode. A feature's vector of bag b goes to out[b * out_stride + its column] and on;
// features have `batch` bags each.
struct DheRequest {
  Bags bags;
  float* out;
  int64_t out_stride;
  int64_t largest_id = INT64_MAX;  // that is allowed
};

// What decodes one feature.
struct DheFeature {
  DecoderView decoder;
  int64_t column;  // of `out`
};

// What a forward pass of training keeps of one feature of n entries for its backward pass; the caller's.
struct KeptActivations {
  float* floats;          // of the distinct IDs (dhe.h), block_stride n * block_pitch
  int64_t* ids;           // [n], of which `count` are given: the distinct IDs
  int32_t* row_of_entry;  // [n]: which of `ids` an entry has; -1: padding
  int64_t count = 0;
};

// `features`: as many as the request has. OffsetsError or IdError (an ID that is negative or too large)
// before anything is written. Results do not depend on the number of threads. `kept`: one for each feature,
// in training.
void dhe_bag_forward(const DheRequest&, const DheFeature* features, Dedupe, int threads,
                     KeptActivations* kept = nullptr);

// Whether each bag of the feature holds one ID: its vector then needs no pooling.
bool one_id_per_bag(const Bags&, int64_t feature);

// One feature's IDs, all >= 0, and where their vectors go: vectors[i * stride] and on.
struct DecodeWork {
  DecoderView decoder;
  const int64_t* ids;
  int64_t count;
  float* vectors;
  int64_t stride;
  float* kept = nullptr;  // where activations go as well (dhe.h)
  int64_t kept_stride = 0;
};
// IDs of one feature that a thread decodes at once.
struct DecodeBlock {
  int64_t feature, begin, count;
};
// Cuts each feature's IDs into nearly equal blocks, as many for one thread as for another.
void plan_decode_blocks(const std::vector<DecodeWork>&, int threads, std::vector<DecodeBlock>&);
// `scratch`: scratch_floats() of the feature's decoder.
void decode_block(const std::vector<DecodeWork>&, const DecodeBlock&, float* scratch);
// The vectors of several features' IDs, not pooled. As many IDs for one thread as for another.
void dhe_decode(const std::vector<DecodeWork>&, int threads);

}  // namespace mprec
