#include "scheduler/correction.h"

#include <algorithm>
#include <cmath>

namespace mprec::scheduler {
namespace {

constexpr double wander = 0.05;      // variance that the machine's factor gains in a second
constexpr double unknown = 0.25;     // variance of the machine's factor after a long silence
constexpr double profiled = 0.02;    // the same right after profiling
constexpr double deviating = 0.02;   // variance of a path's deviation before anything is known of it
constexpr double reversion_s = 5.0;  // time in which a deviation that is not observed falls to 1/e
constexpr double pause_s = 0.05;     // silence after which caches and clocks are cold
constexpr double cold = 0.25;        // least variance of the machine's factor then, and more of a call
constexpr double warming = 0.5;      // share of that which it has in each further call
constexpr double first_noise = 0.15 * 0.15;
constexpr double least_noise = 0.02 * 0.02, most_noise = 0.5 * 0.5;
constexpr double noise_gain = 0.02;
constexpr double outlier = 3.0;         // standard deviations
const double limit = std::log(1000.0);  // no observation counts for more than this

}  // namespace

Correction::Correction(size_t paths)
    : mean_(paths + 1, 0.0),
      covariance_((paths + 1) * (paths + 1), 0.0),
      factors_(paths, 1.0),
      known_(profiled),
      noise_(first_noise) {
  covariance(0, 0) = profiled;
  for (size_t j = 1; j < mean_.size(); ++j) covariance(j, j) = deviating;
}

double Correction::known(double now) const {
  return std::min(unknown, known_ + wander * std::max(now - seen_, 0.0));
}

double Correction::spread(double now, double calls) const { return std::sqrt(noise_ / calls + known(now)); }

void Correction::observe(size_t path, double ratio, double now, double seconds) {
  if (!(ratio > 0 && std::isfinite(ratio))) return;
  const bool paused = now - seconds - seen_ > pause_s;  // or nothing has run yet
  cold_ = paused ? cold : warming * cold_;
  age(now);
  covariance(0, 0) = std::max(covariance(0, 0), cold_);
  const size_t n = mean_.size(), i = path + 1;
  double off = std::clamp(std::log(ratio), -limit, limit) - (mean_[0] + mean_[i]);
  double total = covariance(0, 0) + 2 * covariance(0, i) + covariance(i, i) + noise_ + cold_;
  double doubt = noise_ + (paused ? cold : 0.0);  // for `known_`: else sparse calls would seem unpredictable
  if (std::abs(off) <= outlier * std::sqrt(total)) {
    suspect_ = 0;
    const double told = noise_ / (noise_ + cold_);  // the share that this says of the noise
    noise_ = std::clamp(noise_ + noise_gain * told * told * (off * off - total), least_noise, most_noise);
  } else if (off * suspect_ > 0) {
    if (std::abs(suspect_) < std::abs(off)) off = suspect_;
    suspect_ = 0;
    covariance(0, 0) += off * off;
    known_ += off * off;
    total += off * off;
  } else {
    suspect_ = off;
    doubt += off * off;
    total += off * off;
  }
  known_ *= doubt / (known_ + doubt);
  std::vector<double> gain(n);
  for (size_t j = 0; j < n; ++j) gain[j] = covariance(0, j) + covariance(i, j);
  for (size_t j = 0; j < n; ++j) {
    const double part = gain[j] / total;
    mean_[j] += part * off;
    for (size_t k = 0; k < n; ++k) covariance(j, k) -= part * gain[k];
  }
  for (size_t j = 0; j + 1 < n; ++j) factors_[j] = std::exp(mean_[0] + mean_[j + 1]);
  least_ = *std::min_element(factors_.begin(), factors_.end());
}

void Correction::age(double now) {
  if (std::isinf(seen_)) seen_ = now;
  const double elapsed = std::max(now - seen_, 0.0), kept = std::exp(-elapsed / reversion_s);
  known_ = known(now);
  seen_ = now;
  covariance(0, 0) = std::min(unknown, covariance(0, 0) + wander * elapsed);
  const double fresh = (1 - kept * kept) * deviating;
  for (size_t j = 1; j < mean_.size(); ++j) {
    mean_[j] *= kept;
    covariance(0, j) *= kept;
    covariance(j, 0) = covariance(0, j);
    for (size_t k = 1; k < mean_.size(); ++k) covariance(j, k) *= kept * kept;
    covariance(j, j) += fresh;
  }
}

}  // namespace mprec::scheduler
