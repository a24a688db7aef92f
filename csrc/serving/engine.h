// What an engine does between a query's arrival and its outcome, on threads that need no interpreter.
//
// Clients submit queries; the scheduler forms jobs of them; a thread for each executor takes its jobs one
// after another. A job whose path is a native program is run right there. Any other, and one whose program
// did not succeed, is left to the caller, who scores it in his own way and says so. Outcomes are collected
// for whoever tells the clients.
//
// So an executor whose paths are programs waits for nothing but its jobs, however busy the interpreter is
// with clients.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/aligned.h"
#include "program/program.h"
#include "scheduler/scheduler.h"

namespace mprec::serving {

using scheduler::Job;
using scheduler::Lane;
using scheduler::Piece;

struct Load;

struct Query : scheduler::Ticket {
  Query(int64_t size, double arrived, double deadline, std::optional<Batch> batch, void* client)
      : Ticket(size, deadline), arrived(arrived), batch(batch), client(client), missing(size) {}

  const double arrived;
  const std::optional<Batch> batch;  // none: in a form that programs do not take
  void* const client;                // known to the caller alone
  Load* load = nullptr;              // that it is part of, at this place
  size_t place = 0;
  // Guarded by the engine's lock.
  int64_t missing;                                     // samples not scored yet; 0: it has its outcome
  int readers = 0;                                     // programs that read its batch now
  bool orphan = false;                                 // it had its outcome before they were done
  std::vector<float> scores;                           // of those that are
  std::vector<std::pair<std::string, int64_t>> paths;  // how many samples each path scored
};

// Queries whose outcomes are kept for a thread that waits for all of them.
struct Load {
  struct Entry {
    int64_t size;
    double at;  // seconds after the start
    std::optional<Batch> batch;
    void* client;
  };
  struct Result {
    enum { open, answered, refused, failed } kind = open;
    std::string reason, message;   // of a refusal
    double late = 0;               // until it was submitted
    double due = 0, finished = 0;  // on the clock
    std::shared_ptr<Query> query;  // with its scores
  };
  std::vector<Entry> entries;
  std::vector<Result> results;
  int64_t open = 0;  // queries without outcome; guarded by the engine's lock
  std::condition_variable closed;
};

inline Query& query_of(const Piece& piece) { return static_cast<Query&>(*piece.ticket); }

class Engine {
 public:
  using Clock = std::function<double()>;
  // By executor and option: the path's program, or null. Whoever sets them keeps them alive.
  using Programs = std::vector<std::vector<const Program*>>;

  struct Counts {
    int64_t queries = 0, answered = 0, late = 0, failed = 0, cancelled = 0, batches = 0;
    std::map<std::string, int64_t> refused, samples;  // by reason; by path
    struct Executor {
      int64_t batches = 0;
      double busy_s = 0;
      std::vector<int64_t> served;  // batches by option that it scored
    };
    std::vector<Executor> executors;
    double last_answer = -std::numeric_limits<double>::infinity();
  };
  // A query has its scores; or it is refused as `expired`; or it had its outcome, told by another call, while
  // a program read its batch, which is now done with it.
  struct Outcome {
    enum Kind { answered, expired, done_with };
    std::shared_ptr<Query> query;
    Kind kind;
    double arrived, finished;  // on the clock
  };
  // Asked several times a second by a thread that waits; true: wait no longer, where that can be helped.
  using Stop = std::function<bool()>;

  Engine(std::vector<std::shared_ptr<Lane>> lanes, scheduler::Scheduler::Limits limits, Clock clock);

  // -- clients

  // Queues a query of `size` samples, or says why not. `arrived`: on the clock, now if absent.
  std::pair<std::shared_ptr<Query>, std::optional<scheduler::Refusal>> submit(int64_t size, double sla,
                                                                              std::optional<double> arrived,
                                                                              std::optional<Batch> batch,
                                                                              void* client);
  // Submits the queries of a load when they are due, and waits for their outcomes. Stopped, it submits no more.
  void replay(Load& load, double sla, const Stop& stop);
  // Submits a load of one query and waits for its outcome. If an executor is free, and the query's job is so
  // short that handing it to another thread would take longer, this thread runs it.
  void answer(Load& one, double sla, std::optional<double> arrived, const Stop& stop);
  // False if the query has its outcome already; else it has none but this, and costs no more work. A program
  // may still read its batch: see Query::orphan.
  bool cancel(Query& query);
  // The outcomes since the last call. With `wait`, not before there are some or the engine has stopped.
  std::vector<Outcome> outcomes(bool wait);

  // -- executors' threads

  void start();  // from now on queries that arrive are handed to free executors
  // The next job of executor `index` that its programs cannot do; null when the engine is closed and all
  // queries have been scored.
  std::shared_ptr<Job> take(size_t index, int threads);
  // The same at once, without programs; null if there is nothing to do. `expired`: queries were refused.
  std::shared_ptr<Job> poll(size_t index, bool& expired);
  std::vector<Piece> wanted(const Job& job);  // pieces of queries that have no outcome yet
  bool score(const Piece& piece, const std::string& path, const float* scores);
  // A query's own input raised. False if it has its outcome already.
  bool fail(const std::shared_ptr<Query>& query);
  // The end of a job: its path took `seconds`; or (seconds <= 0) it did not serve, and is left alone for a
  // while.
  void done(const Job& job, double seconds, double rest_s = 0);
  void again(std::shared_ptr<scheduler::Ticket> ticket);  // a query to another executor
  void rest(size_t index, double rest_s);

  // -- the rest

  void close();                                 // no more queries
  std::vector<std::shared_ptr<Query>> clear();  // refuses those that wait as `closed`
  void stop();                                  // outcomes() waits no longer
  void replace(std::vector<std::shared_ptr<Lane>> lanes);
  void set_program(size_t index, size_t option, const Program* program);
  bool uses(const Program* program);  // is a thread running it?
  bool uses(size_t index, const Lane* lane);

  template <class Read>
  auto read(const Read& f) {  // f(scheduler, counts, now) under the lock
    const double time = clock_();
    const std::lock_guard lock(mutex_);
    return f(scheduler_, counts_, now(time));
  }

 private:
  struct Executor {
    std::shared_ptr<Job> job;    // started, not yet seen by the thread that runs it
    std::shared_ptr<Lane> lane;  // of the job under way
    const Program* running = nullptr;
    std::vector<const Program*> programs;
    std::condition_variable wake;
    AlignedBuffer<int64_t> ids, offsets;
    AlignedBuffer<float> dense, scores;
  };

  double now(double time);
  bool assign(double now, const Query* own = nullptr);
  std::optional<scheduler::Refusal> offer(std::shared_ptr<Query> query, double now,
                                          const Query* own = nullptr);
  bool is_for_its_client(const Job& job, const Query* own) const;
  std::shared_ptr<Query> enlist(Load& load, size_t place, double sla, double from, double now,
                                bool by_client);
  void wait(Load& load, std::unique_lock<std::mutex>& lock, const Stop& stop);
  void settle(std::shared_ptr<Query> query, Outcome::Kind kind, double now);
  bool settle_in_load(const std::shared_ptr<Query>& query, Load::Result result);
  void done_with(const std::shared_ptr<Query>& query);
  void finish(const Job& job, double now, double seconds, double rest_s);
  const Program* program_of(const Job& job) const;
  std::vector<Piece> open_pieces(const Job& job) const;
  bool execute(const Job& job, const Program& program, int threads, std::unique_lock<std::mutex>& lock);
  double run(const Program& program, const std::vector<Piece>& pieces, Executor& executor, int threads);
  void enter(const Piece& piece, const std::string& path, const float* scores, double now);

  std::mutex mutex_;
  scheduler::Scheduler scheduler_;
  const Clock clock_;
  double offset_ = 0, last_ = -std::numeric_limits<double>::infinity();  // of a clock that was set back
  std::vector<std::unique_ptr<Executor>> executors_;
  std::vector<Outcome> outcomes_;
  std::condition_variable has_outcomes_;
  Counts counts_;
  bool started_ = false, closed_ = false, stopped_ = false;
};

}  // namespace mprec::serving
