// A block's parameters from tensors, for the drivers.
#pragma once

#include "common/tensors.h"
#include "naf_block.h"

namespace r2r {

// tensors are the parameters from `first` on.
template <class T>
Parameters<T> pointers(const std::vector<Tensor>& tensors, Parameter first) {
  STD_TORCH_CHECK(tensors.size() == static_cast<size_t>(PARAMETERS - first), PARAMETERS - first, " parameters are needed");
  Parameters<T> found;
  for (int p = first; p < PARAMETERS; p++) found.of[p] = data<T>(tensors[p - first]);
  return found;
}

// The same as float32, but for those `without`, which are left out.
inline Parameters<const float> widened(
    const std::vector<Tensor>& tensors, Parameter first, const std::vector<Parameter>& without, Floats& floats) {
  Parameters<const float> found;
  for (int p = first; p < PARAMETERS; p++) {
    bool wanted = true;
    for (const Parameter other : without) wanted = wanted && p != other;
    if (wanted) found.of[p] = floats(tensors[p - first]);
  }
  return found;
}

// kept [5, N, C, H, W] of the type of x: conv1, conv4, y. Nothing is kept where it is empty.
template <class T>
NAFBlockKept<T> kept_in(const Tensor& kept, const Tensor& x) {
  if (kept.numel() == 0) return {};
  const int64_t values = x.numel();
  STD_TORCH_CHECK(kept.numel() == 5 * values, "kept must be empty or five times as large as x");
  T* const first = data<T>(kept);
  return {.conv1 = first, .conv4 = first + 2 * values, .y = first + 4 * values};
}

// Whether 1x1 convolutions of T multiply pairs of channels.
template <class T>
bool multiplies_pairs(int64_t channels) {
  return kernels<NAFBlockKernels<T>>().pairs && channels % 2 == 0;
}

}  // namespace r2r
