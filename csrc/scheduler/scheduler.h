// Which queries are served next, by which path, on which executor; and which are refused at the door.
//
// The aim is the most correct predictions in time: the sum of quality x samples over queries answered by
// their deadlines. When an executor is free, each batch it could take (a path and a number of queries from
// the front of the queue) is worth
//
//     gain = q * (samples expected in time) - v * samples - lambda * T - damage
//
// - q is the path's quality and T its expected time. A sample is expected in time with the chance that a
//   log-normal time around T ends before its deadline.
// - v and lambda are the values of a waiting sample and of a second, from the linear program of price.h at
// the
//   rate at which samples must be served: the rate at which they arrive, or what the deadlines of the queue
//   demand, whichever is greater.
// - damage is what the queries left behind, and the next one to arrive, lose because they have to wait for T:
// the
//   time by which the fastest paths would then miss their deadlines, times the greatest goodput.
//
// The best batch is served, unless it loses and another executor will do better in time. With an idle queue
// time has no price, so that the path of best quality is taken; above the capacity of all paths a sample has
// no value, so that batches go for throughput alone. docs/scheduling.md derives this.
//
// A query is refused at once if it could not be in time even if everything before it took the fastest path;
// the predictions' spread is allowed for. After a silence, one query is always let through: predictions may
// be wrong, and only an answer can tell.
//
// Nothing here knows threads, devices or tensors. Times are seconds on the caller's clock, which may be
// virtual.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "scheduler/congestion.h"
#include "scheduler/correction.h"
#include "scheduler/price.h"
#include "scheduler/queue.h"
#include "scheduler/traffic.h"

namespace mprec::scheduler {

// A path on an executor. seconds[b]: profiled mean time of a batch of b samples, b = 0 ... max_batch;
// infinite where the path does not take the size.
struct Option {
  std::string path;
  double quality;
  std::vector<double> seconds;

  // Of a batch of any size: beyond the table, in proportion.
  double profiled(int64_t samples) const;
};

// An executor as the scheduler sees it: what it can run, how fast it is now, until when it is busy.
struct Lane {
  // std::invalid_argument if there are no options, or their tables are too short or of different lengths.
  Lane(std::string name, std::vector<Option> options);

  size_t option(const std::string& path) const;  // its place; std::out_of_range
  bool resting(size_t option, double now) const { return rests[option] > now; }
  bool resting(double now) const;  // all its options
  // At no size does option `a` take more than this many times as long as `b`, by the profile.
  double most_slower(size_t a, size_t b) const { return slower[a * options.size() + b]; }

  std::string name;
  std::vector<Option> options;
  std::shared_ptr<Correction> correction;
  std::vector<double> least;  // the least profiled time of each size
  bool busy = false;
  double until = -std::numeric_limits<double>::infinity();  // when the job under way should be done
  std::vector<double> rests;                                // options that raised: not taken before this time
  std::vector<double> slower;                               // most_slower() of all pairs
  std::vector<double> unit;  // seconds per sample of each option in a batch that fits the SLA
  // Options that do not rest (all, if all rest) and that none of these dominates, of greatest goodput first.
  std::vector<size_t> sensible;
  size_t fast = 0;  // the option of greatest goodput
};

// A batch for one executor.
struct Job {
  size_t index;  // of the executor
  std::shared_ptr<Lane> lane;
  size_t option;
  std::vector<Piece> pieces;
  int64_t samples;
  double predicted_s;  // expected time
  double profiled_s;   // what the profile says
  double started;
};

// Why a query is not taken.
struct Refusal {
  const char* reason;  // full, overload or unsupported
  std::string message;
};

// The queue of one engine and the choice of what to run. Not thread-safe: the caller holds a lock.
class Scheduler {
 public:
  struct Limits {
    int64_t max_batch = 2048;     // samples of a job
    int64_t max_queue = 1 << 20;  // samples waiting
    bool admission = true;        // refuse what is not likely to be in time
    double late_share = 0.01;     // of the queries taken under load, at most
  };

  // std::invalid_argument for no lanes or limits out of range.
  Scheduler(std::vector<std::shared_ptr<Lane>> lanes, Limits limits);

  // Queue a query, or say why not.
  std::optional<Refusal> offer(double now, std::shared_ptr<Ticket> ticket);
  // Take a query out of the queue; false if no sample of it waits there any more.
  bool withdraw(const Ticket& ticket) { return queue_.remove(ticket); }
  // Take out the queries at the front that no executor can answer in time any more, not yet begun.
  std::vector<std::shared_ptr<Ticket>> expire(double now);
  // Empty the queue.
  std::vector<std::shared_ptr<Ticket>> clear();

  // A job for an executor that is free, marked as started; null if there is nothing to start now.
  std::shared_ptr<Job> next(double now);
  // A job has ended: its executor is free. Its path took `seconds`, which is learnt from.
  void done(const Job& job, double now, double seconds);
  // A job gave nothing: its executor is free, its path is left alone for `rest_s` seconds.
  void failed(const Job& job, double now, double rest_s);
  // Put back a query that a job took and nobody answered.
  void again(std::shared_ptr<Ticket> ticket);
  // Leave all paths of an executor alone for `rest_s` seconds from now; 0: no longer.
  void rest(size_t index, double now, double rest_s);
  // Other paths for the same executors, from the next job on. std::invalid_argument if their number differs.
  void replace(std::vector<std::shared_ptr<Lane>> lanes);

  const std::vector<std::shared_ptr<Lane>>& lanes() const { return lanes_; }
  const Queue& queue() const { return queue_; }

  double query_s = 0;  // expected time of the caller's own work for each query of a batch

 private:
  // What all batches of one choice have in common.
  struct State {
    double now, value, rate, backlog;  // value: of a waiting sample; rate: samples/s; backlog: seconds
    Overflow overflow;
  };
  struct Batch {
    size_t queries;  // from the front
    int64_t samples;
  };
  struct Candidate {
    double gain;
    int64_t samples;
    size_t lane, option, queries;
    double seconds;
    double profit;  // the gain before damage
    bool operator<(const Candidate& other) const;
  };

  Lane& release(const Job& job, double now);
  bool is_probe(double now) const;
  bool is_out(const Lane& lane, double now) const;
  void refresh(double now);
  void price_options(Lane& lane, double now);
  double demand(double now, double rate) const;
  int64_t fitting(const std::vector<double>& seconds, double limit) const;
  double expected(const Lane& lane, size_t option, int64_t samples, double queries) const;
  double fastest(const Lane& lane, double samples) const;
  double shortest(int64_t samples) const;
  double certainty(double now);
  double time_for(double now, int64_t samples, double margin) const;

  std::vector<Batch> batches(size_t free) const;
  std::optional<Candidate> best(const State& state, size_t index, const std::vector<Batch>& batches) const;
  bool better_elsewhere(const State& state, const Candidate& best) const;
  std::shared_ptr<Job> start(double now, const Candidate& chosen);

  std::vector<std::shared_ptr<Lane>> lanes_;
  Limits limits_;
  double shift_ = 0;  // qualities count from here: they must be positive
  Queue queue_;
  Traffic traffic_;
  double last_news_ = -std::numeric_limits<double>::infinity();  // when a job last started or ended
  std::vector<double> priced_;                                   // what prices were computed for
  int64_t priced_until_ = 0;                                     // so many arrivals
  double rested_ = -std::numeric_limits<double>::infinity();     // or until an option may be taken again
  FluidPrice price_;
  Latest latest_;
  double stretch_ = 1.0;  // time per sample of the batches that a full queue makes, over that of good ones
};

}  // namespace mprec::scheduler
