// A ranking model's whole path from a batch to its scores: look-up -> decoders -> bottom MLP -> interaction
// -> top MLP. README.md says how.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "dense/mlp.h"
#include "program/stages.h"

namespace mprec {

// What the top MLP gets: the first vector and the products of all pairs, or all vectors.
enum class Interaction { dot, cat };

struct Batch {
  const float* dense;  // [samples][num_dense], rows `dense_stride` apart
  int64_t dense_stride;
  Bags bags;  // of indices and offsets alone: stages say how they are pooled

  int64_t samples() const { return bags.batch; }
};

class Program {
 public:
  struct Parts {
    int64_t num_features = 0;
    int num_dense = 0, dim = 0;
    // Their parts together: each of 0 ... n - 1, once.
    std::vector<TableStage> tables;  // in order of feature
    std::vector<DecoderStage> decoders;
    std::vector<CachedStage> cached;
    std::vector<HotStage> hot;
    std::vector<UnseenStage> unseen;  // make no parts
    std::optional<Mlp> bottom;        // num_dense -> dim; or, without dense numbers,
    std::vector<float> constant;      // dim numbers in its output's place
    // The vectors 1 ... that interact, 0 being the bottom's; none: the parts as they are.
    std::vector<MixTerm> mixing;
    Interaction interaction = Interaction::dot;
    std::optional<Mlp> top;  // dim + products -> 1, or all vectors' numbers -> 1
  };
  // std::invalid_argument if the parts do not fit together.
  explicit Program(Parts);

  // The scores of all samples. OffsetsError or IdError for what a bag cannot be; scores are then unspecified.
  // Does not allocate once a calling thread has run a batch of that size.
  void run(const Batch&, float* scores, int threads) const;

  int64_t num_features() const { return parts_.num_features; }
  int num_dense() const { return parts_.num_dense; }
  int64_t nbytes() const;  // of what is packed: MLPs, hot IDs

 private:
  struct TableRun {  // stages of adjacent features, pooled in one call
    size_t first, count;
    Mode mode;
    BagsOf bags;
  };
  struct Layout;
  struct Workspace;
  struct Block;
  // Of the constructor (parts.cpp).
  void add_stages_of_halves();
  void count_parts();
  void check_parts() const;
  void check_unseen() const;
  void check_layers() const;
  void plan_runs();

  Layout layout() const;
  void plan_decoding(int64_t samples, int threads, Workspace&) const;
  void run_cached(const Bags&, int threads, Workspace&) const;
  bool pool_tables(const Block&, Workspace&) const;
  void project(const Block&, const Workspace&) const;
  void pool_vectors(const Block&, const Workspace&) const;
  bool score_block(const Batch&, int64_t begin, int samples, const Layout&, Workspace&, int thread,
                   bool backwards, float* scores) const;
  [[noreturn]] void throw_first_bad_id(const Bags&) const;

  Parts parts_;  // tables and decoders: of the batch's bags, and then those of the halves
  std::vector<TableRun> runs_;
  int64_t num_parts_ = 0;
  int64_t num_codes_ = 0;      // of a sample, of all tables with projections
  int64_t cached_floats_ = 0;  // of a sample, of all decoders behind caches
  InteractionView interaction_;
  int64_t multiply_adds_;  // per sample, without decoders
};

}  // namespace mprec
