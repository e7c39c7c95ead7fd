// Loads and stores packs of float32, float16 or bfloat16 elements as floats.
#pragma once

#include <type_traits>

#include "cuda.cuh"

namespace r2r::cuda {

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <class T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

template <class T, int E>
struct alignas(sizeof(T) * E) Pack {
  T value[E];
};

template <int E, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[E]) {
  const Pack<T, E> pack = *reinterpret_cast<const Pack<T, E>*>(from);
#pragma unroll
  for (int e = 0; e < E; e++) to[e] = widen(pack.value[e]);
}
template <int E, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[E]) {
  Pack<T, E> pack;
#pragma unroll
  for (int e = 0; e < E; e++) pack.value[e] = narrow<T>(from[e]);
  *reinterpret_cast<Pack<T, E>*>(to) = pack;
}

template <class T>
constexpr int WIDE = 16 / sizeof(T);  // elements in 16 bytes

// Calls body<number of elements to load at a time>().
template <class T, class Body>
__device__ __forceinline__ void for_width(bool wide, const Body& body) {
  if (wide) {
    body.template operator()<WIDE<T>>();
  } else {
    body.template operator()<1>();
  }
}

}  // namespace r2r::cuda
