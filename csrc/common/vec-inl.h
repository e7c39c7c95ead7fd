// Vectors of floats, as wide as the instruction set that this file is compiled for. They are the compiler's vector types.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "dispatch.h"
#include "scratch.h"
#include "tiling.h"

namespace r2r::R2R_ISA {

#if defined(__AVX512F__)
// A mask of all lanes. GCC 12 warns that the intrinsics without a mask read an uninitialised register.
constexpr int ALL = -1;
constexpr int WIDTH = 16;
constexpr int ROWS = 14;  // output channels of a micro-kernel: ROWS x 2 accumulators
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
constexpr int ROWS = 6;
#else
constexpr int WIDTH = 4;
constexpr int ROWS = 6;
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef float loose_vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(2 * WIDTH)));
typedef uint16_t loose_half_vec __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

// body(0) ... body(N - 1), each with a constant. Vectors of an array that only constants index stay in registers. GCC keeps
// an array that a loop indexes in memory, even where it unrolls the loop.
template <int N, class Body>
inline __attribute__((always_inline)) void unrolled(const Body& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

inline vec splat(float value) {
  return value - vec{};
}
inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// GCC 12 compiles __builtin_convertvector to five instructions. With AVX2 the intrinsic's builtin stands here: <immintrin.h>
// takes a second to compile.
inline vec widen(half_vec bits) {
#if defined(__AVX512F__)
  const uvec wide = (uvec)_mm512_maskz_cvtepu16_epi32(ALL, (__m256i)bits);
#elif defined(__AVX2__)
  typedef short values __attribute__((vector_size(16)));
  const uvec wide = (uvec)__builtin_ia32_pmovzxwd256((values)bits);
#else
  const uvec wide = __builtin_convertvector(bits, uvec);
#endif
  return (vec)(wide << 16);
}
inline half_vec narrow(vec value) {  // round to nearest even; a NaN stays one
#if defined(__AVX512BF16__)
  return (half_vec)_mm512_cvtneps_pbh((__m512)value);
#else
  uvec bits = (uvec)value;
  uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  ivec nan = value != value;
  return __builtin_convertvector((rounded & ~(uvec)nan) | ((uvec)nan & 0x7fc0), half_vec);
#endif
}

inline vec load(const float* p) {
  return *(const loose_vec*)p;
}
inline vec load_once(const float* p) {  // a value used three times: GCC 12 would load it three times, across cache lines
  vec value = load(p);
#if defined(__AVX512F__)
  __asm__("" : "+v"(value));
#endif
  return value;
}
inline ivec load(const int32_t* p) {
  return (ivec)load((const float*)p);
}
inline half_vec load_bits(const bfloat16* p) {
  return *(const loose_half_vec*)p;
}
inline vec load(const bfloat16* p) {
  return widen(load_bits(p));
}
inline void store(float* p, vec value) {
  *(loose_vec*)p = value;
}
inline void store(bfloat16* p, vec value) {
  *(loose_half_vec*)p = narrow(value);
}

// The first n values; the others are read as 0 and not written.
#if defined(__AVX512F__)
inline vec load_first(const float* p, int64_t n) {
  return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
inline void store_first(float* p, vec value, int64_t n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)value);
}
inline half_vec load_first_bits(const bfloat16* p, int64_t n) {
  return (half_vec)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
}
inline void store_first(bfloat16* p, vec value, int64_t n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(value));
}
#else
inline vec load_first(const float* p, int64_t n) {
  vec value{};
  for (int64_t i = 0; i < n; i++) value[i] = p[i];
  return value;
}
inline void store_first(float* p, vec value, int64_t n) {
  for (int64_t i = 0; i < n; i++) p[i] = value[i];
}
inline half_vec load_first_bits(const bfloat16* p, int64_t n) {
  half_vec bits{};
  for (int64_t i = 0; i < n; i++) bits[i] = p[i].bits;
  return bits;
}
inline void store_first(bfloat16* p, vec value, int64_t n) {
  half_vec bits = narrow(value);
  for (int64_t i = 0; i < n; i++) p[i].bits = bits[i];
}
#endif
inline vec load_first(const bfloat16* p, int64_t n) {
  return widen(load_first_bits(p, n));
}

template <class T>
inline vec load_upto(const T* p, int64_t n) {
  return n >= WIDTH ? load(p) : load_first(p, n);
}
template <class T>
inline void store_upto(T* p, vec value, int64_t n) {
  if (n >= WIDTH) {
    store(p, value);
  } else {
    store_first(p, value, n);
  }
}

// A line is LINE<T> values that are loaded and stored together. With AVX-512 it is a cache line, else one vector. load_line
// gives its vector v. The vectors hold the values in the order that costs the fewest instructions ("line order"), which is
// the same for all operands, so that elementwise arithmetic is right in it. The functions with `in_order` take values in
// their usual order. stream_line is a streaming store: p must be aligned to a cache line, and others see the values after
// fence().
#if defined(__AVX512F__)
template <class T>
constexpr int LINE = 64 / sizeof(T);

// Interleaves half v of each 128 bits of `even` and `odd`. It is one instruction (vpunpck). The shuffle is written out
// because GCC 12 passes the operands of the intrinsic through the stack.
template <int v>
inline vec interleave_halves(vec even, vec odd) {
  typedef uint16_t values __attribute__((vector_size(64)));
  values order;
  for (int i = 0; i < 32; i++) order[i] = i / 8 * 8 + v * 4 + i % 8 / 2 + i % 2 * 32;
  return (vec)__builtin_shuffle((values)even, (values)odd, order);
}
inline vec load_line(const bfloat16* p, int v) {
  const vec line = load((const float*)p);
  return v ? interleave_halves<1>(vec{}, line) : interleave_halves<0>(vec{}, line);
}
inline void to_line_order(vec (&values)[2]) {
  ivec first, second;
  for (int i = 0; i < WIDTH; i++) {
    first[i] = i / 4 * 8 + i % 4;
    second[i] = first[i] + 4;
  }
  const vec low = __builtin_shuffle(values[0], values[1], first);
  values[1] = __builtin_shuffle(values[0], values[1], second);
  values[0] = low;
}
inline __m512i narrow(const vec (&line)[2]) {
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)line[1], (__m512)line[0]);
  return _mm512_maskz_permutexvar_epi64(ALL, _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), halves);
#else
  const vec first = widen(narrow(line[0])), second = widen(narrow(line[1]));
  return _mm512_packus_epi32((__m512i)((uvec)first >> 16), (__m512i)((uvec)second >> 16));
#endif
}
inline __m512i narrow_in_order(const vec (&line)[2]) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)line[1], (__m512)line[0]);
#else
  const __m512i first = _mm512_castsi256_si512((__m256i)narrow(line[0]));
  return _mm512_maskz_inserti64x4(ALL, first, (__m256i)narrow(line[1]), 1);
#endif
}
inline void store_in_order(bfloat16* p, const vec (&line)[2]) {
  _mm512_storeu_si512(p, narrow_in_order(line));
}
inline void stream_in_order(bfloat16* p, const vec (&line)[2]) {
  _mm512_stream_si512((__m512i*)p, narrow_in_order(line));
}
inline void store_line(bfloat16* p, const vec (&line)[2]) {
  _mm512_storeu_si512(p, narrow(line));
}
inline void stream_line(bfloat16* p, const vec (&line)[2]) {
  _mm512_stream_si512((__m512i*)p, narrow(line));
}
inline void stream_line(float* p, const vec (&line)[1]) {
  _mm512_stream_ps(p, (__m512)line[0]);
}
#else
template <class T>
constexpr int LINE = WIDTH;

template <class T>
inline void stream_line(T* p, const vec (&line)[1]) {
  store(p, line[0]);
}
#endif
template <class T>
inline vec load_line(const T* p, int) {
  return load(p);
}
inline void to_line_order(vec (&)[1]) {}
template <class T>
inline void store_line(T* p, const vec (&line)[1]) {
  store(p, line[0]);
}
template <class T>
inline void store_in_order(T* p, const vec (&line)[1]) {
  store(p, line[0]);
}
template <class T>
inline void stream_in_order(T* p, const vec (&line)[1]) {
  stream_line(p, line);
}
inline void fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Two neighbouring values, as the dot-product instructions of bfloat16 take them: two channels of a pixel, or two pixels of
// a channel. A vector of WIDTH pairs has the type vec.
struct Pair {
  bfloat16 even;
  bfloat16 odd;
};

inline vec load(const Pair* p) {
  return *(const loose_vec*)p;
}
// Whether products of T take pairs: those of bfloat16 do, where the processor has the instructions.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool MULTIPLIES_PAIRS = std::is_same_v<T, bfloat16>;

inline vec interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vec)_mm512_maskz_permutexvar_epi16(ALL, order, halves);
}
inline vec pairs(half_vec even, half_vec odd) {
  return interleave(_mm512_maskz_inserti64x4(ALL, _mm512_castsi256_si512((__m256i)even), (__m256i)odd, 1));
}
inline void store(Pair* p, vec even, vec odd) {
  *(loose_vec*)p = interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
inline vec multiply_add_pairs(vec a, vec b, vec sum) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)a);
}
inline vec multiply_add(Pair weight, vec pairs, vec sum) {
  int32_t bits;
  __builtin_memcpy(&bits, &weight, sizeof(bits));
  return multiply_add_pairs((vec)_mm512_set1_epi32(bits), pairs, sum);
}
#else
template <class T>
constexpr bool MULTIPLIES_PAIRS = false;
#endif
template <class T>
inline vec multiply_add_factors(vec a, vec b, vec sum) {
#if defined(__AVX512BF16__)
  if constexpr (MULTIPLIES_PAIRS<T>) return multiply_add_pairs(a, b, sum);
#endif
  return sum + a * b;
}
inline vec even_of(vec pairs) {
  return (vec)((ivec)pairs << 16);
}
inline vec odd_of(vec pairs) {
  return (vec)((ivec)pairs & (int)0xffff0000);
}
inline vec multiply_add(float weight, vec x, vec sum) {
  return sum + weight * x;
}

inline ivec lanes() {
  ivec lane;
  for (int i = 0; i < WIDTH; i++) lane[i] = i;
  return lane;
}
inline vec keep(vec value, ivec mask) {  // 0 where the mask is 0, even where the value is not finite
  return (vec)((ivec)value & mask);
}

inline float sum(vec value) {  // pairwise
  float lane[WIDTH];
  *(loose_vec*)lane = value;
  for (int half = WIDTH / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  }
  return lane[0];
}
inline float sum_lanes(const float* lanes) {
  vec total{};
  for (int64_t i = 0; i < LANES; i += WIDTH) total += load(lanes + i);
  return sum(total);
}
inline vec square_root(vec value) {  // the compiler makes one instruction of it
  for (int i = 0; i < WIDTH; i++) value[i] = __builtin_sqrtf(value[i]);
  return value;
}

// Transposes WIDTH vectors: log2(WIDTH) rounds of interleaving the first half of them with the second.
inline void transpose(vec (&rows)[WIDTH]) {
  ivec low, high;
  for (int i = 0; i < WIDTH; i++) {
    low[i] = i / 2 + i % 2 * WIDTH;
    high[i] = low[i] + WIDTH / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < WIDTH; round *= 2) {
    vec next[WIDTH];
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH / 2; i++) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + WIDTH / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + WIDTH / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) rows[i] = next[i];
  }
}

}  // namespace r2r::R2R_ISA
