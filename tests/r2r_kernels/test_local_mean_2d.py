"""What local_mean_2d does beside the contract; see test_contract.py."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional
from torch import Tensor

import r2r_kernels.functional as F
from r2r_kernels import reference
from tests.r2r_kernels.operators import SHAPES
from tests.r2r_kernels.rule import FORMATS, Operator, assert_follows

# A pixel; even and odd; larger than the image along one axis, along both
WINDOWS = [(1, 1), (2, 3), (3, 2), (4, 100), (100, 2), (100, 100), (5, 16)]


def operator(window: Sequence[int]) -> Operator:
    def call(ops: ModuleType, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (ops.local_mean_2d(tensors[0], window),)

    return call


def pooled(x: Tensor, window: tuple[int, int]) -> Tensor:
    """The windows inside the image, and those of the border repeated outwards."""
    height, width = x.shape[2:]
    mean = torch.nn.functional.avg_pool2d(x, (min(window[0], height), min(window[1], width)), stride=1)
    down, across = height - mean.shape[2], width - mean.shape[3]
    pads = (across // 2, (across + 1) // 2, down // 2, (down + 1) // 2)
    return torch.nn.functional.pad(mean, pads, mode="replicate")


@pytest.mark.parametrize("window", WINDOWS)
def test_the_reference_pools_as_tlc_does(window: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 7, 19, dtype=torch.float64, requires_grad=True)
    y, wanted = reference.local_mean_2d(x, window), pooled(x, window)
    torch.testing.assert_close(y, wanted)
    upstream = torch.randn_like(y)
    (dx,), (wanted,) = (torch.autograd.grad(out, x, upstream) for out in (y, wanted))
    torch.testing.assert_close(dx, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape)
    for name in ("contiguous", "channels_last"):
        for window in WINDOWS:
            assert_follows(operator(window), [FORMATS[name](x)], dtype)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_strips_meet_and_sums_do_not_drift(name: str) -> None:
    """One plane is cut into strips of rows; a running sum has come a long way from a value of 1e4 at the other end."""
    x = torch.rand(1, 1, 300, 70)
    assert_follows(operator((5, 9)), [FORMATS[name](x)], torch.float32)
    x[0, 0, :9, :9] = 1e4
    far = F.local_mean_2d(FORMATS[name](x), (5, 9))[..., 20:, 20:]
    torch.testing.assert_close(far, pooled(x.double(), (5, 9))[..., 20:, 20:].float(), rtol=1e-6, atol=0)


def test_large_values_of_half_precision() -> None:
    x = 200 * torch.ones(1, 3, 40, 40, dtype=torch.float16)
    assert torch.equal(F.local_mean_2d(x, (30, 30)), x)


def test_bad_input() -> None:
    x = torch.randn(1, 5, 4, 4)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[5, 4, 4\]"):
        F.local_mean_2d(x[0], (3, 3))
    with pytest.raises(TypeError, match=r"x must be of a float dtype, got torch.int64"):
        F.local_mean_2d(x.long(), (3, 3))
    for window in ((0, 3), (3,), (3, 3, 3)):
        with pytest.raises(ValueError, match=r"window must be \(height, width\), both 1 or more, got \("):
            F.local_mean_2d(x, window)
    not_numbers: tuple[Any, ...] = (3, (1.5, 2), (True, 2), None)
    for window in not_numbers:
        with pytest.raises(TypeError, match="window must be a pair of whole numbers, got "):
            F.local_mean_2d(x, window)
