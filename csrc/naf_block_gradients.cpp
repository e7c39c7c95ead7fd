#include "naf_block_gradients.h"

namespace r2r {

// -- sums -------------------------------------------------------------------------------------------------------------

int64_t SumsInParts::floats_of(Parameter p) const {
  const int64_t matrix = channels_ * padded(channels_), vector = channels_ * LANES;
  switch (p) {
    case CONV1_WEIGHT:
    case CONV4_WEIGHT:
      return 2 * matrix;
    case CONV3_WEIGHT:
    case CONV5_WEIGHT:
      return matrix;
    case CONV1_BIAS:
    case CONV4_BIAS:
      return 2 * vector;
    case NORM1_WEIGHT:
    case NORM1_BIAS:
    case CONV3_BIAS:
    case NORM2_WEIGHT:
    case NORM2_BIAS:
    case CONV5_BIAS:
      return vector;
    default:  // conv2 and the attention are summed elsewhere; beta and gamma follow from conv3 and conv5
      return 0;
  }
}

Parameters<float> SumsInParts::of_part(int64_t part) const {
  Parameters<float> sums;
  float* memory = memory_ + part * part_floats_;
  for (int p = first_; p < PARAMETERS; p++) {
    const int64_t floats = floats_of(static_cast<Parameter>(p));
    if (floats) sums.of[p] = memory;
    memory += floats;
  }
  return sums;
}

void SumsInParts::begin(float* memory) {
  memory_ = memory;
  parallel(parts_, [&](int64_t begin, int64_t end) {
    std::fill(memory + begin * part_floats_, memory + end * part_floats_, 0.0f);
  });
}

std::vector<float> SumsInParts::gathered(const std::vector<float>& shares, int64_t images, int64_t each) const {
  std::vector<float> all(images * channels_);
  for (int64_t part = 0; part < parts_; part++) {
    for_part(part, images, each, [&](int64_t n, int64_t, int64_t) {
      for (int64_t c = 0; c < channels_; c++) all[n * channels_ + c] += shares[(part + n) * channels_ + c];
    });
  }
  return all;
}

void SumsInParts::total(const float* sums, int64_t count, double* to) const {
  std::fill(to, to + count, 0.0);
  for (int64_t part = 0; part < parts_; part++) {
    const float* from = sums + part * part_floats_;
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
  }
}

double SumsInParts::total_of_lanes(const float* sums) const {
  double each[LANES], all = 0;
  total(sums, LANES, each);
  for (const double lane : each) all += lane;
  return all;
}

// Gradients of output channel o of the parameters.
struct SumsInParts::Rows {
  const SumsInParts& of;
  const Parameters<float> sums;
  const Parameters<const float>& weights;
  const Parameters<float>& gradients;
  std::vector<double> row;

  // The gradient of a vector: of a bias, or of a norm's parameter.
  void vector(Parameter p, int64_t o) {
    gradients[p][o] = static_cast<float>(of.total_of_lanes(sums[p] + o * LANES));
  }
  void matrix(Parameter p, int64_t o, double scale) {
    const int64_t channels = of.channels_;
    of.total(sums[p] + o * padded(channels), channels, row.data());
    for (int64_t c = 0; c < channels; c++) gradients[p][o * channels + c] = static_cast<float>(scale * row[c]);
  }
  // Of scale * (weight @ x + bias). The products of the gradient with x, times the weight and summed, are the scale's
  // gradient.
  void scaled(Parameter weight, Parameter bias, Parameter scale, int64_t o) {
    const int64_t channels = of.channels_;
    matrix(weight, o, weights[scale][o]);
    const double of_bias = of.total_of_lanes(sums[bias] + o * LANES);
    double of_scale = weights[bias][o] * of_bias;
    for (int64_t c = 0; c < channels; c++) of_scale += weights[weight][o * channels + c] * row[c];
    gradients[bias][o] = static_cast<float>(weights[scale][o] * of_bias);
    gradients[scale][o] = static_cast<float>(of_scale);
  }
};

void SumsInParts::to_gradients(const Parameters<const float>& weights, const Parameters<float>& gradients) const {
  const bool whole = first_ <= NORM1_WEIGHT;
  parallel(2 * channels_, [&](int64_t begin, int64_t end) {
    Rows rows{*this, of_part(0), weights, gradients, std::vector<double>(channels_)};
    for (int64_t o = begin; o < end; o++) {
      rows.matrix(CONV4_WEIGHT, o, 1);
      rows.vector(CONV4_BIAS, o);
      if (o < channels_) {
        rows.scaled(CONV5_WEIGHT, CONV5_BIAS, GAMMA, o);
        rows.vector(NORM2_WEIGHT, o);
        rows.vector(NORM2_BIAS, o);
      }
      if (!whole) continue;
      rows.matrix(CONV1_WEIGHT, o, 1);
      rows.vector(CONV1_BIAS, o);
      if (o < channels_) {
        rows.scaled(CONV3_WEIGHT, CONV3_BIAS, BETA, o);
        rows.vector(NORM1_WEIGHT, o);
        rows.vector(NORM1_BIAS, o);
      }
    }
  });
}

// -- products ---------------------------------------------------------------------------------------------------------

namespace {

// body(parameter, its rows, the scale of its rows) for the matrices [rows, channels] from `first` on.
template <class Body>
void for_matrices(Parameter first, int64_t channels, const Parameters<const float>& weights, const Body& body) {
  if (first <= CONV1_WEIGHT) body(CONV1_WEIGHT, 2 * channels, nullptr);
  if (first <= CONV3_WEIGHT) body(CONV3_WEIGHT, channels, weights[BETA]);
  body(CONV4_WEIGHT, 2 * channels, nullptr);
  body(CONV5_WEIGHT, channels, weights[GAMMA]);
}

}  // namespace

int64_t transposed_floats(Parameter first, int64_t channels) {
  int64_t floats = 0;
  for_matrices(first, channels, {}, [&](Parameter, int64_t rows, const float*) { floats += rows * channels; });
  return floats;
}

template <class F>
NAFBlockProducts<F> make_products(
    const Parameters<const F>& matrices, const Parameters<const float>& weights, Parameter first, int64_t channels,
    float* memory) {
  Parameters<F> transposed;
  F* next = reinterpret_cast<F*>(memory);
  for_matrices(first, channels, weights, [&](Parameter p, int64_t rows, const float*) {
    transposed[p] = next;
    next += rows * channels;
  });
  parallel((2 * channels + LANES - 1) / LANES, [&](int64_t begin, int64_t end) {
    for_matrices(first, channels, weights, [&](Parameter p, int64_t rows, const float* scale) {
      kernels<NAFBlockBackwardKernels<F>>().transpose(
          matrices[p], scale, rows, channels, begin * LANES, std::min(end * LANES, rows), transposed[p]);
    });
  });
  NAFBlockProducts<F> made{matrices, {}};
  for (int p = 0; p < PARAMETERS; p++) made.transposed.of[p] = transposed.of[p];
  return made;
}

template NAFBlockProducts<float> make_products(
    const Parameters<const float>&, const Parameters<const float>&, Parameter, int64_t, float*);
template NAFBlockProducts<bfloat16> make_products(
    const Parameters<const bfloat16>&, const Parameters<const float>&, Parameter, int64_t, float*);

}  // namespace r2r
