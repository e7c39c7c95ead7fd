"""Rounds are interleaved, phases apart, peaks seen; no assertion on how long anything takes."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from benchmarks.timing import Contender, Effort, Measurement, Observation, measure, observe, percentile

CPU = torch.device("cpu")
SHORT = Observation({}, None)


def measured(contender: Contender, effort: Effort, first: Observation = SHORT) -> Measurement:
    return measure({"": contender}, {"": first}, CPU, effort)[""]


def test_rivals_take_turns() -> None:
    calls: list[str] = []
    x = torch.rand(300_000)

    def of(name: str) -> Contender:
        def call() -> torch.Tensor:
            calls.append(name)
            return x.sort().values  # longer than the least sample

        return Contender({"": call})

    found = measure({name: of(name) for name in "abc"}, dict.fromkeys("abc", SHORT), CPU, Effort(0.0, 4, 4))
    assert all(len(one.samples[""]) == 4 and one.iterations == 1 for one in found.values())
    rounds = [calls[start : start + 3] for start in range(3, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1, "the order never changed"


def test_short_calls_are_repeated_within_a_sample() -> None:
    count = [0]

    def call() -> None:
        count[0] += 1

    found = measured(Contender({"": call}), Effort(0.0, 2, 2))
    assert found.iterations > 10
    assert count[0] == 1 + 2 * found.iterations


def test_one_round_is_the_one_that_was_observed() -> None:
    """32 photos of 224 x 224 take minutes with all rivals."""
    calls: list[str] = []
    contender = Contender({name: lambda name=name: calls.append(name) for name in ("forward", "backward")})  # type: ignore[misc]
    found = measured(contender, Effort(0.0, 1, 1))
    assert calls == ["forward", "backward"]
    assert [len(samples) for samples in found.samples.values()] == [1, 1]


@pytest.mark.parametrize("compiles", [False, True])
def test_a_call_of_minutes_is_made_once_unless_it_compiled(compiles: bool) -> None:
    """A photo of 24 MP takes minutes with each rival."""
    calls = []
    contender = Contender({"": lambda: calls.append("")}, compiles=compiles)
    found = measured(contender, Effort(0.0, 3, 3), Observation({"": 100.0}, 5))
    if compiles:
        assert len(calls) > 3
        assert found.peak != 5
        assert 100.0 not in found.samples[""]
    else:
        assert (calls, found.peak, found.samples) == ([], 5, {"": [100.0]})


def test_phases_run_in_order() -> None:
    calls: list[str] = []
    contender = Contender({name: lambda name=name: calls.append(name) for name in ("forward", "backward")})  # type: ignore[misc]
    answers, first = observe(contender, CPU)
    assert (answers, list(first.seconds)) == ([None, None], ["forward", "backward"])
    found = measured(contender, Effort(0.0, 2, 2), first)
    assert calls == ["forward", "backward"] * 4
    assert [len(samples) for samples in found.samples.values()] == [2, 2]


@pytest.mark.skipif(sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc")
def test_peak_memory_of_a_call() -> None:
    call = Contender({"": lambda: torch.zeros(2**24).sum()})
    assert measured(call, Effort(0.0, 1, 1)).peak == pytest.approx(2**26, rel=0.1)


def test_effort() -> None:
    effort = Effort(seconds=2.0, least=3, most=20)
    assert [effort.rounds(a_round) for a_round in (1e-3, 0.2, 5.0, 100.0)] == [20, 10, 3, 1]


def test_percentiles() -> None:
    samples = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [percentile(samples, p) for p in (20, 50, 80)] == pytest.approx([1.8, 3.0, 4.2])
    assert percentile([7.0], 80) == 7.0
