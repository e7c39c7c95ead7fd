"""The reference is differentiable, and the kernels' backward formulas are its derivative (gradcheck in float64)."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from r2r_kernels import functional, reference
from r2r_kernels.reference import NAFBlockParams
from tests.r2r_kernels.rule import parameters


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


BOTH = pytest.mark.parametrize("ops", [reference, functional], ids=["reference", "functional"])


@BOTH
def test_layer_norm_2d(ops: ModuleType) -> None:
    assert gradcheck(ops.layer_norm_2d, (random(2, 3, 4, 3), random(3), random(3)))


@BOTH
def test_simple_gate(ops: ModuleType) -> None:
    assert gradcheck(ops.simple_gate, (random(2, 4, 3, 2),))


@BOTH
def test_depthwise_gate(ops: ModuleType) -> None:
    assert gradcheck(ops.depthwise_gate, (random(2, 4, 4, 3), random(4, 1, 3, 3), random(4)))


@BOTH
def test_naf_block(ops: ModuleType) -> None:
    params = [p.double().requires_grad_() for p in parameters(2)]
    assert gradcheck(lambda x, *p: ops.naf_block(x, NAFBlockParams(*p)), (random(2, 2, 4, 3), *params))


@BOTH
def test_local_naf_block(ops: ModuleType) -> None:
    params = [p.double().requires_grad_() for p in parameters(2)]

    def block(x: Tensor, *p: Tensor) -> Tensor:
        return ops.naf_block(x, NAFBlockParams(*p), window=(2, 3))

    assert gradcheck(block, (random(1, 2, 3, 4), *params))


@BOTH
def test_local_mean_2d(ops: ModuleType) -> None:
    assert gradcheck(lambda x: ops.local_mean_2d(x, (2, 3)), (random(2, 2, 4, 5),))


@BOTH
def test_upsample_add(ops: ModuleType) -> None:
    assert gradcheck(ops.upsample_add, (random(2, 4, 2, 3), random(8, 4, 1, 1), random(2, 2, 4, 6)))


@BOTH
@pytest.mark.parametrize("mode", ["hard", "multi", "soft"])
def test_bank_retrieve(ops: ModuleType, mode: str) -> None:
    counts = torch.tensor([3, 2])

    def retrieve(query: Tensor, keys: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return ops.bank_retrieve(query, keys, values, counts, scale, mode=mode)

    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(retrieve, (random(2, 2, 2, 2), random(2, 3, 2, 2, 2), random(2, 3, 3, 2, 2), scale))


@BOTH
def test_slot_conv(ops: ModuleType) -> None:
    assert gradcheck(ops.slot_conv, (random(2, 4, 3, 2, 3), random(2, 3, 2, 3, 3), random(2, 3)))


@BOTH
@pytest.mark.parametrize("kernel", [1, 3])
def test_gated_conv(ops: ModuleType, kernel: int) -> None:
    assert gradcheck(ops.gated_conv, (random(2, 3, 4, 5), random(2, 3, 2, 2), random(3, 2, kernel, kernel), random(3)))
