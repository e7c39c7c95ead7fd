"""What upsample_add does beside the contract; see test_contract.py."""

from __future__ import annotations

import pytest
import torch

import r2r_kernels.functional as F
from tests.r2r_kernels.operators import CASES
from tests.r2r_kernels.rule import assert_follows

operator, inputs = CASES["upsample_add"].call, CASES["upsample_add"].inputs


def test_an_empty_batch() -> None:
    """PyTorch's pixel_shuffle has no gradient of one."""
    x, skip, weight = (t.requires_grad_() for t in inputs(0, 4, 5, 6))
    y = F.upsample_add(x, weight, skip)
    assert y.shape == skip.shape
    gradients = torch.autograd.grad(y, (x, weight, skip), torch.ones_like(y))
    assert [g.shape for g in gradients] == [x.shape, weight.shape, skip.shape]
    assert not gradients[1].any()


def test_large_values_of_half_precision() -> None:
    tensors = [200 * t if t.dim() == 4 and t.shape[-1] > 1 else t for t in inputs(1, 16, 5, 7)]
    assert all(t.isfinite().all() for t in operator(F, [t.half() for t in tensors]))
    assert_follows(operator, tensors, torch.float16)


def test_bad_input() -> None:
    x, skip, weight = inputs(1, 4, 3, 5)
    with pytest.raises(ValueError, match=r"x must have an even number of channels, got \[1, 7, 3, 5\]"):
        F.upsample_add(x[:, :7], weight, skip)
    with pytest.raises(
        ValueError, match=r"weight must be \[16, 8, 1, 1\] to fit x \[1, 8, 3, 5\], got \[16, 8, 3, 3\]"
    ):
        F.upsample_add(x, torch.randn(16, 8, 3, 3), skip)
    with pytest.raises(ValueError, match=r"skip must be \[1, 4, 6, 10\] to fit x \[1, 8, 3, 5\], got \[1, 4, 6, 9\]"):
        F.upsample_add(x, weight, skip[..., :9])
    with pytest.raises(TypeError, match=r"skip must be torch.float32 as x is, got torch.float64"):
        F.upsample_add(x, weight, skip.double())
    with pytest.raises(ValueError, match=r"weight must be on cpu as x is, got meta"):
        F.upsample_add(x, weight.to("meta"), skip)
