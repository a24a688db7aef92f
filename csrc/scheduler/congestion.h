// What it costs others that an executor is taken for a while. Both effects are in seconds of work that is
// lost in the end: the queue grows, and may reach its bound before it is empty again (Overflow); a query that
// arrives meanwhile may come too late, however fast it is served then (Latest).
#pragma once
#include <cstdint>
#include <vector>

namespace mprec::scheduler {

// Work lost at the queue's bound.
//
// A second of work that is added is made up for by the next idle time, unless the queue has grown to its
// bound before. With a compound Poisson stream seen as Brownian motion of drift `load - 1` and variance `load
// * grain` per second (`grain`: variance over mean of arriving work, in seconds), a queue of w seconds
// reaches the bound b before it is empty with chance
//
//     (exp(theta w) - 1) / (exp(theta b) - 1),    theta = 2 (1 - load) / (load * grain)
//
// (gambler's ruin; see for example Karlin and Taylor, A Second Course in Stochastic Processes, chapter 15).
class Overflow {
 public:
  Overflow(double load, double grain, double bound);
  // Seconds lost if `backlog` seconds of work wait and `more` are added: the chance's integral.
  double lost(double backlog, double more) const;

 private:
  double bound_, theta_, scale_;
  bool flat_;
};

// How long executors may be taken before queries of the sizes that arrive cannot be met any more.
class Latest {
 public:
  Latest() = default;
  // `seconds` are times on the fastest path of a sample of queries, `sizes` their sizes, `spread` the
  // deviation of the logarithm of such a time.
  Latest(const std::vector<double>& seconds, const std::vector<int64_t>& sizes, double sla, double spread);
  // Mean over arriving samples of the time in which an arrival is lost, if executors are taken so long.
  double missed(double seconds) const;

 private:
  struct Sum {
    double weight = 0, moment = 0;
  };
  std::vector<double> starts_;
  std::vector<Sum> sums_{1};  // of weights, and of weights times starts
};

}  // namespace mprec::scheduler
