// simple_gate: the first half of the channels times the second half.
#pragma once

#include "common/dispatch.h"

namespace r2r {

// Rows of two halves of `length` values each. A kernel takes the first `count` values of each half.
struct Halves {
  int64_t rows;
  int64_t length;
  int64_t count;
};

template <class T>
struct SimpleGateKernels {
  // x [rows, 2, length] -> y [rows, length].
  void (*multiply)(const T* x, T* y, const Halves&);
  // dy [rows, length], x [rows, 2, length] -> dx like x.
  void (*multiply_backward)(const T* dy, const T* x, T* dx, const Halves&);
};
R2R_DECLARE_KERNELS(SimpleGateKernels)

}  // namespace r2r
