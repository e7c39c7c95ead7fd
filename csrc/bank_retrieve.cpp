#include "bank_retrieve.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/tensors.h"

namespace r2r {

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// As torch.nn.functional.normalize, in double: an error of a norm is an error of all its similarities, and the softmax takes
// exponentials of these.
double norm(float square) {
  return std::max(std::sqrt(static_cast<double>(square)), 1e-12);
}

enum Mode { HARD, MULTI, SOFT };

// The choice of tasks and the weights of slots for one sample. Its similarities [tasks, slots] become weights in place.
struct Selection {
  const int64_t* counts;
  int64_t tasks;
  int64_t slots;

  // The mean similarity of each task, -inf where it holds no slots.
  void score(const float* similarity, float* scores) const {
    for (int64_t t = 0; t < tasks; t++) {
      double total = 0;
      for (int64_t s = 0; s < counts[t]; s++) total += similarity[t * slots + s];
      scores[t] = counts[t] > 0 ? static_cast<float>(total / static_cast<double>(counts[t])) : -INFINITE;
    }
  }

  void choose(const float* scores, int64_t mode, bool* taking) const {
    int64_t best = 0;  // the first NaN, as argmax, or the first largest
    bool above = false;
    for (int64_t t = 0; t < tasks; t++) {
      above = above || scores[t] > 0;
      if (!std::isnan(scores[best]) && (std::isnan(scores[t]) || scores[t] > scores[best])) best = t;
    }
    for (int64_t t = 0; t < tasks; t++) {
      if (mode == SOFT) {
        taking[t] = scores[t] > -INFINITE;
      } else {
        taking[t] = mode == MULTI && above ? scores[t] > 0 : t == best;
      }
    }
  }

  void weigh(const bool* taking, float* weights) const {
    float largest = -INFINITE;
    for (int64_t t = 0; t < tasks; t++) {
      for (int64_t s = 0; s < counts[t] && taking[t]; s++) largest = std::max(largest, weights[t * slots + s]);
    }
    double total = 0;
    for (int64_t t = 0; t < tasks; t++) {
      float* own = weights + t * slots;
      const int64_t used = taking[t] ? counts[t] : 0;
      for (int64_t s = 0; s < used; s++) total += own[s] = std::exp(own[s] - largest);
      std::fill(own + used, own + slots, 0.0f);
    }
    for (int64_t i = 0; i < tasks * slots; i++) weights[i] = static_cast<float>(weights[i] / total);
  }
};

// taking [N, T]: which tasks take part; read where `given`, else written. weights [N, T, S] are written.
void bank_retrieve(
    Tensor query, Tensor keys, Tensor values, Tensor counts, double scale, bool given, int64_t mode, Tensor taking,
    Tensor readout, Tensor scores, Tensor weights) {
  for_dtype(query, [&]<class T>() {
    const int64_t number = query.size(0), tasks = keys.size(0), slots = keys.size(1);
    const int64_t depth = keys.numel() / std::max<int64_t>(1, tasks * slots), length = readout.numel() / number;
    const Selection selection{data<const int64_t>(counts), tasks, slots};

    const T* queries = data<const T>(query);
    std::vector<double> norms(number);
    for (int64_t n = 0; n < number; n++) {
      const T* own = queries + n * depth;
      float unused;
      norms[n] = norm(kernels<BankRetrieveKernels<T>>().dot_products(own, depth, own, 1, &unused));
    }

    float* similarity = data<float>(weights);
    const T* all_keys = data<const T>(keys);
    parallel(tasks * slots, [&](int64_t begin, int64_t end) {
      std::vector<float> dots(number);
      for (int64_t i = begin; i < end; i++) {
        if (i % slots >= selection.counts[i / slots]) continue;
        const float square =
            kernels<BankRetrieveKernels<T>>().dot_products(all_keys + i * depth, depth, queries, number, dots.data());
        const double factor = scale / norm(square);
        for (int64_t n = 0; n < number; n++) {
          similarity[n * tasks * slots + i] = static_cast<float>(factor * dots[n] / norms[n]);
        }
      }
    });

    bool* part = data<bool>(taking);
    for (int64_t n = 0; n < number; n++) {
      float *own = similarity + n * tasks * slots, *own_scores = data<float>(scores) + n * tasks;
      selection.score(own, own_scores);
      if (!given) selection.choose(own_scores, mode, part + n * tasks);
      selection.weigh(part + n * tasks, own);
    }

    constexpr int64_t BLOCK = 4096;  // values of the readout that a task makes, for all samples; of a slot at least a page
    const T* all_values = data<const T>(values);
    T* out = data<T>(readout);
    parallel((length + BLOCK - 1) / BLOCK, [&](int64_t begin, int64_t end) {
      std::vector<float> totals(number * BLOCK);
      std::vector<const float*> own_weights(number);
      std::vector<float*> own_totals(number);
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = i * BLOCK, valid = std::min(BLOCK, length - first);
        std::fill(totals.begin(), totals.end(), 0.0f);
        for (int64_t t = 0; t < tasks; t++) {
          int64_t count = 0;
          for (int64_t n = 0; n < number; n++) {
            if (!part[n * tasks + t]) continue;
            own_weights[count] = similarity + (n * tasks + t) * slots;
            own_totals[count++] = totals.data() + n * BLOCK;
          }
          if (!count) continue;
          kernels<BankRetrieveKernels<T>>().add_weighted(
              all_values + t * slots * length + first, length, selection.counts[t], valid, own_weights.data(),
              own_totals.data(), count);
        }
        for (int64_t n = 0; n < number; n++) {
          kernels<BankRetrieveKernels<T>>().narrow(totals.data() + n * BLOCK, out + n * length + first, valid);
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def(
      "bank_retrieve(Tensor query, Tensor keys, Tensor values, Tensor counts, float scale, bool given, int mode, "
      "Tensor(a!) taking, Tensor(b!) readout, Tensor(c!) scores, Tensor(d!) weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("bank_retrieve", TORCH_BOX(&bank_retrieve));
}

}  // namespace r2r
