// Gated convolution on NVIDIA GPUs: which kernel of gated_conv.cuh is launched, on how many blocks.
#include "gated_conv.cuh"
#include "common/tensors.h"

namespace r2r::cuda {

namespace {

using torch::headeronly::ScalarType;

// Calls body with a null pointer whose type names that of the elements.
template <class Body>
void for_elements(const Tensor& tensor, const Body& body) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) {
    body(static_cast<float*>(nullptr));
  } else if (dtype == ScalarType::Half) {
    body(static_cast<__half*>(nullptr));
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "float32, bfloat16 or float16 only");
    body(static_cast<__nv_bfloat16*>(nullptr));
  }
}

bool on_16_bytes(std::initializer_list<const void*> pointers) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return std::all_of(pointers.begin(), pointers.end(), aligned);
}

int64_t over(int64_t count, int64_t each) {
  return (count + each - 1) / each;
}

// Whether a kernel can load and store 16 bytes at a time. The 1x1 kernel for planes takes any width, as it handles the ends
// of a plane apart.
template <class T>
bool wide(std::initializer_list<const void*> pointers, int64_t channels, int width, bool channels_last, int64_t kernel) {
  return on_16_bytes(pointers) && (channels_last ? channels % WIDE<T> == 0 : kernel == 1 || width % WIDE<T> == 0);
}

void check_size(const Tensor& x) {
  STD_TORCH_CHECK(x.size(2) * x.size(3) <= INT_MAX - CHUNK, "an image must have fewer than 2^31 pixels");
}

}  // namespace

void gated_conv(Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, Tensor y) {
  check_size(x);
  check_size(prior);
  const Stream stream(x);
  for_elements(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Forward<T> op{
        data<const T>(x),
        data<const T>(prior),
        data<const T>(weight),
        data<const T>(bias),
        data<T>(y),
        x.size(0),
        x.size(1),
        static_cast<int>(x.size(2)),
        static_cast<int>(x.size(3)),
        static_cast<int>(prior.size(2)),
        static_cast<int>(prior.size(3)),
        false,
        false};
    op.resized = op.prior_height != op.height || op.prior_width != op.width;
    op.wide = wide<T>({op.x, op.prior, op.weight, op.bias, op.y}, op.channels, op.width, channels_last, weight.size(2));
    const int64_t area = static_cast<int64_t>(op.height) * op.width;
    if (weight.size(2) == 3 && channels_last) {
      stream.launch(window_forward<T, true>, Tile<true>::jobs(op.images, op.channels, op.height, op.width), op);
    } else if (weight.size(2) == 3) {
      stream.launch(window_forward<T, false>, Tile<false>::jobs(op.images, op.channels, op.height, op.width), op);
    } else if (channels_last) {
      const int64_t packs = op.channels / (op.wide ? WIDE<T> : 1);
      stream.launch(rows_forward<T>, over(over(op.images * area, PIXELS) * packs, THREADS), op);
    } else {
      stream.launch(planes_forward<T>, op.images * op.channels * over(area, CHUNK), op);
    }
  });
}

void gated_conv_backward(
    Tensor dy, Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, Tensor dx, Tensor dprior,
    Tensor dweight, Tensor dbias) {
  check_size(x);
  const Stream stream(x);
  for_elements(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Backward<T> op{
        data<const T>(dy),
        data<const T>(x),
        data<const T>(prior),
        data<const T>(weight),
        data<const T>(bias),
        data<T>(dx),
        data<T>(dprior),
        nullptr,
        x.size(0),
        x.size(1),
        static_cast<int>(x.size(2)),
        static_cast<int>(x.size(3)),
        false};
    const int64_t area = static_cast<int64_t>(op.height) * op.width, kernel_size = weight.size(2);
    const int sums = static_cast<int>(2 * kernel_size * kernel_size + 1);
    int64_t parts = op.images * over(area, CHUNK);
    if (kernel_size == 1 && channels_last) parts = over(op.images * area, STRETCH);
    if (kernel_size == 3) {
      const auto tiles = channels_last ? Tile<true>::parts : Tile<false>::parts;
      parts = op.images * tiles(op.height, op.width);
    }
    const int64_t shape[] = {parts, sums, op.channels};
    const Tensor partial = torch::stable::new_empty(x, shape, ScalarType::Float);
    op.partial = data<float>(partial);
    op.wide = wide<T>(
        {op.dy, op.x, op.prior, op.weight, op.bias, op.dx, op.dprior}, op.channels, op.width, channels_last, kernel_size);
    if (kernel_size == 3 && channels_last) {
      stream.launch(window_backward<T, true>, Tile<true>::jobs(op.images, op.channels, op.height, op.width), op);
    } else if (kernel_size == 3) {
      stream.launch(window_backward<T, false>, Tile<false>::jobs(op.images, op.channels, op.height, op.width), op);
    } else if (channels_last) {
      stream.launch(rows_backward<T>, parts * over(op.channels / (op.wide ? WIDE<T> : 1), PACKS), op);
    } else {
      stream.launch(planes_backward<T>, parts * op.channels, op);
    }
    stream.launch(
        add_parts, over(sums * op.channels, COLUMNS), op.partial, parts, sums, op.channels, data<float>(dweight),
        data<float>(dbias));
  });
}

}  // namespace r2r::cuda

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CUDA, m) {
  m.impl("gated_conv", TORCH_BOX(&r2r::cuda::gated_conv));
  m.impl("gated_conv_backward", TORCH_BOX(&r2r::cuda::gated_conv_backward));
}
