"""depthwise_gate against its reference; see rule.py."""

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
    return ops.depthwise_gate(tensors[0], tensors[1], tensors[2])


def inputs(shape: tuple[int, int, int, int]) -> list[Tensor]:
    n, c, h, w = shape
    return [torch.randn(n, 2 * c, h, w), torch.randn(2 * c, 1, 3, 3) / 3, torch.randn(2 * c)]


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


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (1, 4, 1, 1), (1, 32, 1, 9), (1, 32, 9, 1)])
def test_small_and_empty_batches(shape: tuple[int, int, int, int]) -> None:
    assert_follows(operator, inputs(shape), torch.float32)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 32, 33, 50])
def test_every_width_has_its_edges_right(width: int) -> None:
    x, weight, bias = inputs((1, 20, 7, width))
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x), weight, bias], torch.float32)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 2, 70, 600), (8, 32, 64, 64)])
def test_an_image_of_several_strips(shape: tuple[int, int, int, int], name: str) -> None:
    x, weight, bias = inputs(shape)
    assert_follows(operator, [FORMATS[name](x), weight, bias], torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_the_number_of_threads_does_not_change_a_bit(name: str, threads: int) -> None:
    x, weight, bias = inputs((3, 20, 30, 40))
    assert_same_bits(operator, [FORMATS[name](x), weight, bias], threads)


def test_gradients_of_any_memory_format() -> None:
    x, weight, bias = inputs((2, 6, 7, 9))
    gradient, of_mean = torch.randn(2, 6, 7, 9), torch.randn(2, 6, 1, 1)
    wanted = torch.ops.r2r.depthwise_gate_backward(gradient, of_mean, x, weight, bias)
    for make in FORMATS.values():
        expanded = of_mean[:, :, 0, 0].T.contiguous().T[:, :, None, None]
        got = torch.ops.r2r.depthwise_gate_backward(make(gradient), expanded, x, weight, bias)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_opcheck() -> None:
    for name in ("contiguous", "channels_last"):
        x, weight, bias = inputs((2, 3, 5, 4))
        x = FORMATS[name](x)
        opcheck(torch.ops.r2r.depthwise_gate.default, tuple(t.requires_grad_() for t in (x, weight, bias)))
        gated, mean = torch.ops.r2r.depthwise_gate(x.detach(), weight.detach(), bias.detach())
        with torch.no_grad():
            opcheck(torch.ops.r2r.depthwise_gate_backward.default, (gated, mean, x, weight, bias))


def test_bad_input() -> None:
    x, weight, bias = inputs((2, 3, 5, 4))
    with pytest.raises(ValueError, match=r"x must have an even number of channels"):
        F.depthwise_gate(x[:, :5], weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \[6, 1, 3, 3\] .* got \[6, 1, 1, 3\]"):
        F.depthwise_gate(x, weight[:, :, :1], bias)
    with pytest.raises(TypeError, match=r"x as x is|weight must be torch.float32 as x is, got torch.bfloat16"):
        F.depthwise_gate(x, weight.bfloat16(), bias)
