// What naf_block_backward and gated_feed_forward_backward share: the matrices that gradients are carried back with, and the
// sums over pixels that gradients of parameters are made of.
#pragma once

#include <algorithm>

#include "naf_block_backward.h"
#include "naf_block_parameters.h"

namespace r2r {

// Sums over pixels for the parameters from `first` on, in parts. A part is some of the pixels. Its sums are as large as the
// weights, so there are few parts, each with enough pixels to be worth its sums. Their number depends on the shape alone,
// and they are added in their order: the result has the same bits whatever the number of threads.
class SumsInParts {
 public:
  // `panels` are taken at a time.
  SumsInParts(Parameter first, int64_t channels, int64_t panels) : first_(first), channels_(channels) {
    while (parts_ < 64 && parts_ * 8 <= panels && 2 * parts_ * channels * channels <= 1 << 19) parts_ *= 2;
    for (int p = first; p < PARAMETERS; p++) part_floats_ += floats_of(static_cast<Parameter>(p));
  }

  int64_t floats() const {
    return parts_ * part_floats_;
  }
  void begin(float* memory);

  // Calls body(part, n, first, last, its sums) for panels [first, last) of image n, on PyTorch's threads; `each` panels an
  // image.
  template <class Body>
  void sweep(int64_t images, int64_t each, const Body& body) const {
    parallel(parts_, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++) {
        const Parameters<float> sums = of_part(part);
        for_part(part, images, each, [&](int64_t n, int64_t first, int64_t last) { body(part, n, first, last, sums); });
      }
    });
  }

  // Sums [images, channels] of what a sweep left for each part and image, in the order of the parts. The share of a part in
  // image n lies at part + n of shares [parts + images, channels]: no two shares have the same place.
  std::vector<float> gathered(const std::vector<float>& shares, int64_t images, int64_t each) const;
  int64_t parts() const {
    return parts_;
  }

  // Writes the gradients of the parameters from `first` on, but those of conv2 and of the attention.
  void to_gradients(const Parameters<const float>& weights, const Parameters<float>& gradients) const;

 private:
  int64_t floats_of(Parameter p) const;
  Parameters<float> of_part(int64_t part) const;
  template <class Body>
  void for_part(int64_t part, int64_t images, int64_t each, const Body& body) const {
    const int64_t all = images * each;
    for_images(all * part / parts_, all * (part + 1) / parts_, each, body);
  }

  // Totals of all parts, in float64. `sums` points into the first part.
  void total(const float* sums, int64_t count, double* to) const;
  double total_of_lanes(const float* sums) const;
  struct Rows;

  Parameter first_;
  int64_t channels_;
  int64_t parts_ = 2;
  int64_t part_floats_ = 0;
  float* memory_ = nullptr;
};

// The products with the matrices of the parameters from `first` on. The transposed ones are made in memory, of
// transposed_floats.
int64_t transposed_floats(Parameter first, int64_t channels);
template <class F>
NAFBlockProducts<F> make_products(
    const Parameters<const F>& matrices, const Parameters<const float>& weights, Parameter first, int64_t channels,
    float* memory);

// The operator for all images and the parameters from `first` on, without its work memory. The sums and the transposed
// matrices stay in the calling thread's shared scratch.
template <class T>
NAFBlockBackward<T> taken_back(
    const Tensor& dz, const Tensor& x, const std::vector<Tensor>& params, Parameter first, double eps, bool channels_last,
    const Tensor& dx, SumsInParts& sums, Floats& floats) {
  const int64_t channels = x.size(1);
  const bool pairs = multiplies_pairs<T>(channels);
  const std::vector<Parameter> without = pairs ? std::vector{CONV1_WEIGHT, CONV4_WEIGHT} : std::vector<Parameter>{};
  NAFBlockBackward<T> op{};
  op.weights = widened(params, first, without, floats);
  op.pairs = pairs;
  op.dz = images<const T>(dz, channels_last);
  op.x = images<const T>(x, channels_last);
  op.dx = images<T>(dx, channels_last);
  op.eps = static_cast<float>(eps);
  float* memory = shared_scratch(sums.floats() + transposed_floats(first, channels));
  sums.begin(memory);
  memory += sums.floats();
  if (pairs) {
    op.in_pairs = make_products(pointers<const T>(params, first), op.weights, first, channels, memory);
  } else {
    op.products = make_products(op.weights, op.weights, first, channels, memory);
  }
  return op;
}

}  // namespace r2r
