// What CUDA operators need of CUDA and of PyTorch beside it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <climits>
#include <type_traits>

namespace r2r::cuda {

constexpr int THREADS = 256;  // threads of a block

// PyTorch's current stream on the device of a tensor. That device is the current one during the lifetime of this object. The
// function is looked up in libtorch_cuda at run time, so that this library also loads into a PyTorch without CUDA.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    using Get = decltype(&aoti_torch_get_current_cuda_stream);
    static const Get get = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    STD_TORCH_CHECK(get, "this PyTorch has no CUDA stream to run on");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(get(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Launches at most INT_MAX blocks of THREADS threads. Each kernel loops over its jobs with a stride of the grid.
  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const std::type_identity_t<Parameters>&... arguments) const {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(std::min<int64_t>(blocks, INT_MAX)), THREADS, 0, stream_>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "a kernel could not be launched: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace r2r::cuda
