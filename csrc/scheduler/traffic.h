// What arrives: how many samples per second, how unevenly, in queries of which sizes, with how much time
// left. All averages fade with time, measured in latency targets (SLAs): these are the times that decide.
#pragma once
#include <cstdint>
#include <vector>

namespace mprec::scheduler {

// Samples per second, with weights that fall by e in memory() seconds. Before the first query, and the first
// one after a pause, there was a silence. It counts the less the more often queries have come since: full
// load that sets in is seen after a few of them.
class Rate {
 public:
  void count(double now, double samples, double memory_s);
  double at(double now);  // after the first count()
  double memory() const { return memory_s_; }

 private:
  void fade(double now);

  double memory_s_ = 0, sum_ = 0, weight_ = 0, silence_ = 0, at_ = 0, latest_ = 0;
  int64_t arrivals_ = 0;
};

// Variance over mean of the samples in a window.
class Dispersion {
 public:
  void count(double now, double samples, double window_s);
  double samples() const;  // 0 before a few windows are over

 private:
  bool started_ = false;
  double start_ = 0, here_ = 0, mean_ = 0, square_ = 0;
  int64_t windows_ = 0;
};

class Traffic {
 public:
  void count(double now, int64_t size, double left);  // a query, with so many seconds to its deadline

  // Samples per second: the steady average, or the quick one where it is greater by more than its standard
  // deviation.
  double rate(double now);

  // Variance over mean of the samples that arrive in a window. burst_size() where queries arrive
  // independently, more where they come in bursts.
  double dispersion() const;

  double sla() const { return sla_; }                // mean seconds to a query's deadline
  double query_size() const { return query_size_; }  // mean samples of a query
  double burst_size() const { return burst_size_; }  // mean size of the query that a random sample belongs to
  int64_t arrivals() const { return arrivals_; }     // queries
  const std::vector<int64_t>& sizes() const { return sizes_; }  // of the last queries, in no order

 private:
  double sla_ = 0, query_size_ = 1, burst_size_ = 1;
  int64_t arrivals_ = 0;
  std::vector<int64_t> sizes_;
  Rate slow_, fast_;
  Dispersion dispersion_;
};

}  // namespace mprec::scheduler
