#include "operators.h"

namespace r2r {

namespace {

// body(half, at): for each of `rows` rows of two halves of `length` values, where the first half begins in the whole, and
// where the row begins in a tensor of one half.
struct Halves {
  int64_t rows;
  int64_t length;
  int64_t pieces;  // a row is cut so that one image still feeds all threads

  Halves(const Tensor& half, bool channels_last) {
    const int64_t area = half.size(2) * half.size(3);
    rows = channels_last ? half.size(0) * area : half.size(0);
    length = channels_last ? half.size(1) : half.size(1) * area;
    pieces = (length + PIECE - 1) / PIECE;
  }

  template <class Body>
  void for_each(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, PIECE / std::max<int64_t>(1, length));
    const int64_t tasks = rows * pieces;
    parallel((tasks + grain - 1) / grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * grain; i < std::min(end * grain, tasks); i++) {
        const int64_t row = i / pieces, offset = i % pieces * PIECE;
        body(row * 2 * length + offset, row * length + offset, std::min(PIECE, length - offset));
      }
    });
  }

  static constexpr int64_t PIECE = 16384;
};

}  // namespace

void simple_gate(Tensor x, bool channels_last, Tensor y) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* in = data<T>(x);
    T* out = data<T>(y);
    const Halves halves(y, channels_last);
    halves.for_each([&](int64_t whole, int64_t half, int64_t count) {
      kernels(tag).multiply(in + whole, in + whole + halves.length, out + half, count);
    });
  });
}

void simple_gate_backward(Tensor dy, Tensor x, bool channels_last, Tensor dx) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T *d = data<T>(dy), *in = data<T>(x);
    T* out = data<T>(dx);
    const Halves halves(dy, channels_last);
    halves.for_each([&](int64_t whole, int64_t half, int64_t count) {
      const int64_t second = whole + halves.length;
      kernels(tag).multiply_backward(d + half, in + whole, in + second, out + whole, out + second, count);
    });
  });
}

}  // namespace r2r
