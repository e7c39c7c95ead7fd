from __future__ import annotations

import pytest
import torch

from r2r_kernels import reference
from r2r_kernels.operators.layout import memory_format
from r2r_kernels.triton import depthwise_gate
from tests.r2r_kernels.triton.comparison import CASES, assert_as_good


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_follows_the_reference(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    n, c, h, w = shape
    x = torch.randn(n, 2 * c, h, w).to(device, dtype).to(memory_format=layout)
    weight, bias = (torch.randn(s).to(device, dtype) for s in ((2 * c, 1, 3, 3), (2 * c,)))
    upstream = torch.randn(shape).to(device, dtype), torch.randn(n, c, 1, 1).to(device, dtype)
    gated, mean = depthwise_gate.forward(x, weight, bias)
    got = depthwise_gate.backward(*upstream, x, weight, bias)
    assert gated.is_contiguous(memory_format=memory_format(x))
    assert_as_good([gated, mean, *got], reference.depthwise_gate, (x, weight, bias), upstream)


def test_strips_meet(device: str) -> None:
    """More rows than a strip has, more columns, more channels: no seam between programs."""
    config = {"BW": 8, "BH": 16, "rows": 4, "num_warps": 4}
    x, weight, bias = torch.randn(1, 40, 6, 9), torch.randn(40, 1, 3, 3), torch.randn(40)
    x, weight, bias = (t.to(device) for t in (x, weight, bias))
    upstream = torch.randn(1, 20, 6, 9, device=device), torch.randn(1, 20, 1, 1, device=device)
    results = depthwise_gate.forward(x, weight, bias, config)
    got = depthwise_gate.backward(*upstream, x, weight, bias, config, config)
    assert_as_good([*results, *got], reference.depthwise_gate, (x, weight, bias), upstream)


def test_empty_batch(device: str) -> None:
    x = torch.empty(0, 14, 3, 5, device=device)
    weight, bias = torch.ones(14, 1, 3, 3, device=device), torch.ones(14, device=device)
    gated, mean = depthwise_gate.forward(x, weight, bias)
    dx, dweight, dbias = depthwise_gate.backward(gated, mean, x, weight, bias)
    assert (gated.shape, mean.shape, dx.shape) == ((0, 7, 3, 5), (0, 7, 1, 1), x.shape)
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu: str) -> None:
    x = torch.randn(1, 16, 16384, 16400, device=gpu, dtype=torch.bfloat16)
    weight, bias = (torch.randn(s, device=gpu, dtype=torch.bfloat16) for s in ((16, 1, 3, 3), (16,)))
    gated, _ = depthwise_gate.forward(x, weight, bias)
    wanted, _ = reference.depthwise_gate(x[:, :, -8:].float(), weight.float(), bias.float())
    torch.testing.assert_close(gated[:, :, -7:].float(), wanted[:, :, 1:], atol=0.05, rtol=0.02)
