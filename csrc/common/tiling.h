// How work on images is cut: into panels for vectors, into tiles for caches, into ranges for threads.
//
// What is static here (in a class: inline) is compiled for each instruction set. A static function is private to its file.
// Of an inline one the linker keeps the first copy, so it must see the objects of the least capable instruction set first.
#pragma once

#include <cstdint>

namespace r2r {

// A panel is PANEL neighbouring pixels of every channel, [channels][PANEL] floats. A vector then holds pixels: statistics
// over channels need no shuffles, and 1x1 convolutions read weights as PyTorch keeps them.
constexpr int64_t PANEL = 32;
constexpr int64_t LANES = 16;  // values of the widest vector: room for sums that are not yet summed across

static inline int64_t panels(int64_t pixels) {
  return (pixels + PANEL - 1) / PANEL;
}

// An image batch [N, channels, pixels], or [N, pixels, channels] where channels_last.
template <class T>
struct Images {
  T* data;
  int64_t channels;
  int64_t pixels;
  bool channels_last;

  T* image(int64_t n) const {
    return data + n * channels * pixels;
  }
};

// The part of an image that one task of a 3x3 convolution makes.
struct Tile {
  int64_t top;
  int64_t bottom;
  int64_t left;
  int64_t right;
};

// An image as `down` x `across` tiles of about one size, row by row.
struct Tiling {
  int64_t height;
  int64_t width;
  int64_t down;
  int64_t across;

  int64_t count() const {
    return down * across;
  }
  Tile tile(int64_t i) const {
    const int64_t row = i / across, column = i % across;
    return {height * row / down, height * (row + 1) / down, width * column / across, width * (column + 1) / across};
  }
};

// A batch has `each` units (such as panels) an image. Calls body(n, first, last) for each image n that has some of the units
// [begin, end) of the batch; these are its own units [first, last).
template <class Body>
static inline void for_images(int64_t begin, int64_t end, int64_t each, const Body& body) {
  while (begin < end) {
    const int64_t n = begin / each, next = (n + 1) * each, stop = end < next ? end : next;
    body(n, begin - n * each, stop - n * each);
    begin = stop;
  }
}

}  // namespace r2r
