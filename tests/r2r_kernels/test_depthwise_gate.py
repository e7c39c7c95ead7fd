"""What depthwise_gate does beside the contract; see test_contract.py."""

from __future__ import annotations

import pytest
import torch

import r2r_kernels.functional as F
from tests.r2r_kernels.operators import CASES
from tests.r2r_kernels.rule import FORMATS, assert_follows, assert_same_bits

operator, inputs = CASES["depthwise_gate"].call, CASES["depthwise_gate"].inputs


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 32, 33, 50])
def test_every_width_has_its_edges_right(width: int) -> None:
    x, weight, bias = inputs(1, 20, 7, width)
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x), weight, bias], torch.float32)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 2, 70, 600), (8, 32, 64, 64)])
def test_an_image_of_several_strips(shape: tuple[int, int, int, int], name: str) -> None:
    x, weight, bias = inputs(*shape)
    assert_follows(operator, [FORMATS[name](x), weight, bias], torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_the_number_of_threads_does_not_change_a_bit(name: str, threads: int) -> None:
    x, weight, bias = inputs(3, 20, 30, 40)
    assert_same_bits(operator, [FORMATS[name](x), weight, bias], threads)


def test_gradients_of_any_memory_format() -> None:
    x, weight, bias = inputs(2, 6, 7, 9)
    gradient, of_mean = torch.randn(2, 6, 7, 9), torch.randn(2, 6, 1, 1)
    wanted = torch.ops.r2r.depthwise_gate_backward(gradient, of_mean, x, weight, bias)
    for make in FORMATS.values():
        expanded = of_mean[:, :, 0, 0].T.contiguous().T[:, :, None, None]
        got = torch.ops.r2r.depthwise_gate_backward(make(gradient), expanded, x, weight, bias)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_bad_input() -> None:
    x, weight, bias = inputs(2, 3, 5, 4)
    with pytest.raises(ValueError, match=r"x must have an even number of channels"):
        F.depthwise_gate(x[:, :5], weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \[6, 1, 3, 3\] .* got \[6, 1, 1, 3\]"):
        F.depthwise_gate(x, weight[:, :, :1], bias)
    with pytest.raises(TypeError, match=r"x as x is|weight must be torch.float32 as x is, got torch.bfloat16"):
        F.depthwise_gate(x, weight.bfloat16(), bias)
