#include "tensors.h"

#include <cstdlib>
#include <new>
#include <string>

namespace r2r {

namespace {

class Memory {
 public:
  float* operator()(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const {
      std::free(p);
    }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace

float* scratch(int64_t floats) {
  thread_local Memory memory;
  return memory(floats);
}

float* shared_scratch(int64_t floats) {
  thread_local Memory memory;
  return memory(floats);
}

#define R2R_DECLARE(isa)                             \
  namespace isa {                                    \
  const Kernels<float>& kernels(const float*);       \
  const Kernels<bfloat16>& kernels(const bfloat16*); \
  }
R2R_DECLARE(baseline)
#if defined(__x86_64__)
R2R_DECLARE(avx2)
R2R_DECLARE(avx512)
R2R_DECLARE(avx512_bf16)
#endif

// As PyTorch's own kernels, these obey ATEN_CPU_CAPABILITY=default|avx2|avx512 (the last: without bf16 instructions).
template <class T>
const Kernels<T>& best(const T* tag) {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string wanted = variable ? variable : "";
  if (wanted == "default") return baseline::kernels(tag);
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted != "avx2") {
    const bool bf16 = __builtin_cpu_supports("avx512bf16") && wanted != "avx512";
    return bf16 ? avx512_bf16::kernels(tag) : avx512::kernels(tag);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels(tag);
#endif
  return baseline::kernels(tag);
}

const Kernels<float>& kernels(const float* tag) {
  static const Kernels<float>& chosen = best(tag);
  return chosen;
}
const Kernels<bfloat16>& kernels(const bfloat16* tag) {
  static const Kernels<bfloat16>& chosen = best(tag);
  return chosen;
}

}  // namespace r2r
