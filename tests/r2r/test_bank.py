"""The bank: adding, removing and replacing tasks."""

from __future__ import annotations

import pytest
import torch

from r2r import DegradationBank


@pytest.fixture
def bank() -> DegradationBank:
    bank = DegradationBank(("a", "b"), slots=4, key_channels=3, value_channels=5, size=2)
    bank.replace(torch.rand(2, 4, 3, 2, 2), torch.rand(2, 4, 5, 2, 2), torch.tensor([True, True]))
    return bank


def test_replace_touches_present_tasks_only(bank: DegradationBank) -> None:
    keys, old = torch.rand(2, 4, 3, 2, 2), bank.keys.clone()
    bank.replace(keys, torch.rand(2, 4, 5, 2, 2), torch.tensor([False, True]))
    assert torch.equal(bank.keys[0], old[0])
    assert torch.equal(bank.keys[1], keys[1])


def test_tasks_of_other_counts_are_padded(bank: DegradationBank) -> None:
    keys, values = torch.rand(6, 3, 2, 2), torch.rand(6, 5, 2, 2)
    old = bank.keys.clone()
    bank.add_task("c", keys, values)
    assert bank.tasks == ("a", "b", "c")
    assert bank.counts.tolist() == [4, 4, 6]
    assert torch.equal(bank.keys[2], keys)
    assert torch.equal(bank.keys[:2, :4], old)
    bank.add_task("d", keys[:1], values[:1])
    assert bank.counts.tolist() == [4, 4, 6, 1]
    bank.remove_task("a")
    assert bank.tasks == ("b", "c", "d")
    assert torch.equal(bank.keys[0, :4], old[1])


def test_likeness_is_a_cosine(bank: DegradationBank) -> None:
    likeness = bank.likeness()
    torch.testing.assert_close(likeness.diagonal(), torch.ones(2))
    flat = bank.keys.flatten(2).mean(1)
    torch.testing.assert_close(likeness[0, 1], torch.cosine_similarity(flat[0], flat[1], dim=0))


def test_bad_tasks_are_named(bank: DegradationBank) -> None:
    keys, values = torch.rand(4, 3, 2, 2), torch.rand(4, 5, 2, 2)
    with pytest.raises(ValueError, match="already has a task 'a'"):
        bank.add_task("a", keys, values)
    with pytest.raises(ValueError, match=r"keys must be \[slots, 3, 2, 2\]"):
        bank.add_task("c", values, values)
    with pytest.raises(ValueError, match=r"values must be \[slots, 5, 2, 2\]"):
        bank.add_task("c", keys, values[:2])
    with pytest.raises(ValueError, match="no task 'z'"):
        bank.remove_task("z")
    bank.remove_task("a")
    with pytest.raises(ValueError, match="last task"):
        bank.remove_task("b")
