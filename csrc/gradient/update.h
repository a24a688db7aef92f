// Row gradients and what becomes of them, written once over Vec and the numbers of the rows. Included by
// kernel.h and kernel16.h, which are compiled once per ISA: in one file, whose growth the compiler bounds, it
// would inline less.
//
// Keys are sorted, so a row's entries stand together: their gradients are added in registers and the row is
// read and written once. Weights, states and gradients lie anywhere, so their lines are asked for some
// entries ahead. The arithmetic is that of torch's optimizers, operation by operation and without fused
// multiply-adds, so that results agree to rounding.
#pragma once
#include "gradient/gradient.h"
#include "gradient/row.h"
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

constexpr int64_t entries_ahead = 32;

template <class T>
constexpr int64_t in_a_line = 64 / static_cast<int64_t>(sizeof(T));
template <class T>
inline void prefetch_lines(const T* p, int64_t numbers) {
  for (int64_t i = 0; i < numbers; i += in_a_line<T>) prefetch_l2(p + i);
}
template <class T>
inline void prefetch_lines(Gradient16<T> g, int64_t numbers) {
  if (g.narrow)
    prefetch_lines(static_cast<const T*>(g.values), numbers);
  else
    prefetch_lines(static_cast<const float*>(g.values), numbers);
}

struct Yes {
  constexpr operator bool() const { return true; }
};
struct No {
  constexpr operator bool() const { return false; }
};

inline uint32_t row_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
inline uint32_t entry_of(uint64_t key) { return static_cast<uint32_t>(key); }

// Asks for what an entry needs, when the walk stands at the entry `entries_ahead` before it: one at a time,
// for a burst, as before a row of many entries, would fill the queue to memory and drop out of the cache.
template <Rule rule, class T>
struct Ahead {
  using Number = T;  // of the table
  const RowGradients& g;
  const TableRows& t;
  bool compact;

  void operator()(int64_t i) const {
    i += entries_ahead;
    if (i >= g.count) return;
    prefetch_lines(gradients_of(g, T{}) + g.bags[entry_of(g.keys[i])] * g.grad_stride, g.dim);
    const int64_t row = row_of(g.keys[i]);
    if (compact || row == row_of(g.keys[i - 1])) return;
    prefetch_lines(static_cast<T*>(t.weight) + row * t.weight_stride, g.dim);
    if (t.first) prefetch_lines(t.first + row * t.state_stride, rule == Rule::rowwise_adagrad ? 1 : g.dim);
    if (t.second) prefetch_lines(t.second + row * t.state_stride, g.dim);
  }
};
template <class T>
struct NothingAhead {
  using Number = T;
  void operator()(int64_t) const {}
};

// Sum of the gradients of entries [begin, end) in `vectors` registers of columns.
template <int vectors, bool tail, bool scaled, class Ahead>
inline void accumulate(const RowGradients& g, int64_t begin, int64_t end, int64_t column, Mask mask,
                       const Ahead& ahead, Vec (&acc)[vectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) acc[v] = zero();
  for (int64_t i = begin; i < end; ++i) {
    ahead(i);
    const uint32_t entry = entry_of(g.keys[i]);
    const auto grad = gradients_of(g, typename Ahead::Number{}) + g.bags[entry] * g.grad_stride + column;
    const Vec scale = broadcast(scaled ? g.scales[entry] : 1.0f);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const bool masked = tail && v == vectors - 1;
      const Vec x = masked ? get<true>(grad + v * Vec::width, mask) : get<false>(grad + v * Vec::width, mask);
      acc[v] = acc[v] + (scaled ? x * scale : x);
    }
  }
}
template <int vectors, bool tail, class Ahead>
inline void accumulate(const RowGradients& g, int64_t begin, int64_t end, int64_t column, Mask mask,
                       const Ahead& ahead, Vec (&acc)[vectors]) {
  if (g.scales)
    accumulate<vectors, tail, true>(g, begin, end, column, mask, ahead, acc);
  else
    accumulate<vectors, tail, false>(g, begin, end, column, mask, ahead, acc);
}

template <class T, bool scaled>
inline void add_terms(const RowGradients& g, float* sums) {
  const auto grad = gradients_of(g, T{});
  for (int64_t i = 0; i < g.count; ++i) {
    if (i + entries_ahead < g.count)
      prefetch_lines(grad + g.bags[entry_of(g.keys[i + entries_ahead])] * g.grad_stride, g.dim);
    const uint32_t entry = entry_of(g.keys[i]);
    const auto term = grad + g.bags[entry] * g.grad_stride;
    float* const sum = sums + row_of(g.keys[i]) * g.dim;
    const Vec scale = broadcast(scaled ? g.scales[entry] : 1.0f);
    const auto add = [&](int64_t column, auto tail, Mask mask) __attribute__((always_inline)) {
      const Vec x = get<tail>(term + column, mask);
      put<tail>(sum + column, get<tail>(sum + column, mask) + (scaled ? x * scale : x), mask);
    };
    int64_t column = 0;
    for (; column + Vec::width <= g.dim; column += Vec::width) add(column, No{}, Mask(Vec::width));
    if (column < g.dim) add(column, Yes{}, Mask(g.dim - column));
  }
}
// Gradients of a table of T, summed row by row where the rows' sums stay in a cache.
template <class T>
inline void add_to(const RowGradients& g, float* sums) {
  if (g.scales)
    add_terms<T, true>(g, sums);
  else
    add_terms<T, false>(g, sums);
}

struct Constants {
  Vec lr, eps, one_less_beta1, one_less_beta2, keep;
  explicit Constants(const Update& u)
      : lr(broadcast(u.lr)),
        eps(broadcast(u.eps)),
        one_less_beta1(broadcast(1.0f - u.beta1)),
        one_less_beta2(broadcast(1.0f - u.beta2)),
        keep(broadcast(u.keep)) {}
};

// Applies a rule with state per element to one register of columns.
template <Rule rule, bool tail, class W>
inline void update_columns(Vec g, W weight, float* first, float* second, const Constants& c, Mask mask) {
  if (rule == Rule::assign) {
    put<tail>(weight, g, mask);
  } else if (rule == Rule::sgd) {
    put<tail>(weight, c.keep * get<tail>(weight, mask) - c.lr * g, mask);
  } else if (rule == Rule::adagrad) {
    const Vec sum = get<tail>(first, mask) + g * g;
    put<tail>(first, sum, mask);
    put<tail>(weight, c.keep * get<tail>(weight, mask) - c.lr * (g / (sqrt(sum) + c.eps)), mask);
  } else {
    const Vec old_first = get<tail>(first, mask), old_second = get<tail>(second, mask);
    const Vec new_first = old_first + (g - old_first) * c.one_less_beta1;
    const Vec new_second = old_second + (g * g - old_second) * c.one_less_beta2;
    put<tail>(first, new_first, mask);
    put<tail>(second, new_second, mask);
    const Vec step = c.lr * (new_first / (sqrt(new_second) + c.eps));
    put<tail>(weight, c.keep * get<tail>(weight, mask) - step, mask);
  }
}

template <Rule rule, int vectors, bool tail, class Ahead, class W>
inline void update_block(const RowGradients& g, int64_t begin, int64_t end, int64_t column, Mask mask,
                         const Constants& c, const Ahead& ahead, W weight, float* first, float* second) {
  Vec acc[vectors];
  accumulate<vectors, tail>(g, begin, end, column, mask, ahead, acc);
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = column + v * Vec::width;
    update_columns<rule, tail>(acc[v], weight + at, first + at, second + at, c, mask);
  }
}

// One row: entries [begin, end) and the row they belong to.
template <Rule rule, class Ahead, class W>
inline void update_row(const RowGradients& g, int64_t begin, int64_t end, const Constants& c,
                       const Ahead& ahead, W weight, float* first, float* second) {
  constexpr int64_t block = 4 * Vec::width;
  constexpr NothingAhead<typename Ahead::Number> nothing{};
  const Mask all(Vec::width);
  int64_t column = 0;
  if (block <= g.dim)
    update_block<rule, 4, false>(g, begin, end, column, all, c, ahead, weight, first, second), column = block;
  else if (Vec::width <= g.dim)
    update_block<rule, 1, false>(g, begin, end, column, all, c, ahead, weight, first, second),
        column = Vec::width;
  else
    return update_block<rule, 1, true>(g, begin, end, 0, Mask(g.dim), c, ahead, weight, first, second);
  for (; column + block <= g.dim; column += block)
    update_block<rule, 4, false>(g, begin, end, column, all, c, nothing, weight, first, second);
  for (; column + Vec::width <= g.dim; column += Vec::width)
    update_block<rule, 1, false>(g, begin, end, column, all, c, nothing, weight, first, second);
  if (column < g.dim)
    update_block<rule, 1, true>(g, begin, end, column, Mask(g.dim - column), c, nothing, weight, first,
                                second);
}

// Adds the mean of the squares to the row's state; the factor of the gradient in the row's step.
inline float rowwise_step(Vec squares, int64_t dim, const Update& u, float* sum_of_squares) {
  *sum_of_squares += sum(squares) / static_cast<float>(dim);
  return u.lr / (__builtin_sqrtf(*sum_of_squares) + u.eps);
}

// A row of `vectors` registers, the last one masked if `tail`, whose gradient never leaves them.
template <int vectors, bool tail, class Ahead, class W>
inline void update_row_rowwise(const RowGradients& g, int64_t begin, int64_t end, const Update& u, Mask mask,
                               const Ahead& ahead, W weight, float* sum_of_squares) {
  Vec acc[vectors];
  accumulate<vectors, tail>(g, begin, end, 0, mask, ahead, acc);
  Vec squares = zero();
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) squares = squares + acc[v] * acc[v];
  const Vec step = broadcast(rowwise_step(squares, g.dim, u, sum_of_squares)), keep = broadcast(u.keep);
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const W p = weight + v * Vec::width;
    if (tail && v == vectors - 1)
      put<true>(p, keep * get<true>(p, mask) - step * acc[v], mask);
    else
      put<false>(p, keep * get<false>(p, mask) - step * acc[v], mask);
  }
}

// A row of any width, whose gradient is kept in `scratch`.
template <class Ahead, class W>
inline void update_wide_row_rowwise(const RowGradients& g, int64_t begin, int64_t end, const Update& u,
                                    const Constants& c, const Ahead& ahead, W weight, float* sum_of_squares,
                                    float* scratch) {
  update_row<Rule::assign>(g, begin, end, c, ahead, scratch, scratch, scratch);
  Vec squares = zero();
  int64_t column = 0;
  for (; column + Vec::width <= g.dim; column += Vec::width) {
    const Vec x = load(scratch + column);
    squares = squares + x * x;
  }
  const Mask mask(g.dim - column);
  if (column < g.dim) {
    const Vec x = load(scratch + column, mask);
    squares = squares + x * x;
  }
  const Vec step = broadcast(rowwise_step(squares, g.dim, u, sum_of_squares));
  for (column = 0; column + Vec::width <= g.dim; column += Vec::width)
    put<false>(weight + column, c.keep * get<false>(weight + column, mask) - step * load(scratch + column),
               mask);
  if (column < g.dim)
    put<true>(weight + column,
              c.keep * get<true>(weight + column, mask) - step * load(scratch + column, mask), mask);
}

// Runs update(begin, end, weight, first, second) for each distinct row of the share, ascending.
template <class T, class Ahead, class Body>
inline void for_each_row(const RowGradients& g, const TableRows& t, bool compact, const Ahead& ahead,
                         const Body& update) {
  for (int64_t i = 1 - entries_ahead; i < 0; ++i) ahead(i);
  int64_t distinct = 0;
  for (int64_t begin = 0, end; begin < g.count; begin = end, ++distinct) {
    const int64_t row = row_of(g.keys[begin]);
    for (end = begin + 1; end < g.count && row_of(g.keys[end]) == row;) ++end;
    const auto weight = row_at(t, compact ? distinct : row, T{});
    float* first = t.first ? t.first + row * t.state_stride : no_state(weight);
    float* second = t.second ? t.second + row * t.state_stride : no_state(weight);
    update(begin, end, weight, first, second);
  }
}

template <Rule rule, class T>
void apply_rule(const RowGradients& g, const TableRows& t, const Update& u, bool compact) {
  const Constants c(u);
  const Ahead<rule, T> ahead{g, t, compact};
  for_each_row<T>(g, t, compact, ahead,
                  [&](int64_t begin, int64_t end, auto weight, float* first, float* second) {
                    update_row<rule>(g, begin, end, c, ahead, weight, first, second);
                  });
}

template <int vectors, bool tail, class T>
void apply_rowwise(const RowGradients& g, const TableRows& t, const Update& u, Mask mask) {
  const Ahead<Rule::rowwise_adagrad, T> ahead{g, t, false};
  for_each_row<T>(g, t, false, ahead, [&](int64_t begin, int64_t end, auto weight, float* first, float*) {
    update_row_rowwise<vectors, tail>(g, begin, end, u, mask, ahead, weight, first);
  });
}

template <class T>
inline void apply_rowwise(const RowGradients& g, const TableRows& t, const Update& u, float* scratch) {
  const int64_t vectors = (g.dim + Vec::width - 1) / Vec::width, rest = g.dim % Vec::width;
  const Mask mask(rest ? rest : Vec::width);
  if (vectors == 1)
    return rest ? apply_rowwise<1, true, T>(g, t, u, mask) : apply_rowwise<1, false, T>(g, t, u, mask);
  if (vectors == 2 && !rest) return apply_rowwise<2, false, T>(g, t, u, mask);
  if (vectors == 4 && !rest) return apply_rowwise<4, false, T>(g, t, u, mask);
  const Constants c(u);
  const Ahead<Rule::rowwise_adagrad, T> ahead{g, t, false};
  for_each_row<T>(g, t, false, ahead, [&](int64_t begin, int64_t end, auto weight, float* first, float*) {
    update_wide_row_rowwise(g, begin, end, u, c, ahead, weight, first, scratch);
  });
}

// A table of T: float, Half or BFloat. `assign` writes float32.
template <class T>
inline void apply_to(const RowGradients& g, const TableRows& t, const Update& u, bool compact,
                     float* scratch) {
  switch (u.rule) {
    case Rule::assign: return apply_rule<Rule::assign, float>(g, t, u, compact);
    case Rule::sgd: return apply_rule<Rule::sgd, T>(g, t, u, compact);
    case Rule::adagrad: return apply_rule<Rule::adagrad, T>(g, t, u, compact);
    case Rule::rowwise_adagrad: return apply_rowwise<T>(g, t, u, scratch);
    case Rule::adam: return apply_rule<Rule::adam, T>(g, t, u, compact);
  }
}

// Of tables of float16 or bfloat16: kernel16.h.
void apply16(const RowGradients&, const TableRows&, const Update&, float* scratch);
void add16(const RowGradients&, Format, float* sums);

}  // namespace mprec::MPREC_ISA
