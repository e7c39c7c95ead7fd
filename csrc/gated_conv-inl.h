// The kernels of gated_conv. gated_conv_element-inl.h has the arithmetic of an element, gated_conv_planes-inl.h (NCHW) and
// gated_conv_rows-inl.h (channels_last) have the walks over an image, gated_conv_backward-inl.h those of the gradients.
#include "gated_conv_backward-inl.h"
#include "gated_conv_planes-inl.h"
#include "gated_conv_rows-inl.h"

namespace r2r::R2R_ISA {

template <class T>
constexpr GatedConvKernels<T> gated_conv_kernels{
    .plane = gated_conv_plane<T>,
    .rows = gated_conv_rows<T>,
    .plane_backward = gated_conv_plane_backward<T>,
    .rows_backward = gated_conv_rows_backward<T>,
};
R2R_DEFINE_KERNELS(GatedConvKernels, gated_conv_kernels)

}  // namespace r2r::R2R_ISA
