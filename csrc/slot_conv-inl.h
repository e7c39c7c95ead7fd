// slot_conv. The planes of all slots are staged as floats with a frame of zeros, rows width + 2 apart. The output at a
// position then needs the inputs at nine fixed offsets from it. So a vector holds neighbouring positions, across the ends of
// rows; what it computes between rows is not kept. A block of SLOTS outputs shares each vector of inputs.
#include "common/vec-inl.h"
#include "slot_conv.h"

namespace r2r::R2R_ISA {

constexpr int SLOTS = WIDTH == 16 ? 4 : 2;
constexpr int VECTORS = WIDTH == 16 ? 5 : 4;  // SLOTS x VECTORS accumulators; an 8x8 plane is 5 vectors of 16

struct Planes {
  int64_t height;
  int64_t width;
  int64_t stride;
  int64_t positions;  // from the first pixel to the last
  int64_t size;       // floats; reads end up to a vector behind the frame

  Planes(int64_t h, int64_t w)
      : height(h), width(w), stride(w + 2), positions((h - 1) * (w + 2) + w), size((h + 2) * (w + 2) + PANEL) {}

  int64_t offset(int tap) const {
    return tap / 3 * stride + tap % 3;
  }

  template <class T>
  void stage(const T* from, int64_t step, int64_t count, float* to) const {
    for (int64_t i = 0; i < count * size; i += WIDTH) store_upto(to + i, vec{}, count * size - i);
    for (int64_t s = 0; s < count; s++) {
      for (int64_t r = 0; r < height; r++) {
        const T* row = from + s * step + r * width;
        float* out = to + s * size + (r + 1) * stride + 1;
        for (int64_t i = 0; i < width; i += WIDTH) store_upto(out + i, load_upto(row + i, width - i), width - i);
      }
    }
  }
};

// out[slot + r] at VECS vectors of positions = bias + the sum over j, tap of taps[j][tap] * in[slot + r + j - before].
template <int VECS>
inline void correlate_slots(
    const Planes& planes, const float* in, int64_t inputs, int64_t slot, int64_t before, const float* taps, int64_t k,
    float bias, int64_t position, float* out) {
  vec sums[SLOTS][VECS];
  for (auto& row : sums) {
    for (vec& value : row) value = splat(bias);
  }
  const int64_t first = slot - before;
  const auto add = [&]<bool ALL>(int64_t d) __attribute__((always_inline)) {
    const float* plane = in + (first + d) * planes.size + position;
    for (int tap = 0; tap < 9; tap++) {
      const float* at = plane + planes.offset(tap);
      vec x[VECS];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; v++) x[v] = load(at + v * WIDTH);
#pragma GCC unroll 8
      for (int r = 0; r < SLOTS; r++) {
        if (!ALL && (d < r || d - r >= k)) continue;
        const float weight = taps[(d - r) * 9 + tap];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) sums[r][v] += weight * x[v];
      }
    }
  };
  const int64_t begin = first < 0 ? -first : 0, end = least(k + SLOTS - 1, inputs - first);
  for (int64_t d = begin; d < end; d++) {
    if (d >= SLOTS - 1 && d < k) {
      add.template operator()<true>(d);
    } else {
      add.template operator()<false>(d);
    }
  }
  for (int r = 0; r < SLOTS; r++) {
    for (int v = 0; v < VECS; v++) store(out + r * planes.size + position + v * WIDTH, sums[r][v]);
  }
}

// correlate_slots on the `vectors` vectors of positions that are left, at most VECS at a time.
template <int VECS>
inline void correlate_vectors(
    int64_t vectors, const Planes& planes, const float* in, int64_t inputs, int64_t slot, int64_t before, const float* taps,
    int64_t k, float bias, int64_t position, float* out) {
  if (vectors >= VECS) {
    correlate_slots<VECS>(planes, in, inputs, slot, before, taps, k, bias, position, out);
  } else if constexpr (VECS > 1) {
    correlate_vectors<VECS - 1>(vectors, planes, in, inputs, slot, before, taps, k, bias, position, out);
  }
}

template <class T>
inline void correlate(
    const Planes& planes, const float* in, int64_t inputs, int64_t before, const float* taps, int64_t k, float bias,
    int64_t outputs, T* to, int64_t step, float* out) {
  const int64_t vectors = (planes.positions + WIDTH - 1) / WIDTH;
  for (int64_t slot = 0; slot < outputs; slot += SLOTS) {
    for (int64_t v = 0; v < vectors; v += VECTORS) {
      correlate_vectors<VECTORS>(vectors - v, planes, in, inputs, slot, before, taps, k, bias, v * WIDTH, out);
    }
    for (int64_t r = 0; r < least(SLOTS, outputs - slot); r++) {
      for (int64_t row = 0; row < planes.height; row++) {
        const float* from = out + r * planes.size + row * planes.stride;
        T* at = to + (slot + r) * step + row * planes.width;
        for (int64_t i = 0; i < planes.width; i += WIDTH) {
          store_upto(at + i, load_upto(from + i, planes.width - i), planes.width - i);
        }
      }
    }
  }
}

template <class T>
void slot_conv(const SlotConv<T>& op, int64_t task, int64_t channel) {
  const Planes planes(op.height, op.width);
  const int64_t area = op.height * op.width, step = op.channels * area, outputs = op.slots - op.kernel + 1;
  const int64_t own = task * op.channels + channel;
  const auto [x, out] = scratch_parts(op.slots * planes.size, SLOTS * planes.size + PANEL);
  planes.stage(op.x + (task * op.slots * op.channels + channel) * area, step, op.slots, x);
  correlate(
      planes, x, op.slots, 0, op.weight + own * op.kernel * 9, op.kernel, op.bias[own], outputs,
      op.y + (task * outputs * op.channels + channel) * area, step, out);
}

// dweight[j + r][tap] for r < DEPTH: the sum over slots and positions of x[slot + j + r] at the tap times dy[slot].
template <int DEPTH>
inline void weight_gradient(
    const Planes& planes, const float* x, const float* dy, int64_t outputs, int64_t j, float* dweight) {
  vec sums[DEPTH][9] = {};
  for (int64_t slot = j; slot < j + DEPTH - 1 + outputs; slot++) {
    for (int64_t i = 0; i < planes.positions; i += WIDTH) {
      vec d[DEPTH];
#pragma GCC unroll 4
      for (int r = 0; r < DEPTH; r++) {
        const int64_t from = slot - j - r;
        d[r] = from >= 0 && from < outputs ? load(dy + from * planes.size + planes.offset(4) + i) : vec{};
      }
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; tap++) {
        const vec value = load(x + slot * planes.size + planes.offset(tap) + i);
#pragma GCC unroll 4
        for (int r = 0; r < DEPTH; r++) sums[r][tap] += d[r] * value;
      }
    }
  }
  for (int r = 0; r < DEPTH; r++) {
    for (int tap = 0; tap < 9; tap++) dweight[(j + r) * 9 + tap] = sum(sums[r][tap]);
  }
}

template <class T>
void slot_conv_backward(const SlotConvBackward<T>& op, int64_t task, int64_t channel) {
  constexpr int DEPTH = WIDTH == 16 ? 3 : 1;
  const Planes planes(op.height, op.width);
  const int64_t area = op.height * op.width, step = op.channels * area, k = op.kernel, outputs = op.slots - k + 1;
  const int64_t own = task * op.channels + channel;
  const auto [x, dy, out, flipped] =
      scratch_parts(op.slots * planes.size, op.slots * planes.size, SLOTS * planes.size, 9 * k + PANEL);
  planes.stage(op.x + (task * op.slots * op.channels + channel) * area, step, op.slots, x);
  planes.stage(op.dy + (task * outputs * op.channels + channel) * area, step, outputs, dy);
  for (int64_t i = 0; i < k * 9; i++) flipped[i] = op.weight[own * k * 9 + k * 9 - 1 - i];
  correlate(
      planes, dy, outputs, k - 1, flipped, k, 0.0f, op.slots, op.dx + (task * op.slots * op.channels + channel) * area, step,
      out);
  int64_t j = 0;
  for (; j + DEPTH <= k; j += DEPTH) weight_gradient<DEPTH>(planes, x, dy, outputs, j, op.dweight + own * k * 9);
  for (; j < k; j++) weight_gradient<1>(planes, x, dy, outputs, j, op.dweight + own * k * 9);
  double total = 0;
  for (int64_t s = 0; s < outputs; s++) {
    vec plane{};
    for (int64_t i = 0; i < planes.size; i += WIDTH) plane += load_upto(dy + s * planes.size + i, planes.size - i);
    total += sum(plane);
  }
  op.dbias[own] = (float)total;
}

template <class T>
constexpr SlotConvKernels<T> slot_conv_kernels{
    .forward = slot_conv<T>,
    .backward = slot_conv_backward<T>,
};
R2R_DEFINE_KERNELS(SlotConvKernels, slot_conv_kernels)

}  // namespace r2r::R2R_ISA
