from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r2r.data.dataset import Key, Source
from r2r.data.degradations import Noise
from r2r.data.folders import Pair
from r2r.data.sampler import EpochSampler
from r2r.errors import InputError


def source(labels: tuple[int, ...], images: int, repeat: int = 1) -> Source:
    pairs = tuple(Pair(str(index), Path(f"{index}.png")) for index in range(images))
    return Source("-".join(map(str, labels)), labels, pairs, Noise(), repeat)


def reference_tasks(batch: list[Key], sources: list[Source]) -> set[int]:
    return {label for key in batch[len(batch) // 2 :] for label in sources[key[0]].labels}


SOURCES = [source((0,), 30), source((1,), 5, repeat=3), source((2,), 2)]


def test_an_epoch_shows_every_image_as_often_as_it_repeats() -> None:
    sources = [source((0,), 7, repeat=2), source((1,), 3, repeat=2)]
    sampler = EpochSampler(sources, 4, 2)
    assert sampler.steps_per_epoch == len(sampler) == 5
    seen = Counter(key[:2] for batch in sampler for key in batch)
    assert sum(seen.values()) == 20
    # Swaps for missing tasks may move a few; the order itself holds each image twice.
    order = Counter(map(tuple, sampler._epoch_order(0).tolist()))
    assert order == {(0, index): 2 for index in range(7)} | {(1, index): 2 for index in range(3)}
    moved = sum((seen - order).values())
    assert moved <= sampler.steps_per_epoch


def test_the_same_again_and_another_epoch_otherwise() -> None:
    batches = list(EpochSampler(SOURCES, 8, 3, seed=5))
    assert list(EpochSampler(SOURCES, 8, 3, seed=5)) == batches
    assert list(EpochSampler(SOURCES, 8, 3, seed=6)) != batches
    later = list(EpochSampler(SOURCES, 8, 3, seed=5, epoch=1))
    assert [[key[:2] for key in batch] for batch in later] != [[key[:2] for key in batch] for batch in batches]


@pytest.mark.parametrize("steps", [None, 9])
def test_resuming_anywhere_gives_the_batches_that_were_left(steps: int | None) -> None:
    sampler = EpochSampler(SOURCES, 6, 3, seed=1, steps=steps)
    sampler.set_position(4, 0)
    batches = list(sampler)
    for place in range(sampler.steps_per_epoch + 1):
        fresh = EpochSampler(SOURCES, 6, 3, seed=1, steps=steps)
        fresh.set_position(4, place)
        assert len(fresh) == len(batches) - place
        assert list(fresh) == batches[place:]
        assert list(fresh) == batches[place:]  # iterating does not move the position


@pytest.mark.parametrize("batch_size", [5, 6, 7])
def test_every_task_is_in_the_half_that_builds_the_bank(batch_size: int) -> None:
    sources = [source((0,), 500), source((1,), 2), source((2,), 1)]
    for epoch in range(3):
        for batch in EpochSampler(sources, batch_size, 3, epoch=epoch):
            assert len(batch) == batch_size
            assert reference_tasks(batch, sources) == {0, 1, 2}


def test_every_task_of_mixtures_too() -> None:
    sources = [source((0, 1), 300), source((1, 2), 5), source((3,), 1), source((0,), 100)]
    for batch in EpochSampler(sources, 8, 4):
        assert reference_tasks(batch, sources) == {0, 1, 2, 3}


def test_the_restored_half_is_not_touched_by_swaps() -> None:
    sources = [source((0,), 200), source((1,), 1)]
    sampler = EpochSampler(sources, 4, 2)
    order = sampler._epoch_order(0)
    for index, batch in enumerate(sampler):
        expected = [tuple(row) for row in order[4 * index : 4 * index + 2].tolist()]
        assert [key[:2] for key in batch[:2]] == expected


def test_draws_differ_and_fit_a_seed() -> None:
    draws = [key[2] for batch in EpochSampler(SOURCES, 6, 3, steps=200) for key in batch]
    assert len(set(draws)) == len(draws)
    assert min(draws) >= 0
    assert max(draws) < 2**63
    assert np.mean(draws) == pytest.approx(2**62, rel=0.05)


def test_fixed_steps_are_balanced_over_tasks_not_images() -> None:
    sources = [source((0,), 1000), source((1,), 10), source((1,), 30), source((2,), 3)]
    sampler = EpochSampler(sources, 12, 3, steps=300)
    assert len(sampler) == 300
    # Only the restored half: the other one is touched up.
    counts = Counter(key[0] for batch in sampler for key in batch[:6])
    total = sum(counts.values())
    assert counts[0] / total == pytest.approx(1 / 3, abs=0.04)
    assert counts[3] / total == pytest.approx(1 / 3, abs=0.04)
    assert counts[2] / counts[1] == pytest.approx(3, rel=0.4)


def test_what_cannot_be_sampled() -> None:
    with pytest.raises(InputError, match=r"batch size 4: its second half.* 2 samples for 3 tasks; accepted: 5 or more"):
        EpochSampler(SOURCES, 4, 3)
    with pytest.raises(InputError, match=r"tasks \[3\] have no photos"):
        EpochSampler(SOURCES, 12, 4)
    with pytest.raises(InputError, match="47 samples do not fill a batch of 60"):
        EpochSampler(SOURCES, 60, 3)
    with pytest.raises(InputError, match="accepted: a seed of 0 or more"):
        EpochSampler(SOURCES, 8, 3, seed=-1)
    sampler = EpochSampler(SOURCES, 8, 3)
    with pytest.raises(InputError, match="accepted: batches 0 to 5"):
        sampler.set_position(0, 6)


def test_without_a_bank_a_batch_may_lack_tasks() -> None:
    sources = [source((task,), 3) for task in range(4)]
    (batch,) = EpochSampler(sources, 2, num_tasks=4, steps=1, bank=False)
    assert len(batch) == 2
    with pytest.raises(InputError, match="batch size 2"):
        EpochSampler(sources, 2, num_tasks=4, steps=1)


def test_shares_say_how_often_a_source_comes() -> None:
    sources = [source((0,), 3), source((1,), 3), source((), 3)]
    sources = [replace(one, share=share) for one, share in zip(sources, (6.0, 3.0, 1.0), strict=True)]
    sampler = EpochSampler(sources, 10, 2, steps=300, bank=False)
    counts = np.bincount([key[0] for batch in sampler for key in batch], minlength=3)
    assert counts / counts.sum() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    for batch in EpochSampler(sources, 4, 2, steps=100):
        assert {0, 1} <= {key[0] for key in batch[2:]}  # the half that builds the bank holds every task
