#include "naf_block.h"

#include <algorithm>

#include "local_mean_2d.h"
#include "naf_block_parameters.h"

namespace r2r {

namespace {

// A tile's normalised pixels should fit the second-level cache. Tiles should be large enough that the pixels around them,
// which are computed again, do not matter.
Tiling tiling(int64_t channels, int64_t height, int64_t width) {
  constexpr int64_t FLOATS = 196608, LEAST_AREA = 1024, WIDEST = 512;
  const int64_t area = std::max(LEAST_AREA, FLOATS / channels), across = (width + WIDEST - 1) / WIDEST;
  const int64_t rows = std::max<int64_t>(4, area * across / width);
  int64_t down = (height + rows - 1) / rows;
  if (down * across > 1 && down % 2) down = std::min(height, down + 1);
  return {height, width, down, across};
}

template <class T>
NAFBlock<T> block(
    const Tensor& x, const std::vector<Tensor>& params, double eps, bool channels_last, const Tensor& gated,
    const Tensor& result, Floats& floats) {
  const bool pairs = multiplies_pairs<T>(x.size(1));
  std::vector<Parameter> without{SCA_WEIGHT};
  if (pairs) without.insert(without.end(), {CONV1_WEIGHT, CONV3_WEIGHT, CONV4_WEIGHT, CONV5_WEIGHT});
  return {
      .weights = widened(params, NORM1_WEIGHT, without, floats),
      .matrices = pointers<const T>(params, NORM1_WEIGHT),
      .pairs = pairs,
      .x = images<const T>(x, channels_last),
      .result = images<T>(result, channels_last),
      .gated = data<T>(gated),
      .kept = {},
      .height = x.size(2),
      .width = x.size(3),
      .eps = static_cast<float>(eps)};
}

// Sums of gated over each tile, [images, tiles, channels].
template <class T>
std::vector<float> make_gated(const NAFBlock<T>& op, const Tiling& tiles, int64_t images) {
  const int64_t channels = op.x.channels, all = images * tiles.count();
  // Few tiles: each is shared by threads, which make different channels of it.
  const int64_t splits = std::min(channels, (torch::stable::get_num_threads() + all - 1) / all);
  std::vector<float> sums(all * channels);
  parallel(all * splits, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t at = i / splits, split = i % splits;
      kernels<NAFBlockKernels<T>>().gated(
          op, at / tiles.count(), tiles.tile(at % tiles.count()), channels * split / splits, channels * (split + 1) / splits,
          sums.data() + at * channels);
    }
  });
  return sums;
}

// attention [images, channels].
template <class T>
std::vector<float> make_attention(const NAFBlock<T>& op, int64_t tiles, int64_t images, const std::vector<float>& sums) {
  const int64_t channels = op.x.channels;
  std::vector<float> mean(channels), attention(images * channels);
  for (int64_t n = 0; n < images; n++) {
    for (int64_t c = 0; c < channels; c++) {
      double total = 0;
      for (int64_t t = 0; t < tiles; t++) total += sums[(n * tiles + t) * channels + c];
      mean[c] = static_cast<float>(total / static_cast<double>(op.x.pixels));
    }
    kernels<NAFBlockKernels<T>>().attention(
        op.matrices[SCA_WEIGHT], op.weights[SCA_BIAS], channels, mean.data(), attention.data() + n * channels);
  }
  return attention;
}

}  // namespace

template <class T>
void make_result(const NAFBlock<T>& op, int64_t images, const float* attention) {
  constexpr int64_t GRAIN = PANEL / 2;  // threads share the pixels of a small image to half a panel
  parallel_over_images(images, (op.x.pixels + GRAIN - 1) / GRAIN, [&](int64_t n, int64_t begin, int64_t end) {
    kernels<NAFBlockKernels<T>>().result(
        op, n, attention ? attention + n * op.x.channels : nullptr, begin * GRAIN, std::min(op.x.pixels, end * GRAIN));
  });
}

template void make_result(const NAFBlock<float>&, int64_t, const float*);
template void make_result(const NAFBlock<bfloat16>&, int64_t, const float*);

namespace {

// kept: nullptr, or memory for what is kept.
void run(
    const Tensor& x, const std::vector<Tensor>& params, double eps, bool channels_last, const Tensor& result,
    const Tensor* kept) {
  if (x.numel() == 0) return;
  // In NCHW gated lies in the memory of the result: a pixel of the result replaces it when it is made.
  const int64_t shape[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  const Tensor gated = channels_last ? torch::stable::new_empty(x, shape) : result;
  for_dtype(x, [&]<class T>() {
    Floats floats;
    NAFBlock<T> op = block<T>(x, params, eps, channels_last, gated, result, floats);
    if (kept) op.kept = kept_in<T>(*kept, x);
    const Tiling tiles = tiling(op.x.channels, op.height, op.width);
    const std::vector<float> sums = make_gated(op, tiles, x.size(0));
    make_result(op, x.size(0), make_attention(op, tiles.count(), x.size(0), sums).data());
  });
}

void naf_block(Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor result) {
  run(x, params, eps, channels_last, result, nullptr);
}

void naf_block_training(Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor result, Tensor kept) {
  run(x, params, eps, channels_last, result, &kept);
}

void local_naf_block(
    Tensor x, std::vector<Tensor> params, double eps, int64_t window_height, int64_t window_width, bool channels_last,
    Tensor result) {
  if (x.numel() == 0) return;
  const int64_t images = x.size(0), shape[] = {images, x.size(1), x.size(2), x.size(3)};
  const Tensor gated = torch::stable::new_empty(x, shape), mean = torch::stable::new_empty(x, shape);
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const NAFBlock<T> op = block<T>(x, params, eps, channels_last, gated, result, floats);
    make_gated(op, tiling(op.x.channels, op.height, op.width), images);
    local_means(
        LocalMean2d<T>{
            .x = op.gated,
            .y = data<T>(mean),
            .channels = op.x.channels,
            .height = op.height,
            .width = op.width,
            .window_height = std::min(window_height, op.height),
            .window_width = std::min(window_width, op.width),
            .backward = false,
            .channels_last = false},
        images);
    const LocalAttention<T> attention{
        r2r::images<const T>(mean, false), r2r::images<T>(gated, false), floats(params[SCA_WEIGHT]), op.weights[SCA_BIAS]};
    parallel_over_images(images, panels(op.x.pixels), [&](int64_t n, int64_t begin, int64_t end) {
      kernels<NAFBlockKernels<T>>().local_attention(attention, n, begin, end);
    });
    make_result(op, images, std::vector<float>(images * op.x.channels, 1.0f).data());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def("naf_block(Tensor x, Tensor[] params, float eps, bool channels_last, Tensor(a!) result) -> ()");
  m.def(
      "naf_block_training(Tensor x, Tensor[] params, float eps, bool channels_last, Tensor(a!) result, Tensor(b!) kept) -> "
      "()");
  m.def(
      "local_naf_block(Tensor x, Tensor[] params, float eps, int window_height, int window_width, bool channels_last, "
      "Tensor(a!) result) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("naf_block", TORCH_BOX(&naf_block));
  m.impl("naf_block_training", TORCH_BOX(&naf_block_training));
  m.impl("local_naf_block", TORCH_BOX(&local_naf_block));
}

}  // namespace r2r
