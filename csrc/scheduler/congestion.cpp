#include "scheduler/congestion.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "common/error.h"

namespace mprec::scheduler {
namespace {

constexpr double steepest = 30.0;                // exponent beyond which a chance is 0 or 1
constexpr double thirds[] = {-1.09, 0.0, 1.09};  // means of the thirds of a normal distribution

}  // namespace

Overflow::Overflow(double load, double grain, double bound) : bound_(bound) {
  const double exponent =
      std::clamp(2 * (1 - load) * bound / std::max(load * grain, 1e-12), -steepest, steepest);
  theta_ = exponent / bound;
  flat_ = std::abs(exponent) < 1e-3;
  scale_ = flat_ ? 2 * bound : std::expm1(exponent);
}

double Overflow::lost(double backlog, double more) const {
  if (more <= 0) return 0;
  double end = backlog + more, beyond = 0;
  if (end > bound_) {
    beyond = end - std::max(bound_, backlog);
    end = bound_;
    if (backlog >= end) return beyond;
  }
  if (flat_) return beyond + (end * end - backlog * backlog) / scale_;
  const double grown = (std::exp(theta_ * end) - std::exp(theta_ * backlog)) / theta_;
  return beyond + (grown - (end - backlog)) / scale_;
}

Latest::Latest(const std::vector<double>& seconds, const std::vector<int64_t>& sizes, double sla,
               double spread) {
  if (seconds.size() != sizes.size())
    throw std::invalid_argument(
        message("seconds, sizes: expected equally many, got ", seconds.size(), " and ", sizes.size()));
  double total = 0;
  for (const int64_t size : sizes) total += 3 * static_cast<double>(size);
  std::vector<std::pair<double, double>> starts;
  for (size_t i = 0; i < seconds.size(); ++i)
    for (const double z : thirds)
      starts.emplace_back(sla - seconds[i] * std::exp(z * spread), static_cast<double>(sizes[i]) / total);
  std::sort(starts.begin(), starts.end());
  for (const auto& [start, weight] : starts) {
    if (start <= 0) continue;  // lost in any case
    starts_.push_back(start);
    sums_.push_back({sums_.back().weight + weight, sums_.back().moment + weight * start});
  }
}

double Latest::missed(double seconds) const {
  const Sum& sum = sums_[std::upper_bound(starts_.begin(), starts_.end(), seconds) - starts_.begin()];
  return sum.weight * seconds - sum.moment;
}

}  // namespace mprec::scheduler
