from __future__ import annotations

import pytest
import torch

from r2r_kernels import reference
from r2r_kernels.operators.layout import memory_format
from r2r_kernels.triton import layer_norm_2d
from tests.r2r_kernels.triton.comparison import CASES, FORMATS, assert_as_good


@pytest.mark.parametrize(("shape", "layout"), [*CASES, ((1, 300, 2, 9), torch.contiguous_format)])
def test_follows_the_reference(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    x, dy = (torch.randn(shape).to(device, dtype).to(memory_format=layout) for _ in range(2))
    weight, bias = torch.randn(2, shape[1]).to(device, dtype)
    y, mean, rstd = layer_norm_2d.forward(x, weight, bias, 1e-6)
    got = layer_norm_2d.backward(dy, x, weight, mean, rstd)
    assert y.is_contiguous(memory_format=memory_format(x))
    assert_as_good([y, *got], reference.layer_norm_2d, (x, weight, bias), (dy,))


def test_large_activations(device: str) -> None:
    """Squares of fp16 activations overflow fp16, and a large mean must not drown the variance."""
    x = (200 * torch.randn(1, 48, 5, 7) + torch.tensor([0, 100, -200, 3, 50]).view(5, 1)).clamp(-250, 250)
    x = x.to(device, torch.float16)
    weight, bias = torch.randn(2, 48).to(device, torch.float16)
    y, mean, rstd = layer_norm_2d.forward(x, weight, bias, 1e-6)
    dy = torch.randn_like(x)
    got = layer_norm_2d.backward(dy, x, weight, mean, rstd)
    assert_as_good([y, *got], reference.layer_norm_2d, (x, weight, bias), (dy,))


def test_shifted_far_from_zero(device: str) -> None:
    """A variance from sums of squares would have lost all its digits here."""
    x = (torch.randn(1, 64, 3, 5) + 4096).to(device)
    one, zero = torch.ones(64, device=device), torch.zeros(64, device=device)
    y, _, _ = layer_norm_2d.forward(x, one, zero, 1e-6)
    wanted = reference.layer_norm_2d(x.double(), one.double(), zero.double())
    torch.testing.assert_close(y, wanted.float(), atol=2e-3, rtol=0)


def test_mixed_dtypes_and_views(device: str) -> None:
    """Half activations with float32 parameters (autocast); an x that is a view, off any boundary."""
    x = torch.randn(2, 9, 6, 5).to(device, torch.float16)[:, 1:8, :, 1:]
    weight, bias = torch.randn(2, 7, device=device)
    y, mean, rstd = layer_norm_2d.forward(x, weight, bias, 1e-6)
    dy = torch.randn_like(x)
    _, dweight, _ = layer_norm_2d.backward(dy, x, weight, mean, rstd)
    assert (y.dtype, dweight.dtype, y.is_contiguous()) == (torch.float16, torch.float32, True)
    wanted = reference.layer_norm_2d(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), wanted, atol=4e-3, rtol=2e-3)


def test_empty_batch(device: str) -> None:
    x = torch.empty(0, 7, 3, 5, device=device)
    weight = torch.ones(7, device=device)
    y, mean, rstd = layer_norm_2d.forward(x, weight, weight, 1e-6)
    dx, dweight, dbias = layer_norm_2d.backward(x, x, weight, mean, rstd)
    assert (y.shape, mean.shape, dx.shape) == (x.shape, (0, 3, 5), x.shape)
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu: str) -> None:
    x = torch.randn(1, 8, 16384, 16400, device=gpu, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, 8, device=gpu, dtype=torch.bfloat16)
    for layout in FORMATS:
        y, _, _ = layer_norm_2d.forward(x.contiguous(memory_format=layout), weight, bias, 1e-6)
        wanted = reference.layer_norm_2d(x[:, :, -8:], weight, bias)
        torch.testing.assert_close(y[:, :, -8:], wanted)
