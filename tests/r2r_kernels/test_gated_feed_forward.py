"""What gated_feed_forward does beside the contract; see test_contract.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import r2r_kernels.functional as F
from r2r_kernels import reference
from r2r_kernels.reference import GatedFeedForwardParams
from tests.r2r_kernels.operators import CASES
from tests.r2r_kernels.rule import FORMATS, assert_follows, assert_same_bits, parameters

operator, inputs = CASES["gated_feed_forward"].call, CASES["gated_feed_forward"].inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_many_pixels_and_several_images(name: str, dtype: torch.dtype) -> None:
    x, *rest = inputs(3, 24, 40, 67)
    assert_follows(operator, [FORMATS[name](x), *rest], dtype)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_change_a_bit(threads: int) -> None:
    assert_same_bits(operator, inputs(2, 24, 30, 40), threads)


def test_it_is_the_second_half_of_a_block() -> None:
    x, params = torch.randn(1, 8, 5, 6), parameters(8)
    params[10].zero_()  # beta: the first half adds nothing
    whole = reference.naf_block(x, reference.NAFBlockParams(*params))
    torch.testing.assert_close(operator(F, [x, *params[11:]])[0], whole)


def test_empty_batch() -> None:
    x, *rest = (t.requires_grad_() for t in inputs(0, 6, 4, 5))
    y = operator(F, [x, *rest])[0]
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in rest)


def test_flops_are_those_of_plain_pytorch() -> None:
    def count(ops: ModuleType, backward: bool) -> int:
        tensors = [t.requires_grad_(backward) for t in inputs(2, 8, 6, 5)]
        with FlopCounterMode(display=False) as counter:
            (y,) = operator(ops, tensors)
            if backward:
                y.sum().backward()
        return counter.get_total_flops()

    assert count(F, False) == count(reference, False) > 0
    hidden_again = 2 * 2 * 6 * 5 * 2 * 8 * 8
    assert count(F, True) == count(reference, True) + hidden_again


def test_bad_input() -> None:
    x, *rest = inputs(2, 4, 5, 4)
    with pytest.raises(ValueError, match=r"norm_weight must be \[5\] to fit x \[2, 5, 5, 4\], got \[4\]"):
        F.gated_feed_forward(torch.randn(2, 5, 5, 4), GatedFeedForwardParams(*rest))
    with pytest.raises(ValueError, match=r"params must be the 7 of GatedFeedForwardParams, got 6"):
        F.gated_feed_forward(x, rest[:-1])  # type: ignore[arg-type]
