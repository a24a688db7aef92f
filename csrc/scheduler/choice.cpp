// The choice of what runs next: every batch that a free executor could take is valued, the best one is
// started.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "scheduler/scheduler.h"

namespace mprec::scheduler {
namespace {

constexpr int64_t least_part = 32;    // samples of a query that is shared among executors
constexpr double stretch_gain = 0.1;  // share of the way that one batch moves the observed stretch
constexpr double sure = 0.999;        // chance to be in time that smaller batches need not improve

// That a log-normal time is at most `left`; `scale` is 1 / (sqrt(2) x its logarithm's deviation).
double chance_of(double left, double log_seconds, double scale) {
  return left <= 0 ? 0.0 : 0.5 * std::erfc((log_seconds - std::log(left)) * scale);
}

double chance_scale(const Correction& correction, double now) {
  return 1 / (std::sqrt(2.0) * correction.spread(now));
}

}  // namespace

bool Scheduler::Candidate::operator<(const Candidate& other) const {
  return std::tie(gain, samples, lane) < std::tie(other.gain, other.samples, other.lane);
}

std::shared_ptr<Job> Scheduler::next(double now) {
  if (queue_.empty()) return nullptr;
  const auto free = static_cast<size_t>(
      std::count_if(lanes_.begin(), lanes_.end(), [](const auto& lane) { return !lane->busy; }));
  if (!free) return nullptr;
  refresh(now);
  const double rate = traffic_.rate(now), capacity = price_.capacity(), sla = traffic_.sla();
  const double bound = std::max(sla - traffic_.burst_size() / capacity, 0.1 * sla);
  const State state{now, price_.sample(demand(now, rate)), rate,
                    static_cast<double>(queue_.waiting()) / capacity,
                    Overflow(rate / capacity, traffic_.dispersion() / capacity, bound)};
  const std::vector<Batch> possible = batches(free);
  std::optional<Candidate> chosen;
  for (size_t i = 0; i < lanes_.size(); ++i) {
    if (lanes_[i]->busy || is_out(*lanes_[i], now)) continue;
    const auto candidate = best(state, i, possible);
    if (candidate && (!chosen || *chosen < *candidate)) chosen = candidate;
  }
  if (!chosen || (free < lanes_.size() && better_elsewhere(state, *chosen))) return nullptr;
  return start(now, *chosen);
}

// The batches to consider: 1, 2, 4, ... queries from the front and as many as fit; or a part of the first
// query, if it is too large for one batch or several executors could share it.
std::vector<Scheduler::Batch> Scheduler::batches(size_t free) const {
  const int64_t head = queue_[0].left(), lanes = static_cast<int64_t>(free);
  if (head > limits_.max_batch) return {{1, limits_.max_batch}};
  std::vector<Batch> some;
  if (free > 1 && head >= lanes * least_part) some.push_back({1, (head + lanes - 1) / lanes});
  const size_t most = queue_.fitting(limits_.max_batch);
  for (size_t count = 1; count < most; count *= 2) some.push_back({count, queue_.upto(count - 1)});
  some.push_back({most, queue_.upto(most - 1)});
  return some;
}

// The batch of greatest gain for one executor; none if no path takes any of the sizes.
std::optional<Scheduler::Candidate> Scheduler::best(const State& state, size_t index,
                                                    const std::vector<Batch>& batches) const {
  const Lane& lane = *lanes_[index];
  const double now = state.now, second = price_.second(index, state.value), goodput = price_.goodput();
  const double scale = chance_scale(*lane.correction, now);
  const double unit = lane.unit[lane.fast], all_units = 1 / price_.capacity();
  const double share = std::min(all_units / unit, 1.0);  // of the executors' capacity that this one has
  const size_t last = queue_.size() - 1;

  struct Path {
    size_t option;
    double before;  // gain of the next larger batch
  };
  std::vector<Path> paths;  // that may still gain by smaller batches
  for (const size_t o : lane.sensible) paths.push_back({o, -INFINITY});

  std::optional<Candidate> best;
  for (auto batch = batches.rbegin(); batch != batches.rend() && !paths.empty(); ++batch) {
    const auto [count, size] = *batch;
    const auto samples = static_cast<double>(size);
    const auto slack = [&](size_t i) { return queue_.deadline(i) - now; };
    // Work behind query i of the queue, in seconds of all executors, after this batch.
    const auto work = [&](size_t i) { return static_cast<double>(queue_.upto(i) - size) * all_units; };
    const double left = work(last);
    const size_t behind = queue_.upto(count - 1) == size ? count : 0;  // the first query that waits on
    double overdue = -INFINITY;
    if (behind <= last)
      for (const size_t k : {behind, (behind + last) / 2, last})
        overdue = std::max(overdue, work(k) - slack(k));
    const auto exhausted = [&](Path& path) {
      const Option& option = lane.options[path.option];
      const double seconds = expected(lane, path.option, size, static_cast<double>(count));
      if (std::isinf(seconds)) return false;
      const double log_seconds = std::log(seconds);
      double chance = chance_of(slack(0), log_seconds, scale);
      if (count > 1)
        chance = (chance + chance_of(slack(count / 2), log_seconds, scale) +
                  chance_of(slack(count - 1), log_seconds, scale)) /
                 3;
      const double quality = option.quality + shift_;
      const double profit = samples * (quality * chance - state.value) - second * seconds;
      double gain = profit - latest_.missed(share * seconds + left) * state.rate * quality;
      gain -= goodput * (state.overflow.lost(state.backlog, share * (seconds - samples * unit)) +
                         std::max(share * seconds + overdue, 0.0));
      const Candidate candidate{gain, size, index, path.option, count, seconds, profit};
      if (!best || gain > best->gain || (gain == best->gain && size > best->samples)) best = candidate;
      // Smaller batches of this path would be worse still.
      const bool falls = gain < path.before || chance > sure;
      path.before = gain;
      return falls;
    };
    paths.erase(std::remove_if(paths.begin(), paths.end(), exhausted), paths.end());
  }
  return best;
}

// Would an executor that is busy now gain more by the first query, once it is free, than the free one gains
// now? Only if the best batch loses, and unless it leaves others enough to do. The free executor would idle
// meanwhile, which costs the price of its time.
bool Scheduler::better_elsewhere(const State& state, const Candidate& best) const {
  const Ticket& head = queue_[0];
  const int64_t samples = head.left();
  if (best.gain >= 0 || samples > limits_.max_batch) return false;
  if (best.profit > 0 && best.samples < queue_.waiting()) return false;
  // What an executor gains by the first query alone from `start` on.
  const auto alone = [&](size_t index, double start) {
    const Lane& lane = *lanes_[index];
    const double second = price_.second(index, state.value),
                 scale = chance_scale(*lane.correction, state.now);
    double most = -INFINITY;
    for (const size_t o : lane.sensible) {
      const double seconds = expected(lane, o, samples, 1);
      if (std::isinf(seconds) || lane.resting(o, state.now)) continue;
      const double chance = chance_of(head.deadline - start, std::log(seconds), scale);
      const double quality = (lane.options[o].quality + shift_) * chance;
      most = std::max(most, static_cast<double>(samples) * (quality - state.value) - second * seconds);
    }
    return most;
  };
  // Without the damage on both sides: there, too, others have to wait.
  const double part = best.profit * static_cast<double>(samples) / static_cast<double>(best.samples);
  const double here = std::max(part, alone(best.lane, state.now));
  const double idle = price_.second(best.lane, state.value);
  for (size_t index = 0; index < lanes_.size(); ++index) {
    if (!lanes_[index]->busy) continue;
    const double free = std::max(lanes_[index]->until, state.now);
    if (alone(index, free) - idle * (free - state.now) > here) return true;
  }
  return false;
}

std::shared_ptr<Job> Scheduler::start(double now, const Candidate& chosen) {
  const auto& lane = lanes_[chosen.lane];
  auto job =
      std::make_shared<Job>(Job{chosen.lane, lane, chosen.option, queue_.take(chosen.samples), chosen.samples,
                                chosen.seconds, lane->options[chosen.option].profiled(chosen.samples), now});
  lane->busy = true;
  lane->until = now + chosen.seconds;
  last_news_ = now;
  const double good = static_cast<double>(chosen.samples) * lane->unit[chosen.option];
  const double stretch = queue_.empty() ? 1.0 : std::max(1.0, chosen.seconds / good);
  stretch_ += stretch_gain * (stretch - stretch_);
  return job;
}

}  // namespace mprec::scheduler
