from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.triton import bank_retrieve
from tests.r2r_kernels.rule import error

UNEVEN = [5, 2, 0, 3]
TOLD = torch.tensor([[False, True, False, True], [True, False, False, False], [False, False, False, True]])


def bank(dtype: torch.dtype, device: str) -> list[Tensor]:
    """query, keys, values; each sample is near the keys of a task of its own, so that rounding chooses none."""
    centres = torch.randn(4, 1, 3, 3, 3)
    keys = centres + 0.3 * torch.randn(4, 5, 3, 3, 3)
    query = centres[[0, 1, 3], 0] + 0.3 * torch.randn(3, 3, 3, 3)
    return [t.to(device, dtype) for t in (query, keys, torch.randn(4, 5, 17, 3, 3))]


@pytest.mark.parametrize("counts", [[5, 5, 5, 5], UNEVEN])
@pytest.mark.parametrize("told", [None, TOLD])
@pytest.mark.parametrize("mode", ["hard", "multi", "soft"])
def test_follows_the_reference(
    mode: reference.Mode, told: Tensor | None, counts: list[int], dtype: torch.dtype, device: str
) -> None:
    tensors = bank(dtype, device)
    held = torch.tensor(counts, device=device)
    scale = torch.tensor(10.0, device=device)
    if told is not None:
        told = told.to(device)
    query, keys, values = tensors
    readout, scores, weights = bank_retrieve.forward(query, keys, values, held, scale, told, mode)
    exact = reference.bank_retrieve(query.double(), keys.double(), values.double(), held, scale, told, mode)
    plain = reference.bank_retrieve(query, keys, values, held, scale, told, mode)
    assert torch.equal(scores == -torch.inf, exact[1] == -torch.inf)
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(3, device=device))
    finite = held > 0
    for got, other, wanted in ((readout, plain[0], exact[0]), (*(s[:, finite] for s in (scores, plain[1], exact[1])),)):
        assert got.dtype == other.dtype
        rounding = torch.finfo(got.dtype).eps * (4 if got.dtype == torch.float32 else 1)
        assert error([got], [wanted]) <= max(2 * error([other], [wanted]), rounding)


@pytest.mark.parametrize("blind", [False, True])
def test_values_of_other_tasks_are_not_read(blind: bool, device: str) -> None:
    query, keys, values = bank(torch.float32, device)  # whose samples match the tasks 0, 1 and 3
    told = torch.tensor([[False, True, False, True]] * 3, device=device)
    held, scale = torch.tensor([5] * 4, device=device), torch.tensor(30.0, device=device)
    poisoned = values.clone()
    poisoned[2] = torch.nan
    if not blind:
        poisoned[0] = torch.inf
    results = [
        bank_retrieve.forward(query, keys, v, held, scale, None if blind else told, "hard") for v in (values, poisoned)
    ]
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_two_runs_give_the_same_bits(device: str) -> None:
    query, keys, values = bank(torch.float32, device)
    held, scale = torch.tensor(UNEVEN, device=device), torch.tensor(3.0, device=device)
    runs = [bank_retrieve.forward(query, keys, values, held, scale, None, "soft") for _ in range(2)]
    for got, wanted in zip(*runs, strict=True):
        assert torch.equal(got, wanted)


def test_nothing_is_read_beyond_the_slots(device: str) -> None:
    """Counts that a GPU could not check are held below the number of slots."""
    query, keys, values = bank(torch.float32, device)
    scale = torch.tensor(3.0, device=device)
    results = [
        bank_retrieve.forward(query, keys, values, torch.tensor([n] * 4, device=device), scale, None, "soft")
        for n in (5, 9)
    ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
