#include "tensors.h"

#include <algorithm>
#include <bit>

namespace r2r {

const float* Floats::operator()(const Tensor& tensor) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::Float) return data<float>(tensor);
  const int64_t count = tensor.numel();
  copies_.push_back(std::unique_ptr<float[]>(new float[count]));
  const bfloat16* from = data<bfloat16>(tensor);
  float* to = copies_.back().get();
  constexpr int64_t BLOCK = 65536;
  parallel((count + BLOCK - 1) / BLOCK, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * BLOCK; i < std::min(end * BLOCK, count); i++) {
      to[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i].bits) << 16);
    }
  });
  return to;
}

}  // namespace r2r
