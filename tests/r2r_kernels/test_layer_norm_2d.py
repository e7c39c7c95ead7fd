"""What layer_norm_2d does beside the contract; see test_contract.py."""

from __future__ import annotations

import pytest
import torch

import r2r_kernels.functional as F
from tests.r2r_kernels.operators import CASES
from tests.r2r_kernels.rule import assert_follows

operator, inputs = CASES["layer_norm_2d"].call, CASES["layer_norm_2d"].inputs


def test_large_activations_in_half_precision() -> None:
    x, weight, bias = inputs(1, 32, 8, 8)
    for dtype in (torch.float16, torch.bfloat16):
        assert_follows(operator, [x * 200 / x.abs().max(), weight, bias], dtype)


def test_large_mean_does_not_cancel() -> None:
    x, weight, bias = inputs(1, 32, 8, 8)
    assert_follows(operator, [x + 1000, weight, bias], torch.float32)


def test_bad_input() -> None:
    x, weight, bias = inputs(2, 6, 5, 4)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[6, 5, 4\]"):
        F.layer_norm_2d(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \[6\] .* got \[5\]"):
        F.layer_norm_2d(x, weight[:5], bias)
    with pytest.raises(TypeError, match=r"bias must be torch.float32 as x is, got torch.float64"):
        F.layer_norm_2d(x, weight, bias.double())
    with pytest.raises(TypeError, match=r"x must be of a float dtype, got torch.int64"):
        F.layer_norm_2d(x.long(), weight, bias)
    with pytest.raises(ValueError, match=r"weight must be on cpu as x is, got meta"):
        F.layer_norm_2d(x, weight.to("meta"), bias)
    with pytest.raises(TypeError, match=r"x must be a tensor, got list"):
        F.layer_norm_2d(x.tolist(), weight, bias)  # type: ignore[arg-type]
