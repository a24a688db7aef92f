#include "common/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "arch/arch.h"

namespace mprec {
namespace {

using std::chrono::nanoseconds;
using std::chrono::steady_clock;

// How long a thread looks for what it waits for before it sleeps: of a helper, for the next call's job; of a
// caller, for its helpers' last parts. Some times what it takes to wake a thread.
constexpr nanoseconds spin_time{100'000};
// A call that a helper held up is followed by so many times the time lost in which calls run alone: where
// another thread has the helper's core, this bounds what trying it costs.
constexpr int64_t alone_for = 32;
constexpr nanoseconds longest_alone{1'000'000'000};
constexpr int most_helpers = 255;

// Looks for what `found` says until spin_time is over. Another thread may need this one's core, the one that
// is waited for or that is to bring the next job: so each turn offers it.
template <class Found>
bool spin(const Found& found) {
  const auto end = steady_clock::now() + spin_time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (found()) return true;
      spin_pause();
    }
    sched_yield();
  } while (steady_clock::now() < end);
  return false;
}

// One call's work, on the caller's stack.
struct Job {
  void (*part)(const void*, int64_t, int);
  const void* body;
  int64_t parts;
  std::atomic<int64_t> next{0};
  std::atomic<int> slots{1};             // given out; the caller's is 0
  std::atomic<int> helpers{0};           // that were offered the job, and are not done nor had it taken back
  std::atomic<bool> interrupted{false};  // a helper lost its core meanwhile
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error{};

  void work(int slot) noexcept {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) part(body, i, slot);
    } catch (...) {
      next.store(parts, std::memory_order_relaxed);
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
};

// How often the calling thread lost its core to another one.
long times_interrupted() {
#ifdef RUSAGE_THREAD
  rusage usage;
  if (getrusage(RUSAGE_THREAD, &usage) == 0) return usage.ru_nivcsw;
#endif
  return 0;
}

struct Pool;

class alignas(64) Helper {
 public:
  explicit Helper(Pool& pool) : pool_(pool) {
    std::thread([this] { run(); }).detach();
  }

  // Whether it is free, and now has the job at hand.
  bool offer(Job& job) {
    Job* nothing = nullptr;
    if (!offer_.compare_exchange_strong(nothing, &job)) return false;
    if (asleep_.load() && asleep_.exchange(false)) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_one();
    }
    return true;
  }
  // Whether it had not begun, and now will not.
  bool take_back(Job& job) {
    Job* offered = &job;
    return offer_.compare_exchange_strong(offered, nullptr);
  }

 private:
  void run();
  Job* accept() {
    Job* job = offer_.load(std::memory_order_relaxed);
    return job && offer_.compare_exchange_strong(job, at_work()) ? job : nullptr;
  }
  Job* at_work() { return reinterpret_cast<Job*>(this); }  // no job's address

  Pool& pool_;
  std::atomic<Job*> offer_{nullptr};
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The process's helpers, shared by all that call. Never destroyed: helpers run until the process ends.
struct Pool {
  std::atomic<Helper*> helpers[most_helpers] = {};
  std::atomic<int> size{0};
  std::mutex growing;

  std::atomic<int> waiting{0};  // callers that sleep until a job is over
  std::mutex mutex;
  std::condition_variable over;

  std::atomic<int64_t> alone_until{0};  // steady_clock's nanoseconds

  void grow(int wanted) {
    wanted = std::min(wanted, most_helpers);
    if (size.load() >= wanted) return;
    const std::lock_guard<std::mutex> lock(growing);
    try {
      for (int i = size.load(); i < wanted; ++i) {
        helpers[i].store(new Helper(*this));
        size.store(i + 1);
      }
    } catch (const std::system_error&) {  // no more threads: those that there are do
    }
  }
};

void Helper::run() {
  for (;;) {
    Job* job = nullptr;
    if (!spin([&] { return (job = accept()) != nullptr; })) {
      asleep_.store(true);
      if (offer_.load()) {  // came in between; whoever offered it may not have seen this thread asleep
        asleep_.store(false);
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return !asleep_.load(); });
      continue;
    }
    const long before = times_interrupted();
    job->work(job->slots.fetch_add(1));
    if (times_interrupted() != before) job->interrupted.store(true, std::memory_order_relaxed);
    offer_.store(nullptr);
    Pool& pool = pool_;
    if (job->helpers.fetch_sub(1) == 1 && pool.waiting.load()) {  // the job is gone from here on
      {
        const std::lock_guard<std::mutex> lock(pool.mutex);
      }
      pool.over.notify_all();
    }
  }
}

std::atomic<Pool*> pool_in_use{nullptr};

Pool& pool() {
  if (Pool* known = pool_in_use.load()) return *known;
  static const bool made = [] {
    pool_in_use.store(new Pool);
    // The child of a fork has none of the threads, and locks in any state.
    pthread_atfork(nullptr, nullptr, [] { pool_in_use.store(new Pool); });
    return true;
  }();
  static_cast<void>(made);
  return *pool_in_use.load();
}

int64_t now() { return nanoseconds(steady_clock::now().time_since_epoch()).count(); }

// Until the job's helpers are done.
void wait(Pool& pool, Job& job) {
  const auto done = [&] { return job.helpers.load() == 0; };
  if (done()) return;
  const int64_t begin = now();
  if (spin(done)) return;
  pool.waiting.fetch_add(1);
  {
    std::unique_lock<std::mutex> lock(pool.mutex);
    pool.over.wait(lock, done);
  }
  pool.waiting.fetch_sub(1);
  if (!job.interrupted.load(std::memory_order_relaxed)) return;  // its last part was a long one
  const int64_t end = now();
  pool.alone_until.store(end + std::min<int64_t>(alone_for * (end - begin), longest_alone.count()),
                         std::memory_order_relaxed);
}

}  // namespace

void run_parts(int64_t parts, int threads, void (*part)(const void*, int64_t, int), const void* body) {
  Pool& p = pool();
  Job job{part, body, parts};
  const int64_t alone = p.alone_until.load(std::memory_order_relaxed);
  Helper* asked[most_helpers];
  int count = 0;
  if (alone == 0 || now() >= alone) {
    const int wanted = static_cast<int>(std::min<int64_t>(threads, parts)) - 1;
    p.grow(wanted);
    const int size = p.size.load();
    job.helpers.store(size, std::memory_order_relaxed);  // more than are asked: none is the last one yet
    for (int i = 0; i < size && count < wanted; ++i)
      if (Helper* helper = p.helpers[i].load(); helper->offer(job)) asked[count++] = helper;
    job.helpers.fetch_sub(size - count);
  }
  job.work(0);
  for (int i = 0; i < count; ++i)
    if (asked[i]->take_back(job)) job.helpers.fetch_sub(1);
  wait(p, job);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace mprec
