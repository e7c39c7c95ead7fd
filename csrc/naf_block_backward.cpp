#include "naf_block_backward.h"

#include "depthwise_gate_backward.h"
#include "naf_block_gradients.h"

namespace r2r {

namespace {

// A group of images, which the stages take one after the other: what one stage leaves in the work memory of the group, the
// next one should find in a cache.
template <class T>
struct Group {
  NAFBlockBackward<T> op;
  Depthwise conv2;
  int64_t images;
  int64_t channels;
  int64_t panels;           // of an image
  std::vector<float> mean;  // of gated, [images, channels]; so are the following ones
  std::vector<float> attention;
  std::vector<float> dattention;
  std::vector<float> shift;  // the gradient of every pixel of gated through the mean
};

// Of work memory, times channels: 2 of dhidden, 1 of gated, 1 of dy, and 2 of hidden unless it was kept.
int64_t work_channels(bool kept) {
  return kept ? 4 : 6;
}

int64_t images_of_a_group(const Tensor& x, int64_t work) {
  constexpr int64_t VALUES = 1 << 20;  // of work memory
  return std::max<int64_t>(1, std::min(x.size(0), VALUES / (work * x.size(1) * x.size(2) * x.size(3))));
}

template <class T>
void make_hidden(const Group<T>& group) {
  parallel_over_images(group.images, group.panels, [&](int64_t n, int64_t begin, int64_t end) {
    kernels<NAFBlockBackwardKernels<T>>().hidden(group.op, n, begin, end);
  });
}

template <class T>
void make_gated(Group<T>& group) {
  group.mean.resize(group.images * group.channels);
  depthwise_gates<T>(group.conv2, group.images, group.op.hidden, group.op.gated, group.mean.data());
}

template <class T>
void make_attention(Group<T>& group) {
  const Parameters<const float>& w = group.op.weights;
  group.attention.resize(group.mean.size());
  for (int64_t at = 0; at < group.images * group.channels; at += group.channels) {
    kernels<NAFBlockKernels<float>>().attention(
        w[SCA_WEIGHT], w[SCA_BIAS], group.channels, group.mean.data() + at, group.attention.data() + at);
  }
}

template <class T>
void result_backward(Group<T>& group, const SumsInParts& sums) {
  const int64_t channels = group.channels;
  std::vector<float> shares((sums.parts() + group.images) * channels);
  sums.sweep(
      group.images, group.panels, [&](int64_t part, int64_t n, int64_t first, int64_t last, const Parameters<float>& to) {
        kernels<NAFBlockBackwardKernels<T>>().result_backward(
            group.op, n, group.attention.data() + n * channels, first, last, shares.data() + (part + n) * channels, to);
      });
  group.dattention = sums.gathered(shares, group.images, group.panels);
}

template <class T>
void attention_backward(Group<T>& group, const Parameters<float>& gradients) {
  const int64_t channels = group.channels;
  const float* weight = group.op.weights[SCA_WEIGHT];
  float *dweight = gradients[SCA_WEIGHT], *dbias = gradients[SCA_BIAS];
  group.shift.assign(group.mean.size(), 0.0f);
  for (int64_t i = 0; i < channels; i++) {
    for (int64_t n = 0; n < group.images; n++) {
      const float gradient = group.dattention[n * channels + i], share = gradient / static_cast<float>(group.op.x.pixels);
      dbias[i] += gradient;
      for (int64_t c = 0; c < channels; c++) {
        dweight[i * channels + c] += gradient * group.mean[n * channels + c];
        group.shift[n * channels + c] += share * weight[i * channels + c];
      }
    }
  }
}

template <class T>
void gated_backward(const Group<T>& group, const Parameters<float>& gradients) {
  const DepthwiseGateBackward<T> op{
      .conv = group.conv2,
      .dgated = group.op.gated,
      .x = group.op.hidden,
      .dx = group.op.dhidden,
      .scale = group.attention.data(),
      .shift = group.shift.data(),
      .channels_last = false};
  std::vector<float> dweight(18 * group.channels), dbias(2 * group.channels);
  depthwise_gate_gradients(op, group.images, dweight.data(), dbias.data());
  for (size_t i = 0; i < dweight.size(); i++) gradients[CONV2_WEIGHT][i] += dweight[i];
  for (size_t i = 0; i < dbias.size(); i++) gradients[CONV2_BIAS][i] += dbias[i];
}

template <class T>
void hidden_backward(const Group<T>& group, const SumsInParts& sums) {
  sums.sweep(group.images, group.panels, [&](int64_t, int64_t n, int64_t first, int64_t last, const Parameters<float>& to) {
    kernels<NAFBlockBackwardKernels<T>>().hidden_backward(group.op, n, first, last, to);
  });
}

// The group of images from `start` on; op is the operator of all images, without its work memory.
template <class T>
Group<T> group_of(const NAFBlockBackward<T>& op, const Depthwise& conv2, int64_t start, int64_t images, T* work) {
  const int64_t values = images * op.x.channels * op.x.pixels;
  Group<T> group{op, conv2, images, op.x.channels, panels(op.x.pixels), {}, {}, {}, {}};
  group.op.dz.data = op.dz.image(start);
  group.op.x.data = op.x.image(start);
  group.op.dx.data = op.dx.image(start);
  group.op.dhidden = work;
  group.op.gated = group.op.dhidden + 2 * values;
  group.op.dy = group.op.gated + values;
  group.op.hidden = group.op.dy + values;
  if (op.kept.conv1) {
    const int64_t before = start * op.x.channels * op.x.pixels;
    group.op.kept = {.conv1 = op.kept.conv1 + 2 * before, .conv4 = op.kept.conv4 + 2 * before, .y = op.kept.y + before};
    group.op.hidden = group.op.kept.conv1;
  }
  return group;
}

void naf_block_backward(
    Tensor dz, Tensor x, Tensor kept, std::vector<Tensor> params, double eps, bool channels_last, Tensor dx,
    std::vector<Tensor> dparams) {
  const int64_t channels = x.size(1), of_pixels = work_channels(kept.numel()), most = images_of_a_group(x, of_pixels);
  const int64_t shape[] = {most * of_pixels * channels * x.size(2) * x.size(3)};
  const Tensor work = torch::stable::new_empty(x, shape);
  for_dtype(x, [&]<class T>() {
    Floats floats;
    SumsInParts sums(NORM1_WEIGHT, channels, most * panels(x.size(2) * x.size(3)));
    NAFBlockBackward<T> op = taken_back<T>(dz, x, params, NORM1_WEIGHT, eps, channels_last, dx, sums, floats);
    op.kept = kept_in<T>(kept, x);
    const Depthwise conv2{op.weights[CONV2_WEIGHT], op.weights[CONV2_BIAS], channels, x.size(2), x.size(3)};
    const Parameters<float> gradients = pointers<float>(dparams, NORM1_WEIGHT);
    for (const Parameter p : {CONV2_WEIGHT, CONV2_BIAS, SCA_WEIGHT, SCA_BIAS}) {
      std::fill_n(gradients[p], dparams[p].numel(), 0.0f);
    }
    for (int64_t start = 0; start < x.size(0); start += most) {
      Group<T> group = group_of(op, conv2, start, std::min(most, x.size(0) - start), data<T>(work));
      if (!op.kept.conv1) make_hidden(group);
      make_gated(group);
      make_attention(group);
      result_backward(group, sums);
      attention_backward(group, gradients);
      gated_backward(group, gradients);
      hidden_backward(group, sums);
    }
    sums.to_gradients(op.weights, gradients);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def(
      "naf_block_backward(Tensor dz, Tensor x, Tensor kept, Tensor[] params, float eps, bool channels_last, Tensor(a!) dx, "
      "Tensor(b!)[] dparams) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("naf_block_backward", TORCH_BOX(&naf_block_backward));
}

}  // namespace r2r
