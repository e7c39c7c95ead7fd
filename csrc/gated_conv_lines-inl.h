// What the walks over planes and over rows share: vectors and lines of values, the parts that a 3x3 convolution slides over,
// and stores of the result.
#pragma once

#include "gated_conv.h"
#include "gated_conv_element-inl.h"

#define R2R_ALWAYS __attribute__((always_inline))

namespace r2r::R2R_ISA {

// body(i, valid) for each vector of the values [begin, end). `valid` values of it exist: a constant but for the last vector.
template <class Body>
R2R_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + WIDTH <= end; i += WIDTH) body(i, WIDTH);
  if (i < end) body(i, end - i);
}

// body<V>(i, valid) for the values [0, count). The first line begins after `head` values. A line is V vectors. The values
// before and behind the lines come one vector at a time, in their usual order; `valid` values of such a vector exist.
template <class T, class Body>
R2R_INLINE void for_lines(int64_t head, int64_t count, const Body& body) {
  const auto single = [&](int64_t i, int64_t valid) R2R_ALWAYS { body.template operator()<1>(i, valid); };
  for_vectors(0, head, single);
  int64_t i = head;
  for (; i + LINE<T> <= count; i += LINE<T>) body.template operator()<LINE<T> / WIDTH>(i, LINE<T>);
  for_vectors(i, count, single);
}

// A 3x3 convolution slides over parts. Where the processor has dot products of T, one part holds pairs of a value of x and a
// value of the prior. Else the first part holds x and the second one the prior, as floats.
template <class T>
constexpr int PARTS = MULTIPLIES_PAIRS<T> ? 1 : 2;

template <class T>
R2R_INLINE vec load_part(const T* p, int64_t valid) {
  return load_upto(p, valid);
}
R2R_INLINE void join(vec x, vec prior, vec (&parts)[2]) {
  parts[0] = x;
  parts[1] = prior;
}
R2R_INLINE void split(const vec (&parts)[2], vec& x, vec& prior) {
  x = parts[0];
  prior = parts[1];
}
template <int V, class T>
R2R_INLINE void join_lines(const T* x, const T* prior, vec (&parts)[V][2]) {
  for (int v = 0; v < V; v++) join(load_line(x, v), load_line(prior, v), parts[v]);
}
#if defined(__AVX512BF16__)
R2R_INLINE half_vec load_part(const bfloat16* p, int64_t valid) {
  return valid >= WIDTH ? load_bits(p) : load_first_bits(p, valid);
}
R2R_INLINE void join(half_vec x, half_vec prior, vec (&parts)[1]) {
  parts[0] = pairs(x, prior);
}
R2R_INLINE void join(vec x, vec prior, vec (&parts)[1]) {
  join(narrow(x), narrow(prior), parts);
}
R2R_INLINE void split(const vec (&parts)[1], vec& x, vec& prior) {
  x = even_of(parts[0]);
  prior = odd_of(parts[0]);
}
R2R_INLINE void join_lines(const bfloat16* x, const bfloat16* prior, vec (&parts)[2][1]) {
  const vec even = load((const float*)x), odd = load((const float*)prior);
  parts[0][0] = interleave_halves<0>(even, odd);
  parts[1][0] = interleave_halves<1>(even, odd);
}
#endif

// Writes a vector or a line of the result.
template <class T, int V>
R2R_INLINE void put_result(const GatedConv<T>& op, T* p, const vec (&values)[V], int64_t valid) {
  if constexpr (V * WIDTH == LINE<T>) {
    if (valid == LINE<T>) return op.streams ? stream_line(p, values) : store_line(p, values);
  }
  store_upto(p, values[0], valid);
}

// A 1x1 convolution of a vector or a line. For vector v, tap(0, v) is the tap of x, tap(1, v) that of the prior, tap(2, v)
// the bias.
template <int V, class T, class Tap>
R2R_INLINE void gate_values(const GatedConv<T>& op, const T* x, const T* prior, T* y, int64_t valid, const Tap& tap) {
  vec values[V];
  for (int v = 0; v < V; v++) {
    const vec a = V == 1 ? load_upto(x, valid) : load_line(x, v);
    const vec b = V == 1 ? load_upto(prior, valid) : load_line(prior, v);
    values[v] = blend(a, b, gate_of<T>(tap(2, v) + tap(0, v) * a + tap(1, v) * b));
  }
  put_result(op, y, values, valid);
}

}  // namespace r2r::R2R_ISA
