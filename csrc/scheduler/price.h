// What a second of an executor's time and a waiting sample are worth, by a linear program.
//
// Path p on executor e answers one sample in tau[e, p] seconds with quality q[e, p]. If samples come at a
// rate R, the most quality per second of any mixture x[e, p] (samples per second) is the linear program
//
//     maximise    sum q[e, p] x[e, p]
//     subject to  sum over p of tau[e, p] x[e, p] <= 1    for each e     (price of a second: lambda[e])
//                 sum over e, p of x[e, p]        <= R                   (value of a sample: v)
//
// Its dual has one free number, since a given v fixes every price:
//
//     lambda[e] = max over p of (q[e, p] - v) / tau[e, p],  but at least 0
//
// v falls as R rises: below the capacity of the best paths a sample is worth its full quality and time is
// worth nothing; above the capacity of the fastest ones another sample is worth nothing, and a second is
// worth the greatest goodput. Between them v has a few steps. They are found once, so that a price costs one
// search.
#pragma once
#include <cstddef>
#include <vector>

namespace mprec::scheduler {

class FluidPrice {
 public:
  struct Path {
    double quality, tau;
  };

  FluidPrice() = default;
  // executors[e]: the paths of e. Paths of infinite tau are left out.
  explicit FluidPrice(std::vector<std::vector<Path>> executors);

  double best() const { return best_; }          // the greatest quality
  double goodput() const { return goodput_; }    // the most quality per second
  double capacity() const { return capacity_; }  // the greatest rate of which nothing need be refused

  double sample(double rate) const;                    // v where samples come at `rate` per second
  double second(size_t executor, double value) const;  // lambda where a sample is worth `value`
  double quality_per_second(double rate) const;        // the program's optimum: no mixture has more

 private:
  double served(double value) const;

  std::vector<std::vector<Path>> executors_;
  std::vector<double> values_, rates_;  // the steps of v: values_[i] up to rates_[i]
  double best_ = 0, goodput_ = 0, capacity_ = 0;
};

}  // namespace mprec::scheduler
