// The two walks over the bank: over the keys, for similarities, and over the values of the tasks that take part, for the
// readout. Each key and each value is read from memory once for all samples.
#include "bank_retrieve.h"
#include "common/vec-inl.h"

namespace r2r::R2R_ISA {

// Values in a vector of a row of keys or queries. The vector holds floats, or pairs of bfloat16 as they lie in memory.
template <class T>
constexpr int64_t FACTORS = MULTIPLIES_PAIRS<T> ? 2 * WIDTH : WIDTH;

template <class T>
inline vec load_factors(const T* p, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (MULTIPLIES_PAIRS<T>) {
    return n >= FACTORS<T> ? *(const loose_vec*)p : (vec)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
  }
#endif
  return load_upto(p, n);
}

template <class T>
float dot_products(const T* key, int64_t depth, const T* queries, int64_t count, float* out) {
  float square = 0;
  const auto some = [&]<int N>(int64_t n, bool with_square) __attribute__((always_inline)) {
    vec sums[N][2] = {}, squares[2] = {};
    const T* query = queries + n * depth;
    for (int64_t i = 0; i < depth; i += 2 * FACTORS<T>) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const int64_t at = i + half * FACTORS<T>, left = depth - at;
        if (left <= 0) break;
        const vec k = load_factors(key + at, left);
        if (with_square) __builtin_prefetch(key + depth + at, 0, 2);  // the next key
        squares[half] = multiply_add_factors<T>(k, k, squares[half]);
#pragma GCC unroll 8
        for (int m = 0; m < N; m++) {
          sums[m][half] = multiply_add_factors<T>(k, load_factors(query + m * depth + at, left), sums[m][half]);
        }
      }
    }
    for (int m = 0; m < N; m++) out[n + m] = sum(sums[m][0] + sums[m][1]);
    if (with_square) square = sum(squares[0] + squares[1]);
  };
  int64_t n = 0;
  for (; n + 8 <= count; n += 8) some.template operator()<8>(n, n == 0);
  for (; n + 4 <= count; n += 4) some.template operator()<4>(n, n == 0);
  for (; n < count; n++) some.template operator()<1>(n, n == 0);
  return square;
}

template <class T>
void add_weighted(
    const T* values, int64_t stride, int64_t slots, int64_t length, const float* const* weights, float* const* totals,
    int64_t count) {
  constexpr int BLOCK = 4;
  const auto some = [&]<int S>(int64_t slot) __attribute__((always_inline)) {
    const T* rows = values + slot * stride;
    for (int64_t i = 0; i < length; i += WIDTH) {
      const int64_t left = length - i;
      vec row[S];
      for (int s = 0; s < S; s++) {
        row[s] = load_upto(rows + s * stride + i, left);
        __builtin_prefetch(
            rows + (2 * S + s) * stride + i, 0, 2);  // rows are pages apart: the processor would not prefetch them
      }
      for (int64_t m = 0; m < count; m++) {
        vec total = load_upto(totals[m] + i, left);
        for (int s = 0; s < S; s++) total += weights[m][slot + s] * row[s];
        store_upto(totals[m] + i, total, left);
      }
    }
  };
  int64_t slot = 0;
  for (; slot + BLOCK <= slots; slot += BLOCK) some.template operator()<BLOCK>(slot);
  for (; slot < slots; slot++) some.template operator()<1>(slot);
}

template <class T>
void narrow_all(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) store_upto(to + i, load_upto(from + i, count - i), count - i);
}

template <class T>
constexpr BankRetrieveKernels<T> bank_retrieve_kernels{
    .dot_products = dot_products<T>,
    .add_weighted = add_weighted<T>,
    .narrow = narrow_all<T>,
};
R2R_DEFINE_KERNELS(BankRetrieveKernels, bank_retrieve_kernels)

}  // namespace r2r::R2R_ISA
