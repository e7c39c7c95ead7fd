// What the drivers need of tensors, on PyTorch's stable interface (torch >= 2.10).
//
// The operators are r2r_native's. Activations are contiguous, in NCHW or (channels_last) NHWC, float32 or bfloat16.
// Parameters are contiguous and have the dtype of the activations. Statistics and gradients of parameters in sums are
// float32. Results are written to the last arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "dispatch.h"
#include "scratch.h"
#include "tiling.h"

namespace r2r {

using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
Images<T> images(const Tensor& tensor, bool channels_last) {
  return {data<T>(tensor), tensor.size(1), tensor.size(2) * tensor.size(3), channels_last};
}

// Calls body<float>() or body<bfloat16>().
template <class Body>
void for_dtype(const Tensor& tensor, const Body& body) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "float32 or bfloat16 only");
  if (dtype == ScalarType::Float) {
    body.template operator()<float>();
  } else {
    body.template operator()<bfloat16>();
  }
}

// body(begin, end) on PyTorch's threads.
template <class Body>
void parallel(int64_t tasks, const Body& body) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, body);
}

// body(n, first, last) on PyTorch's threads: units [first, last) of image n, of `each` an image.
template <class Body>
void parallel_over_images(int64_t images, int64_t each, const Body& body) {
  parallel(images * each, [&](int64_t begin, int64_t end) { for_images(begin, end, each, body); });
}

// Contiguous parameters as float32: where they are, or widened copies that live as long as this object.
class Floats {
 public:
  const float* operator()(const Tensor& tensor);

 private:
  std::vector<std::unique_ptr<float[]>> copies_;
};

}  // namespace r2r
