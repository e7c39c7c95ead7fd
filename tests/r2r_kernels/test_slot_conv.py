"""What slot_conv does beside the contract; see test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import r2r_kernels.functional as F
from r2r_kernels.nn import SlotConv3d
from tests.r2r_kernels.operators import CASES
from tests.r2r_kernels.rule import assert_follows

operator, inputs = CASES["slot_conv"].call, CASES["slot_conv"].inputs


def test_any_strides() -> None:
    x, weight, bias = inputs(2, 9, 4, 3, 5, 3)
    for strided in (x.transpose(3, 4).contiguous().transpose(3, 4), torch.cat((x, x), dim=2)[:, :, :4]):
        assert not strided.is_contiguous()
        assert_follows(operator, [strided, weight, bias], torch.float32)
        assert F.slot_conv(strided, weight, bias).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 5, 4, 3, 3), (2, 5, 0, 3, 3), (1, 5, 1, 1, 3)])
def test_small_and_empty(shape: tuple[int, int, int, int, int]) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(*shape, 2))
    y = F.slot_conv(x, weight, bias)
    assert y.shape == (shape[0], 4, *shape[2:])
    gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]


def test_autocast_and_flops() -> None:
    module = SlotConv3d(2, 3, 4)
    x = torch.randn(2, 9, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * 2 * 6 * 3 * 25 * 4 * 9


def test_bad_input() -> None:
    x, weight, bias = inputs(2, 5, 3, 4, 3, 2)
    with pytest.raises(ValueError, match=r"x must be \[T, S, C, h, w\], got \[5, 3, 4, 3\]"):
        F.slot_conv(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight must have 1 to 5 slots .* got \[2, 3, 6, 3, 3\]"):
        F.slot_conv(x, torch.randn(2, 3, 6, 3, 3), bias)
    with pytest.raises(ValueError, match=r"weight must be \[2, 3, 2, 3, 3\] .* got \[2, 3, 2, 3, 1\]"):
        F.slot_conv(x, weight[..., :1], bias)
    with pytest.raises(ValueError, match=r"bias must be \[2, 3\] .* got \[3, 3\]"):
        F.slot_conv(x, weight, torch.randn(3, 3))
    with pytest.raises(TypeError, match=r"weight must be torch.float32 as x is, got torch.bfloat16"):
        F.slot_conv(x, weight.bfloat16(), bias)
