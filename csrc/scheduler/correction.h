// How fast the machine is now, compared with its profile.
//
// The logarithm of observed over profiled time of a call of path p is modelled as
//
//     y = machine + deviation[p] + noise
//
// `machine` is common to all paths of an executor: a busy neighbour or a lower clock slows them all. It is a
// random walk. `deviation[p]` is what one path differs from that; it is small and reverts to zero with time.
// A Kalman filter follows them together. Since what is known grows old by itself, old observations are
// forgotten with time, and a path that has not run for a while is expected to follow the machine.
//
// Three rules make the filter robust. An observation further than three standard deviations away is taken for
// as noisy as it is far away, so that one hiccup moves little. If the next one lies as far away on the same
// side, the machine has changed: its variance then grows by the square of the distance, so that the estimate
// moves there at once. The first calls after a pause find cold caches, which is the machine's state: its
// variance is great for a few calls, and so is the calls' own. Else their path would be blamed, and a worse
// one taken for seconds.
#pragma once
#include <cstddef>
#include <limits>
#include <vector>

namespace mprec::scheduler {

class Correction {
 public:
  explicit Correction(size_t paths);

  size_t paths() const { return factors_.size(); }

  // Expected over profiled time of each path.
  const std::vector<double>& factors() const { return factors_; }
  double least_factor() const { return least_; }

  // Variance of the logarithm of a call's time.
  double noise() const { return noise_; }

  // Standard deviation of the logarithm of the next call's time, or of the mean of several, around the
  // expected one.
  double spread(double now, double calls = 1.0) const;

  // A call of `path` that ended at `now`, after `seconds`, took `ratio` times what the profile says. Ratios
  // that are not positive and finite are ignored. A clock that was set back counts as one that stood still.
  void observe(size_t path, double ratio, double now, double seconds = 0.0);

 private:
  double& covariance(size_t i, size_t j) { return covariance_[i * mean_.size() + j]; }
  double known(double now) const;
  void age(double now);

  std::vector<double> mean_, covariance_;  // the machine, then the paths' deviations
  std::vector<double> factors_;
  double least_ = 1.0;
  double known_;                                            // the factor's variance then, pauses left out
  double seen_ = -std::numeric_limits<double>::infinity();  // when that was
  double suspect_ = 0;                                      // the last observation's distance, if an outlier
  double noise_;
  double cold_ = 0;  // variance because of the last pause; halved by each call
};

}  // namespace mprec::scheduler
