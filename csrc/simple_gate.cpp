#include "simple_gate.h"

#include <algorithm>

#include "common/tensors.h"

namespace r2r {

namespace {

// body(at, whole, half) for all rows, in tasks of several short rows or of a part of a long one. `whole` is where these rows
// begin in a tensor of two halves, `half` is where they begin in a tensor of one half.
template <class Body>
void for_halves(const Tensor& half, bool channels_last, const Body& body) {
  constexpr int64_t CHUNK = 16384;
  const int64_t area = half.size(2) * half.size(3);
  const int64_t rows = half.size(0) * (channels_last ? area : 1), length = half.size(1) * (channels_last ? 1 : area);
  const int64_t chunks = (length + CHUNK - 1) / CHUNK, together = std::max<int64_t>(1, CHUNK / std::max<int64_t>(1, length));
  parallel((rows + together - 1) / together * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / chunks * together, offset = i % chunks * CHUNK;
      const Halves at{std::min(together, rows - row), length, std::min(CHUNK, length - offset)};
      body(at, row * 2 * length + offset, row * length + offset);
    }
  });
}

void simple_gate(Tensor x, bool channels_last, Tensor y) {
  for_dtype(x, [&]<class T>() {
    const T* in = data<T>(x);
    T* out = data<T>(y);
    for_halves(y, channels_last, [&](const Halves& at, int64_t whole, int64_t half) {
      kernels<SimpleGateKernels<T>>().multiply(in + whole, out + half, at);
    });
  });
}

void simple_gate_backward(Tensor dy, Tensor x, bool channels_last, Tensor dx) {
  for_dtype(x, [&]<class T>() {
    const T *d = data<T>(dy), *in = data<T>(x);
    T* out = data<T>(dx);
    for_halves(dy, channels_last, [&](const Halves& at, int64_t whole, int64_t half) {
      kernels<SimpleGateKernels<T>>().multiply_backward(d + half, in + whole, out + whole, at);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def("simple_gate(Tensor x, bool channels_last, Tensor(a!) y) -> ()");
  m.def("simple_gate_backward(Tensor dy, Tensor x, bool channels_last, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("simple_gate", TORCH_BOX(&simple_gate));
  m.impl("simple_gate_backward", TORCH_BOX(&simple_gate_backward));
}

}  // namespace r2r
