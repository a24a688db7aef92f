#include "serving/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "serving/join.h"

namespace mprec::serving {
namespace {

constexpr double own_work_s = 20e-6;    // of the engine for a query, about
constexpr double own_work_gain = 0.05;  // share of the way that one batch moves the time of its own work
constexpr std::chrono::milliseconds look_again{5};
constexpr double ask_again_s = 0.1;   // whether to wait on
constexpr double short_job_s = 2e-4;  // a few times what handing it to another thread and back takes

bool all_finite(const float* scores, int64_t count) {
  float sum = 0;  // of numbers times zero: not a number if one is not finite
  for (int64_t i = 0; i < count; ++i) sum += scores[i] * 0.0f;
  return sum == 0;
}

}  // namespace

Engine::Engine(std::vector<std::shared_ptr<Lane>> lanes, scheduler::Scheduler::Limits limits, Clock clock)
    : scheduler_(lanes, limits), clock_(std::move(clock)) {
  for (const auto& lane : lanes) {
    executors_.push_back(std::make_unique<Executor>());
    executors_.back()->programs.resize(lane->options.size());
  }
  for (const auto& lane : lanes) {
    counts_.executors.emplace_back();
    counts_.executors.back().served.resize(lane->options.size());
  }
}

// The clock's time. If it was set back, time stands still there and then goes on.
double Engine::now(double time) {
  time += offset_;
  if (time < last_) {
    offset_ += last_ - time;
    time = last_;
  }
  return last_ = time;
}

// ------------------------------------------------------------------------------------------------- clients

std::pair<std::shared_ptr<Query>, std::optional<scheduler::Refusal>> Engine::submit(
    int64_t size, double sla, std::optional<double> arrived, std::optional<Batch> batch, void* client) {
  const double time = clock_();
  const std::lock_guard lock(mutex_);
  const double now = this->now(time), from = arrived ? *arrived + offset_ : now;
  auto query = std::make_shared<Query>(size, from, from + sla, batch, client);
  auto refusal = offer(query, now);
  if (refusal) query = nullptr;
  return {std::move(query), std::move(refusal)};
}

std::optional<scheduler::Refusal> Engine::offer(std::shared_ptr<Query> query, double now, const Query* own) {
  ++counts_.queries;
  std::optional<scheduler::Refusal> refusal;
  if (closed_)
    refusal = {"closed", "the engine is closed"};
  else
    refusal = scheduler_.offer(now, std::move(query));
  if (refusal) {
    if (refusal->reason == std::string("unsupported"))
      ++counts_.failed;
    else
      ++counts_.refused[refusal->reason];
    return refusal;
  }
  const auto is_free = [](const auto& lane) { return !lane->busy; };
  if (started_ && std::any_of(scheduler_.lanes().begin(), scheduler_.lanes().end(), is_free))
    assign(now, own);
  return refusal;
}

// Offers a query of a load; null if it is refused. `by_client`: see answer().
std::shared_ptr<Query> Engine::enlist(Load& load, size_t place, double sla, double from, double now,
                                      bool by_client) {
  const Load::Entry& entry = load.entries[place];
  Load::Result& result = load.results[place];
  auto query = std::make_shared<Query>(entry.size, from, from + sla, entry.batch, entry.client);
  query->load = &load, query->place = place;
  ++load.open;
  if (auto refusal = offer(query, now, by_client ? query.get() : nullptr)) {
    --load.open;
    result.kind = Load::Result::refused;
    result.reason = refusal->reason, result.message = std::move(refusal->message);
    return nullptr;
  }
  return query;
}

void Engine::wait(Load& load, std::unique_lock<std::mutex>& lock, const Stop& stop) {
  while (load.open > 0) {
    if (load.closed.wait_for(lock, std::chrono::duration<double>(ask_again_s)) == std::cv_status::no_timeout)
      continue;
    lock.unlock();
    stop();  // the queries' memory is the load's: nobody leaves before they have their outcomes
    lock.lock();
  }
}

void Engine::replay(Load& load, double sla, const Stop& stop) {
  load.results.resize(load.entries.size());
  const double start = clock_();
  double asked = start;
  const auto stopped = [&](double now) { return now - asked > ask_again_s && (asked = now, stop()); };
  for (size_t i = 0; i < load.entries.size(); ++i) {
    Load::Result& result = load.results[i];
    result.due = start + load.entries[i].at;
    double time = clock_();
    for (; time < result.due && !stopped(time); time = clock_())
      std::this_thread::sleep_for(std::chrono::duration<double>(std::min(result.due - time, ask_again_s)));
    if (stopped(time)) break;
    result.late = time - result.due;
    const std::lock_guard lock(mutex_);
    const double now = this->now(time);
    enlist(load, i, sla, result.due + offset_, now, false);
  }
  std::unique_lock lock(mutex_);
  wait(load, lock, stop);
}

// Is it one that answer() leaves to the thread that asks?
bool Engine::is_for_its_client(const Job& job, const Query* own) const {
  return own && job.pieces.size() == 1 && job.pieces[0].ticket.get() == own && job.samples == own->size &&
         job.predicted_s <= short_job_s && program_of(job);
}

void Engine::answer(Load& one, double sla, std::optional<double> arrived, const Stop& stop) {
  one.results.resize(1);
  const double time = clock_();
  std::unique_lock lock(mutex_);
  const double now = this->now(time), from = arrived ? *arrived + offset_ : now;
  one.results[0].due = from - offset_;
  const auto query = enlist(one, 0, sla, from, now, true);
  for (size_t i = 0; query && i < executors_.size(); ++i) {
    Executor& executor = *executors_[i];
    if (!executor.job || !is_for_its_client(*executor.job, query.get())) continue;
    auto job = std::move(executor.job);
    executor.lane = job->lane;
    // By one thread: teams of threads for each client would be too many.
    if (execute(*job, *program_of(*job), 1, lock))
      assign(last_);
    else
      executor.job = std::move(job);
    if (executor.job || closed_) executor.wake.notify_one();
    break;
  }
  wait(one, lock, stop);
}

// The outcome of a query of a load; false if it is none.
bool Engine::settle_in_load(const std::shared_ptr<Query>& query, Load::Result outcome) {
  if (!query->load) return false;
  Load::Result& result = query->load->results[query->place];
  result.kind = outcome.kind, result.reason = std::move(outcome.reason);
  result.finished = outcome.finished, result.query = query;
  query->orphan = query->readers;
  if (!query->orphan) done_with(query);
  return true;
}

// Nobody reads the batch of a query any more that has its outcome.
void Engine::done_with(const std::shared_ptr<Query>& query) {
  if (!query->load)
    settle(query, Outcome::done_with, last_);
  else if (--query->load->open == 0)
    query->load->closed.notify_all();
}

bool Engine::cancel(Query& query) {
  const std::lock_guard lock(mutex_);
  if (!query.missing) return false;
  query.missing = 0;
  query.orphan = query.readers;
  ++counts_.cancelled;
  scheduler_.withdraw(query);
  return true;
}

std::vector<Engine::Outcome> Engine::outcomes(bool wait) {
  std::unique_lock lock(mutex_);
  if (wait) has_outcomes_.wait(lock, [&] { return stopped_ || !outcomes_.empty(); });
  return std::move(outcomes_);
}

// ---------------------------------------------------------------------------------------- executors' threads

void Engine::start() {
  const double time = clock_();
  const std::lock_guard lock(mutex_);
  started_ = true;
  assign(now(time));
}

void Engine::settle(std::shared_ptr<Query> query, Outcome::Kind kind, double now) {
  const auto in_load = kind == Outcome::answered ? Load::Result::answered : Load::Result::refused;
  const char* const reason = kind == Outcome::expired ? "expired" : "";
  if (kind != Outcome::done_with &&
      settle_in_load(query, {in_load, reason, "", 0, 0, now - offset_, nullptr}))
    return;
  const double arrived = query->arrived - offset_;
  outcomes_.push_back({std::move(query), kind, arrived, now - offset_});
  has_outcomes_.notify_one();
}

// Refuses what is hopeless, hands jobs to free executors; `own`: of a client who runs it himself. True if
// something was refused.
bool Engine::assign(double now, const Query* own) {
  bool expired = false;
  for (auto& ticket : scheduler_.expire(now)) {
    auto query = std::static_pointer_cast<Query>(std::move(ticket));
    if (!query->missing) continue;
    query->missing = 0;
    ++counts_.refused["expired"];
    settle(std::move(query), Outcome::expired, now);
    expired = true;
  }
  while (auto job = scheduler_.next(now)) {
    Executor& executor = *executors_[job->index];
    executor.job = std::move(job);
    if (!is_for_its_client(*executor.job, own)) executor.wake.notify_one();
  }
  return expired;
}

std::shared_ptr<Job> Engine::poll(size_t index, bool& expired) {
  const double time = clock_();
  const std::lock_guard lock(mutex_);
  expired = assign(now(time));
  Executor& executor = *executors_.at(index);
  if (executor.job) executor.lane = executor.job->lane;
  return std::move(executor.job);
}

std::shared_ptr<Job> Engine::take(size_t index, int threads) {
  Executor& executor = *executors_.at(index);
  double time = clock_();
  std::unique_lock lock(mutex_);
  for (;;) {
    assign(now(time));
    if (!executor.job) {
      if (closed_ && scheduler_.queue().empty() && !executor.lane) {
        for (auto& other : executors_) other->wake.notify_all();
        return nullptr;
      }
      // With queries left to a busy executor, look again now and then: it may be stuck.
      if (scheduler_.queue().empty())
        executor.wake.wait(lock);
      else
        executor.wake.wait_for(lock, look_again);
      lock.unlock();
      time = clock_();
      lock.lock();
      continue;
    }
    const auto job = std::move(executor.job);
    executor.job = nullptr;
    executor.lane = job->lane;
    const Program* const program = program_of(*job);
    if (!program) return job;
    if (!execute(*job, *program, threads, lock)) return job;
    time = last_ - offset_;
  }
}

// Runs a job by its program, without the lock meanwhile. False if that did not succeed.
bool Engine::execute(const Job& job, const Program& program, int threads,
                     std::unique_lock<std::mutex>& lock) {
  Executor& executor = *executors_[job.index];
  const std::vector<Piece> pieces = open_pieces(job);
  for (const Piece& piece : pieces) ++query_of(piece).readers;
  executor.running = &program;
  lock.unlock();
  const double seconds = pieces.empty() ? 0 : run(program, pieces, executor, threads);
  const double time = clock_();
  lock.lock();
  executor.running = nullptr;
  for (const Piece& piece : pieces) {
    Query& query = query_of(piece);
    if (--query.readers == 0 && query.orphan) done_with(std::static_pointer_cast<Query>(piece.ticket));
  }
  if (seconds < 0) return false;
  const double end = now(time);
  const bool own = seconds > 0 && pieces.size() == job.pieces.size();
  finish(job, end, own ? seconds : 0, 0);
  const std::string& path = job.lane->options[job.option].path;
  const float* scores = executor.scores.data();
  for (const Piece& piece : pieces) {
    enter(piece, path, scores, end);
    scores += piece.stop - piece.start;
  }
  return true;
}

// The program of a job's path, if it takes all its queries.
const Program* Engine::program_of(const Job& job) const {
  if (scheduler_.lanes()[job.index] != job.lane) return nullptr;  // of paths that were replaced
  for (const Piece& piece : job.pieces)
    if (!query_of(piece).batch) return nullptr;
  return executors_[job.index]->programs[job.option];
}

// The seconds that a program took for the pieces, whose scores are then executor.scores; -1 if it failed.
double Engine::run(const Program& program, const std::vector<Piece>& pieces, Executor& executor,
                   int threads) try {
  Batch batch = *query_of(pieces[0]).batch;
  if (pieces.size() > 1 || pieces[0].stop - pieces[0].start < batch.samples()) {
    const int64_t columns = program.num_dense();
    std::vector<Part> parts;
    for (const Piece& piece : pieces) parts.push_back({query_of(piece).batch->bags, piece.start, piece.stop});
    Bags bags = joined_bags(parts, program.num_features());
    bags.indices.data = executor.ids.reserve(bags.indices.size);
    bags.offsets.data = executor.offsets.reserve(bags.offsets.size);
    join(parts, bags);
    float* const dense = executor.dense.reserve(bags.batch * columns);
    float* row = dense;
    for (const Piece& piece : pieces) {
      const Batch& b = *query_of(piece).batch;
      for (int64_t s = piece.start; s < piece.stop; ++s, row += columns)
        std::copy_n(b.dense + s * b.dense_stride, columns, row);
    }
    batch = {dense, columns, bags};
  }
  float* const scores = executor.scores.reserve(batch.samples());
  const double start = clock_();
  program.run(batch, scores, threads);
  const double seconds = clock_() - start;
  return all_finite(scores, batch.samples()) ? std::max(seconds, 1e-9) : -1;
} catch (const std::exception&) {
  return -1;  // the caller finds out which query is at fault
}

std::vector<Piece> Engine::open_pieces(const Job& job) const {
  std::vector<Piece> pieces;
  for (const Piece& piece : job.pieces)
    if (query_of(piece).missing) pieces.push_back(piece);
  return pieces;
}

std::vector<Piece> Engine::wanted(const Job& job) {
  const std::lock_guard lock(mutex_);
  return open_pieces(job);
}

void Engine::enter(const Piece& piece, const std::string& path, const float* scores, double now) {
  Query& query = query_of(piece);
  if (!query.missing) return;
  const int64_t size = piece.stop - piece.start;
  counts_.samples[path] += size;
  query.scores.resize(query.size);
  std::copy_n(scores, size, query.scores.begin() + piece.start);
  const auto of_path = [&](const auto& each) { return each.first == path; };
  const auto found = std::find_if(query.paths.begin(), query.paths.end(), of_path);
  if (found == query.paths.end())
    query.paths.emplace_back(path, size);
  else
    found->second += size;
  if ((query.missing -= size)) return;
  ++counts_.answered;
  counts_.late += now > query.deadline;
  counts_.last_answer = now;
  settle(std::static_pointer_cast<Query>(piece.ticket), Outcome::answered, now);
}

bool Engine::score(const Piece& piece, const std::string& path, const float* scores) {
  const double time = clock_();
  const std::lock_guard lock(mutex_);
  const bool wanted = query_of(piece).missing > 0;
  enter(piece, path, scores, now(time));
  return wanted;
}

bool Engine::fail(const std::shared_ptr<Query>& query) {
  const std::lock_guard lock(mutex_);
  if (!query->missing) return false;
  query->missing = 0;
  ++counts_.failed;
  scheduler_.withdraw(*query);
  if (!settle_in_load(query, {Load::Result::failed, "", "", 0, 0, 0, nullptr}))
    query->orphan = query->readers;
  return true;
}

void Engine::done(const Job& job, double seconds, double rest_s) {
  const double time = clock_();
  const std::lock_guard lock(mutex_);
  finish(job, now(time), seconds, rest_s);
}

void Engine::finish(const Job& job, double now, double seconds, double rest_s) {
  executors_.at(job.index)->lane = nullptr;
  Counts::Executor& counts = counts_.executors[job.index];
  if (seconds > 0) {
    scheduler_.done(job, now, seconds);
    double& own = scheduler_.query_s;
    const double spent = std::max(now - job.started - seconds, 0.0) / static_cast<double>(job.pieces.size());
    // One wait for a processor counts for little.
    own += own_work_gain * (std::min(spent, 2 * own + own_work_s) - own);
    if (scheduler_.lanes()[job.index] == job.lane) ++counts.served[job.option];
  } else {
    scheduler_.failed(job, now, rest_s);
  }
  ++counts_.batches;
  ++counts.batches;
  counts.busy_s += now - job.started;
}

void Engine::again(std::shared_ptr<scheduler::Ticket> ticket) {
  const std::lock_guard lock(mutex_);
  scheduler_.again(std::move(ticket));
}

void Engine::rest(size_t index, double rest_s) {
  const double time = clock_();
  const std::lock_guard lock(mutex_);
  scheduler_.rest(index, now(time), rest_s);
}

// -------------------------------------------------------------------------------------------------- the rest

void Engine::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  for (auto& executor : executors_) executor->wake.notify_all();
}

std::vector<std::shared_ptr<Query>> Engine::clear() {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Query>> left;
  for (auto& ticket : scheduler_.clear()) {
    auto query = std::static_pointer_cast<Query>(std::move(ticket));
    if (!query->missing) continue;
    query->missing = 0;  // pieces under way find nothing to answer
    ++counts_.refused["closed"];
    if (settle_in_load(query, {Load::Result::refused, "closed", "the engine is closed", 0, 0, 0, nullptr}))
      continue;
    query->orphan = query->readers;
    left.push_back(std::move(query));
  }
  return left;
}

void Engine::stop() {
  const std::lock_guard lock(mutex_);
  stopped_ = true;
  has_outcomes_.notify_all();
}

void Engine::replace(std::vector<std::shared_ptr<Lane>> lanes) {
  const std::lock_guard lock(mutex_);
  scheduler_.replace(lanes);
  for (size_t i = 0; i < lanes.size(); ++i) {
    executors_[i]->programs.assign(lanes[i]->options.size(), nullptr);
    counts_.executors[i].served.assign(lanes[i]->options.size(), 0);
  }
}

void Engine::set_program(size_t index, size_t option, const Program* program) {
  const std::lock_guard lock(mutex_);
  executors_.at(index)->programs.at(option) = program;
}

bool Engine::uses(const Program* program) {
  const std::lock_guard lock(mutex_);
  for (const auto& executor : executors_)
    if (executor->running == program) return true;
  return false;
}

bool Engine::uses(size_t index, const Lane* lane) {
  const std::lock_guard lock(mutex_);
  return executors_.at(index)->lane.get() == lane;
}

}  // namespace mprec::serving
