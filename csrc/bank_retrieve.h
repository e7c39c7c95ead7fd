// bank_retrieve: the similarities of queries with a bank's keys, and weighted means of its values.
#pragma once

#include "common/dispatch.h"

namespace r2r {

template <class T>
struct BankRetrieveKernels {
  // out[n] = key . queries[n], all [depth]; returns key . key.
  float (*dot_products)(const T* key, int64_t depth, const T* queries, int64_t count, float* out);
  // For m < count: totals[m] [length] += the sum over slots of weights[m][slot] * values[slot]. Slots lie `stride` apart.
  void (*add_weighted)(
      const T* values, int64_t stride, int64_t slots, int64_t length, const float* const* weights, float* const* totals,
      int64_t count);
  // Rounds to T.
  void (*narrow)(const float* from, T* to, int64_t count);
};
R2R_DECLARE_KERNELS(BankRetrieveKernels)

}  // namespace r2r
