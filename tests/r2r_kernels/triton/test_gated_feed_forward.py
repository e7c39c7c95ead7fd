from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.functional import gated_feed_forward_shapes
from r2r_kernels.reference import GatedFeedForwardParams
from r2r_kernels.triton import gated_feed_forward
from tests.r2r_kernels.rule import error
from tests.r2r_kernels.triton.comparison import CASES


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_follows_the_reference(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    channels = shape[1]
    x = torch.randn(shape).to(device, dtype).to(memory_format=layout)
    params = [
        (torch.randn(s) * (0.3 if len(s) == 1 else channels**-0.5) + (len(s) == 1)).to(device, dtype)
        for s in gated_feed_forward_shapes(channels)
    ]

    def answer(*tensors: Tensor) -> Tensor:
        return reference.gated_feed_forward(tensors[0], GatedFeedForwardParams(*tensors[1:]))

    got = gated_feed_forward.forward(x, GatedFeedForwardParams(*params), 1e-6)
    exact, plain = answer(*(t.double() for t in (x, *params))), answer(x, *params)
    assert got.stride() == x.stride()
    rounding = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    assert error([got], [exact]) <= max(2 * error([plain], [exact]), rounding)


def test_empty_batch(device: str) -> None:
    x = torch.empty(0, 8, 3, 5, device=device)
    params = GatedFeedForwardParams(*(torch.ones(s, device=device) for s in gated_feed_forward_shapes(8)))
    assert gated_feed_forward.forward(x, params, 1e-6).shape == x.shape
