"""A task that is learnt on the frozen network: what it takes, and what it leaves as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from skimage import data

from r2r import R2R, InputError
from r2r.data.folders import Pair, clean_folder
from r2r.data.images import write_rgb
from r2r.data.sources import build_source
from r2r.growing import Learning, growth, learn_task, old_sources, split
from tests.conftest import TINY, fill_randomly

QUICK = Learning(steps=12, batch=6, crop=32, slots=3, lr=0.05)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee", "chelsea"):
        write_rgb(folder / f"{name}.png", getattr(data, name)()[:64, :80].astype("float32") / 255)
    return folder


def trained(mixtures: bool) -> R2R:
    torch.manual_seed(0)
    model = R2R(tasks=("denoise", "derain"), mixtures=mixtures, **TINY)
    fill_randomly(model)
    return model.eval()


@pytest.mark.parametrize("mixtures", [False, True])
def test_a_task_is_learnt_and_nothing_else_changes(photos: Path, mixtures: bool) -> None:
    model = trained(mixtures)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    source = build_source({"task": "desnow", "clean": photos, "degradation": "snow"}, (*model.tasks, "desnow"))
    losses: list[float] = []
    grown = learn_task(
        model, "desnow", source, old_sources(model, source.pairs), QUICK, lambda step, loss: losses.append(loss)
    )
    assert len(losses) == QUICK.steps
    assert sum(losses[-4:]) < sum(losses[:4])
    assert grown.tasks == ("denoise", "derain", "desnow")
    assert grown.bank.counts.tolist() == [9, 9, 3]
    assert grown.amalgamator is None
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for name, x in grown.state_dict().items():
        if not name.startswith("bank."):
            assert torch.equal(x, before[name]), name
    lq = torch.rand(2, 3, 40, 32)
    torch.testing.assert_close(grown.restore(lq).scores[:, :2], model.restore(lq).scores)
    torch.testing.assert_close(grown.restore(lq, "derain").image, model.restore(lq, "derain").image)
    assert not torch.allclose(grown.restore(lq, "desnow").image, model.restore(lq, "derain").image)


@pytest.mark.parametrize("mixtures", [False, True])
def test_growth_measures_the_new_task_and_the_old_ones(photos: Path, mixtures: bool) -> None:
    model = trained(mixtures)
    source = build_source({"task": "desnow", "clean": photos, "degradation": "snow"}, (*model.tasks, "desnow"))
    old = old_sources(model, source.pairs)
    assert [one.name for one in old] == ["denoise", "derain"] + ["clean"] * mixtures
    grown = learn_task(model, "desnow", source, old, replace(QUICK, steps=1))
    before, after = growth(model, grown, source, old)
    assert [one.name for one in before.sets] == [one.name for one in after.sets]
    assert after.sets[0].name == "desnow"
    assert [one.input for one in before.sets] == [one.input for one in after.sets]


def test_an_unlike_count_of_slots_moves_no_score() -> None:
    model = trained(True)
    lq = torch.rand(2, 3, 32, 32)
    before = model.restore(lq).scores
    model.freeze_bank()
    model.bank.add_task("one", model.bank.keys[0, :1], model.bank.values[0, :1])
    torch.testing.assert_close(model.restore(lq).scores[:, :2], before)


def test_what_is_held_out_is_a_fifth_at_most() -> None:
    pairs = [Pair(str(index), Path(str(index))) for index in range(100)]
    for number, wanted in ((2, 1), (9, 1), (10, 2), (100, 8)):
        learnt, held_out = split(pairs[:number])
        assert len(held_out) == wanted
        assert {*learnt, *held_out} == {*pairs[:number]}
        assert not {*learnt} & {*held_out}
    with pytest.raises(InputError, match="two or more"):
        split(pairs[:1])


def test_what_cannot_be_learnt(photos: Path) -> None:
    model = trained(True)
    pairs = tuple(clean_folder(photos))
    source = build_source({"task": "new", "clean": photos, "degradation": "snow"}, (*model.tasks, "new"))
    with pytest.raises(InputError, match="already has a task 'derain'; its tasks are denoise, derain"):
        learn_task(model, "derain", source, old_sources(model, pairs), QUICK)
    with pytest.raises(InputError, match=r"task 'a/\+b'; accepted: names of letters, digits, - and _"):
        learn_task(model, "a/+b", source, old_sources(model, pairs), QUICK)
    with pytest.raises(InputError, match="smaller than the crop"):
        learn_task(model, "new", source, old_sources(model, pairs), replace(QUICK, crop=512))
    with pytest.raises(InputError, match="none of the model's tasks is known"):
        learn_task(model, "new", source, (), QUICK)
