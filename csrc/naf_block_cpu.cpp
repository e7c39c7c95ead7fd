#include "operators.h"

namespace r2r {

namespace {

constexpr size_t CONV1 = 2, SCA = 6, CONV3 = 8, CONV4 = 13, CONV5 = 15;  // the matrices among the parameters

// How the first sweep cuts an image: a tile's normalised pixels should fit the second-level cache, and tiles be large
// enough that the pixels computed again around them do not matter.
struct Grid {
  int64_t down;
  int64_t across;
  int64_t height;
  int64_t width;

  Grid(int64_t channels, int64_t image_height, int64_t image_width) : height(image_height), width(image_width) {
    constexpr int64_t FLOATS = 196608, LEAST_AREA = 1024, WIDEST = 512;
    const int64_t area = std::max(LEAST_AREA, FLOATS / channels);
    across = (width + WIDEST - 1) / WIDEST;
    const int64_t rows = std::max<int64_t>(4, area * across / width);
    down = (height + rows - 1) / rows;
    if (down * across > 1 && down % 2) down = std::min(height, down + 1);
  }

  int64_t tiles() const {
    return down * across;
  }
  Tile tile(int64_t i) const {
    const int64_t row = i / across, column = i % across;
    return {height * row / down, height * (row + 1) / down, width * column / across, width * (column + 1) / across};
  }
};

// pool() makes a block local: called between the sweeps, it applies the attention to `gated`.
template <class Pool>
void sweep(
    Tensor x, const std::vector<Tensor>& params, double eps, bool channels_last, Tensor gated, Tensor y, bool local,
    const Pool& pool) {
  STD_TORCH_CHECK(params.size() == 18, "a NAF block has 18 parameters");
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto matrix = [&](size_t i) { return data<T>(params[i]); };
    const NAFBlockMatrices<T> matrices{matrix(CONV1), matrix(SCA), matrix(CONV3), matrix(CONV4), matrix(CONV5)};
    const bool pairs = kernels(tag).pairs && x.size(1) % 2 == 0;
    Floats floats;
    const float* p[18] = {};
    for (size_t i = 0; i < 18; i++) {
      const bool product = i == CONV1 || i == CONV3 || i == CONV4 || i == CONV5;
      if (i != SCA && !(product && pairs)) p[i] = floats(params[i]);
    }
    const NAFBlock<T> op{
        {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14], p[15], p[16], p[17]},
        images<const T>(x, channels_last),
        images<T>(y, channels_last),
        data<T>(gated),
        x.size(2),
        x.size(3),
        static_cast<float>(eps),
        matrices,
        pairs};
    const int64_t images = x.size(0), channels = op.x.channels;
    if (images * channels * op.x.pixels == 0) return;

    const Grid grid(channels, op.height, op.width);
    const int64_t tiles = grid.tiles(), threads = torch::stable::get_num_threads();
    // Few tiles: each is shared by threads, which make different channels of it.
    const int64_t splits = std::min(channels, (threads + images * tiles - 1) / (images * tiles));
    std::vector<float> sums(images * tiles * channels);
    parallel(images * tiles * splits, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = i / splits, split = i % splits;
        const Tile tile = grid.tile(at % tiles);
        kernels(tag).naf_block_first(
            op, at / tiles, tile, channels * split / splits, channels * (split + 1) / splits, sums.data() + at * channels,
            scratch(naf_block_first_scratch(channels, tile)));
      }
    });

    std::vector<float> mean(channels), attention(images * channels, 1.0f);
    if (local) pool(tag);
    for (int64_t n = 0; n < images && !local; n++) {
      for (int64_t c = 0; c < channels; c++) {
        double total = 0;
        for (int64_t t = 0; t < tiles; t++) total += sums[(n * tiles + t) * channels + c];
        mean[c] = static_cast<float>(total / static_cast<double>(op.x.pixels));
      }
      kernels(tag).naf_block_attention(
          matrices.sca, op.weights.sca_bias, channels, mean.data(), attention.data() + n * channels);
    }

    constexpr int64_t GRAIN = PANEL / 2;  // threads share the pixels of a small image to half a panel
    const int64_t each = (op.x.pixels + GRAIN - 1) / GRAIN;
    parallel(images * each, [&](int64_t begin, int64_t end) {
      float* memory = scratch(naf_block_second_scratch(channels));
      while (begin < end) {
        const int64_t n = begin / each, stop = std::min(end, (n + 1) * each);
        kernels(tag).naf_block_second(
            op, n, attention.data() + n * channels, (begin - n * each) * GRAIN,
            std::min(op.x.pixels, (stop - n * each) * GRAIN), memory);
        begin = stop;
      }
    });
  });
}

}  // namespace

void naf_block(Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor gated, Tensor y) {
  sweep(x, params, eps, channels_last, gated, y, false, [](auto*) {});
}

void local_naf_block(
    Tensor x, std::vector<Tensor> params, double eps, int64_t window_height, int64_t window_width, bool channels_last,
    Tensor gated, Tensor pooled, Tensor y) {
  sweep(x, params, eps, channels_last, gated, y, true, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    local_mean_2d(gated, window_height, window_width, false, false, pooled);
    Floats floats;
    const LocalAttention<T> op{
        images<const T>(pooled, false), images<T>(gated, false), floats(params[SCA]), floats(params[SCA + 1])};
    const int64_t each = panels(op.gated.pixels);
    parallel(x.size(0) * each, [&](int64_t begin, int64_t end) {
      float* memory = scratch(local_attention_scratch(op.gated.channels));
      while (begin < end) {
        const int64_t n = begin / each, stop = std::min(end, (n + 1) * each);
        kernels(tag).local_attention(op, n, begin - n * each, stop - n * each, memory);
        begin = stop;
      }
    });
  });
}

}  // namespace r2r
