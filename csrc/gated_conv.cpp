#include "gated_conv.h"

#include <algorithm>

#include "common/tensors.h"

namespace r2r {

namespace {

constexpr int64_t LARGE = 16 << 20;  // bytes; a larger result fills the caches before anyone reads it: streaming stores pay

// Taps as the kernels want them: [C, 2 K K] for planes, [2 K K, C] for channels_last.
class Taps {
 public:
  Taps(const float* weight, int64_t channels, int64_t taps, bool channels_last) : weight_(weight) {
    if (!channels_last) return;
    turned_.resize(channels * taps);
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t t = 0; t < taps; t++) turned_[t * channels + c] = weight[c * taps + t];
    }
    weight_ = turned_.data();
  }
  const float* data() const {
    return weight_;
  }

 private:
  const float* weight_;
  std::vector<float> turned_;
};

// The windows of `in` places that each of `out` places averages.
struct Resizing {
  std::vector<Window> windows;
  std::vector<int32_t> first;
  std::vector<int32_t> last;

  Resizing(int64_t in, int64_t out) : first(out + LANES), last(out + LANES) {
    for (int64_t i = 0; i < out; i++) {
      windows.push_back(window(i, in, out));
      first[i] = static_cast<int32_t>(windows[i].begin);
      last[i] = static_cast<int32_t>(windows[i].end - 1);
    }
  }
};

void gated_conv(Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, Tensor y) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const int64_t kernel = weight.size(2), images = x.size(0);
    const Taps taps(floats(weight), x.size(1), 2 * kernel * kernel, channels_last);
    GatedConv<T> op{
        .x = data<const T>(x),
        .prior = data<const T>(prior),
        .y = data<T>(y),
        .weight = taps.data(),
        .bias = floats(bias),
        .channels = x.size(1),
        .height = x.size(2),
        .width = x.size(3),
        .prior_height = prior.size(2),
        .prior_width = prior.size(3),
        .kernel = kernel,
        .rows = nullptr,
        .first_columns = nullptr,
        .last_columns = nullptr,
        .streams = false};
    const Resizing down(op.prior_height, op.height), across(op.prior_width, op.width);
    if (op.prior_height != op.height || op.prior_width != op.width) {
      op.rows = down.windows.data();
      op.first_columns = across.first.data();
      op.last_columns = across.last.data();
    }
    const int64_t bytes = static_cast<int64_t>(sizeof(T)), row = (channels_last ? op.channels : op.width) * bytes;
    const bool whole_lines = row % 64 == 0 && reinterpret_cast<uintptr_t>(op.y) % 64 == 0;
    op.streams = (whole_lines || (kernel == 1 && !channels_last)) && y.numel() * bytes >= LARGE;
    if (channels_last) {
      const bool narrow = kernel == 3 || op.rows;
      const int64_t columns = narrow ? std::min(op.width, gated_conv_columns(op.channels * bytes)) : op.width;
      const int64_t tiles = (op.width + columns - 1) / columns;
      // A tile of 3x3 waits for its first rows. So tiles are tall, but each thread has a few of them.
      const int64_t wanted = 4 * torch::stable::get_num_threads() / (images * tiles) + 1;
      const int64_t each = kernel == 1 ? STRIP : std::max(2 * STRIP, (op.height + wanted - 1) / wanted);
      const int64_t strips = (op.height + each - 1) / each;
      parallel(images * strips * tiles, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t top = i / tiles % strips * each, tile = i % tiles;
          const Tile place{top, std::min(op.height, top + each), op.width * tile / tiles, op.width * (tile + 1) / tiles};
          kernels<GatedConvKernels<T>>().rows(op, i / tiles / strips, place);
        }
      });
    } else {
      parallel(images * op.channels, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) kernels<GatedConvKernels<T>>().plane(op, i);
      });
    }
  });
}

void gated_conv_backward(
    Tensor dy, Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, Tensor dx, Tensor dprior,
    Tensor dweight, Tensor dbias) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const int64_t kernel = weight.size(2), images = x.size(0), taps = 2 * kernel * kernel;
    const Taps turned(floats(weight), x.size(1), taps, channels_last);
    const GatedConvBackward<T> op{
        .dy = data<const T>(dy),
        .x = data<const T>(x),
        .prior = data<const T>(prior),
        .dx = data<T>(dx),
        .dprior = data<T>(dprior),
        .weight = turned.data(),
        .bias = floats(bias),
        .channels = x.size(1),
        .height = x.size(2),
        .width = x.size(3),
        .kernel = kernel};
    // The sums of each task are kept and added in their order, so that two runs agree.
    const int64_t strips = channels_last ? (op.height + STRIP - 1) / STRIP : 1;
    const int64_t sums = taps + 1;
    std::vector<float> partial(images * strips * sums * op.channels);
    if (channels_last) {
      parallel(images * strips, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t top = i % strips * STRIP;
          kernels<GatedConvKernels<T>>().rows_backward(
              op, i / strips, top, std::min(op.height, top + STRIP), partial.data() + i * sums * op.channels);
        }
      });
    } else {
      parallel(images * op.channels, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          kernels<GatedConvKernels<T>>().plane_backward(op, i, partial.data() + i * sums);
        }
      });
    }
    float *to_weight = data<float>(dweight), *to_bias = data<float>(dbias);
    for (int64_t c = 0; c < op.channels; c++) {
      for (int64_t t = 0; t < sums; t++) {
        double total = 0;
        for (int64_t i = 0; i < images * strips; i++) {
          total += partial[channels_last ? (i * sums + t) * op.channels + c : (i * op.channels + c) * sums + t];
        }
        (t < taps ? to_weight[c * taps + t] : to_bias[c]) = static_cast<float>(total);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def("gated_conv(Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, Tensor(a!) y) -> ()");
  m.def(
      "gated_conv_backward(Tensor dy, Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, "
      "Tensor(a!) dx, Tensor(b!) dprior, Tensor(c!) dweight, Tensor(d!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("gated_conv", TORCH_BOX(&gated_conv));
  m.impl("gated_conv_backward", TORCH_BOX(&gated_conv_backward));
}

}  // namespace r2r
