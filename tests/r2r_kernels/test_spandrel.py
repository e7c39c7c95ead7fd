"""`accelerate` on NAFNet as the package spandrel loads it."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch

import r2r_kernels
from benchmarks.published import import_spandrel


@pytest.fixture(scope="module")
def spandrel() -> Any:
    if importlib.util.find_spec("spandrel") is None:
        pytest.skip("the package spandrel, of the extra `dev`, is not installed")
    return import_spandrel()


def test_a_nafnet_that_spandrel_loads_is_swapped_and_answers_the_same(spandrel: Any) -> None:
    from spandrel.architectures.NAFNet import NAFNet

    torch.manual_seed(0)
    made = NAFNet(width=8, enc_blk_nums=[1, 2], middle_blk_num=1, dec_blk_nums=[1, 1])
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("beta", "gamma")):
                parameter.normal_(std=0.3)
    loaded = spandrel.ModelLoader().load_from_state_dict(made.state_dict())
    eager = copy.deepcopy(loaded.model)
    swaps = r2r_kernels.accelerate(loaded.model)
    assert list(swaps.swapped.values()) == 6 * ["NAFBlock"]
    assert not swaps.left

    x = torch.rand(1, 3, 37, 44)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), eager(x).clamp(0, 1))
    for model in (eager, loaded.model):
        model(x).square().mean().backward()
    for one, other in zip(eager.parameters(), loaded.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)
    r2r_kernels.decelerate(loaded.model)
    assert torch.equal(loaded.model(x), eager(x))
