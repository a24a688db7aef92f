// Queries in order of their deadlines, with running sums of the samples that wait.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

namespace mprec::scheduler {

// A query. `taken` of its samples have been handed out. Who needs to attach something derives from it.
struct Ticket {
  Ticket(int64_t size, double deadline) : size(size), deadline(deadline) {}
  virtual ~Ticket() = default;

  int64_t left() const { return size - taken; }

  const int64_t size;
  const double deadline;
  int64_t taken = 0;
};

// Samples `start` to `stop` of a query.
struct Piece {
  std::shared_ptr<Ticket> ticket;
  int64_t start, stop;
};

// Adding at the end and taking from the front cost the same however many wait; a query that overtakes others
// moves those.
class Queue {
 public:
  size_t size() const { return entries_.size(); }
  bool empty() const { return entries_.empty(); }
  const Ticket& operator[](size_t i) const { return *entries_[i].ticket; }
  double deadline(size_t i) const { return entries_[i].deadline; }
  // Samples waiting up to and with query i; in all.
  int64_t upto(size_t i) const { return entries_[i].end - gone_; }
  int64_t waiting() const { return empty() ? 0 : upto(size() - 1); }

  size_t place(double deadline) const;          // where a query with this deadline would stand
  size_t fitting(int64_t samples) const;        // queries from the front that have so many samples together
  void insert(std::shared_ptr<Ticket> ticket);  // at its place
  std::vector<Piece> take(int64_t samples);     // from the front
  std::shared_ptr<Ticket> pop();                // the first query, unserved
  bool remove(const Ticket& ticket);            // false if it does not wait here

 private:
  struct Entry {
    std::shared_ptr<Ticket> ticket;
    double deadline;
    int64_t end;  // samples up to and with this query, since the queue was made
  };
  std::deque<Entry> entries_;
  int64_t gone_ = 0;  // samples that have left
};

}  // namespace mprec::scheduler
