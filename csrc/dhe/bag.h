// Bags of IDs to pooled vectors, for one or several features, over threads.
#pragma once
#include <cstdint>
#include <vector>

#include "common/integers.h"
#include "dhe/dhe.h"

namespace mprec {

enum class Dedupe { automatic, never, always };

// Bag b of feature t is indices[offset(t * bags + b) : offset(t * bags + b + 1)], where the offset after the
// last one given is the number of indices. Its vector goes to out[b * out_stride + columns[t]] and on.
struct DheBagRequest {
  const DecoderView* decoders;
  int64_t num_features, bags;
  Integers indices, offsets;
  const float* per_sample_weights;  // null: ones
  int mode;                         // 0 sum, 1 mean, 2 max
  int64_t padding_idx;              // -1: none
  float* out;
  int64_t out_stride;
  const int64_t* columns;
  Dedupe dedupe;
  int64_t largest_id = INT64_MAX;  // that is allowed

  int64_t bag_begin(int64_t bag) const { return bag < offsets.size ? offsets[bag] : indices.size; }
  // Whether each bag of the feature holds one ID: its vector then needs no pooling.
  bool one_id_per_bag(int64_t feature) const;
};

// OffsetsError or IdError (an ID that is negative or too large) before anything is written. Results
// do not depend on the number of threads.
void dhe_bag_forward(const DheBagRequest&, int threads);

// The two checks, for callers that pool by themselves.
void check_offsets(const DheBagRequest&);
// The IDs as int64, in `storage` if they come as int32.
const int64_t* checked_ids(const DheBagRequest&, std::vector<int64_t>& storage);

// One feature's IDs, all >= 0, and where their vectors go: vectors[i * stride] and on.
struct DecodeWork {
  DecoderView decoder;
  const int64_t* ids;
  int64_t count;
  float* vectors;
  int64_t stride;
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
