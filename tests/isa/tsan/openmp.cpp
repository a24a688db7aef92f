// OpenMP regions on std::thread, in place of libgomp's own, for builds with -fsanitize=thread.
//
// libgomp synchronises its threads by futexes that ThreadSanitizer does not see, so it reports every region
// as a race with the code around it. It does see the creation, the joining and the mutexes of std::thread.
// The functions are those that gcc calls for `parallel`, `barrier` and `for schedule(dynamic)`.
// libgomp is not linked: a use of any other is an error of the linker.
#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  long next, end, increment, chunk;
};

class Team {
 public:
  explicit Team(int size) : size(size) {}
  const int size;

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++arrived_ == size) {
      arrived_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

  // The team's `number`th loop: the first thread to reach it starts it.
  void start(int number, const Loop& loop) {
    const std::lock_guard<std::mutex> lock(mutex_);
    loops_.emplace(number, loop);
  }
  bool take(int number, long* begin, long* end) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Loop& loop = loops_.at(number);
    if (loop.next >= loop.end) return false;
    *begin = loop.next;
    *end = loop.next = std::min(loop.next + loop.chunk * loop.increment, loop.end);
    return true;
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int arrived_ = 0, round_ = 0;
  std::map<int, Loop> loops_;
};

struct Self {
  Team* team = nullptr;
  int number = 0, loop = -1;
};
thread_local Self self;

}  // namespace

extern "C" {

int omp_get_thread_num() { return self.number; }
int omp_get_num_threads() { return self.team ? self.team->size : 1; }
int omp_get_max_threads() { return static_cast<int>(std::thread::hardware_concurrency()); }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team team(threads ? static_cast<int>(threads) : omp_get_max_threads());
  const auto run = [&](int number) {
    const Self outer = self;
    self = {&team, number, -1};
    body(data);
    self = outer;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < team.size; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& thread : others) thread.join();
}

void GOMP_barrier() {
  if (self.team) self.team->barrier();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  return self.team->take(self.loop, begin, end);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long from, long to, long increment, long chunk, long* begin,
                                          long* end) {
  self.team->start(++self.loop, {from, to, increment, chunk});
  return GOMP_loop_nonmonotonic_dynamic_next(begin, end);
}

void GOMP_loop_end_nowait() {}
void GOMP_loop_end() { GOMP_barrier(); }

}  // extern "C"
