#include "scheduler/price.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <stdexcept>

#include "common/error.h"

namespace mprec::scheduler {

FluidPrice::FluidPrice(std::vector<std::vector<Path>> executors) : executors_(std::move(executors)) {
  // v can only step where a path's profit reaches zero or where two paths of an executor are worth the same.
  std::set<double, std::greater<>> points;
  for (auto& paths : executors_) {
    paths.erase(std::remove_if(paths.begin(), paths.end(), [](const Path& p) { return std::isinf(p.tau); }),
                paths.end());
    for (size_t i = 0; i < paths.size(); ++i) {
      if (paths[i].quality > 0) points.insert(paths[i].quality);
      for (size_t j = i + 1; j < paths.size(); ++j) {
        const auto [q, tau] = paths[i];
        const auto [other_q, other_tau] = paths[j];
        if (tau == other_tau) continue;
        const double point = (q * other_tau - other_q * tau) / (other_tau - tau);
        if (point > 0 && point < std::min(q, other_q)) points.insert(point);
      }
    }
  }
  for (auto at = points.begin(); at != points.end(); ++at) {
    const auto next = std::next(at);
    const double rate = served((*at + (next == points.end() ? 0.0 : *next)) / 2);
    if (rates_.empty() || rate > rates_.back()) {
      values_.push_back(*at);
      rates_.push_back(rate);
    }
  }
  values_.push_back(0.0);
  best_ = points.empty() ? 0.0 : *points.begin();
  for (size_t e = 0; e < executors_.size(); ++e) {
    goodput_ += second(e, 0.0);
    double least = INFINITY;
    for (const Path& p : executors_[e]) least = std::min(least, p.tau);
    capacity_ += 1 / least;
  }
}

double FluidPrice::sample(double rate) const {
  return values_[std::lower_bound(rates_.begin(), rates_.end(), rate) - rates_.begin()];
}

double FluidPrice::second(size_t executor, double value) const {
  if (executor >= executors_.size())
    throw std::invalid_argument(
        message("executor: expected less than ", executors_.size(), ", got ", executor));
  double most = 0;
  for (const Path& p : executors_[executor]) most = std::max(most, std::max(p.quality - value, 0.0) / p.tau);
  return most;
}

double FluidPrice::quality_per_second(double rate) const {
  const double value = sample(rate);
  double sum = rate * value;
  for (size_t e = 0; e < executors_.size(); ++e) sum += second(e, value);
  return sum;
}

// Samples per second if every executor takes its best path at this value; of equals the slower.
double FluidPrice::served(double value) const {
  double rate = 0;
  for (const auto& paths : executors_) {
    double most = -INFINITY, tau = INFINITY;
    for (const Path& p : paths) {
      if (p.quality <= value) continue;
      const double gain = (p.quality - value) / p.tau;
      if (gain > most || (gain == most && p.tau > tau)) most = gain, tau = p.tau;
    }
    rate += 1 / tau;
  }
  return rate;
}

}  // namespace mprec::scheduler
