// The kernels of one instruction set. The build compiles this file once for each, R2R_ISA its name.
#include "bank_retrieve.h"
#include "depthwise_gate.h"
#include "depthwise_gate_backward.h"
#include "gated_conv.h"
#include "layer_norm_2d.h"
#include "local_attention.h"
#include "local_mean_2d.h"
#include "naf_block.h"
#include "naf_block_backward.h"
#include "simple_gate.h"
#include "slot_conv.h"
#include "upsample_add.h"

namespace r2r::R2R_ISA {

#define R2R_STRING(name) #name
#define R2R_NAME(name) R2R_STRING(name)

template <class T>
void widen_all(const T* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) store_upto(to + i, load_upto(from + i, count - i), count - i);
}

template <class T>
void narrow_all(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += WIDTH) store_upto(to + i, load_upto(from + i, count - i), count - i);
}

template <class T>
constexpr Kernels<T> table{
    R2R_NAME(R2R_ISA),
    MULTIPLIES_PAIRS<T>,
    widen_all<T>,
    narrow_all<T>,
    layer_norm_2d<T>,
    layer_norm_2d_backward<T>,
    multiply<T>,
    multiply_backward<T>,
    depthwise_gate<T>,
    depthwise_gate_channels_last<T>,
    naf_block_first<T>,
    naf_block_attention<T>,
    naf_block_second<T>,
    gated_conv_plane<T>,
    gated_conv_rows<T>,
    gated_conv_plane_backward<T>,
    gated_conv_rows_backward<T>,
    dot_products<T>,
    add_weighted<T>,
    slot_conv<T>,
    slot_conv_backward<T>,
    depthwise_gate_backward<T>,
    naf_block_hidden<T>,
    naf_block_second_backward<T>,
    naf_block_first_backward<T>,
    transpose_matrix<T>,
    local_mean_2d<T>,
    local_attention<T>,
    upsample_add_pack,
    upsample_add<T>,
};

const Kernels<float>& kernels(const float*) {
  return table<float>;
}
const Kernels<bfloat16>& kernels(const bfloat16*) {
  return table<bfloat16>;
}

}  // namespace r2r::R2R_ISA
