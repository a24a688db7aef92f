#include "scheduler/traffic.h"

#include <algorithm>
#include <cmath>

namespace mprec::scheduler {
namespace {

constexpr double slow_slas = 10, fast_slas = 2;  // averages over these: steadily, and to notice a burst
constexpr double window_slas = 2;                // in which arrivals are counted for their variance
constexpr int64_t many_windows = 64, few_windows = 16;  // averaged over, and needed to trust the average
constexpr int64_t remembered = 64;                      // queries whose sizes are kept
constexpr int64_t sizes_every = 16;  // queries after which the mean sizes are computed again
constexpr double least_s = 1e-6;

}  // namespace

void Rate::count(double now, double samples, double memory_s) {
  if (!arrivals_ || now - latest_ > memory_s / 2) {  // nothing is known of what begins now
    at_ = now;
    sum_ = weight_ = 0;
    silence_ = memory_s / 4;
    arrivals_ = 1;
  } else if (now > latest_) {  // a batch of queries is one arrival: it does not tell when the next one comes
    ++arrivals_;
  }
  memory_s_ = memory_s;
  latest_ = now;
  fade(now);
  sum_ += samples;
}

double Rate::at(double now) {
  fade(now);
  return sum_ / (weight_ + silence_ / static_cast<double>(arrivals_));
}

void Rate::fade(double now) {
  if (now <= at_) return;
  const double kept = std::exp((at_ - now) / memory_s_);
  sum_ *= kept;
  silence_ *= kept;
  weight_ = weight_ * kept + memory_s_ * (1 - kept);  // the time that the sum stands for
  at_ = now;
}

void Dispersion::count(double now, double samples, double window_s) {
  if (!started_) {
    started_ = true;
    start_ = now;
  }
  const double passed = (now - start_) / window_s;
  if (passed >= 1) {
    const int64_t over = 1 + static_cast<int64_t>(std::min(passed - 1, static_cast<double>(many_windows)));
    for (int64_t i = 0; i < over; ++i) {
      const double here = i == 0 ? here_ : 0.0;
      const double gain = 1.0 / static_cast<double>(std::min(++windows_, many_windows));
      mean_ += gain * (here - mean_);
      square_ += gain * (here * here - square_);
    }
    start_ = now;
    here_ = 0;
  }
  here_ += samples;
}

double Dispersion::samples() const {
  if (windows_ < few_windows || mean_ == 0) return 0;
  return std::max(square_ - mean_ * mean_, 0.0) / mean_;
}

void Traffic::count(double now, int64_t size, double left) {
  left = std::max(left, least_s);
  sla_ += (left - sla_) * (arrivals_ ? 0.05 : 1.0);
  const auto samples = static_cast<double>(size);
  slow_.count(now, samples, slow_slas * sla_);
  fast_.count(now, samples, fast_slas * sla_);
  dispersion_.count(now, samples, window_slas * sla_);
  if (arrivals_ < remembered)
    sizes_.push_back(size);
  else
    sizes_[arrivals_ % remembered] = size;
  ++arrivals_;
  if (arrivals_ % sizes_every == 0 || arrivals_ == 1) {
    double total = 0, squares = 0;
    for (const int64_t s : sizes_) {
      total += static_cast<double>(s);
      squares += static_cast<double>(s) * static_cast<double>(s);
    }
    query_size_ = total / static_cast<double>(sizes_.size());
    burst_size_ = squares / total;
  }
}

double Traffic::rate(double now) {
  if (!arrivals_) return 0;
  const double slow = slow_.at(now), fast = fast_.at(now);
  if (fast <= slow) return slow;
  return std::max(slow, fast * (1 - std::sqrt(burst_size_ / (2 * fast_.memory() * fast))));
}

double Traffic::dispersion() const { return std::max(burst_size_, dispersion_.samples()); }

}  // namespace mprec::scheduler
