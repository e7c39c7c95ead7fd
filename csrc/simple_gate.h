// The gate's product and its backward over a run of values: each is read and written once.
#pragma once

#include "vec.h"

namespace r2r::R2R_ISA {

template <class T>
void multiply(const T* a, const T* b, T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    const int64_t left = count - i;
    store_upto(out + i, load_upto(a + i, left) * load_upto(b + i, left), left);
  }
}

template <class T>
void multiply_backward(const T* dy, const T* a, const T* b, T* da, T* db, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    const int64_t left = count - i;
    const vec d = load_upto(dy + i, left);
    store_upto(da + i, d * load_upto(b + i, left), left);
    store_upto(db + i, d * load_upto(a + i, left), left);
  }
}

}  // namespace r2r::R2R_ISA
