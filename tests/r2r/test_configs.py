"""The configurations that ship load, and mean what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

from r2r.config import load_config
from r2r.data.layouts import LAYOUTS, REPEATS, cdd11_tasks
from r2r.presets import PRESETS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


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
