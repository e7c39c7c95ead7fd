#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

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

}  // namespace r2r
