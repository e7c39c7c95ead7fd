// Memory to work in, for kernels and for drivers.
#pragma once

#include <array>
#include <cstdint>

namespace r2r {

// Scratch belongs to the calling thread. It is aligned to a cache line. It is kept between calls, because fresh pages cost
// more than the work in them. `scratch` is for a task: the thread's next task may overwrite it. `shared_scratch` is for an
// operator, which keeps it while its tasks run.
float* scratch(int64_t floats);
float* shared_scratch(int64_t floats);

// This thread's scratch as parts of so many floats, one behind the other.
template <class... Counts>
static inline std::array<float*, sizeof...(Counts)> scratch_parts(Counts... counts) {
  std::array<float*, sizeof...(Counts)> parts;
  float* part = scratch((int64_t{0} + ... + counts));
  int i = 0;
  ((parts[i++] = part, part += counts), ...);
  return parts;
}

}  // namespace r2r
