"""naf_block against its reference; see rule.py."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import r2r_kernels.functional as F
from r2r_kernels.reference import NAFBlockParams
from tests.r2r_kernels.rule import FORMATS, SHAPES, assert_follows, assert_same_bits, memory_format, parameters


def operator(ops: ModuleType, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (ops.naf_block(tensors[0], NAFBlockParams(*tensors[1:]), 1e-6),)


def inputs(shape: tuple[int, int, int, int]) -> list[Tensor]:
    n, c, h, w = shape
    return [torch.randn(n, c, h, w), *parameters(c)]


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
@pytest.mark.parametrize("shape", [(1, 64, 50, 40), (1, 4, 8, 600), (1, 130, 12, 11), (1, 6, 130, 70), (5, 3, 9, 9)])
def test_tiles_strips_and_ragged_channels(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, *rest = inputs(shape)
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x), *rest], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_change_a_bit(threads: int, dtype: torch.dtype) -> None:
    x, *rest = (t.to(dtype) for t in inputs((1, 24, 30, 40)))
    alone = operator(F, [x, *rest])[0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(operator(F, [x, *rest])[0], alone)
    finally:
        torch.set_num_threads(before)


def test_large_activations_in_half_precision() -> None:
    x, *rest = inputs((1, 16, 8, 8))
    for dtype in (torch.float16, torch.bfloat16):
        assert_follows(operator, [x * 200 / x.abs().max(), *(p / 2 for p in rest)], dtype)


def test_training_keeps_the_input_alone() -> None:
    x, *rest = inputs((1, 16, 32, 32))
    kept: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        operator(F, [x.requires_grad_(), *(p.requires_grad_() for p in rest)])
    assert sum(kept.values()) == x.numel() + sum(p.numel() for p in rest)


def test_opcheck() -> None:
    for name in ("contiguous", "channels_last"):
        x, *rest = inputs((2, 4, 5, 4))
        x = FORMATS[name](x)
        with torch.no_grad():
            opcheck(torch.ops.r2r.naf_block_training.default, (x, rest, 1e-6))
        opcheck(torch.ops.r2r.naf_block.default, (x.requires_grad_(), [p.requires_grad_() for p in rest], 1e-6))
        with torch.no_grad():
            opcheck(torch.ops.r2r.naf_block_backward.default, (x.detach(), x.detach(), x.new_empty(0, 4), rest, 1e-6))


def test_bad_input() -> None:
    x, *rest = inputs((2, 4, 5, 4))
    with pytest.raises(ValueError, match=r"norm1_weight must be \[5\] to fit x \[2, 5, 5, 4\], got \[4\]"):
        F.naf_block(torch.randn(2, 5, 5, 4), NAFBlockParams(*rest))
    with pytest.raises(ValueError, match=r"params must be the 18 of NAFBlockParams, got 17"):
        F.naf_block(x, rest[:-1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"gamma must be torch.float32 as x is, got torch.float16"):
        F.naf_block(x, NAFBlockParams(*rest)._replace(gamma=rest[-1].half()))
