"""Evaluation reports what the model really does, on real photos."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from rich.console import Console

from r2r import R2R, InputError
from r2r.data.dataset import EvaluationPair
from r2r.data.images import write_rgb
from r2r.data.sources import build_source
from r2r.evaluation import (
    Evaluation,
    EvaluationSet,
    ImageResult,
    Quality,
    SetResult,
    evaluate,
    evaluation_set,
    load_sets,
)
from r2r.metrics import centre_crop, psnr, ssim

PHOTOS = {
    "astronaut": skimage.data.astronaut()[:70, 180:270],
    "cat": skimage.data.chelsea()[60:130, 100:190],
    "coffee": skimage.data.coffee()[150:220, 200:290],
}


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    for name, photo in PHOTOS.items():
        write_rgb(tmp_path / "clean" / f"{name}.png", photo / np.float32(255))
    return tmp_path / "clean"


@pytest.fixture
def pairs(clean: Path) -> Path:
    """Pairs of photos made darker."""
    for name, photo in PHOTOS.items():
        write_rgb(clean.parent / "degraded" / f"{name}.png", photo / np.float32(255) * 0.6)
    return clean.parent


@pytest.fixture
def sets(tiny_model: R2R, clean: Path, pairs: Path) -> list[EvaluationSet]:
    entries = ({"task": "denoise", "clean": clean, "sigma": 25}, {"name": "dark", "task": "dehaze", "pairs": pairs})
    return [evaluation_set(build_source(entry, tiny_model.tasks), 3) for entry in entries]


def test_numbers_are_those_of_restoring_by_hand(tiny_model: R2R, sets: list[EvaluationSet]) -> None:
    result = evaluate(tiny_model, sets)
    assert [(one.name, one.tasks) for one in result.sets] == [("denoise", ("denoise",)), ("dark", ("dehaze",))]
    for one, measured in zip(sets, result.sets, strict=True):
        assert [image.name for image in measured.images] == ["astronaut", "cat", "coffee"]
        for index, image in enumerate(measured.images):
            lq, hq = (centre_crop(x) for x in one.pairs[index][1:3])
            assert lq.shape == (3, 64, 80)
            (own,) = one.labels
            wrong = [task for task in range(3) if task != own][index % 2]
            for kind, task in (("input", None), ("blind", None), ("told", measured.tasks[0]), ("misled", wrong)):
                restored = tiny_model.restore(lq[None], task)
                by_hand = lq if kind == "input" else restored.image[0]
                quality = getattr(image, kind)
                assert quality.psnr == pytest.approx(psnr(by_hand, hq).item(), abs=1e-3), kind
                assert quality.ssim == pytest.approx(ssim(by_hand, hq), abs=1e-4), kind
                if kind == "blind":
                    assert image.chosen == (tiny_model.tasks[int(restored.task)],)
        assert measured.blind.psnr == pytest.approx(np.mean([image.blind.psnr for image in measured.images]))
        assert measured.input.ssim == pytest.approx(np.mean([image.input.ssim for image in measured.images]))
    assert result.psnr == pytest.approx(np.mean([one.blind.psnr for one in result.sets]))
    noisy, dark = result.sets
    assert 20 < noisy.input.psnr < 21.5  # sigma 25: 20.17 dB, a little more where it is clipped
    assert noisy.blind.psnr != noisy.input.psnr != dark.input.psnr


def test_telling_the_task_matters_where_another_is_chosen(tiny_model: R2R, sets: list[EvaluationSet]) -> None:
    result = evaluate(tiny_model, sets)
    images = [(one.tasks, image) for one in result.sets for image in one.images]
    assert any(tasks != image.chosen for tasks, image in images)
    assert all((image.blind == image.told) == (tasks == image.chosen) for tasks, image in images)
    without = evaluate(tiny_model, sets, told=False)
    assert [one.told for one in without.sets] == [one.misled for one in without.sets] == [None, None]
    assert [one.blind for one in without.sets] == [one.blind for one in result.sets]


def test_repeated_evaluations_agree_and_the_seed_matters(tiny_model: R2R, clean: Path) -> None:
    source = build_source({"task": "denoise", "clean": clean, "sigma": 25}, tiny_model.tasks)
    first, again, other = (
        evaluate(tiny_model, [evaluation_set(source, 3, seed=seed)]).sets[0].input.psnr for seed in (0, 0, 1)
    )
    assert first == again != other


def result_of(choices: Sequence[tuple[tuple[str, ...], tuple[str, ...]]], tasks: tuple[str, ...]) -> Evaluation:
    """An evaluation of sets with one image each, from their true and chosen tasks."""
    q = Quality(30.0, 0.9)
    sets = []
    for true, chosen in choices:
        likely = tuple(0.9 if task in chosen else 0.1 for task in tasks)
        image = ImageResult("x", chosen, likely, False, q, q, q, q)
        sets.append(SetResult("+".join(true), true, (), (image,), q, q, q, q, float(true == chosen), 0.0))
    return Evaluation(tasks, tuple(sets), 1, 1.0, 1.0, 1, "CPU")


def test_confusion_and_accuracy() -> None:
    single = result_of([(("a",), ("a",)), (("a",), ("c",)), (("b",), ("b",))], ("a", "b", "c"))
    assert single.confusion == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert single.accuracy == pytest.approx(2 / 3)
    assert single.task_accuracy == pytest.approx({"a": 2 / 3, "b": 1, "c": 2 / 3})
    # Six times 0.1 is said and once it is so; three times 0.9 and twice it is so.
    assert single.calibration_error == pytest.approx((abs(1 - 6 * 0.1) + abs(2 - 3 * 0.9)) / 9)
    mixed = result_of([(("a", "b"), ("a", "b")), (("a", "b"), ("a",)), (("c",), ("a", "c"))], ("a", "b", "c"))
    assert mixed.confusion == [[2, 1, 0], [2, 1, 0], [1, 0, 1]]
    assert mixed.accuracy == pytest.approx(1 / 3)  # all of an image's tasks, and no other
    assert mixed.task_accuracy == pytest.approx({"a": 2 / 3, "b": 2 / 3, "c": 1})


def test_mixtures_are_told_all_their_tasks(tiny_model: R2R, clean: Path) -> None:
    model = R2R(**{**tiny_model.config, "mixtures": True})
    model.load_state_dict(tiny_model.state_dict())
    source = build_source({"task": ["denoise", "dehaze"], "clean": clean, "degradation": "noise+haze"}, model.tasks)
    one = evaluation_set(source, 3, mixtures=True)
    result = evaluate(model, [one]).sets[0]
    assert result.tasks == ("denoise", "dehaze")
    lq, hq = (centre_crop(x) for x in one.pairs[0][1:3])
    by_hand = model.eval().restore(lq[None], torch.tensor([[True, False, True]])).image[0]
    assert result.images[0].told is not None
    assert result.images[0].told.psnr == pytest.approx(psnr(by_hand, hq).item(), abs=1e-3)
    blind = model.restore(lq[None]).task[0].tolist()
    assert result.images[0].chosen == tuple(task for task, taken in zip(model.tasks, blind, strict=True) if taken)


def test_photos_with_nothing_wrong_are_to_stay_untouched(tiny_model: R2R, clean: Path) -> None:
    model = R2R(**{**tiny_model.config, "mixtures": True})
    model.load_state_dict(tiny_model.state_dict())
    entries = [{"task": [], "clean": clean}, {"task": "derain", "optional": "denoise", "clean": clean}]
    sets = [evaluation_set(build_source(entry, model.tasks), 3, mixtures=True) for entry in entries]
    model.bank.offset -= 1000
    nothing, rain = evaluate(model, sets).sets
    assert (nothing.name, nothing.tasks, nothing.told) == ("clean", (), None)
    assert (nothing.untouched, nothing.accuracy, rain.untouched, rain.accuracy) == (1, 1, 1, 0)
    assert nothing.misled is not None
    assert nothing.misled.psnr < 100 == nothing.blind.psnr
    assert rain.blind == rain.input
    model.bank.offset.copy_(torch.tensor([1000.0, 1000.0, -1000.0]))
    result = evaluate(model, sets)
    nothing, rain = result.sets
    assert (nothing.untouched, nothing.accuracy, rain.untouched, rain.accuracy) == (0, 0, 0, 1)
    assert result.psnr == rain.blind.psnr  # a photo with nothing wrong has no part in the mean
    assert 0 < result.calibration_error < 1


def test_sizes_are_the_papers(tiny_model: R2R, sets: list[EvaluationSet]) -> None:
    result = evaluate(tiny_model, sets[:1], told=False)
    model = R2R(**{**tiny_model.config, "amalgamator": False})
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0.05 < result.gmacs < 12.75 / 32  # an eighth of the paper's width and few of its blocks
    assert result.seconds > 0
    assert result.peak_memory > 50 * 2**20


def test_perfect_images_count_100_db(tiny_model: R2R) -> None:
    photo = torch.full((3, 32, 32), 0.5)
    pair = EvaluationPair("flat", photo, photo.clone(), torch.tensor(0))
    result = evaluate(tiny_model, [EvaluationSet("flat", (0,), [pair])])
    assert result.sets[0].input == Quality(100.0, 1.0)
    assert math.isfinite(result.psnr)


def test_the_result_is_json_and_tables(tiny_model: R2R, sets: list[EvaluationSet]) -> None:
    result = evaluate(tiny_model, sets)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["sets"][1]["blind"]["psnr"] == result.sets[1].blind.psnr
    assert written["sets"][0]["images"][2]["name"] == "coffee"
    assert written["confusion"] == result.confusion
    assert sum(map(sum, written["confusion"])) == 6
    assert {"tasks", "parameters", "gmacs", "seconds", "peak_memory", "device", "psnr", "accuracy"} <= written.keys()
    for shown in (result, evaluate(tiny_model, sets, told=False)):
        console = Console(width=120, file=io.StringIO(), record=True)
        shown.render(console)
        text = console.export_text()
        assert f"{shown.sets[0].blind.psnr:.2f} / {shown.sets[0].blind.ssim:.3f}" in text
        assert f"{shown.gmacs:.2f} GMAC" in text
        assert "dehaze" in text
        assert "mean" in text


def test_progress_comes_after_each_image(tiny_model: R2R, sets: list[EvaluationSet]) -> None:
    seen = []
    evaluate(tiny_model, sets, progress=lambda one, image: seen.append((one.name, image.name)))
    assert seen == [(name, image) for name in ("denoise", "dark") for image in PHOTOS]


def test_an_unreadable_file_fails(tiny_model: R2R, clean: Path, sets: list[EvaluationSet]) -> None:
    path = clean / "cat.png"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cat\.png: damaged or cut short"):
        evaluate(tiny_model, sets)


def test_what_cannot_be_evaluated(tiny_model: R2R, sets: list[EvaluationSet]) -> None:
    small = EvaluationPair("small", torch.zeros(3, 6, 40), torch.zeros(3, 6, 40), torch.tensor(0))
    for bad, line in (
        ([], "no set was given"),
        ([EvaluationSet("none", (0,), [])], "none: no image"),
        ([EvaluationSet("tiny", (0,), [small])], "small: 32 x 6; at least 7 x 7"),
    ):
        with pytest.raises(InputError, match=line):
            evaluate(tiny_model, bad)
    tiny_model.bank.counts[0] = 0
    with pytest.raises(InputError, match="denoise: the model's bank holds nothing for denoise"):
        evaluate(tiny_model, sets)
    with pytest.raises(InputError, match="the bank is empty"):
        evaluate(R2R(**tiny_model.config), sets)


def test_sets_from_yaml(tiny_model: R2R, clean: Path, pairs: Path, tmp_path: Path) -> None:
    path = tmp_path / "sets.yaml"
    path.write_text(
        f"seed: 3\nsets:\n- {{task: denoise, clean: {clean}, sigma: 25}}\n"
        f"- {{name: dark, task: dehaze, pairs: {pairs}, share: 0.25}}\n"
        f"- {{task: derain, clean: {clean}, degradation: 'rain'}}\n"
    )
    sets = load_sets(path, tiny_model.tasks)
    assert [(one.name, one.labels, len(one.pairs), one.share) for one in sets] == [
        ("denoise", (0,), 3, 1),
        ("dark", (2,), 3, 0.25),
        ("derain", (1,), 3, 1),
    ]
    seeded = evaluation_set(build_source({"task": "denoise", "clean": clean, "sigma": 25}, tiny_model.tasks), 3, seed=3)
    assert torch.equal(sets[0].pairs[1].lq, seeded.pairs[1].lq)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "accepted: a list `sets`"),
        ("sets: []", "accepted: a list `sets`"),
        ("sets: [x]", "set 1 is 'x'; accepted: keys and values"),
        ("sets: [{task: denoise, pears: here}]", "set 1: unknown key 'pears'"),
        ("sets: [{task: descale, clean: CLEAN}]", "set 1: unknown task 'descale'"),
        ("sets: [{task: denoise, clean: /nowhere/at/all, sigma: 25}]", "set 1: .*/nowhere/at/all"),
        ("sets: [{task: denoise, clean: CLEAN, sigma: 25}]\nbatch: 3", "unknown key 'batch'; accepted: sets, seed"),
        ("sets: [{task: denoise, clean: CLEAN, sigma: 25}]\nseed: -1", "seed -1; accepted: 0 or more"),
        ("sets: [", "not YAML"),
    ],
)
def test_bad_yaml(tiny_model: R2R, clean: Path, tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "sets.yaml"
    path.write_text(text.replace("CLEAN", str(clean)))
    with pytest.raises(InputError, match=rf"sets\.yaml: {line}") as error:
        load_sets(path, tiny_model.tasks)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"none\.yaml: No such file"):
        load_sets(tmp_path / "none.yaml", tiny_model.tasks)
