#include "operators.h"

namespace r2r {

namespace {

constexpr size_t CONV1 = 2, CONV3 = 8, CONV4 = 13, CONV5 = 15;  // the matrices that pixels are multiplied with

// Where a part of the pixels leaves its sums, of all parameters but the depthwise convolution's and the attention's; of the
// second half alone, those of the second half.
int64_t floats_of_sums(int64_t channels, bool whole) {
  return (whole ? 6 : 3) * channels * padded(channels) + (whole ? 10 : 5) * channels * LANES;
}

NAFBlockSums sums_at(float* memory, int64_t channels, bool whole) {
  const auto take = [&](int64_t floats) {
    float* taken = memory;
    memory += floats;
    return taken;
  };
  const int64_t matrix = channels * padded(channels), vector = channels * LANES;
  NAFBlockSums sums{};
  if (whole) {
    sums.norm1_weight = take(vector);
    sums.norm1_bias = take(vector);
    sums.conv1_weight = take(2 * matrix);
    sums.conv1_bias = take(2 * vector);
    sums.conv3_weight = take(matrix);
    sums.conv3_bias = take(vector);
  }
  sums.norm2_weight = take(vector);
  sums.norm2_bias = take(vector);
  sums.conv4_weight = take(2 * matrix);
  sums.conv4_bias = take(2 * vector);
  sums.conv5_weight = take(matrix);
  sums.conv5_bias = take(vector);
  return sums;
}

// The sums of all parts, in their order.
struct Total {
  const float* memory;
  int64_t parts;
  int64_t size;

  void row(const float* first, int64_t count, double* to) const {
    std::fill(to, to + count, 0.0);
    for (int64_t part = 0; part < parts; part++) {
      const float* from = memory + part * size + (first - memory);
      for (int64_t i = 0; i < count; i++) to[i] += from[i];
    }
  }
  double lanes(const float* first) const {
    double each[LANES], total = 0;
    row(first, LANES, each);
    for (double lane : each) total += lane;
    return total;
  }
};

// To `to`, a block's 18 gradients; those of the first half where sums of it were made.
void gradients(
    const NAFBlockWeights& w, int64_t channels, const Total& total, const NAFBlockSums& sums,
    const std::vector<float*>& to) {
  const int64_t stride = padded(channels);
  const bool whole = sums.conv1_weight != nullptr;
  parallel(2 * channels, [&](int64_t begin, int64_t end) {
    std::vector<double> row(channels);
    const auto matrix = [&](const float* products, int64_t o, float* weight, double scale) {
      total.row(products + o * stride, channels, row.data());
      for (int64_t c = 0; c < channels; c++) weight[o * channels + c] = static_cast<float>(scale * row[c]);
    };
    // Of scale * (weight @ x + bias), summed products of the gradient with x: those with the whole give that of the scale.
    const auto scaled = [&](const float* products, const float* lanes, int64_t o, const float* weight, const float* bias,
                            const float* scale, float* dweight, float* dbias, float* dscale) {
      matrix(products, o, dweight, scale[o]);
      const double of_bias = total.lanes(lanes + o * LANES);
      double of_scale = bias[o] * of_bias;
      for (int64_t c = 0; c < channels; c++) of_scale += weight[o * channels + c] * row[c];
      dbias[o] = static_cast<float>(scale[o] * of_bias);
      dscale[o] = static_cast<float>(of_scale);
    };
    for (int64_t o = begin; o < end; o++) {
      if (whole) {
        matrix(sums.conv1_weight, o, to[2], 1);
        to[3][o] = static_cast<float>(total.lanes(sums.conv1_bias + o * LANES));
      }
      matrix(sums.conv4_weight, o, to[13], 1);
      to[14][o] = static_cast<float>(total.lanes(sums.conv4_bias + o * LANES));
      if (o >= channels) continue;
      if (whole) {
        scaled(sums.conv3_weight, sums.conv3_bias, o, w.conv3_weight, w.conv3_bias, w.beta, to[8], to[9], to[10]);
      }
      scaled(sums.conv5_weight, sums.conv5_bias, o, w.conv5_weight, w.conv5_bias, w.gamma, to[15], to[16], to[17]);
      const float* norms[4] = {sums.norm1_weight, sums.norm1_bias, sums.norm2_weight, sums.norm2_bias};
      const int64_t at[4] = {0, 1, 11, 12};
      for (int i = whole ? 0 : 2; i < 4; i++) to[at[i]][o] = static_cast<float>(total.lanes(norms[i] + o * LANES));
    }
  });
}

// The gated channels of some images and their means.
template <class T>
void gate(const NAFBlockBackward<T>& op, const Depthwise& conv, int64_t images, float* mean) {
  const T* tag = nullptr;
  const int64_t channels = conv.channels, area = op.x.pixels;
  parallel(images * channels, [&](int64_t begin, int64_t end) {
    const int64_t rows = std::max<int64_t>(4, 16384 / conv.width);
    float* work = scratch(2 * plane_floats(rows, conv.width));
    for (int64_t i = begin; i < end; i++) {
      double total = 0;
      for (int64_t top = 0; top < conv.height; top += rows) {
        const int64_t n = i / channels;
        total += kernels(tag).depthwise_gate(
            conv, op.hidden + n * 2 * channels * area, op.gated + n * channels * area, i % channels,
            Tile{top, std::min(conv.height, top + rows), 0, conv.width}, work);
      }
      mean[i] = static_cast<float>(total / static_cast<double>(area));
    }
  });
}

// The attention's gradients, added to dweight and dbias, and that of every gated pixel through the mean.
void attention_backward(
    const NAFBlockWeights& w, int64_t images, int64_t channels, int64_t pixels, const float* mean, const float* dattention,
    float* dweight, float* dbias, float* dgated) {
  for (int64_t i = 0; i < channels; i++) {
    for (int64_t n = 0; n < images; n++) {
      const float gradient = dattention[n * channels + i], share = gradient / static_cast<float>(pixels);
      dbias[i] += gradient;
      for (int64_t c = 0; c < channels; c++) {
        dweight[i * channels + c] += gradient * mean[n * channels + c];
        dgated[n * channels + c] += share * w.sca_weight[i * channels + c];
      }
    }
  }
}

}  // namespace

void naf_block_backward(
    Tensor dz, Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor work, Tensor dx,
    std::vector<Tensor> dparams) {
  STD_TORCH_CHECK(params.size() == 18 && dparams.size() == 18, "a NAF block has 18 parameters");
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3), matrix = channels * channels;
    const bool pairs = kernels(tag).pairs && channels % 2 == 0;
    Floats floats;
    const float* p[18] = {};
    std::vector<float*> to(18);
    for (size_t i = 0; i < 18; i++) {
      if (!(pairs && (i == CONV1 || i == CONV4))) p[i] = floats(params[i]);
      to[i] = data<float>(dparams[i]);
    }
    const NAFBlockWeights w{p[0], p[1],  p[2],  p[3],  p[4],  p[5],  p[6],  p[7],  p[8],
                            p[9], p[10], p[11], p[12], p[13], p[14], p[15], p[16], p[17]};
    const Depthwise conv{w.conv2_weight, w.conv2_bias, channels, x.size(2), x.size(3)};
    // Images are taken in groups, for which there is memory to work in: what one sweep leaves there, the next should
    // find in a cache. A sweep over a group's panels that makes sums has parts, in number independent of that of the
    // threads: enough of them to share, each with enough pixels to be worth its sums, which are as large as the weights.
    const int64_t most = work.size(0), each = panels(pixels), size = floats_of_sums(channels, true);
    int64_t parts = 2;
    while (parts < 64 && parts * 8 <= most * each && 2 * parts * matrix <= 1 << 19) parts *= 2;
    float* memory = shared_scratch(parts * size + 6 * matrix);
    const auto products = [&]<class F>(const F* conv1, const F* conv3, const F* conv4, const F* conv5) {
      F *transposed = reinterpret_cast<F*>(memory + parts * size), *to_conv3 = transposed + 2 * matrix;
      F *to_conv4 = to_conv3 + matrix, *to_conv5 = to_conv4 + 2 * matrix;
      parallel((2 * channels + LANES - 1) / LANES, [&](int64_t begin, int64_t end) {
        const auto& transpose = kernels(conv1).transpose_matrix;
        const int64_t first = begin * LANES, last = std::min(end * LANES, 2 * channels), half = std::min(last, channels);
        transpose(conv1, nullptr, 2 * channels, channels, first, last, transposed);
        transpose(conv4, nullptr, 2 * channels, channels, first, last, to_conv4);
        transpose(conv3, w.beta, channels, channels, first, half, to_conv3);
        transpose(conv5, w.gamma, channels, channels, first, half, to_conv5);
      });
      return NAFBlockProducts<F>{conv1, conv3, conv4, transposed, to_conv3, to_conv4, to_conv5};
    };
    NAFBlockProducts<float> in_floats{};
    NAFBlockProducts<T> in_pairs{};
    if (pairs) {
      const auto own = [&](size_t i) -> const T* { return data<T>(params[i]); };
      in_pairs = products(own(CONV1), own(CONV3), own(CONV4), own(CONV5));
    } else {
      in_floats = products(w.conv1_weight, w.conv3_weight, w.conv4_weight, w.conv5_weight);
    }

    parallel(parts, [&](int64_t begin, int64_t end) { std::fill(memory + begin * size, memory + end * size, 0.0f); });
    std::fill(to[6], to[6] + matrix, 0.0f);
    std::fill(to[7], to[7] + channels, 0.0f);
    std::vector<float> dconv2(20 * channels);
    for (int64_t start = 0; start < x.size(0); start += most) {
      const int64_t images = std::min(most, x.size(0) - start), all = images * each;
      const auto group = [&]<class U>(const Tensor& tensor) {
        Images<U> whole = r2r::images<U>(tensor, channels_last);
        whole.data = whole.image(start);
        return whole;
      };
      T* hidden = data<T>(work);
      T *dhidden = hidden + images * 2 * channels * pixels, *gated = dhidden + images * 2 * channels * pixels;
      T* dy = gated + images * channels * pixels;
      const NAFBlockBackward<T> op{
          w,
          in_floats,
          in_pairs,
          pairs,
          group.template operator()<const T>(dz),
          group.template operator()<const T>(x),
          group.template operator()<T>(dx),
          hidden,
          gated,
          dy,
          dhidden,
          static_cast<float>(eps)};
      const auto sweep = [&](int64_t begin, int64_t end, const auto& body) {
        while (begin < end) {
          const int64_t n = begin / each, stop = std::min(end, (n + 1) * each);
          body(n, begin - n * each, stop - n * each);
          begin = stop;
        }
      };
      const auto sweep_parts = [&](const auto& body) {
        parallel(parts, [&](int64_t begin, int64_t end) {
          float* kept = scratch(naf_block_backward_scratch(channels));
          for (int64_t part = begin; part < end; part++) {
            const NAFBlockSums sums = sums_at(memory + part * size, channels, true);
            sweep(all * part / parts, all * (part + 1) / parts, [&](int64_t n, int64_t first, int64_t last) {
              body(part, n, first, last, sums, kept);
            });
          }
        });
      };

      parallel(all, [&](int64_t begin, int64_t end) {
        float* kept = scratch(naf_block_backward_scratch(channels));
        sweep(begin, end, [&](int64_t n, int64_t first, int64_t last) {
          kernels(tag).naf_block_hidden(op, n, first, last, kept);
        });
      });
      std::vector<float> mean(images * channels), attention(images * channels);
      gate(op, conv, images, mean.data());
      for (int64_t n = 0; n < images; n++) {
        kernels(p[6]).naf_block_attention(
            w.sca_weight, w.sca_bias, channels, mean.data() + n * channels, attention.data() + n * channels);
      }

      std::vector<float> pieces((parts + images) * channels);  // part + image tells every piece of an image from others
      sweep_parts([&](int64_t part, int64_t n, int64_t first, int64_t last, const NAFBlockSums& sums, float* kept) {
        kernels(tag).naf_block_second_backward(
            op, n, attention.data() + n * channels, first, last, pieces.data() + (part + n) * channels, sums, kept);
      });
      std::vector<float> dattention(images * channels), shift(images * channels);
      for (int64_t part = 0; part < parts; part++) {
        sweep(all * part / parts, all * (part + 1) / parts, [&](int64_t n, int64_t, int64_t) {
          for (int64_t c = 0; c < channels; c++) dattention[n * channels + c] += pieces[(part + n) * channels + c];
        });
      }
      attention_backward(w, images, channels, pixels, mean.data(), dattention.data(), to[6], to[7], shift.data());
      const DepthwiseGateBackward<T> of_gate{conv, gated, hidden, dhidden, attention.data(), shift.data(), false};
      depthwise_gate_gradients(of_gate, images, dconv2.data(), dconv2.data() + 18 * channels);
      for (int64_t i = 0; i < 18 * channels; i++) to[4][i] = (start ? to[4][i] : 0) + dconv2[i];
      for (int64_t i = 0; i < 2 * channels; i++) to[5][i] = (start ? to[5][i] : 0) + dconv2[18 * channels + i];
      sweep_parts([&](int64_t, int64_t n, int64_t first, int64_t last, const NAFBlockSums& sums, float* kept) {
        kernels(tag).naf_block_first_backward(op, n, first, last, sums, kept);
      });
    }
    gradients(w, channels, Total{memory, parts, size}, sums_at(memory, channels, true), to);
  });
}

void gated_feed_forward_backward(
    Tensor dz, Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor dx,
    std::vector<Tensor> dparams) {
  STD_TORCH_CHECK(params.size() == 7 && dparams.size() == 7, "the second half of a NAF block has 7 parameters");
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr size_t HALF = 11;  // where the second half's parameters begin among a block's
    const int64_t channels = x.size(1), matrix = channels * channels;
    const int64_t each = panels(x.size(2) * x.size(3)), all = x.size(0) * each;
    const bool pairs = kernels(tag).pairs && channels % 2 == 0;
    Floats floats;
    NAFBlockWeights w{};
    w.norm2_weight = floats(params[0]);
    w.norm2_bias = floats(params[1]);
    if (!pairs) w.conv4_weight = floats(params[2]);
    w.conv4_bias = floats(params[3]);
    w.conv5_weight = floats(params[4]);
    w.conv5_bias = floats(params[5]);
    w.gamma = floats(params[6]);
    std::vector<float*> to(18);
    for (size_t i = 0; i < 7; i++) to[HALF + i] = data<float>(dparams[i]);

    // Parts, as in naf_block_backward.
    const int64_t size = floats_of_sums(channels, false);
    int64_t parts = 2;
    while (parts < 64 && parts * 8 <= all && 2 * parts * matrix <= 1 << 19) parts *= 2;
    float* memory = shared_scratch(parts * size + 3 * matrix);
    const auto products = [&]<class F>(const F* conv4, const F* conv5) {
      F *to_conv4 = reinterpret_cast<F*>(memory + parts * size), *to_conv5 = to_conv4 + 2 * matrix;
      parallel((2 * channels + LANES - 1) / LANES, [&](int64_t begin, int64_t end) {
        const auto& transpose = kernels(conv4).transpose_matrix;
        const int64_t first = begin * LANES, last = std::min(end * LANES, 2 * channels);
        transpose(conv4, nullptr, 2 * channels, channels, first, last, to_conv4);
        transpose(conv5, w.gamma, channels, channels, first, std::min(last, channels), to_conv5);
      });
      return NAFBlockProducts<F>{nullptr, nullptr, conv4, nullptr, nullptr, to_conv4, to_conv5};
    };
    NAFBlockProducts<float> in_floats{};
    NAFBlockProducts<T> in_pairs{};
    if (pairs) {
      const T *conv4 = data<T>(params[2]), *conv5 = data<T>(params[4]);
      in_pairs = products(conv4, conv5);
    } else {
      in_floats = products(w.conv4_weight, w.conv5_weight);
    }
    const NAFBlockBackward<T> op{
        w,
        in_floats,
        in_pairs,
        pairs,
        images<const T>(dz, channels_last),
        images<const T>(x, channels_last),
        images<T>(dx, channels_last),
        nullptr,
        nullptr,
        nullptr,
        nullptr,
        static_cast<float>(eps)};
    parallel(parts, [&](int64_t begin, int64_t end) {
      float* kept = scratch(naf_block_backward_scratch(channels));
      std::fill(memory + begin * size, memory + end * size, 0.0f);
      for (int64_t part = begin; part < end; part++) {
        const NAFBlockSums sums = sums_at(memory + part * size, channels, false);
        int64_t at = all * part / parts;
        const int64_t stop = all * (part + 1) / parts;
        while (at < stop) {
          const int64_t n = at / each, last = std::min(stop, (n + 1) * each);
          kernels(tag).naf_block_second_backward(op, n, nullptr, at - n * each, last - n * each, nullptr, sums, kept);
          at = last;
        }
      }
    });
    gradients(w, channels, Total{memory, parts, size}, sums_at(memory, channels, false), to);
  });
}

}  // namespace r2r
