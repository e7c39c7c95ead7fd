"""The configurations that ship load, and mean what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from r2r.config import load_config
from r2r.data.degradations import parse_degradation
from r2r.data.layouts import LAYOUTS, REPEATS, cdd11_tasks
from r2r.presets import PRESETS
from r2r.training import learning_rate

FOLDER = Path(__file__).parents[2] / "configs"
SETS = sorted([*FOLDER.glob("evaluate_*.yaml"), *FOLDER.glob("calibrate_*.yaml")])
CONFIGS = sorted({*FOLDER.glob("*.yaml")} - {*SETS})


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
    config = load_config(next(path for path in CONFIGS if path.stem == name))
    assert {entry["task"]: entry.get("repeat", 1) for entry in config.data} == REPEATS[tasks]


def test_the_mixtures_repeat_as_published() -> None:
    data = load_config(FOLDER / "mixtures.yaml").data
    assert [entry.get("repeat") for entry in data] == [9] * 11


@pytest.mark.parametrize("name", ["three_tasks", "five_tasks", "mixtures"])
def test_the_papers_configurations_have_its_schedule(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    assert (config.pretrain.warmup_end, config.pretrain.cosine_end) == (15, 270)
    assert (config.pretrain.batch_size, config.finetune.batch_size) == (
        {"three_tasks": 64, "five_tasks": 120, "mixtures": 96}[name],
        32,
    )


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
    named = {task for entry in sets for task in ([entry["task"]] if isinstance(entry["task"], str) else entry["task"])}
    assert named == set(tasks)
    assert any(entry["task"] == [] for entry in sets)  # something in which nothing is wrong
