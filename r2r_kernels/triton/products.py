"""What the operators that multiply matrices share."""

from __future__ import annotations

import torch
from torch import Tensor


def precision(x: Tensor) -> str:
    """How `tl.dot` multiplies: float32 as float32, unless PyTorch was told that TF32 will do for matrix products.

    It may have been told by this setting, by one above it or by the older `allow_tf32`, which raises where the newer
    ones were used.
    """
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def product(left: Tensor, right: Tensor) -> Tensor:
    """The transpose of left times right, [N, P, A] and [N, P, B] -> float32 [N, A, B]: the gradient of a weight.

    Long sums and a small result: cuBLAS splits the sum over the whole GPU, in the same way in every run.
    """
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left.transpose(1, 2), right, out_dtype=torch.float32)
    return left.float().transpose(1, 2) @ right.float()
