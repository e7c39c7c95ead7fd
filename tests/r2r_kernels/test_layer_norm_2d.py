"""layer_norm_2d against its reference; see rule.py."""

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
    return (ops.layer_norm_2d(tensors[0], tensors[1], tensors[2], 1e-6),)


def inputs(shape: tuple[int, int, int, int]) -> list[Tensor]:
    n, c, h, w = shape
    return [torch.randn(n, c, h, w) * 3 + 1, torch.randn(c), torch.randn(c)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, *rest = inputs(shape)
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x), *rest], dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_answers_in_the_memory_format_of_x(name: str) -> None:
    x, *rest = inputs((2, 8, 6, 5))
    x = FORMATS[name](x)
    assert_follows(operator, [x, *rest], torch.float32)
    y = operator(F, [x, *rest])[0]
    assert y.is_contiguous(memory_format=memory_format(x))


def test_two_runs_give_the_same_bits() -> None:
    assert_same_bits(operator, inputs((2, 32, 40, 70)))


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (1, 4, 1, 1), (1, 4, 1, 9), (1, 4, 9, 1)])
def test_small_and_empty_batches(shape: tuple[int, int, int, int]) -> None:
    assert_follows(operator, inputs(shape), torch.float32)


def test_large_activations_in_half_precision() -> None:
    x, weight, bias = inputs((1, 32, 8, 8))
    for dtype in (torch.float16, torch.bfloat16):
        assert_follows(operator, [x * 200 / x.abs().max(), weight, bias], dtype)


def test_large_mean_does_not_cancel() -> None:
    x, weight, bias = inputs((1, 32, 8, 8))
    assert_follows(operator, [x + 1000, weight, bias], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    for name in ("contiguous", "channels_last"):
        x, weight, bias = (t.to(dtype).requires_grad_() for t in inputs((2, 6, 5, 4)))
        opcheck(torch.ops.r2r.layer_norm_2d.default, (FORMATS[name](x).detach().requires_grad_(), weight, bias, 1e-6))
        y, mean, rstd = torch.ops.r2r.layer_norm_2d(x.detach(), weight.detach(), bias.detach(), 1e-6)
        opcheck(torch.ops.r2r.layer_norm_2d_backward.default, (y, x.detach(), weight.detach(), mean, rstd))


def test_bad_input() -> None:
    x, weight, bias = inputs((2, 6, 5, 4))
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[6, 5, 4\]"):
        F.layer_norm_2d(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \[6\] .* got \[5\]"):
        F.layer_norm_2d(x, weight[:5], bias)
    with pytest.raises(TypeError, match=r"bias must be torch.float32 as x is, got torch.float64"):
        F.layer_norm_2d(x, weight, bias.double())
    with pytest.raises(TypeError, match=r"x must be of a float dtype, got torch.int64"):
        F.layer_norm_2d(x.long(), weight, bias)
    with pytest.raises(ValueError, match=r"weight must be on cpu as x is, got meta"):
        F.layer_norm_2d(x, weight.to("meta"), bias)
    with pytest.raises(TypeError, match=r"x must be a tensor, got list"):
        F.layer_norm_2d(x.tolist(), weight, bias)  # type: ignore[arg-type]
