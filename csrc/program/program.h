// A ranking model's whole path from a batch to its scores: look-up -> decoders -> bottom MLP -> interaction
// -> top MLP. README.md says how.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "bags/bags.h"
#include "dense/mlp.h"
#include "dhe/dhe.h"
#include "embedding_bag/embedding_bag.h"

namespace mprec {

// What a table's pooled rows are codes of: vectors are codes @ matrix + bias, for each row of the bag.
struct Projection {
  int rank;
  std::vector<float> matrix;  // [rank][dim]
  std::vector<float> bias;    // [dim], or none
};
// Stages make vectors of `dim` numbers: of each sample one `part`, pooled from the bag of `feature`. Rows of
// a table may be several vectors long: then they are that part and the next ones.
struct TableStage {
  const char* rows;
  int64_t num_rows, row_bytes;
  Format format;
  int64_t feature, part;
  Mode mode;
  int vectors = 1;                       // of a row
  std::optional<Projection> projection;  // rows are `rank` long
};
struct DecoderStage {
  DecoderView decoder;
  int64_t feature, part;
  Mode mode;
};

// What the top MLP gets: the first vector and the products of all pairs, or all vectors.
enum class Interaction { dot, cat };

struct Batch {
  const float* dense;  // [samples][num_dense], rows `dense_stride` apart
  int64_t dense_stride;
  Bags bags;  // of indices and offsets alone: stages say how they are pooled

  int64_t samples() const { return bags.batch; }
};

// Does not own rows and decoders.
class Program {
 public:
  struct Parts {
    int64_t num_features = 0;
    int num_dense = 0, dim = 0;
    std::vector<TableStage> tables;      // in order of feature
    std::vector<DecoderStage> decoders;  // parts of tables and decoders together: each of 0 ... n - 1, once
    std::optional<Mlp> bottom;           // num_dense -> dim; or, without dense numbers,
    std::vector<float> constant;         // dim numbers in its output's place
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
  int64_t nbytes() const;  // of the packed MLPs

 private:
  struct TableRun {  // stages of adjacent features, pooled in one call
    size_t first, count;
    Mode mode;
  };
  struct Layout;
  struct Workspace;
  Layout layout() const;
  void plan_decoding(const Bags&, int threads, Workspace&) const;
  void project(const Bags&, int64_t begin, int samples, const float* codes, float* ones, float* parts,
               int64_t parts_stride) const;
  bool score_block(const Batch&, int64_t begin, int samples, const Layout&, Workspace&, int thread,
                   bool backwards, float* scores) const;
  [[noreturn]] void throw_first_bad_id(const Bags&) const;

  Parts parts_;
  std::vector<TableRun> runs_;
  int64_t num_parts_;
  int64_t num_codes_ = 0;  // of a sample, of all tables with projections
  InteractionView interaction_;
  int64_t multiply_adds_;  // per sample, without decoders
};

}  // namespace mprec
