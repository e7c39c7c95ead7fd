"""Which graph is replayed; graphs themselves are stood in for, as they need a GPU (`test_frozen.py` runs real ones)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from r2r import replay
from r2r.replay import Replays


class Recorded:
    """A graph that calls the function it was made of."""

    def __init__(self, function: Any, inputs: Any) -> None:
        self.function = function
        self.done = self

    def synchronize(self) -> None:
        pass

    def replay(self, inputs: Any) -> Any:
        return [*self.function(*inputs), "replayed"]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Replays:
    monkeypatch.setattr(replay, "_Graph", Recorded)
    return Replays(most=2)


def double(x: Tensor) -> list[Tensor]:
    return [2 * x]


def test_the_second_call_of_a_shape_captures(replays: Replays) -> None:
    x = torch.ones(3)
    assert len(replays(double, (x,))) == 1
    assert len(replays(double, (x,))) == 2
    assert len(replays(double, (torch.ones(4),))) == 1


@pytest.mark.parametrize("how", ["another tensor", "other memory", "one less"])
def test_graphs_are_forgotten_when_what_they_read_is_exchanged(replays: Replays, how: str) -> None:
    x, weights = torch.ones(3), [torch.ones(5), torch.ones(6)]
    for _ in range(2):
        replays(double, (x,), weights)
    assert len(replays) == 1
    if how == "another tensor":
        weights[1] = torch.ones(6)
    elif how == "other memory":
        weights[1].data = torch.ones(6)
    else:
        weights.pop()
    assert len(replays(double, (x,), weights)) == 1
    assert len(replays) == 0
    assert len(replays(double, (x,), weights)) == 2


def test_changes_in_place_keep_the_graph(replays: Replays) -> None:
    x, weight = torch.ones(3), torch.ones(5)
    for _ in range(2):
        replays(double, (x,), [weight])
    weight += 1
    assert len(replays(double, (x,), [weight])) == 2
