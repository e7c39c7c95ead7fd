"""The configurations that ship load, and mean what the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from r2r import R2R
from r2r.ablation import dotted
from r2r.config import load_config
from r2r.data.degradations import parse_degradation
from r2r.data.layouts import LAYOUTS, REPEATS, cdd11_tasks
from r2r.presets import PRESETS
from r2r.training import learning_rate

FOLDER = Path(__file__).parents[2] / "configs"
SETS = sorted([*FOLDER.glob("evaluate_*.yaml"), *FOLDER.glob("calibrate_*.yaml")])
PAPER = [FOLDER / "paper" / f"{name}.yaml" for name in ("three_tasks", "five_tasks", "mixtures")]
CONFIGS = [*sorted({*FOLDER.glob("*.yaml")} - {*SETS}), *PAPER]
GRIDS = [path for path in sorted(FOLDER.glob("*/*.yaml")) if "variants" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert config.preset in PRESETS
    for entry in config.data:
        named = {entry["task"]} if isinstance(entry["task"], str) else set(entry["task"])
        assert named <= set(config.tasks)
        assert entry.get("layout", "gopro") in LAYOUTS
        if "class" in entry:
            assert set(cdd11_tasks(entry["class"])) == named


@pytest.mark.parametrize(("name", "tasks"), [("three_tasks", 3), ("five_tasks", 5)])
def test_published_repeats(name: str, tasks: int) -> None:
    config = load_config(FOLDER / "paper" / f"{name}.yaml")
    assert {entry["task"]: entry.get("repeat", 1) for entry in config.data} == REPEATS[tasks]


def test_the_mixtures_repeat_as_published() -> None:
    data = load_config(FOLDER / "paper" / "mixtures.yaml").data
    assert [entry.get("repeat") for entry in data] == [9] * 11
    classes = {entry["class"] for entry in data}
    sets = yaml.safe_load((FOLDER / "paper" / "evaluate_mixtures.yaml").read_text())["sets"]
    assert {entry["class"] for entry in sets} == classes
    for entry in sets:
        named = entry["task"]
        assert cdd11_tasks(entry["class"]) == ((named,) if isinstance(named, str) else tuple(named))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_configurations_have_its_recipe(path: Path) -> None:
    config = load_config(path)
    first, second = config.pretrain, config.finetune
    batch = {"three_tasks": 64, "five_tasks": 120, "mixtures": 96}[path.stem]
    assert (first.epochs, first.crop, first.batch_size, second.epochs, second.crop, second.batch_size) == (
        240, 128, batch, 30, 224, 32,
    )  # fmt: skip
    assert (first.warmup_end, first.cosine_end, first.lr, first.warmup_lr) == (15, 270, 2e-4, 1e-7)
    assert (second.warmup_end, second.cosine_end, second.lr, second.final_lr) == (0, 30, 1e-6, 1e-8)
    assert first.by_epoch
    assert second.by_epoch
    loss = config.loss
    assert (loss.pixel, loss.fft, loss.degradation, loss.match, loss.label_smoothing) == (1, 0.125, 0.1, 0.1, 0.1)
    assert (config.clip_norm, config.ema, config.mislead, config.precision) == (0.01, 0, 0, "fp32")
    assert config.model == {"similarity": "published", "padding": "zeros", "residual": "mean"}
    assert PRESETS[config.preset]["capacity"] == 64


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_variant_of_a_grid_is_a_configuration(path: Path) -> None:
    grid = yaml.safe_load(path.read_text())
    whole = load_config(path.parent / grid["base"])
    named = tasks_of(yaml.safe_load((path.parent / grid["sets"]).read_text())["sets"])
    seen = []
    for changes in grid["variants"].values():
        config = load_config(path.parent / grid["base"], dotted(changes))
        assert {*config.tasks} <= named
        assert {*config.tasks} <= tasks_of(config.data)
        R2R(**{**PRESETS[config.preset], "tasks": config.tasks, "width": 4, **config.model})
        assert config not in seen
        seen.append(config)
    assert whole in seen or len(seen) == 1  # something to compare with


def tasks_of(entries: list[dict[str, Any]]) -> set[str]:
    named = [entry["task"] for entry in entries]
    return {task for one in named for task in ([one] if isinstance(one, str) else one)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shortened_run_warms_up_and_cools_down(path: Path) -> None:
    phase = load_config(path, ["pretrain.epochs=24", "pretrain.warmup_epochs=null", "pretrain.horizon=null"]).pretrain
    rates = [learning_rate(phase, epoch) for epoch in (1.5, 24)]
    assert rates[0] == pytest.approx(phase.lr)
    assert rates[1] < phase.final_lr + 0.04 * phase.lr
    if path.stem != "default_weights":  # the record of a run
        assert load_config(path, ["pretrain.epochs=24"]).pretrain == phase


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_every_file_of_sets_names_tasks_of_the_weights_and_degradations_that_exist(path: Path) -> None:
    tasks = load_config(FOLDER / "default_weights.yaml").tasks
    sets = yaml.safe_load(path.read_text())["sets"]
    assert len({entry["name"] for entry in sets}) == len(sets)
    for entry in sets:
        for key in ("task", "optional"):
            named = entry.get(key, [])
            assert {named} <= set(tasks) if isinstance(named, str) else set(named) <= set(tasks)
        if "degradation" in entry:
            parse_degradation(entry["degradation"])
    if path.stem.endswith("default"):
        assert tasks_of(sets) == set(tasks)
        assert any(entry["task"] == [] for entry in sets)  # something in which nothing is wrong
