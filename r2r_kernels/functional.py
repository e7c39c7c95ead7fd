"""The fused operators: names, signatures and answers of `r2r_kernels.reference`."""

from r2r_kernels.reference import (
    NAFBlockParams,
    bank_retrieve,
    depthwise_gate,
    gated_conv,
    layer_norm_2d,
    naf_block,
    simple_gate,
    slot_conv,
    task_mask,
)

__all__ = [
    "NAFBlockParams",
    "bank_retrieve",
    "depthwise_gate",
    "gated_conv",
    "layer_norm_2d",
    "naf_block",
    "simple_gate",
    "slot_conv",
    "task_mask",
]
