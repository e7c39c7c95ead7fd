// Stands in for csrc/cuda.cuh: the kernels of a .cu file as C++, run on a CPU, block after block. The threads of a block are
// fibres. A warp, drawn at random, runs until it waits for the others: it is ahead of them by all that is between two
// barriers, so that a missing one gives wrong answers. A sanitizer of the CPU sees every access to memory, that of the
// block included.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>

#include "common/tensors.h"

#define __CUDACC__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

// Nothing is visible outside of this file: what a linker may merge, such as static variables of templates, sanitizers leave
// alone.
namespace r2r {
inline namespace {
namespace cuda {}
}  // namespace
}  // namespace r2r

namespace r2r::cuda {

using std::min;

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;

using __half = _Float16;
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half value) {
  return static_cast<float>(value);
}
inline __half __float2half_rn(float value) {
  return static_cast<__half>(value);
}
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __expf(float x) {
  return std::exp(x);
}

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

// Where a fibre goes on. swapcontext() alone would ask the system at every change.
struct Place {
  void* buffer[5];
};
__attribute__((noinline, no_sanitize_address)) inline void go_to(Place& place) {
  __builtin_longjmp(place.buffer, 1);
}
__attribute__((noinline, no_sanitize_address)) inline void change(Place& from, Place& to) {
  if (__builtin_setjmp(from.buffer) == 0) go_to(to);
}
__attribute__((noinline, no_sanitize_address)) inline void begin(Place& from, ucontext_t& fibre) {
  if (__builtin_setjmp(from.buffer) == 0) setcontext(&fibre);
}

// Threads that wait for one another.
struct Barrier {
  int members = 0;
  int waiting = 0;
  int round = 0;
};

class Block {
 public:
  static constexpr size_t STACK = 1 << 17;

  Block() : stacks_(new char[THREADS * STACK]) {}

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    current = this;
    all_ = {THREADS, 0, 0};
    std::fill_n(warps_, WARPS, Barrier{WARP, 0, 0});
    std::fill_n(done_, THREADS, false);
    int warps[WARPS], before;
    std::iota(warps, warps + WARPS, 0);
    do {
      before = progress_;
      std::shuffle(warps, warps + WARPS, random_);
      for (const int warp : warps) run_warp(warp);
    } while (progress_ != before);
    if (all_.members > 0) {
      std::fputs("threads of a block wait for others that do not come\n", stderr);
      std::abort();
    }
  }

  void wait_for_all() {
    wait(all_);
  }
  float exchange(float value, int mask) {  // the values of one exchange are read before those of the next but one are written
    const int thread = threadIdx.x, turn = exchanges_[thread]++ % 2;
    values_[turn][thread] = value;
    wait(warps_[thread / WARP]);
    return values_[turn][thread ^ mask];
  }

  static inline Block* current = nullptr;

 private:
  // As far as it comes without the others.
  void run_warp(int warp) {
    int threads[WARP], before;
    std::iota(threads, threads + WARP, warp * WARP);
    do {
      before = progress_;
      std::shuffle(threads, threads + WARP, random_);
      for (const int thread : threads) {
        if (done_[thread]) continue;
        threadIdx.x = thread;
        started_[thread] ? change(scheduler_, places_[thread]) : start(thread);
      }
    } while (progress_ != before);
  }
  void start(int thread) {
    ucontext_t fibre;
    getcontext(&fibre);
    fibre.uc_stack.ss_sp = stacks_.get() + thread * STACK;
    fibre.uc_stack.ss_size = STACK;
    fibre.uc_link = nullptr;
    makecontext(&fibre, &Block::enter, 0);
    started_[thread] = true;
    begin(scheduler_, fibre);
  }
  static void enter() {
    Block& block = *current;
    const int thread = threadIdx.x;
    for (;;) {
      (*block.kernel_)();
      block.done_[thread] = true;
      block.leave(block.all_);
      block.leave(block.warps_[thread / WARP]);
      block.progress_++;
      change(block.places_[thread], block.scheduler_);
    }
  }
  void leave(Barrier& barrier) {  // a thread that has ended is not waited for
    barrier.members--;
    release(barrier);
  }
  void release(Barrier& barrier) {
    if (barrier.waiting < barrier.members || barrier.waiting == 0) return;
    barrier.waiting = 0;
    barrier.round++;
    progress_++;
  }
  void wait(Barrier& barrier) {
    const int thread = threadIdx.x, round = barrier.round;
    barrier.waiting++;
    release(barrier);
    while (barrier.round == round) change(places_[thread], scheduler_);
  }

  std::unique_ptr<char[]> stacks_;
  Place scheduler_, places_[THREADS];
  bool started_[THREADS] = {}, done_[THREADS];
  float values_[2][THREADS];
  unsigned exchanges_[THREADS] = {};
  Barrier all_, warps_[WARPS];
  int progress_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  std::minstd_rand random_;
};

inline void __syncthreads() {
  Block::current->wait_for_all();
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return Block::current->exchange(value, mask);
}

inline Block& the_block() {
  static Block block;
  return block;
}

class Stream {
 public:
  explicit Stream(const torch::stable::Tensor&) {}

  // Fewer blocks than asked for, so that they have to walk on.
  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const std::type_identity_t<Parameters>&... arguments) const {
    gridDim.x = static_cast<unsigned>(std::min<int64_t>(blocks, 3));
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) the_block().run([&] { kernel(arguments...); });
  }
};

}  // namespace r2r::cuda
