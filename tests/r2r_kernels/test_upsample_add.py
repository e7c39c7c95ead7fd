"""upsample_add against its reference; see rule.py. Shapes are those of the result's half: [N, C, h, w] stands for x
[N, 2C, h, w] and a result of [N, C, 2h, 2w]."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import r2r_kernels.functional as F
from tests.r2r_kernels.rule import FORMATS, SHAPES, assert_follows, assert_same_bits, memory_format


def operator(ops: ModuleType, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    x, weight, skip = tensors
    return (ops.upsample_add(x, weight, skip),)


def inputs(shape: tuple[int, int, int, int]) -> list[Tensor]:
    n, c, h, w = shape
    return [
        torch.randn(n, 2 * c, h, w),
        torch.randn(4 * c, 2 * c, 1, 1) / (2 * c) ** 0.5,
        torch.randn(n, c, 2 * h, 2 * w),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, weight, skip = inputs(shape)
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x), weight, FORMATS[name](skip)], dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_answers_in_the_memory_format_of_x(name: str, other: str) -> None:
    x, weight, skip = inputs((2, 8, 6, 5))
    x, skip = FORMATS[name](x), FORMATS[other](skip)
    assert_follows(operator, [x, weight, skip], torch.float32)
    assert F.upsample_add(x, weight, skip).is_contiguous(memory_format=memory_format(x))


def test_two_runs_give_the_same_bits() -> None:
    assert_same_bits(operator, inputs((2, 32, 20, 35)))


def test_an_empty_batch() -> None:
    """PyTorch's pixel_shuffle has no gradient of one."""
    x, weight, skip = (t.requires_grad_() for t in inputs((0, 4, 5, 6)))
    y = F.upsample_add(x, weight, skip)
    assert y.shape == skip.shape
    gradients = torch.autograd.grad(y, (x, weight, skip), torch.ones_like(y))
    assert [g.shape for g in gradients] == [x.shape, weight.shape, skip.shape]
    assert not gradients[1].any()


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 1, 9), (1, 4, 9, 1), (1, 4, 3, 150)])
def test_small_images(shape: tuple[int, int, int, int]) -> None:
    x, weight, skip = inputs(shape)
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x), weight, FORMATS[name](skip)], torch.float32)


def test_large_values_of_half_precision() -> None:
    tensors = [200 * t if t.dim() == 4 and t.shape[-1] > 1 else t for t in inputs((1, 16, 5, 7))]
    assert all(t.isfinite().all() for t in operator(F, [t.half() for t in tensors]))
    assert_follows(operator, tensors, torch.float16)


def test_opcheck() -> None:
    for name in ("contiguous", "channels_last"):
        x, weight, skip = inputs((2, 3, 5, 4))
        x = FORMATS[name](x)
        opcheck(torch.ops.r2r.upsample_add.default, tuple(t.requires_grad_() for t in (x, weight, skip)))
        opcheck(torch.ops.r2r.upsample_add_backward.default, (torch.randn(2, 3, 10, 8), x.detach(), weight.detach()))


def test_bad_input() -> None:
    x, weight, skip = inputs((1, 4, 3, 5))
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
