// One element of the gated convolution (R2R, section 3.4): z = grouped convolution of (x, prior) + bias, gate = sigmoid(z),
// y = x * (1 - gate) + prior * gate, and its gradients. A value is a vector of floats on a CPU, and a float on a GPU
// (gated_conv.cuh). Only the exponential differs between them.
//
// A convolution of K x K has 2 K K taps a channel: those of x, then those of the prior.
#pragma once

#if defined(__CUDACC__)
#define R2R_INLINE __device__ __forceinline__
#define R2R_UNROLL _Pragma("unroll")
#else
#define R2R_INLINE inline __attribute__((always_inline))
#define R2R_UNROLL _Pragma("GCC unroll 9")
#include "common/vec-inl.h"
#endif

namespace r2r::R2R_ISA {

#if defined(__CUDACC__)
R2R_INLINE float exponential(float x) {
  return __expf(x);
}
#else
// 2^t with t = x / ln(2): 2^floor(t) times a polynomial of the fraction. The polynomial's relative error is 1e-7, the error
// from rounding t is |x| times 6e-8. In a sigmoid both are lost in the rounding of 1 + e^x. NaN stays.
R2R_INLINE vec exponential(vec x) {
  vec t = x * 1.44269504f;
#if defined(__AVX512F__)
  const vec r = (vec)_mm512_maskz_reduce_ps(ALL, (__m512)t, 1);
#else
  t = t < -126.0f ? splat(-126.0f) : t;
  t = t > 127.0f ? splat(127.0f) : t;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits
  const vec shifted = (t - 0.5f) + magic, r = t - (shifted - magic);
#endif
  vec p = splat(1.8775767e-3f);
  p = p * r + 8.9893397e-3f;
  p = p * r + 5.5826318e-2f;
  p = p * r + 2.4015361e-1f;
  p = p * r + 6.9315308e-1f;
  p = p * r + 9.9999994e-1f;
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_scalef_ps(ALL, (__m512)p, (__m512)t);
#else
  return (vec)((ivec)p + ((ivec)shifted << 23));
#endif
}
#endif

template <class V>
R2R_INLINE V sigmoid(V z) {
  return 1.0f / (1.0f + exponential(-z));
}

#if !defined(__CUDACC__)
// The sigmoid for a result of dtype T. For bfloat16, 14 bits of it are enough, and take a fifth less time.
template <class T>
R2R_INLINE vec gate_of(vec z) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __m512 t = (__m512)(z * -1.44269504f);
    const vec r = (vec)_mm512_maskz_reduce_ps(ALL, t, 1);
    vec p = splat(7.90204e-2f);
    p = p * r + 2.241397e-1f;
    p = p * r + 6.968404e-1f;
    p = p * r + 9.998012e-1f;
    const vec power = (vec)_mm512_maskz_scalef_ps(ALL, (__m512)p, t);
    return (vec)_mm512_maskz_rcp14_ps(ALL, (__m512)(1.0f + power));
  }
#endif
  return sigmoid(z);
}
#endif

template <class V>
R2R_INLINE V blend(V x, V prior, V gate) {
  return x * (1.0f - gate) + prior * gate;  // x + gate * (prior - x) loses the prior where x is large
}

// Gradient of z, given that of y.
template <class V>
R2R_INLINE V gate_gradient(V dy, V x, V prior, V gate) {
  return dy * (prior - x) * gate * (1.0f - gate);
}

// start + the K x K taps on what read(row, column) gives at these offsets; sign -1 is the convolution's adjoint.
template <int K, class V, class Tap, class Read>
R2R_INLINE V convolve(V start, int sign, const Tap& tap, const Read& read) {
  R2R_UNROLL
  for (int t = 0; t < K * K; t++) start += tap(t) * read(sign * (t / K - K / 2), sign * (t % K - K / 2));
  return start;
}

}  // namespace r2r::R2R_ISA
