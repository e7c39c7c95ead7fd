"""What simple_gate does beside the contract; see test_contract.py."""

from __future__ import annotations

import pytest
import torch

import r2r_kernels.functional as F
from tests.r2r_kernels.operators import CASES
from tests.r2r_kernels.rule import FORMATS, assert_follows

operator, inputs = CASES["simple_gate"].call, CASES["simple_gate"].inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32, 40, 70), (3, 7, 50, 61)])
def test_more_than_one_task_of_the_threads(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    (x,) = inputs(*shape)
    for name in ("contiguous", "channels_last"):
        assert_follows(operator, [FORMATS[name](x)], dtype)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must have an even number of channels, got \[1, 5, 4, 4\]"):
        F.simple_gate(torch.randn(1, 5, 4, 4))
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[5, 4\]"):
        F.simple_gate(torch.randn(5, 4))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_gradients_it_has_the_same_bits_and_format(dtype: torch.dtype, layout: torch.memory_format) -> None:
    whole = torch.randn(2, 9, 5, 7, dtype=dtype).contiguous(memory_format=layout)
    for x in (whole[:, :8], whole[:, 1:7, 1:, 2:5], whole[:0, :8]):
        wanted = F.simple_gate(x)
        with torch.no_grad():
            got = F.simple_gate(x)
        assert torch.equal(got, wanted)
        assert torch.equal(got, x[:, : got.shape[1]] * x[:, got.shape[1] :])
        assert got.is_contiguous(memory_format=layout)
        assert got.stride() == wanted.stride()
