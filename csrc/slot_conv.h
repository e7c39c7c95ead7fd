// slot_conv: for each task and channel a (k, 3, 3) correlation along the slots.
#pragma once

#include "common/dispatch.h"

namespace r2r {

template <class T>
struct SlotConv {
  const T* x;
  T* y;
  const float* weight;  // [tasks, channels, kernel, 9]
  const float* bias;    // [tasks, channels]
  int64_t slots;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t kernel;
};

template <class T>
struct SlotConvBackward {
  const T* dy;
  const T* x;
  T* dx;
  const float* weight;
  float* dweight;
  float* dbias;
  int64_t slots;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t kernel;
};

template <class T>
struct SlotConvKernels {
  void (*forward)(const SlotConv<T>&, int64_t task, int64_t channel);
  void (*backward)(const SlotConvBackward<T>&, int64_t task, int64_t channel);
};
R2R_DECLARE_KERNELS(SlotConvKernels)

}  // namespace r2r
