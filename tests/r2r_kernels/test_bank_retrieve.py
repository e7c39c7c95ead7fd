"""What bank_retrieve does beside the contract; see test_contract.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import r2r_kernels.functional as F
from r2r_kernels import reference
from r2r_kernels.nn import BankRetrieval
from r2r_kernels.operators import bank_retrieve
from tests.r2r_kernels.operators import UNEVEN, bank, retrieval
from tests.r2r_kernels.rule import assert_follows

TASKS = {
    "blind": None,
    "one for all": 1,
    "one a sample": torch.tensor([3, 0, 1]),
    "int32": torch.tensor([1], dtype=torch.int32),
    "mask": torch.tensor([[True, False, True, False], [False, True, False, True], [False, False, False, True]]),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("mode", ["hard", "multi", "soft"])
def test_told(name: str, mode: str) -> None:
    task = TASKS[name]
    for counts in (None, UNEVEN):
        assert_follows(retrieval(counts, task, mode), bank(), torch.float32)


@pytest.mark.parametrize("task", [None, torch.tensor([1, 3, 1])])
def test_values_of_other_tasks_are_not_read(task: Tensor | None) -> None:
    query, keys, values, scale = bank()
    counts = torch.full((4,), 6)
    wanted, scores = F.bank_retrieve(query, keys, values, counts, scale, task)
    chosen = scores.argmax(1) if task is None else task
    others = [t for t in range(4) if t not in chosen]
    assert others
    values[others] = torch.nan
    got, _ = F.bank_retrieve(query, keys, values, counts, scale, task)
    assert torch.equal(got, wanted)


def test_gradients_of_keys_and_values_of_any_stride() -> None:
    query, keys, values, scale = bank()

    def gradients(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        own_keys, own_values = (change(x).detach().requires_grad_() for x in (keys, values))
        readout, _ = F.bank_retrieve(query, own_keys, own_values, torch.full((4,), 6), scale, 1)
        return torch.autograd.grad(readout.square().sum(), (own_keys, own_values))

    permuted = gradients(lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2))
    for got, wanted in zip(permuted, gradients(torch.clone), strict=True):
        assert wanted.any()
        assert torch.equal(got, wanted)


def test_slots_not_in_use_are_not_read() -> None:
    query, keys, values, scale = bank()
    keys[1, 2:], values[1, 2:] = torch.nan, torch.nan
    for mode in ("hard", "soft"):
        readout, scores = F.bank_retrieve(query, keys, values, torch.tensor([6, 2, 6, 6]), scale, mode=mode)
        assert readout.isfinite().all()
        assert scores.isfinite().all()


def test_a_zero_query_has_a_gradient_of_zeros_at_most() -> None:
    query, keys, values, scale = bank()
    query[0] = 0
    query.requires_grad_()
    readout, scores = F.bank_retrieve(query, keys, values, torch.full((4,), 6), scale, 0)
    assert torch.equal(scores[0], torch.zeros(4))
    torch.testing.assert_close(readout[0], values[0].mean(0))
    (gradient,) = torch.autograd.grad(scores.sum(), query)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("similarity", ["cosine", "published"])
def test_module(similarity: Any) -> None:
    query, keys, values, _ = bank()
    counts = torch.full((4,), 6)
    for mode in ("hard", "multi", "soft"):
        ours, plain = (BankRetrieval(similarity, mode, eager) for eager in (False, True))
        for got, wanted in zip(ours(query, keys, values, counts), plain(query, keys, values, counts), strict=True):
            torch.testing.assert_close(got, wanted)


def test_more_than_one_block_of_the_readout() -> None:
    assert_follows(retrieval(), bank(9, 3, 11, 4, 300, 8), torch.float32)


def test_empty_batch() -> None:
    query, keys, values, scale = bank()
    readout, scores = F.bank_retrieve(query[:0], keys, values, torch.full((4,), 6), scale)
    assert readout.shape == (0, 7, 3, 3)
    assert scores.shape == (0, 4)


def test_opcheck_of_told_tasks() -> None:
    query, keys, values, scale = bank()
    for task in (torch.tensor([3, 0, 1]), TASKS["mask"]):
        leaves = [t.clone().requires_grad_() for t in (query, keys, values, scale)]
        opcheck(torch.ops.r2r.bank_retrieve.default, (*leaves[:3], torch.tensor(UNEVEN), leaves[3], task, "hard"))


def test_autocast_and_flops() -> None:
    query, keys, values, scale = bank()
    counts = torch.full((4,), 6)
    with torch.autocast("cpu", torch.bfloat16):
        readout, scores = F.bank_retrieve(query.bfloat16(), keys, values, counts, scale)
    assert readout.dtype == scores.dtype == torch.float32
    with FlopCounterMode(display=False) as counter:
        F.bank_retrieve(query, keys, values, counts, scale)
    assert counter.get_total_flops() == 2 * 3 * (keys.numel() + values[0].numel())


def test_bad_input() -> None:
    query, keys, values, scale = bank()
    counts = torch.tensor(UNEVEN)
    with pytest.raises(ValueError, match=r"told tasks must be 0 to 3, got 4"):
        F.bank_retrieve(query, keys, values, counts, scale, 4)
    with pytest.raises(ValueError, match=r"told tasks must be 0 to 3"):
        F.bank_retrieve(query, keys, values, counts, scale, torch.tensor([0, -1, 1]))
    with pytest.raises(ValueError, match=r"task must be \[3\] for 3 queries, got \[2\]"):
        F.bank_retrieve(query, keys, values, counts, scale, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"task must be of an integer dtype or bool, got torch.float32"):
        F.bank_retrieve(query, keys, values, counts, scale, torch.zeros(3))
    with pytest.raises(ValueError, match=r"a task that takes part holds no slots in the bank"):
        F.bank_retrieve(query, keys, values, counts, scale, 2)
    with pytest.raises(ValueError, match=r"a task that takes part holds no slots in the bank"):
        F.bank_retrieve(query, keys, values, torch.zeros_like(counts), scale)
    with pytest.raises(ValueError, match=r"counts must be 0 to 6"):
        F.bank_retrieve(query, keys, values, counts + 1, scale)
    with pytest.raises(ValueError, match=r"keys must be \['T', 'S', 5, 3, 3\] to fit the query, got \[4, 6, 4, 3, 3\]"):
        F.bank_retrieve(query, keys[:, :, :4], values, counts, scale)
    with pytest.raises(ValueError, match=r"values must be \[4, 6, 'Cv', 3, 3\] to fit the keys, got \[4, 5, 7, 3, 3\]"):
        F.bank_retrieve(query, keys, values[:, :5], counts, scale)
    with pytest.raises(ValueError, match=r"counts must be \[4\] to fit the keys, got \[3\]"):
        F.bank_retrieve(query, keys, values, counts[:3], scale)
    with pytest.raises(TypeError, match=r"counts must be an int64 tensor, got torch.float32"):
        F.bank_retrieve(query, keys, values, counts.float(), scale)
    far = [t.to("meta") for t in (query, keys, values, counts)]
    with pytest.raises(ValueError, match=r"keys must be on cpu as query is, got meta"):
        F.bank_retrieve(query, far[1], values, counts, scale)
    with pytest.raises(ValueError, match=r"values must be on cpu as query is, got meta"):
        F.bank_retrieve(query, keys, far[2], counts, scale)
    with pytest.raises(ValueError, match=r"counts must be on cpu as query is, got meta"):
        F.bank_retrieve(query, keys, values, far[3], scale)
    with pytest.raises(ValueError, match=r"scale must be a number or a 0-d float tensor on cpu, .* on meta"):
        F.bank_retrieve(query, keys, values, counts, scale.to("meta"))
    with pytest.raises(ValueError, match=r"task must be on cpu as query is, got meta"):
        F.bank_retrieve(query, keys, values, counts, scale, torch.zeros(3, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"told tasks must be 0 to 3, got \[0, 4, 1\]"):
        F.bank_retrieve(far[0], far[1], far[2], far[3], scale.to("meta"), torch.tensor([0, 4, 1]))
    with pytest.raises(TypeError, match=r"values must be torch.float32 as keys are, got torch.bfloat16"):
        F.bank_retrieve(query, keys, values.bfloat16(), counts, scale)
    with pytest.raises(ValueError, match=r'mode must be "hard", "multi" or "soft", got \'best\''):
        F.bank_retrieve(query, keys, values, counts, scale, mode="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale must be a number or a 0-d float tensor on cpu"):
        F.bank_retrieve(query, keys, values, counts, torch.ones(2))


def test_the_host_never_waits_for_a_device() -> None:
    """Meta tensors have no values: whatever asks for one raises. The launchers of the kernels are left out."""
    query, keys, values, scale = (t.to("meta") for t in bank())
    counts = torch.tensor(UNEVEN, device="meta")
    for mode in ("hard", "multi", "soft"):
        for task in (None, 1, torch.tensor([3, 0, 1]), torch.zeros(3, dtype=torch.int64, device="meta")):
            readout, scores = F.bank_retrieve(query, keys, values, counts, scale, task, mode)
            told = task.to("meta") if isinstance(task, Tensor) else None
            *_, weights = bank_retrieve.forward(query, keys, values, counts, scale, told, mode)
            gradients = bank_retrieve.backward(readout, scores, query, keys, values, counts, scale, weights)
            assert [g.shape for g in gradients] == [t.shape for t in (query, keys, values, scale)]


@pytest.mark.gpu
def test_captured_in_a_graph_follows_the_query() -> None:
    """The task is known on the device only: a captured retrieval chooses anew at each replay."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    query, keys, values, scale = (t.cuda() for t in bank(4))
    counts = torch.full((4,), 6, device="cuda")
    F.bank_retrieve(query, keys, values, counts, scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        readout, scores = F.bank_retrieve(query, keys, values, counts, scale)
    for _ in range(2):
        query.copy_(query.roll(1, 0))
        graph.replay()
        wanted = reference.bank_retrieve(query, keys, values, counts, scale)
        torch.testing.assert_close((readout, scores), wanted)
