// simple_gate: each value is read and written once.
#include "common/vec-inl.h"
#include "simple_gate.h"

namespace r2r::R2R_ISA {

template <class T>
void multiply(const T* x, T* y, const Halves& at) {
  for (int64_t row = 0; row < at.rows; row++, x += 2 * at.length, y += at.length) {
    for (int64_t i = 0; i < at.count; i += WIDTH) {
      const int64_t left = at.count - i;
      store_upto(y + i, load_upto(x + i, left) * load_upto(x + at.length + i, left), left);
    }
  }
}

template <class T>
void multiply_backward(const T* dy, const T* x, T* dx, const Halves& at) {
  for (int64_t row = 0; row < at.rows; row++, dy += at.length, x += 2 * at.length, dx += 2 * at.length) {
    for (int64_t i = 0; i < at.count; i += WIDTH) {
      const int64_t left = at.count - i;
      const vec d = load_upto(dy + i, left), a = load_upto(x + i, left), b = load_upto(x + at.length + i, left);
      store_upto(dx + i, d * b, left);
      store_upto(dx + at.length + i, d * a, left);
    }
  }
}

template <class T>
constexpr SimpleGateKernels<T> simple_gate_kernels{
    .multiply = multiply<T>,
    .multiply_backward = multiply_backward<T>,
};
R2R_DEFINE_KERNELS(SimpleGateKernels, simple_gate_kernels)

}  // namespace r2r::R2R_ISA
