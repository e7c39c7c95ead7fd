// What the drivers need of tensors, on PyTorch's stable interface (torch >= 2.10).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"

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

// Calls body with a null pointer to float or bfloat16.
template <class Body>
void for_dtype(const Tensor& tensor, const Body& body) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "float32 or bfloat16 only");
  if (dtype == ScalarType::Float) {
    body(static_cast<float*>(nullptr));
  } else {
    body(static_cast<bfloat16*>(nullptr));
  }
}

// body(begin, end) on PyTorch's threads.
template <class Body>
void parallel(int64_t tasks, const Body& body) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, body);
}

// This thread's scratch: aligned to a cache line, kept between calls because fresh pages cost more than the work in them.
// Tasks take the first; what an operator holds while its tasks run is in the second.
float* scratch(int64_t floats);
float* shared_scratch(int64_t floats);

// Contiguous parameters as float32: where they are, or widened copies that live as long as this.
class Floats {
 public:
  const float* operator()(const Tensor& tensor) {
    if (tensor.scalar_type() == torch::headeronly::ScalarType::Float) return data<float>(tensor);
    copies_.push_back(std::unique_ptr<float[]>(new float[tensor.numel()]));
    const bfloat16* from = data<bfloat16>(tensor);
    float* to = copies_.back().get();
    constexpr int64_t BLOCK = 65536;
    const int64_t count = tensor.numel();
    parallel((count + BLOCK - 1) / BLOCK, [&](int64_t begin, int64_t end) {
      kernels(from).widen(from + begin * BLOCK, to + begin * BLOCK, std::min(end * BLOCK, count) - begin * BLOCK);
    });
    return to;
  }

 private:
  std::vector<std::unique_ptr<float[]>> copies_;
};

}  // namespace r2r
