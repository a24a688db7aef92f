// The row-gradient kernel, written once over Vec; included by one file per ISA.
//
// Keys are sorted, so a row's entries stand together: their gradients are added in registers and the row is
// read and written once. Weights, states and gradients lie anywhere, so their lines are asked for some
// entries ahead. The arithmetic is that of torch's optimizers, operation by operation and without fused
// multiply-adds, so that results agree to rounding.
#pragma once
#include "gradient/gradient.h"
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

constexpr int64_t entries_ahead = 12;

inline void prefetch_lines(const float* p, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) prefetch(p + i);
}

inline uint32_t row_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
inline uint32_t entry_of(uint64_t key) { return static_cast<uint32_t>(key); }

template <Rule rule>
inline void prefetch_entry(const RowGradients& g, const TableRows& t, int64_t i, bool compact) {
  prefetch_lines(g.grad + g.bags[entry_of(g.keys[i])] * g.grad_stride, g.dim);
  const int64_t row = row_of(g.keys[i]);
  if (compact || row == row_of(g.keys[i - 1])) return;
  prefetch_lines(t.weight + row * t.weight_stride, g.dim);
  if (t.first) prefetch_lines(t.first + row * t.state_stride, rule == Rule::rowwise_adagrad ? 1 : g.dim);
  if (t.second) prefetch_lines(t.second + row * t.state_stride, g.dim);
}

// Sum of the gradients of entries [begin, end) in `vectors` registers of columns.
template <int vectors, bool tail, bool scaled>
inline void accumulate(const RowGradients& g, int64_t begin, int64_t end, int64_t column, Mask mask,
                       Vec (&acc)[vectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) acc[v] = zero();
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t entry = entry_of(g.keys[i]);
    const float* grad = g.grad + g.bags[entry] * g.grad_stride + column;
    const Vec scale = broadcast(scaled ? g.scales[entry] : 1.0f);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const Vec x = tail ? load(grad + v * Vec::width, mask) : load(grad + v * Vec::width);
      acc[v] = acc[v] + (scaled ? x * scale : x);
    }
  }
}

struct Constants {
  Vec lr, eps, one_less_beta1, one_less_beta2;
  explicit Constants(const Update& u)
      : lr(broadcast(u.lr)),
        eps(broadcast(u.eps)),
        one_less_beta1(broadcast(1.0f - u.beta1)),
        one_less_beta2(broadcast(1.0f - u.beta2)) {}
};

template <bool tail>
inline Vec get(const float* p, Mask mask) {
  return tail ? load(p, mask) : load(p);
}
template <bool tail>
inline void put(float* p, Vec x, Mask mask) {
  if (tail)
    store(p, x, mask);
  else
    store(p, x);
}

// Applies a rule with state per element to one register of columns.
template <Rule rule, bool tail>
inline void update_columns(Vec g, float* weight, float* first, float* second, const Constants& c, Mask mask) {
  if (rule == Rule::assign) {
    put<tail>(weight, g, mask);
  } else if (rule == Rule::sgd) {
    put<tail>(weight, get<tail>(weight, mask) - c.lr * g, mask);
  } else if (rule == Rule::adagrad) {
    const Vec sum = get<tail>(first, mask) + g * g;
    put<tail>(first, sum, mask);
    put<tail>(weight, get<tail>(weight, mask) - c.lr * (g / (sqrt(sum) + c.eps)), mask);
  } else {
    const Vec old_first = get<tail>(first, mask), old_second = get<tail>(second, mask);
    const Vec new_first = old_first + (g - old_first) * c.one_less_beta1;
    const Vec new_second = old_second + (g * g - old_second) * c.one_less_beta2;
    put<tail>(first, new_first, mask);
    put<tail>(second, new_second, mask);
    put<tail>(weight, get<tail>(weight, mask) - c.lr * (new_first / (sqrt(new_second) + c.eps)), mask);
  }
}

template <Rule rule, int vectors, bool tail>
inline void update_block(const RowGradients& g, int64_t begin, int64_t end, int64_t column, Mask mask,
                         const Constants& c, float* weight, float* first, float* second) {
  Vec acc[vectors];
  if (g.scales)
    accumulate<vectors, tail, true>(g, begin, end, column, mask, acc);
  else
    accumulate<vectors, tail, false>(g, begin, end, column, mask, acc);
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = column + v * Vec::width;
    update_columns<rule, tail>(acc[v], weight + at, first + at, second + at, c, mask);
  }
}

// One row: entries [begin, end) and the row they belong to.
template <Rule rule>
inline void update_row(const RowGradients& g, int64_t begin, int64_t end, const Constants& c, float* weight,
                       float* first, float* second) {
  constexpr int64_t block = 4 * Vec::width;
  const Mask all(Vec::width);
  int64_t column = 0;
  for (; column + block <= g.dim; column += block)
    update_block<rule, 4, false>(g, begin, end, column, all, c, weight, first, second);
  for (; column + Vec::width <= g.dim; column += Vec::width)
    update_block<rule, 1, false>(g, begin, end, column, all, c, weight, first, second);
  if (column < g.dim)
    update_block<rule, 1, true>(g, begin, end, column, Mask(g.dim - column), c, weight, first, second);
}

inline void update_row_rowwise(const RowGradients& g, int64_t begin, int64_t end, const Update& u,
                               float* weight, float* sum_of_squares, float* scratch) {
  const Constants c(u);
  update_row<Rule::assign>(g, begin, end, c, scratch, scratch, scratch);
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
  *sum_of_squares += sum(squares) / static_cast<float>(g.dim);
  const Vec step = broadcast(u.lr) / (sqrt(broadcast(*sum_of_squares)) + broadcast(u.eps));
  for (column = 0; column + Vec::width <= g.dim; column += Vec::width)
    store(weight + column, load(weight + column) - step * load(scratch + column));
  if (column < g.dim)
    store(weight + column, load(weight + column, mask) - step * load(scratch + column, mask), mask);
}

template <Rule rule>
void apply_rule(const RowGradients& g, const TableRows& t, const Update& u, bool compact, float* scratch) {
  const Constants c(u);
  int64_t distinct = 0;
  for (int64_t begin = 0; begin < g.count; ++distinct) {
    const int64_t row = row_of(g.keys[begin]);
    int64_t end = begin + 1;
    while (end < g.count && row_of(g.keys[end]) == row) ++end;
    for (int64_t i = begin + entries_ahead; i < end + entries_ahead && i < g.count; ++i)
      prefetch_entry<rule>(g, t, i, compact);
    float* weight = t.weight + (compact ? distinct : row) * t.weight_stride;
    // A rule without state is given its weight in the state's place: never read or written there.
    float* first = t.first ? t.first + row * t.state_stride : weight;
    float* second = t.second ? t.second + row * t.state_stride : weight;
    if (rule == Rule::rowwise_adagrad)
      update_row_rowwise(g, begin, end, u, weight, first, scratch);
    else
      update_row<rule>(g, begin, end, c, weight, first, second);
    begin = end;
  }
}

inline void apply(const RowGradients& g, const TableRows& t, const Update& u, bool compact, float* scratch) {
  switch (u.rule) {
    case Rule::assign: return apply_rule<Rule::assign>(g, t, u, compact, scratch);
    case Rule::sgd: return apply_rule<Rule::sgd>(g, t, u, compact, scratch);
    case Rule::adagrad: return apply_rule<Rule::adagrad>(g, t, u, compact, scratch);
    case Rule::rowwise_adagrad: return apply_rule<Rule::rowwise_adagrad>(g, t, u, compact, scratch);
    case Rule::adam: return apply_rule<Rule::adam>(g, t, u, compact, scratch);
  }
}

extern const GradientKernels gradient_kernels = {apply};

}  // namespace mprec::MPREC_ISA
