"""Strengths of tasks: how much of a task's restoration is mixed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data

from r2r import R2R, fast
from r2r.bank import DegradationBank
from r2r.config import TrainConfig
from r2r.errors import InputError
from r2r.frozen import inference_form
from r2r.training import build_model
from tests.conftest import finding_nothing, whole_and_tiled, with_the_same_attention_everywhere

TASKS = ("denoise", "derain", "dehaze")
STRENGTHS = {"denoise": 0.25, "dehaze": 0.5}
PHOTO = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255  # [1, 3, 400, 600]
CROP = PHOTO[:, :, :200, :240]


@pytest.mark.parametrize(
    ("task", "strength"),
    [("denoise", 0.25), ("derain", 1.0), ("dehaze", 0.5), ("denoise+dehaze", 0.375), ("denoise+derain", 0.625)],
)
def test_told_tasks_are_mixed_in_by_the_mean_of_their_strengths(task: str, strength: float) -> None:
    full = finding_nothing(mixtures=True).restore(CROP, task).image
    image = finding_nothing(mixtures=True, strengths=STRENGTHS).restore(CROP, task).image
    torch.testing.assert_close(image, CROP + strength * (full - CROP))
    assert torch.equal(image, full) == (strength == 1)
    half = finding_nothing(mixtures=True, strengths=STRENGTHS).restore(CROP, task, strength=0.5).image
    torch.testing.assert_close(half, CROP + strength / 2 * (full - CROP))


def test_blind_every_photo_of_a_batch_has_its_own() -> None:
    plain, model = (
        finding_nothing(mixtures=True),
        finding_nothing(mixtures=True, strengths={"dehaze": 0.5, "denoise": 0}),
    )
    batch = CROP.expand(4, -1, -1, -1)
    tasks = torch.tensor([[False, False, True], [False, True, False], [True, False, False], [False] * 3])
    full, images = (one.restore(batch, tasks).image for one in (plain, model))
    torch.testing.assert_close(images[0], (full[0] + CROP[0]) / 2)
    assert torch.equal(images[1], full[1])
    assert torch.equal(images[2:], batch[2:])
    for one in (plain, model):
        one.bank.offset[2] += 200
    torch.testing.assert_close(model(CROP), (plain(CROP) + CROP) / 2)


def test_a_model_that_names_one_task_has_them_too() -> None:
    plain, model = finding_nothing(), finding_nothing(strengths=STRENGTHS)
    for task, strength in (("denoise", 0.25), ("derain", 1.0)):
        full = plain.restore(CROP, task).image
        torch.testing.assert_close(model.restore(CROP, task).image, CROP + strength * (full - CROP))
    chosen = TASKS[int(plain.restore(CROP).task)]
    torch.testing.assert_close(model(CROP), CROP + STRENGTHS.get(chosen, 1) * (plain(CROP) - CROP))


def test_what_lies_smoothly_over_a_photo_is_taken_off_in_part() -> None:
    settings: dict[str, Any] = {"mixtures": True, "smooth_tasks": ["dehaze"]}
    full, half, none = (
        finding_nothing(**settings, strengths={"dehaze": s}).restore(PHOTO, "dehaze").image for s in (1, 0.5, 0)
    )
    assert (full - PHOTO).abs().mean() > 0.01
    between = (half - PHOTO).abs().mean() / (full - PHOTO).abs().mean()
    assert 0.3 < between < 0.7
    assert (none - PHOTO).abs().mean() < 0.002  # a guided filter's gain is nearly 1


def test_frozen_and_fast_models_do_the_same() -> None:
    wanted = finding_nothing(mixtures=True, strengths=STRENGTHS).restore(CROP, "dehaze")
    quick = finding_nothing(fast.R2R, mixtures=True, strengths=STRENGTHS)
    for one in (quick, inference_form(quick)):
        torch.testing.assert_close(one.restore(CROP, "dehaze").image, wanted.image, rtol=0, atol=1e-3)


def test_tiles_give_what_one_piece_gives() -> None:
    model = with_the_same_attention_everywhere(finding_nothing(mixtures=True, strengths=STRENGTHS))
    pixels = np.ascontiguousarray(PHOTO[0, :, :400, :420].permute(1, 2, 0).numpy())
    for task in ("denoise", "derain", "dehaze"):
        whole, tiled = whole_and_tiled(model, pixels, task=task)
        assert np.abs(whole.pixels - tiled.pixels).max() < 2e-3
        assert np.abs(whole.pixels - pixels).max() > 0.01
    model.bank.strengths["denoise"] = 0
    for restored in whole_and_tiled(model, pixels, task="denoise"):
        assert np.abs(restored.pixels - pixels).max() < 1e-6


def test_training_sees_all_of_a_restoration() -> None:
    labels = torch.tensor([[False, False, True]])
    plain, model = (finding_nothing(mixtures=True, strengths=s).train() for s in ({}, STRENGTHS))
    assert torch.equal(plain(CROP, labels).restored, model(CROP, labels).restored)


def test_they_are_saved_and_go_with_the_bank(tmp_path: Path) -> None:
    finding_nothing(mixtures=True, strengths=STRENGTHS).save_pretrained(tmp_path / "model")
    loaded = R2R.from_pretrained(tmp_path / "model")
    assert loaded.config["strengths"] == STRENGTHS
    other = DegradationBank(["denoise"], 9, 8, 64, 2)
    assert other.take_over(loaded.bank) == ("derain", "dehaze")
    assert other.strengths == {"dehaze": 0.5}
    other.remove_task("dehaze")
    assert other.strengths == {}

    config = TrainConfig(tasks=["dehaze", "desnow"], data=[{}], init=str(tmp_path / "model"))
    assert build_model(config, mixtures=True).bank.strengths == {"dehaze": 0.5}
    config.model = {"strengths": {"desnow": 2}}
    with pytest.raises(InputError, match=r"model: strengths must be 0..1, of tasks among dehaze, desnow; got"):
        build_model(config, mixtures=True)


@pytest.mark.parametrize("wrong", [{"desnow": 0.5}, {"denoise": 1.5}, {"denoise": -1}, {"denoise": "half"}, [1], 0.5])
def test_a_config_with_others_is_refused_in_one_line(tmp_path: Path, wrong: object) -> None:
    finding_nothing(mixtures=True).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "strengths": wrong}))
    with pytest.raises(InputError, match=r"config.json does not describe an R2R model: .+"):
        R2R.from_pretrained(tmp_path)
