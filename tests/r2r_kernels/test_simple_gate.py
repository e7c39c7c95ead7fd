"""simple_gate against its reference; see rule.py."""

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
    return (ops.simple_gate(tensors[0]),)


def inputs(shape: tuple[int, int, int, int]) -> list[Tensor]:
    n, c, h, w = shape
    return [torch.randn(n, 2 * c, h, w)]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32, 40, 70), (3, 7, 50, 61)])
def test_more_than_one_task_of_the_threads(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    (x,) = inputs(shape)
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x)], dtype)


def test_opcheck() -> None:
    for name in ("contiguous", "channels_last"):
        x = FORMATS[name](torch.randn(2, 6, 5, 4)).requires_grad_()
        opcheck(torch.ops.r2r.simple_gate.default, (x,))
        opcheck(torch.ops.r2r.simple_gate_backward.default, (torch.randn(2, 3, 5, 4), x.detach()))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must have an even number of channels, got \[1, 5, 4, 4\]"):
        F.simple_gate(torch.randn(1, 5, 4, 4))
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[5, 4\]"):
        F.simple_gate(torch.randn(5, 4))
