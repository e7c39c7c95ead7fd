// Gated convolution on NVIDIA GPUs. gated_conv_element-inl.h has the arithmetic of an element.
//
// The 1x1 kernels stream. A thread loads and stores 16 bytes at a time: neighbouring pixels of a plane, or neighbouring
// channels of a pixel in channels_last. Elements at addresses that 16 does not divide are loaded and stored one by one: the
// ends of a plane, or the whole plane where the tensors' alignments differ.
// The 3x3 kernels stage a tile of x and of the prior as floats in shared memory.
// A prior of another size is averaged where it is loaded.
// Each kernel is compiled for a dtype; a 3x3 kernel also for a memory format. Whether 16 bytes can be loaded at once and
// whether the prior is resized are conditions at run time: all threads take the same branch.
// The gradients of weight and bias are deterministic. Each block sums a fixed part; add_parts sums the parts in a fixed order.
#pragma once

#include "gated_conv.h"
#include "pack.cuh"

#define R2R_ISA cuda
#include "gated_conv_element-inl.h"

namespace r2r::cuda {

template <class T>
struct Forward {
  const T* x;
  const T* prior;
  const T* weight;
  const T* bias;
  T* y;
  int64_t images;
  int64_t channels;
  int height;
  int width;
  int prior_height;
  int prior_width;
  bool wide;  // load and store 16 bytes at a time
  bool resized;
};

template <class T>
struct Backward {
  const T* dy;
  const T* x;
  const T* prior;
  const T* weight;
  const T* bias;
  T* dx;
  T* dprior;
  float* partial;  // [parts, 2 K K + 1, channels]
  int64_t images;
  int64_t channels;
  int height;
  int width;
  bool wide;
};

// to[e] = the mean of the prior over the pooling window of pixel (row, column). Neighbouring pixels of the prior are `step`
// elements apart.
template <int E, class T>
__device__ __forceinline__ void load_resized(
    const T* prior, int row, int column, const Forward<T>& op, int64_t step, float (&to)[E]) {
  const Window rows = window(row, op.prior_height, op.height), columns = window(column, op.prior_width, op.width);
#pragma unroll
  for (int e = 0; e < E; e++) to[e] = 0;
  for (int64_t r = rows.begin; r < rows.end; r++) {
    for (int64_t c = columns.begin; c < columns.end; c++) {
      float some[E];
      load(prior + (r * op.prior_width + c) * step, some);
#pragma unroll
      for (int e = 0; e < E; e++) to[e] += some[e];
    }
  }
  const float scale = 1.0f / static_cast<float>((rows.end - rows.begin) * (columns.end - columns.begin));
#pragma unroll
  for (int e = 0; e < E; e++) to[e] *= scale;
}

// -- 1x1, planes -------------------------------------------------------------------------------------------------------

constexpr int CHUNK = 16384;  // pixels of a plane that a block computes

// Calls body<E>(pixel) for this thread's pixels of [begin, end). `base` is the plane's address. Where `wide`, E is WIDE<T>
// between the first and the last address that 16 divides. Elsewhere E is 1.
template <class T, class Body>
__device__ __forceinline__ void for_pixels(const T* base, int begin, int end, bool wide, const Body& body) {
  constexpr int E = WIDE<T>;
  int middle = begin, last = begin;
  if (wide) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(base + begin) / sizeof(T) % E);
    middle = min(end, begin + (past ? E - past : 0));
    last = middle + (end - middle) / E * E;
    for (int i = middle + static_cast<int>(threadIdx.x) * E; i < last; i += THREADS * E) body.template operator()<E>(i);
  }
  for (int i = begin + static_cast<int>(threadIdx.x); i < middle; i += THREADS) body.template operator()<1>(i);
  for (int i = last + static_cast<int>(threadIdx.x); i < end; i += THREADS) body.template operator()<1>(i);
}

template <class T>
__global__ void __launch_bounds__(THREADS) planes_forward(const Forward<T> op) {
  const int area = op.height * op.width, chunks = (area + CHUNK - 1) / CHUNK;
  const int64_t jobs = op.images * op.channels * chunks;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t plane = job / chunks, channel = plane % op.channels;
    const int begin = static_cast<int>(job % chunks) * CHUNK, end = min(area, begin + CHUNK);
    const float of_x = widen(op.weight[2 * channel]), of_prior = widen(op.weight[2 * channel + 1]);
    const float bias = widen(op.bias[channel]);
    const T *x = op.x + plane * area, *prior = op.prior + plane * op.prior_height * op.prior_width;
    T* y = op.y + plane * area;
    for_pixels(x, begin, end, op.wide, [&]<int E>(int i) {
      float a[E], b[E];
      load(x + i, a);
      if (op.resized) {
#pragma unroll
        for (int e = 0; e < E; e++) {
          float one[1];
          load_resized(prior, (i + e) / op.width, (i + e) % op.width, op, 1, one);
          b[e] = one[0];
        }
      } else {
        load(prior + i, b);
      }
#pragma unroll
      for (int e = 0; e < E; e++) a[e] = blend(a[e], b[e], sigmoid(bias + of_x * a[e] + of_prior * b[e]));
      store(y + i, a);
    });
  }
}

// Sums values over the threads of a block that share threadIdx.x % GROUP, in a fixed order. The first GROUP threads get the
// sums.
template <int COUNT, int GROUP>
__device__ __forceinline__ void sum_block(float (&values)[COUNT]) {
  __shared__ float of_warps[THREADS / 32][COUNT][GROUP];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int t = 0; t < COUNT; t++) {
#pragma unroll
    for (int offset = 16; offset >= GROUP; offset /= 2) values[t] += __shfl_xor_sync(0xffffffff, values[t], offset);
  }
  __syncthreads();  // of_warps has been read
  if (lane < GROUP) {
#pragma unroll
    for (int t = 0; t < COUNT; t++) of_warps[warp][t][lane] = values[t];
  }
  __syncthreads();
  if (threadIdx.x < GROUP) {
#pragma unroll
    for (int t = 0; t < COUNT; t++) {
      values[t] = 0;
      for (int w = 0; w < THREADS / 32; w++) values[t] += of_warps[w][t][lane];
    }
  }
}

// One element of the 1x1 backward. Replaces x and prior by their gradients. Adds to the gradients of the taps and the bias.
__device__ __forceinline__ void pixel_backward(
    float dy, float& x, float& prior, float of_x, float of_prior, float bias, float (&sums)[3]) {
  const float gate = sigmoid(bias + of_x * x + of_prior * prior), dz = gate_gradient(dy, x, prior, gate);
  sums[0] += dz * x;
  sums[1] += dz * prior;
  sums[2] += dz;
  x = dy * (1.0f - gate) + of_x * dz;
  prior = dy * gate + of_prior * dz;
}

template <class T>
__global__ void __launch_bounds__(THREADS) planes_backward(const Backward<T> op) {
  const int area = op.height * op.width, chunks = (area + CHUNK - 1) / CHUNK;
  const int64_t jobs = op.images * op.channels * chunks;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t plane = job / chunks, channel = plane % op.channels;
    const int begin = static_cast<int>(job % chunks) * CHUNK, end = min(area, begin + CHUNK);
    const float of_x = widen(op.weight[2 * channel]), of_prior = widen(op.weight[2 * channel + 1]);
    const float bias = widen(op.bias[channel]);
    const int64_t base = plane * area;
    float sums[3] = {};
    for_pixels(op.x + base, begin, end, op.wide, [&]<int E>(int i) {
      float dy[E], x[E], prior[E];
      load(op.dy + base + i, dy);
      load(op.x + base + i, x);
      load(op.prior + base + i, prior);
#pragma unroll
      for (int e = 0; e < E; e++) pixel_backward(dy[e], x[e], prior[e], of_x, of_prior, bias, sums);
      store(op.dx + base + i, x);
      store(op.dprior + base + i, prior);
    });
    sum_block<3, 1>(sums);
    const int64_t part = plane / op.channels * chunks + job % chunks;
    if (threadIdx.x == 0) {
      for (int t = 0; t < 3; t++) op.partial[(part * 3 + t) * op.channels + channel] = sums[t];
    }
  }
}

// -- 1x1, channels_last ------------------------------------------------------------------------------------------------

constexpr int PIXELS = 8;     // pixels of a thread
constexpr int PACKS = 32;     // packs of channels of a block
constexpr int STRETCH = 256;  // pixels over which a block of the backward sums

template <int E, class T>
__device__ __forceinline__ void load_taps(
    const T* weight, const T* bias, int64_t channel, float (&of_x)[E], float (&of_prior)[E], float (&to_bias)[E]) {
  float both[2 * E];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float some[E];
    load(weight + 2 * channel + half * E, some);
#pragma unroll
    for (int e = 0; e < E; e++) both[half * E + e] = some[e];
  }
#pragma unroll
  for (int e = 0; e < E; e++) of_x[e] = both[2 * e], of_prior[e] = both[2 * e + 1];
  load(bias + channel, to_bias);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) rows_forward(const Forward<T> op) {
  for_width<T>(op.wide, [&]<int E>() {
    const int area = op.height * op.width;
    const int64_t packs = op.channels / E, pixels = op.images * area, groups = (pixels + PIXELS - 1) / PIXELS;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; i < groups * packs;
         i += gridDim.x * static_cast<int64_t>(THREADS)) {
      const int64_t channel = i % packs * E;
      float of_x[E], of_prior[E], bias[E];
      load_taps(op.weight, op.bias, channel, of_x, of_prior, bias);
      const int64_t first = i / packs * PIXELS, end = min(pixels, first + PIXELS);
#pragma unroll 4
      for (int64_t pixel = first; pixel < end; pixel++) {
        float a[E], b[E];
        load(op.x + pixel * op.channels + channel, a);
        if (op.resized) {
          const int place = static_cast<int>(pixel % area);
          const T* image = op.prior + pixel / area * op.prior_height * op.prior_width * op.channels + channel;
          load_resized(image, place / op.width, place % op.width, op, op.channels, b);
        } else {
          load(op.prior + pixel * op.channels + channel, b);
        }
#pragma unroll
        for (int e = 0; e < E; e++) a[e] = blend(a[e], b[e], sigmoid(bias[e] + of_x[e] * a[e] + of_prior[e] * b[e]));
        store(op.y + pixel * op.channels + channel, a);
      }
    }
  });
}

template <class T>
__global__ void __launch_bounds__(THREADS) rows_backward(const Backward<T> op) {
  constexpr int LANES = THREADS / PACKS;
  __shared__ float of_lanes[LANES][PACKS];
  for_width<T>(op.wide, [&]<int E>() {
    const int64_t packs = op.channels / E, across = (packs + PACKS - 1) / PACKS;
    const int64_t pixels = op.images * op.height * op.width, parts = (pixels + STRETCH - 1) / STRETCH;
    const int pack = threadIdx.x % PACKS, lane = threadIdx.x / PACKS;
    for (int64_t job = blockIdx.x; job < parts * across; job += gridDim.x) {
      const int64_t part = job / across, channel = (job % across * PACKS + pack) * E;
      const bool exists = channel < op.channels;
      float sums[E][3] = {};
      if (exists) {
        float of_x[E], of_prior[E], bias[E];
        load_taps(op.weight, op.bias, channel, of_x, of_prior, bias);
        const int64_t end = min(pixels, (part + 1) * STRETCH);
        for (int64_t pixel = part * STRETCH + lane; pixel < end; pixel += LANES) {
          const int64_t at = pixel * op.channels + channel;
          float dy[E], x[E], prior[E];
          load(op.dy + at, dy);
          load(op.x + at, x);
          load(op.prior + at, prior);
#pragma unroll
          for (int e = 0; e < E; e++) pixel_backward(dy[e], x[e], prior[e], of_x[e], of_prior[e], bias[e], sums[e]);
          store(op.dx + at, x);
          store(op.dprior + at, prior);
        }
      }
#pragma unroll
      for (int e = 0; e < E; e++) {
#pragma unroll
        for (int t = 0; t < 3; t++) {
          __syncthreads();
          of_lanes[lane][pack] = sums[e][t];
          __syncthreads();
          if (lane == 0 && exists) {
            float total = 0;
            for (int l = 0; l < LANES; l++) total += of_lanes[l][pack];
            op.partial[(part * 3 + t) * op.channels + channel + e] = total;
          }
        }
      }
    }
  });
}

// -- 3x3 ---------------------------------------------------------------------------------------------------------------

// What a block computes: HEIGHT x WIDTH pixels of CHANNELS channels. In shared memory channels vary fastest.
template <bool LAST>
struct Tile {
  static constexpr int HEIGHT = LAST ? 8 : 16;
  static constexpr int WIDTH = LAST ? 8 : 64;
  static constexpr int CHANNELS = LAST ? 16 : 1;

  // The number of elements with `halo` more pixels on each side.
  static __host__ __device__ constexpr int size(int halo) {
    return (HEIGHT + 2 * halo) * (WIDTH + 2 * halo) * CHANNELS;
  }
  static __device__ __forceinline__ int stride(int halo) {
    return (WIDTH + 2 * halo) * CHANNELS;
  }

  int64_t image;
  int64_t channel;  // the first
  int top;
  int left;
  int64_t part;

  static __host__ __device__ int64_t parts(int height, int width) {
    return static_cast<int64_t>((height + HEIGHT - 1) / HEIGHT) * ((width + WIDTH - 1) / WIDTH);
  }
  static __host__ __device__ int64_t jobs(int64_t images, int64_t channels, int height, int width) {
    return images * parts(height, width) * ((channels + CHANNELS - 1) / CHANNELS);
  }
  __device__ Tile(int64_t job, int64_t channels, int height, int width) {
    const int64_t groups = (channels + CHANNELS - 1) / CHANNELS, tiles = parts(height, width);
    const int across = (width + WIDTH - 1) / WIDTH;
    // Consecutive jobs are neighbours in memory: groups of channels in channels_last, tiles of a plane otherwise.
    const int64_t group = LAST ? job % groups : job / tiles % groups;
    const int tile = static_cast<int>(LAST ? job / groups % tiles : job % tiles);
    image = job / groups / tiles;
    channel = group * CHANNELS;
    top = tile / across * HEIGHT;
    left = tile % across * WIDTH;
    part = image * tiles + tile;
  }
};

// The offset of element (row, column) of a channel in an image.
template <bool LAST>
__device__ __forceinline__ int64_t position(int64_t channels, int64_t channel, int height, int width, int row, int column) {
  const int64_t pixel = static_cast<int64_t>(row) * width + column;
  return LAST ? pixel * channels + channel : channel * height * width + pixel;
}

// Stages a tile of an image with its halo, zero outside of the image. read<E>(row, column, channel, to) loads E elements.
template <class T, int HALO, bool LAST, class Read>
__device__ __forceinline__ void stage(
    const Tile<LAST>& tile, int64_t channels, int height, int width, bool wide, float* to, const Read& read) {
  using Shape = Tile<LAST>;
  constexpr int ROWS = Shape::HEIGHT + 2 * HALO, COLUMNS = Shape::WIDTH + 2 * HALO;
  const auto put = [&]<int COUNT>(int row, int column, int channel) {
    float some[COUNT] = {};
    const int r = tile.top + row - HALO, c = tile.left + column - HALO;
    const bool inside = r >= 0 && r < height && c >= 0 && c < width && tile.channel + channel < channels;
    if (inside) read.template operator()<COUNT>(r, c, tile.channel + channel, some);
#pragma unroll
    for (int e = 0; e < COUNT; e++) to[(row * COLUMNS + column) * Shape::CHANNELS + channel + e] = some[e];
  };
  for_width<T>(wide, [&]<int E>() {
    if constexpr (LAST) {
      constexpr int PACKED = Shape::CHANNELS / E;
      for (int i = threadIdx.x; i < ROWS * COLUMNS * PACKED; i += THREADS) {
        put.template operator()<E>(i / PACKED / COLUMNS, i / PACKED % COLUMNS, i % PACKED * E);
      }
    } else {
      constexpr int PACKED = Shape::WIDTH / E;
      for (int i = threadIdx.x; i < ROWS * PACKED; i += THREADS) {
        put.template operator()<E>(i / PACKED, HALO + i % PACKED * E, 0);
      }
    }
  });
  if constexpr (!LAST) {
    for (int i = threadIdx.x; i < ROWS * 2 * HALO; i += THREADS) {
      const int side = i % (2 * HALO);
      put.template operator()<1>(i / (2 * HALO), side < HALO ? side : side + Shape::WIDTH, 0);
    }
  }
}

// Stores a staged tile without a halo.
template <bool LAST, class T>
__device__ __forceinline__ void unstage(
    const Tile<LAST>& tile, int64_t channels, int height, int width, bool wide, const float* from, T* image) {
  using Shape = Tile<LAST>;
  for_width<T>(wide, [&]<int E>() {
    for (int i = threadIdx.x; i < Shape::size(0) / E; i += THREADS) {
      const int pixel = i * E / Shape::CHANNELS;
      const int row = tile.top + pixel / Shape::WIDTH, column = tile.left + pixel % Shape::WIDTH;
      const int64_t channel = tile.channel + i * E % Shape::CHANNELS;
      if (row >= height || column >= width || channel >= channels) continue;
      float some[E];
#pragma unroll
      for (int e = 0; e < E; e++) some[e] = from[i * E + e];
      store(image + position<LAST>(channels, channel, height, width, row, column), some);
    }
  });
}

// Loads the taps of a channel: 9 of x, then 9 of the prior. Zero beyond the last channel.
template <class T>
__device__ __forceinline__ void load_kernel(const T* weight, int64_t channel, int64_t channels, float (&taps)[18]) {
#pragma unroll
  for (int t = 0; t < 18; t++) taps[t] = channel < channels ? widen(weight[channel * 18 + t]) : 0.0f;
}

template <bool LAST>
__device__ __forceinline__ float logit_at(
    const float* x, const float* prior, int stride, const float (&taps)[18], float bias) {
  constexpr int STEP = Tile<LAST>::CHANNELS;
  const auto of_x = [&](int v, int h) { return x[v * stride + h * STEP]; };
  const auto of_prior = [&](int v, int h) { return prior[v * stride + h * STEP]; };
  const float z = convolve<3>(bias, 1, [&](int t) { return taps[t]; }, of_x);
  return convolve<3>(z, 1, [&](int t) { return taps[9 + t]; }, of_prior);
}

template <class T, bool LAST>
__global__ void __launch_bounds__(THREADS, 2) window_forward(const Forward<T> op) {
  using Shape = Tile<LAST>;
  __shared__ float x[Shape::size(1)], prior[Shape::size(1)], y[Shape::size(0)];
  const int64_t area = static_cast<int64_t>(op.height) * op.width;
  const int64_t from = static_cast<int64_t>(op.prior_height) * op.prior_width;
  const int64_t jobs = Shape::jobs(op.images, op.channels, op.height, op.width);
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const Shape tile(job, op.channels, op.height, op.width);
    const int64_t image = tile.image * op.channels * area;
    __syncthreads();  // the previous tile has been stored
    const auto read_x = [&]<int COUNT>(int r, int c, int64_t channel, float (&to)[COUNT]) {
      load(op.x + image + position<LAST>(op.channels, channel, op.height, op.width, r, c), to);
    };
    const auto read_prior = [&]<int COUNT>(int r, int c, int64_t channel, float (&to)[COUNT]) {
      if (!op.resized) {
        load(op.prior + image + position<LAST>(op.channels, channel, op.height, op.width, r, c), to);
      } else if constexpr (LAST) {
        load_resized(op.prior + tile.image * op.channels * from + channel, r, c, op, op.channels, to);
      } else {
#pragma unroll
        for (int e = 0; e < COUNT; e++) {
          float one[1];
          load_resized(op.prior + (tile.image * op.channels + channel) * from, r, c + e, op, 1, one);
          to[e] = one[0];
        }
      }
    };
    stage<T, 1>(tile, op.channels, op.height, op.width, op.wide, x, read_x);
    stage<T, 1>(tile, op.channels, op.height, op.width, op.wide, prior, read_prior);
    __syncthreads();
    const int own = threadIdx.x % Shape::CHANNELS;
    float taps[18];
    load_kernel(op.weight, tile.channel + own, op.channels, taps);
    const float bias = tile.channel + own < op.channels ? widen(op.bias[tile.channel + own]) : 0.0f;
    for (int i = threadIdx.x; i < Shape::size(0); i += THREADS) {
      const int pixel = i / Shape::CHANNELS, row = pixel / Shape::WIDTH, column = pixel % Shape::WIDTH;
      const int at = (row + 1) * Shape::stride(1) + (column + 1) * Shape::CHANNELS + own;
      y[i] = blend(x[at], prior[at], sigmoid(logit_at<LAST>(x + at, prior + at, Shape::stride(1), taps, bias)));
    }
    __syncthreads();
    unstage(tile, op.channels, op.height, op.width, op.wide, y, op.y + image);
  }
}

template <class T, bool LAST>
__global__ void __launch_bounds__(THREADS, 2) window_backward(const Backward<T> op) {
  using Shape = Tile<LAST>;
  __shared__ float x[Shape::size(2)], prior[Shape::size(2)];
  __shared__ float gate[Shape::size(1)];  // dy, then the gate, then dx
  __shared__ float dz[Shape::size(1)];
  const int64_t area = static_cast<int64_t>(op.height) * op.width;
  const int64_t jobs = Shape::jobs(op.images, op.channels, op.height, op.width);
  const int own = threadIdx.x % Shape::CHANNELS;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const Shape tile(job, op.channels, op.height, op.width);
    const int64_t image = tile.image * op.channels * area;
    const auto reader = [&](const T* from) {
      return [&, from]<int COUNT>(int r, int c, int64_t channel, float (&to)[COUNT]) {
        load(from + image + position<LAST>(op.channels, channel, op.height, op.width, r, c), to);
      };
    };
    __syncthreads();  // the previous tile has been stored
    stage<T, 2>(tile, op.channels, op.height, op.width, op.wide, x, reader(op.x));
    stage<T, 2>(tile, op.channels, op.height, op.width, op.wide, prior, reader(op.prior));
    stage<T, 1>(tile, op.channels, op.height, op.width, op.wide, gate, reader(op.dy));
    __syncthreads();
    const int64_t channel = tile.channel + own;
    float taps[18];
    load_kernel(op.weight, channel, op.channels, taps);
    const float bias = channel < op.channels ? widen(op.bias[channel]) : 0.0f;
    float direct[(Shape::size(0) + THREADS - 1) / THREADS];  // dy of this thread's pixels
#pragma unroll
    for (int n = 0; n < Shape::size(0) / THREADS; n++) {
      const int pixel = (threadIdx.x + n * THREADS) / Shape::CHANNELS;
      const int row = pixel / Shape::WIDTH, column = pixel % Shape::WIDTH;
      direct[n] = gate[(row + 1) * Shape::stride(1) + (column + 1) * Shape::CHANNELS + own];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Shape::size(1); i += THREADS) {
      const int pixel = i / Shape::CHANNELS, row = pixel / (Shape::WIDTH + 2), column = pixel % (Shape::WIDTH + 2);
      const int at = (row + 1) * Shape::stride(2) + (column + 1) * Shape::CHANNELS + own;
      const float g = sigmoid(logit_at<LAST>(x + at, prior + at, Shape::stride(2), taps, bias));
      const int r = tile.top + row - 1, c = tile.left + column - 1;
      const bool inside = r >= 0 && r < op.height && c >= 0 && c < op.width;
      dz[i] = inside ? gate_gradient(gate[i], x[at], prior[at], g) : 0.0f;
      gate[i] = g;
    }
    __syncthreads();
    float sums[19] = {};
    float dx[(Shape::size(0) + THREADS - 1) / THREADS], dprior[(Shape::size(0) + THREADS - 1) / THREADS];
#pragma unroll
    for (int n = 0; n < Shape::size(0) / THREADS; n++) {
      const int pixel = (threadIdx.x + n * THREADS) / Shape::CHANNELS;
      const int row = pixel / Shape::WIDTH, column = pixel % Shape::WIDTH;
      const int at = (row + 1) * Shape::stride(1) + (column + 1) * Shape::CHANNELS + own;
      const int wide = (row + 2) * Shape::stride(2) + (column + 2) * Shape::CHANNELS + own;
      const auto read = [&](int v, int h) { return dz[at + v * Shape::stride(1) + h * Shape::CHANNELS]; };
      const float to_prior = direct[n] * gate[at];
      dx[n] = convolve<3>(direct[n] - to_prior, -1, [&](int t) { return taps[t]; }, read);
      dprior[n] = convolve<3>(to_prior, -1, [&](int t) { return taps[9 + t]; }, read);
#pragma unroll
      for (int t = 0; t < 9; t++) {
        const int offset = wide + (t / 3 - 1) * Shape::stride(2) + (t % 3 - 1) * Shape::CHANNELS;
        sums[t] += dz[at] * x[offset];
        sums[9 + t] += dz[at] * prior[offset];
      }
      sums[18] += dz[at];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < Shape::size(0) / THREADS; n++) {
      gate[threadIdx.x + n * THREADS] = dx[n];
      dz[threadIdx.x + n * THREADS] = dprior[n];
    }
    sum_block<19, Shape::CHANNELS>(sums);  // synchronises the block, so gate and dz are complete
    unstage(tile, op.channels, op.height, op.width, op.wide, gate, op.dx + image);
    unstage(tile, op.channels, op.height, op.width, op.wide, dz, op.dprior + image);
    if (threadIdx.x < Shape::CHANNELS && channel < op.channels) {
      for (int t = 0; t < 19; t++) op.partial[(tile.part * 19 + t) * op.channels + channel] = sums[t];
    }
  }
}

constexpr int COLUMNS = 8;  // neighbouring sums of a block: 32 bytes of each part

// Sums partial [parts, sums, channels] over the parts, to dweight [channels, sums - 1] and dbias [channels]. A thread sums
// every 32nd part; one thread then sums those sums. The order is fixed, and the loads of a sum are spread over 32 threads.
__global__ void __launch_bounds__(THREADS)
    add_parts(const float* partial, int64_t parts, int sums, int64_t channels, float* dweight, float* dbias) {
  constexpr int LANES = THREADS / COLUMNS;
  __shared__ float of_lanes[LANES][COLUMNS];
  const int column = threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;
  const int64_t count = sums * channels;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(COLUMNS); first < count;
       first += gridDim.x * static_cast<int64_t>(COLUMNS)) {
    const int64_t i = first + column;
    float total = 0;
    if (i < count) {
#pragma unroll 8
      for (int64_t part = lane; part < parts; part += LANES) total += partial[part * count + i];
    }
    __syncthreads();  // the previous sums have been read
    of_lanes[lane][column] = total;
    __syncthreads();
    if (lane == 0 && i < count) {
      total = 0;
      for (int l = 0; l < LANES; l++) total += of_lanes[l][column];
      const int64_t t = i / channels, channel = i % channels;
      (t < sums - 1 ? dweight[channel * (sums - 1) + t] : dbias[channel]) = total;
    }
  }
}

}  // namespace r2r::cuda
