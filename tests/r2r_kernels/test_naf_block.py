"""What naf_block does beside the contract; see test_contract.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import r2r_kernels.functional as F
from r2r_kernels import reference
from r2r_kernels.operators import naf_block
from r2r_kernels.reference import NAFBlockParams
from tests.r2r_kernels.operators import CASES, SHAPES
from tests.r2r_kernels.rule import FORMATS, Operator, assert_follows, assert_same_bits, error, memory_format

operator, inputs = CASES["naf_block"].call, CASES["naf_block"].inputs
local = CASES["naf_block with a window"].call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_local_attention_follows_too(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, *rest = inputs(*shape)
    for name in ("contiguous", "channels_last"):
        assert_follows(local, [FORMATS[name](x), *rest], dtype)
        fused = assert_inference_follows(local, [FORMATS[name](x), *rest], dtype)
        assert fused.is_contiguous(memory_format=memory_format(FORMATS[name](x)))


def assert_inference_follows(operator: Operator, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Without gradients another implementation may run."""
    rounded = [t.to(dtype) for t in tensors]
    exact, plain = (operator(reference, [t.to(kind) for t in rounded])[0] for kind in (torch.float64, dtype))
    got = operator(F, rounded)[0]
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
    assert error([got], [exact]) <= max(2 * error([plain], [exact]), torch.finfo(dtype).eps)
    assert torch.equal(operator(F, rounded)[0], got)
    return got


def test_a_window_around_the_whole_image_is_the_plain_block() -> None:
    x, *rest = inputs(1, 8, 5, 4)
    assert torch.equal(local(F, [x, *rest])[0], operator(F, [x, *rest])[0])
    torch.testing.assert_close(local(reference, [x, *rest]), operator(reference, [x, *rest]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 50, 40), (1, 4, 8, 600), (1, 130, 12, 11), (1, 6, 130, 70), (5, 3, 9, 9)])
def test_tiles_strips_and_ragged_channels(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, *rest = inputs(*shape)
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x), *rest], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 24, 30, 40), (5, 20, 64, 66)])
def test_the_number_of_threads_does_not_change_a_bit(
    shape: tuple[int, int, int, int], threads: int, dtype: torch.dtype
) -> None:
    assert_same_bits(operator, [t.to(dtype) for t in inputs(*shape)], threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_images_and_the_last_smaller_one(dtype: torch.dtype) -> None:
    assert_follows(operator, inputs(5, 20, 64, 66), dtype)  # the backward takes two of them at a time


def test_gradients_of_any_memory_format() -> None:
    x, *rest = inputs(2, 6, 7, 9)
    gradient, nothing = torch.randn(2, 6, 7, 9), x.new_empty(0, 6)
    wanted = torch.ops.r2r.naf_block_backward(gradient, x, nothing, rest, 1e-6)
    for make in FORMATS.values():
        got = torch.ops.r2r.naf_block_backward(make(gradient), x, nothing, rest, 1e-6)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_large_activations_in_half_precision() -> None:
    x, *rest = inputs(1, 16, 8, 8)
    for dtype in (torch.float16, torch.bfloat16):
        assert_follows(operator, [x * 200 / x.abs().max(), *(p / 2 for p in rest)], dtype)


def test_training_keeps_the_input_alone() -> None:
    x, *rest = inputs(1, 16, 32, 32)
    kept: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        operator(F, [x.requires_grad_(), *(p.requires_grad_() for p in rest)])
    assert sum(kept.values()) == x.numel() + sum(p.numel() for p in rest)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 512, 5, 7), (7, 512, 9, 11), (1, 513, 20, 12), (2, 515, 1, 3)])
def test_what_is_kept_of_many_channels_is_what_the_backward_would_make_again(
    name: str, shape: tuple[int, int, int, int]
) -> None:
    x, *rest = inputs(*shape)
    x, gradient = FORMATS[name](x), torch.randn(shape)
    y, kept = torch.ops.r2r.naf_block_training(x, rest, 1e-6)
    assert kept.shape == (5, *shape)
    assert torch.equal(y, torch.ops.r2r.naf_block(x, rest, 1e-6))
    again = torch.ops.r2r.naf_block_backward(gradient, x, kept[:0], rest, 1e-6)
    for got, wanted in zip(torch.ops.r2r.naf_block_backward(gradient, x, kept, rest, 1e-6), again, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    # The backward reads it: other values give other gradients.
    other = torch.ops.r2r.naf_block_backward(gradient, x, torch.zeros_like(kept), rest, 1e-6)
    assert not torch.allclose(other[0], again[0])


def test_nothing_is_kept_of_few_channels_large_images_and_half_precision() -> None:
    for shape, dtype in (((1, 511, 3, 3), torch.float32), ((1, 512, 3, 3), torch.bfloat16)):
        x, *rest = (t.to(dtype) for t in inputs(*shape))
        assert torch.ops.r2r.naf_block_training(x, rest, 1e-6)[1].numel() == 0
    for side, kept in ((57, 5), (58, 0)):  # 5 * 512 * 57^2 is just below 2^23
        assert len(naf_block._kept(torch.empty(1).expand(1, 512, side, side))) == kept


def test_opcheck_of_training() -> None:
    for name in ("contiguous", "channels_last"):
        for channels in (4, 512):
            x, *rest = inputs(2, channels, 5, 4)
            with torch.no_grad():
                opcheck(torch.ops.r2r.naf_block_training.default, (FORMATS[name](x), rest, 1e-6))


def test_bad_input() -> None:
    x, *rest = inputs(2, 4, 5, 4)
    with pytest.raises(ValueError, match=r"norm1_weight must be \[5\] to fit x \[2, 5, 5, 4\], got \[4\]"):
        F.naf_block(torch.randn(2, 5, 5, 4), NAFBlockParams(*rest))
    with pytest.raises(ValueError, match=r"params must be the 18 of NAFBlockParams, got 17"):
        F.naf_block(x, rest[:-1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"params must be a NAFBlockParams, got Tensor"):
        F.naf_block(x, rest[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"gamma must be torch.float32 as x is, got torch.float16"):
        F.naf_block(x, NAFBlockParams(*rest)._replace(gamma=rest[-1].half()))
    with pytest.raises(ValueError, match=r"window must be \(height, width\), both 1 or more, got \(0, 3\)"):
        F.naf_block(x, NAFBlockParams(*rest), window=(0, 3))
