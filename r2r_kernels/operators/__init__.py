"""The operators, one file each; importing this package registers all of them as `torch.ops.r2r.<name>`.

A file holds the choice of the implementation, the shapes for tracing, the plain backward, autograd and the FLOPs of its
operator. The names are `forward` and `backward`.
"""

from r2r_kernels.operators import (
    bank_retrieve,
    depthwise_gate,
    gated_conv,
    gated_feed_forward,
    layer_norm_2d,
    local_mean_2d,
    naf_block,
    simple_gate,
    slot_conv,
    upsample_add,
)

__all__ = [
    "bank_retrieve",
    "depthwise_gate",
    "gated_conv",
    "gated_feed_forward",
    "layer_norm_2d",
    "local_mean_2d",
    "naf_block",
    "simple_gate",
    "slot_conv",
    "upsample_add",
]
