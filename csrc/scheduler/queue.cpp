#include "scheduler/queue.h"

#include <algorithm>
#include <utility>

namespace mprec::scheduler {

size_t Queue::place(double deadline) const {
  const auto at = std::upper_bound(entries_.begin(), entries_.end(), deadline,
                                   [](double d, const Entry& e) { return d < e.deadline; });
  return static_cast<size_t>(at - entries_.begin());
}

size_t Queue::fitting(int64_t samples) const {
  const auto at = std::upper_bound(entries_.begin(), entries_.end(), gone_ + samples,
                                   [](int64_t end, const Entry& e) { return end < e.end; });
  return static_cast<size_t>(at - entries_.begin());
}

void Queue::insert(std::shared_ptr<Ticket> ticket) {
  const size_t at = place(ticket->deadline);
  const int64_t before = at ? entries_[at - 1].end : gone_, samples = ticket->left();
  const double deadline = ticket->deadline;
  entries_.insert(entries_.begin() + static_cast<std::ptrdiff_t>(at),
                  {std::move(ticket), deadline, before + samples});
  for (size_t i = at + 1; i < entries_.size(); ++i) entries_[i].end += samples;
}

std::vector<Piece> Queue::take(int64_t samples) {
  std::vector<Piece> pieces;
  while (samples > 0) {
    Ticket& first = *entries_.front().ticket;
    const int64_t part = std::min(samples, first.left());
    pieces.push_back({entries_.front().ticket, first.taken, first.taken + part});
    first.taken += part;
    gone_ += part;
    samples -= part;
    if (!first.left()) entries_.pop_front();
  }
  return pieces;
}

std::shared_ptr<Ticket> Queue::pop() {
  std::shared_ptr<Ticket> first = std::move(entries_.front().ticket);
  gone_ = entries_.front().end;
  entries_.pop_front();
  return first;
}

bool Queue::remove(const Ticket& ticket) {
  size_t i = static_cast<size_t>(std::lower_bound(entries_.begin(), entries_.end(), ticket.deadline,
                                                  [](const Entry& e, double d) { return e.deadline < d; }) -
                                 entries_.begin());
  while (i < entries_.size() && entries_[i].ticket.get() != &ticket &&
         entries_[i].deadline == ticket.deadline)
    ++i;
  if (i == entries_.size() || entries_[i].ticket.get() != &ticket) return false;
  if (i == 0) {
    pop();
    return true;
  }
  const int64_t samples = entries_[i].end - entries_[i - 1].end;
  entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(i));
  for (; i < entries_.size(); ++i) entries_[i].end -= samples;
  return true;
}

}  // namespace mprec::scheduler
