"""The model obeys what is changed inside of it: adapters on convolutions of blocks and of the decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r2r import R2R, fast
from tests.conftest import TINY, fill_randomly
from tests.r2r_kernels.adapters import Lora


@pytest.mark.parametrize("name", ["encoder.levels.0.0.conv1", "encoder.middle.0.sca.1", "decoder.ups.0.0"])
def test_an_adapter_in_the_backbone_changes_the_answer_and_learns(name: str) -> None:
    torch.manual_seed(0)
    models = [R2R(tasks=("denoise", "derain"), **TINY), fast.R2R(tasks=("denoise", "derain"), **TINY)]
    fill_randomly(models[0])
    models[1].load_state_dict(models[0].state_dict())
    lq = torch.rand(2, 3, 32, 32)
    answers = []
    for model in models:
        before = model.eval()(lq)
        torch.manual_seed(1)
        adapted = Lora(model.get_submodule(name))  # type: ignore[arg-type]
        model.set_submodule(name, adapted)
        answers.append(model(lq))
        assert isinstance(before, Tensor)
        assert not torch.allclose(answers[-1], before)
        answers[-1].square().sum().backward()
        assert adapted.up.weight.grad is not None
        assert adapted.up.weight.grad.any()
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-4)
