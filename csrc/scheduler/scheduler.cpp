// The queue's door and the scheduler's expectations; choice.cpp has the choice of what to run.
#include "scheduler/scheduler.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "common/error.h"

namespace mprec::scheduler {
namespace {

constexpr double probe_s = 0.1;  // silence after which a query is let through; at least the SLA
constexpr double stale =
    0.05;  // relative change of a factor or the SLA after which prices are computed again
constexpr int64_t stale_arrivals = 64;  // queries after which they are, too
constexpr size_t sizes_looked_at = 16;
constexpr double least_left_s = 1e-4;

// One option dominates another if it is as good and as fast, or so nearly that measurements could not tell: a
// share of the quality, of the time in good batches, and of the time of any batch.
constexpr double same_quality = 5e-4, same_unit = 0.02, same_seconds = 0.25;

// The z with P(Z <= z) = p, for 0.5 <= p < 1. A start within 4.5e-4 (Abramowitz and Stegun, 26.2.23), made
// exact by Newton's method.
double normal_quantile(double p) {
  if (p <= 0.5) return 0;
  const double t = std::sqrt(-2 * std::log(1 - p));
  double z =
      t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
  for (int i = 0; i < 3; ++i)
    z -= (0.5 * std::erfc(-z / std::sqrt(2.0)) - p) * std::sqrt(2 * M_PI) * std::exp(z * z / 2);
  return z;
}

constexpr int64_t most_samples = int64_t{1} << 40;  // sums of two stay far from overflow

void check_lanes(const std::vector<std::shared_ptr<Lane>>& lanes) {
  if (std::find(lanes.begin(), lanes.end(), nullptr) != lanes.end())
    throw std::invalid_argument("lanes: expected executors, got none in one place");
}

std::string milliseconds(double seconds) {
  char text[64];
  std::snprintf(text, sizeof text, "%.3f ms", 1e3 * seconds);
  return text;
}

}  // namespace

double Option::profiled(int64_t samples) const {
  const auto last = static_cast<int64_t>(seconds.size()) - 1;
  return samples <= last ? seconds[samples]
                         : seconds[last] * static_cast<double>(samples) / static_cast<double>(last);
}

Lane::Lane(std::string lane, std::vector<Option> some) : name(std::move(lane)), options(std::move(some)) {
  if (options.empty()) throw std::invalid_argument(message("options of ", name, ": expected at least one"));
  const size_t sizes = options.front().seconds.size();
  least.assign(sizes, std::numeric_limits<double>::infinity());
  for (const Option& o : options) {
    if (o.seconds.size() < 2 || o.seconds.size() != sizes)
      throw std::invalid_argument(message(
          "seconds of ", o.path, ": expected the same number of sizes for all paths, at least 2, got ",
          o.seconds.size(), " and ", sizes));
    for (size_t b = 0; b < sizes; ++b) least[b] = std::min(least[b], o.seconds[b]);
  }
  slower.assign(options.size() * options.size(), 0.0);
  for (size_t a = 0; a < options.size(); ++a)
    for (size_t b = 0; b < options.size(); ++b)
      for (size_t size = 1; a != b && size < sizes; ++size)
        if (!std::isinf(options[b].seconds[size]))
          slower[a * options.size() + b] =
              std::max(most_slower(a, b), options[a].seconds[size] / options[b].seconds[size]);
  correction = std::make_shared<Correction>(options.size());
  rests.assign(options.size(), -std::numeric_limits<double>::infinity());
}

size_t Lane::option(const std::string& path) const {
  for (size_t o = 0; o < options.size(); ++o)
    if (options[o].path == path) return o;
  throw std::out_of_range(path);
}

bool Lane::resting(double now) const {
  return std::all_of(rests.begin(), rests.end(), [now](double end) { return end > now; });
}

Scheduler::Scheduler(std::vector<std::shared_ptr<Lane>> lanes, Limits limits)
    : lanes_(std::move(lanes)), limits_(limits) {
  if (lanes_.empty()) throw std::invalid_argument("lanes: expected at least one");
  check_lanes(lanes_);
  for (const auto& [name, value] :
       {std::pair{"max_batch", limits.max_batch}, {"max_queue", limits.max_queue}})
    if (value < 1 || value > most_samples)
      throw std::invalid_argument(message(name, ": expected 1 to ", most_samples, ", got ", value));
  if (!(limits.late_share > 0 && limits.late_share < 1))
    throw std::invalid_argument(message("late_share: expected in (0, 1), got ", limits.late_share));
  double lowest = std::numeric_limits<double>::infinity();
  for (const auto& lane : lanes_)
    for (const Option& o : lane->options) lowest = std::min(lowest, o.quality);
  if (lowest <= 0) shift_ = 1 - lowest;
}

std::optional<Refusal> Scheduler::offer(double now, std::shared_ptr<Ticket> ticket) {
  const int64_t size = ticket->size;
  const double deadline = ticket->deadline;
  if (size < 1 || size > most_samples || std::isnan(deadline))
    throw std::invalid_argument(
        message("query: expected 1 to 2^40 samples and a deadline, got ", size, " and ", deadline));
  traffic_.count(now, size, deadline - now);
  if (std::isinf(shortest(size))) return Refusal{"unsupported", message("no path takes a batch of ", size)};
  if (queue_.waiting() + size > limits_.max_queue)
    return Refusal{"full", message(queue_.waiting(), " samples wait already, ", size, " more would exceed ",
                                   limits_.max_queue)};
  if (limits_.admission && !(now < deadline && is_probe(now))) {
    const size_t place = queue_.place(deadline);
    const int64_t ahead = place ? queue_.upto(place - 1) : 0;
    const double needed = time_for(now, ahead + size, certainty(now));
    if (now + needed > deadline)
      return Refusal{"overload", message("takes ", milliseconds(needed), " at best, ",
                                         milliseconds(deadline - now), " are left")};
  }
  queue_.insert(std::move(ticket));
  return std::nullopt;
}

std::vector<std::shared_ptr<Ticket>> Scheduler::expire(double now) {
  std::vector<std::shared_ptr<Ticket>> expired;
  const auto lanes = static_cast<int64_t>(lanes_.size());
  while (limits_.admission && !queue_.empty()) {
    const Ticket& head = queue_[0];
    const bool met = now + shortest((head.size + lanes - 1) / lanes) <= head.deadline;
    if (head.taken || met || (now < head.deadline && is_probe(now))) break;
    expired.push_back(queue_.pop());
  }
  return expired;
}

std::vector<std::shared_ptr<Ticket>> Scheduler::clear() {
  std::vector<std::shared_ptr<Ticket>> all;
  while (!queue_.empty()) all.push_back(queue_.pop());
  return all;
}

void Scheduler::done(const Job& job, double now, double seconds) {
  Lane& lane = release(job, now);
  if (&lane != job.lane.get()) return;
  if (lane.resting(job.option, now)) priced_.clear();  // it need not rest any longer
  lane.rests[job.option] = -std::numeric_limits<double>::infinity();
  if (job.profiled_s > 0) lane.correction->observe(job.option, seconds / job.profiled_s, now, seconds);
}

void Scheduler::failed(const Job& job, double now, double rest_s) {
  Lane& lane = release(job, now);
  if (&lane != job.lane.get() || rest_s <= 0) return;
  lane.rests[job.option] = now + rest_s;
  priced_.clear();  // others may have to do its work
}

void Scheduler::again(std::shared_ptr<Ticket> ticket) {
  if (!ticket) throw std::invalid_argument("ticket: expected one, got none");
  ticket->taken = 0;
  queue_.insert(std::move(ticket));
}

void Scheduler::rest(size_t index, double now, double rest_s) {
  if (index >= lanes_.size())
    throw std::invalid_argument(message("index: expected 0 to ", lanes_.size() - 1, ", got ", index));
  std::fill(lanes_[index]->rests.begin(), lanes_[index]->rests.end(), now + rest_s);
  priced_.clear();
}

// An executor that is not to be used, because all its paths rest and others do not.
bool Scheduler::is_out(const Lane& lane, double now) const {
  return lane.resting(now) &&
         !std::all_of(lanes_.begin(), lanes_.end(), [now](const auto& other) { return other->resting(now); });
}

Lane& Scheduler::release(const Job& job, double now) {
  if (job.index >= lanes_.size())
    throw std::invalid_argument(message("job: of executor ", job.index, ", but there are ", lanes_.size()));
  Lane& lane = *lanes_[job.index];
  lane.busy = false;
  lane.until = last_news_ = now;
  return lane;
}

void Scheduler::replace(std::vector<std::shared_ptr<Lane>> lanes) {
  if (lanes.size() != lanes_.size())
    throw std::invalid_argument(
        message("lanes: expected ", lanes_.size(), ", as before, got ", lanes.size()));
  check_lanes(lanes);
  for (size_t i = 0; i < lanes.size(); ++i) {
    lanes[i]->busy = lanes_[i]->busy;
    lanes[i]->until = lanes_[i]->until;
  }
  lanes_ = std::move(lanes);
  priced_.clear();
}

// Nothing waits, nothing has started or ended for a while, and an executor is free.
bool Scheduler::is_probe(double now) const {
  if (now - last_news_ < std::max(probe_s, traffic_.sla()) || queue_.size() > 1) return false;
  return std::any_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return !lane->busy; });
}

// Prices, if corrections, queries or the SLA have moved since they were computed.
void Scheduler::refresh(double now) {
  const double sla = traffic_.sla();
  if (!priced_.empty() && traffic_.arrivals() < priced_until_ && now < rested_) {
    const auto moved = [](double value, double then) { return std::abs(value - then) > stale * then; };
    size_t i = 0;
    bool old = moved(sla, priced_[i++]);
    for (const auto& lane : lanes_)
      for (const double factor : lane->correction->factors()) old = old || moved(factor, priced_[i++]);
    if (!old) return;
  }
  priced_.assign(1, sla);
  priced_until_ = traffic_.arrivals() + stale_arrivals;
  rested_ = std::numeric_limits<double>::infinity();
  for (const auto& lane : lanes_)
    for (const double end : lane->rests)
      if (end > now) rested_ = std::min(rested_, end);
  std::vector<std::vector<FluidPrice::Path>> columns;
  const Lane* quick = lanes_.front().get();
  for (const auto& lane : lanes_) {
    price_options(*lane, now);
    auto& column = columns.emplace_back();
    for (const size_t o : lane->sensible)
      column.push_back({lane->options[o].quality + shift_, lane->unit[o]});
    if (lane->unit[lane->fast] < quick->unit[quick->fast]) quick = lane.get();
  }
  price_ = FluidPrice(std::move(columns));
  std::vector<int64_t> sorted = traffic_.sizes(), sizes;
  std::sort(sorted.begin(), sorted.end());
  std::vector<double> seconds;
  for (size_t i = 0; i < sorted.size(); i += 1 + sorted.size() / sizes_looked_at) {
    sizes.push_back(sorted[i]);
    seconds.push_back(expected(*quick, quick->fast, sorted[i], 1));
  }
  latest_ = Latest(seconds, sizes, sla, std::sqrt(quick->correction->noise()));
}

// What a sample costs by each option of an executor, and which of them are worth a thought: near equals would
// only take turns, at the cost of caches that have to be filled again.
void Scheduler::price_options(Lane& lane, double now) {
  const double sla = traffic_.sla(), own = query_s / traffic_.query_size();
  const std::vector<double>& factors = lane.correction->factors();
  lane.unit.clear();
  for (size_t o = 0; o < lane.options.size(); ++o) {
    const Option& option = lane.options[o];
    priced_.push_back(factors[o]);
    const int64_t size = fitting(option.seconds, 0.5 * sla / factors[o]);
    double each = option.seconds[size] / static_cast<double>(size);
    if (std::isinf(each))  // a path that takes some sizes only
      for (size_t b = 1; b < option.seconds.size(); ++b)
        each = std::min(each, option.seconds[b] / static_cast<double>(b));
    lane.unit.push_back(each * factors[o] + own);
  }
  const bool all_rest = lane.resting(now);
  std::vector<size_t> order;
  for (size_t o = 0; o < lane.options.size(); ++o)
    if (all_rest || !lane.resting(o, now)) order.push_back(o);
  const auto goodput = [&](size_t o) { return (lane.options[o].quality + shift_) / lane.unit[o]; };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return goodput(a) > goodput(b); });
  lane.sensible.clear();
  for (const size_t o : order) {
    const double quality = lane.options[o].quality + shift_;
    const bool dominated = std::any_of(lane.sensible.begin(), lane.sensible.end(), [&](size_t p) {
      return lane.options[p].quality + shift_ >= (1 - same_quality) * quality &&
             lane.unit[p] <= (1 + same_unit) * lane.unit[o] &&
             lane.most_slower(p, o) * factors[p] <= (1 + same_seconds) * factors[o];
    });
    if (!dominated) lane.sensible.push_back(o);
  }
  lane.fast = lane.sensible.front();
}

// The largest batch that takes at most `limit` seconds, at least 1. A query that has just missed a batch
// waits for it and is in the next, so that half the SLA is what a batch may take.
int64_t Scheduler::fitting(const std::vector<double>& seconds, double limit) const {
  const auto end =
      seconds.begin() + std::min<int64_t>(limits_.max_batch + 1, static_cast<int64_t>(seconds.size()));
  const auto over = std::partition_point(seconds.begin() + 2, std::max(seconds.begin() + 2, end),
                                         [&](double s) { return s <= limit; });
  return over - seconds.begin() - 1;
}

// Samples per second that must be served: what arrives, or what the queue's deadlines ask for.
double Scheduler::demand(double now, double rate) const {
  const size_t size = queue_.size();
  for (size_t i = 0; i < size; i = i + 1 == size ? size : std::min(2 * i + 1, size - 1))
    rate = std::max(rate,
                    static_cast<double>(queue_.upto(i)) / std::max(queue_.deadline(i) - now, least_left_s));
  return rate;
}

// Expected time of a batch.
double Scheduler::expected(const Lane& lane, size_t option, int64_t samples, double queries) const {
  return lane.options[option].profiled(samples) * lane.correction->factors()[option] + query_s * queries;
}

// Expected time of so many samples in good batches by the executor's path of greatest goodput.
double Scheduler::fastest(const Lane& lane, double samples) const {
  const auto size = static_cast<int64_t>(std::min(samples, static_cast<double>(limits_.max_batch)));
  const double one = expected(lane, lane.fast, std::max<int64_t>(1, size), samples / traffic_.query_size());
  const double good = samples * lane.unit[lane.fast] * stretch_;
  return std::isinf(one) ? good : std::max(one, good);
}

// About the least expected time of a batch on any executor.
double Scheduler::shortest(int64_t samples) const {
  double least = std::numeric_limits<double>::infinity();
  for (const auto& lane : lanes_) {
    const auto b = std::min<size_t>(static_cast<size_t>(samples), lane->least.size() - 1);
    least = std::min(least, lane->least[b] * lane->correction->least_factor());
  }
  return least;
}

// Standard deviations by which a query must be expected in time. Taking it costs time that is worth (q - v) /
// q of what it brings: nothing while there is time for all, everything where there is not.
double Scheduler::certainty(double now) {
  refresh(now);
  const double worth = price_.sample(demand(now, traffic_.rate(now))) / price_.best();
  return normal_quantile(std::clamp(1 - worth, 0.5, 1 - limits_.late_share));
}

// Seconds until all executors together have answered so many samples by their fastest paths, and `margin`
// standard deviations.
double Scheduler::time_for(double now, int64_t samples, double margin) const {
  std::vector<std::pair<double, const Lane*>> ready;
  ready.reserve(lanes_.size());
  for (const auto& lane : lanes_)
    if (!is_out(*lane, now)) ready.emplace_back(lane->busy ? std::max(lane->until, now) : now, lane.get());
  std::stable_sort(ready.begin(), ready.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  const auto work = static_cast<double>(samples);
  double rate = 0, done = 0, end = 0;
  for (size_t k = 0; k < ready.size(); ++k) {
    const double speed = work / fastest(*ready[k].second, work);
    rate += speed;
    done += (ready[k].first - now) * speed;
    end = (work + done) / rate;
    if (k + 1 < ready.size() && now + end <= ready[k + 1].first) break;
  }
  const double calls = std::max(1.0, 2 * end / traffic_.sla());
  double spread = 0;
  for (const auto& lane : lanes_) spread = std::max(spread, lane->correction->spread(now, calls));
  return end * std::exp(margin * spread);
}

}  // namespace mprec::scheduler
