#include "operators.h"

namespace r2r {

namespace {

// body(at, whole, half): all rows in tasks that feed every thread, of several short rows or a part of a long one; where they
// begin in a tensor of two halves and in one of a half.
template <class Body>
void for_halves(const Tensor& half, bool channels_last, const Body& body) {
  constexpr int64_t PIECE = 16384;
  const int64_t area = half.size(2) * half.size(3);
  const int64_t rows = half.size(0) * (channels_last ? area : 1), length = half.size(1) * (channels_last ? 1 : area);
  const int64_t pieces = (length + PIECE - 1) / PIECE, together = std::max<int64_t>(1, PIECE / std::max<int64_t>(1, length));
  parallel((rows + together - 1) / together * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / pieces * together, offset = i % pieces * PIECE;
      const Halves at{std::min(together, rows - row), length, std::min(PIECE, length - offset)};
      body(at, row * 2 * length + offset, row * length + offset);
    }
  });
}

}  // namespace

void simple_gate(Tensor x, bool channels_last, Tensor y) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* in = data<T>(x);
    T* out = data<T>(y);
    for_halves(y, channels_last, [&](const Halves& at, int64_t whole, int64_t half) {
      kernels(tag).multiply(in + whole, out + half, at);
    });
  });
}

void simple_gate_backward(Tensor dy, Tensor x, bool channels_last, Tensor dx) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T *d = data<T>(dy), *in = data<T>(x);
    T* out = data<T>(dx);
    for_halves(dy, channels_last, [&](const Halves& at, int64_t whole, int64_t half) {
      kernels(tag).multiply_backward(d + half, in + whole, out + whole, at);
    });
  });
}

}  // namespace r2r
