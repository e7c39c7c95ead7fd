"""A grid is trained, goes on where it was stopped, and ends in one table whose figures are right."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_rel
from skimage import data

from r2r import InputError
from r2r.ablation import Grid, Run, Scores, load_grid, paired, rows_of, run_grid, write_tables
from r2r.config import TrainConfig
from r2r.data.images import write_rgb
from r2r.training import Silent
from tests.conftest import TINY


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    for name, photo in (("astronaut", data.astronaut()), ("coffee", data.coffee())):
        write_rgb(tmp_path / "photos" / f"{name}.png", photo[:64, :64].astype("float32") / 255)
    base = {
        "tasks": ["denoise", "lowlight"],
        "data": [{"task": task, "clean": "photos"} for task in ("denoise", "lowlight")],
        "preset": "tiny",
        "model": {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()},
        "pretrain": {"epochs": 1, "steps": 2, "crop": 32, "batch_size": 4},
        "finetune": {"epochs": 0},
        "workers": 0,
        "log_every": 1,
        "device": "cpu",
    }
    sets = [{"task": task, "clean": "photos"} for task in ("denoise", "lowlight")]
    content = {
        "base": "base.yaml",
        "sets": "sets.yaml",
        "seeds": [0, 1],
        "variants": {"all": {}, "pixel & no_fft": {"loss": {"fft": 0}}, "one task": {"tasks": ["denoise"]}},
    }
    for name, one in (("base", base), ("sets", {"sets": sets}), ("grid", content)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(one, sort_keys=False))
    return tmp_path / "grid.yaml"


class Stop(Silent):
    """Interrupts at an update."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    def update(self, done: int, row: dict[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_grid_goes_on_and_ends_in_a_table(grid: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'runs'}"
    runs = load_grid(grid, [out])
    assert [(run.variant, run.seed) for run in runs.runs[:3]] == [("all", 0), ("all", 1), ("pixel & no_fft", 0)]
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_grid(runs, Stop(5), lines.append)
    assert len(lines) == 3  # the first seed of all variants comes first
    lines.clear()
    assert run_grid(load_grid(grid, [out]), Silent(), lines.append) == []
    assert lines[0] == "one task, seed 0 (3 of 6)"
    assert len(lines) == 4

    rows = rows_of(runs)
    assert [(row.variant, row.seeds) for row in rows] == [("all", 2), ("pixel & no_fft", 2), ("one task", 2)]
    assert list(rows[2].sets) == ["denoise"]
    assert rows[0].figures["blind"].value == pytest.approx(np.mean([cell.value for cell in rows[0].sets.values()]))
    assert {"misled", "matched"} <= rows[0].figures.keys()
    assert {"misled", "untouched"}.isdisjoint(rows[2].figures)  # no other task to be told, no set with nothing wrong
    assert rows[0].differences == {}
    one = rows[2].differences["blind"]  # on the set that both have
    assert one.value == pytest.approx(rows[2].sets["denoise"].value - rows[0].sets["denoise"].value)

    table = (tmp_path / "runs" / "table.md").read_text()
    assert f"| all | 2 | {rows[0].figures['blind'].text(2)} | - |" in table
    assert r"pixel \& no\_fft & 2 & " in (tmp_path / "runs" / "table.tex").read_text()
    with (tmp_path / "runs" / "table.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert float(written[1]["told_difference"]) == rows[1].differences["told"].value
    assert written[2]["lowlight"] == ""

    content = yaml.safe_load(grid.read_text())
    content["variants"]["all"] = {"clip_norm": 0.5}
    grid.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"all/0/result\.json is of other settings"):
        run_grid(load_grid(grid, [out]), Silent(), lines.append)


def test_sets_with_nothing_wrong_count_as_untouched_alone(grid: Path, tmp_path: Path) -> None:
    base, sets = (yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in ("base", "sets"))
    base["model"]["mixtures"] = True
    sets["sets"].append({"name": "clean", "task": [], "clean": "photos"})
    for name, one in (("base", base), ("sets", sets)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(one))
    variants = {"all": {}, "no misleading": {"mislead": 0.0}}
    grid.write_text(yaml.safe_dump({**yaml.safe_load(grid.read_text()), "seeds": [0], "variants": variants}))
    runs = load_grid(grid, [f"out={tmp_path / 'runs'}"])
    assert run_grid(runs, Silent(), lambda line: None) == []
    images = json.loads((tmp_path / "runs" / "all" / "0" / "result.json").read_text())["images"]
    faulty, sound = ([one for one in images if (one["set"] == "clean") == clean] for clean in (False, True))
    assert [one["told"] for one in sound] == [None, None]
    for row in rows_of(runs):
        assert list(row.sets) == ["denoise", "lowlight", "clean"]
        assert row.figures["blind"].value == pytest.approx(np.mean([row.sets[one].value for one in list(row.sets)[:2]]))
        assert row.figures.keys() == {"blind", "told", "misled", "ssim", "matched", "untouched"}
    first = rows_of(runs)[0].figures
    assert first["untouched"].value == np.mean([one["untouched"] for one in sound])
    assert first["matched"].value == np.mean([one["matched"] for one in faulty])
    assert rows_of(runs)[1].differences.keys() == {"blind", "told"}


def test_a_run_that_fails_does_not_stop_the_others(grid: Path, tmp_path: Path) -> None:
    runs = load_grid(grid, [f"out={tmp_path / 'runs'}"])
    (tmp_path / "runs" / "all" / "0" / "last").mkdir(parents=True)
    (tmp_path / "runs" / "all" / "0" / "last" / "model.safetensors").touch()  # a model that would be replaced
    failed = run_grid(runs, Silent(), lambda line: None)
    assert [re.sub(": .*", "", line) for line in failed] == ["all, seed 0"]
    assert [row.seeds for row in rows_of(runs)] == [1, 2, 2]


def scores(shift: float, noise: int) -> Scores:
    values = np.random.default_rng(noise).normal(30 + shift, 1, 8)
    return {
        ("a", str(i)): {"blind": float(x), "told": float(x) + 1, "ssim": 0.9, "matched": 1.0}
        for i, x in enumerate(values)
    }


def test_intervals_are_students() -> None:
    ours, baseline = ({seed: scores(shift, 10 * seed + shift) for seed in range(3)} for shift in (1, 0))
    cell = paired(ours, baseline, "blind")
    means = [[np.mean([x["blind"] for x in one.values()]) for one in runs.values()] for runs in (ours, baseline)]
    interval = ttest_rel(*means).confidence_interval(0.95)
    assert cell is not None
    assert cell.spread is not None
    assert (cell.value - cell.spread, cell.value + cell.spread) == pytest.approx((interval.low, interval.high))
    single = paired({0: ours[0]}, {0: baseline[0], 1: baseline[1]}, "told")  # one seed: by image
    images = [[x["told"] for x in one[0].values()] for one in (ours, baseline)]
    interval = ttest_rel(*images).confidence_interval(0.95)
    assert single is not None
    assert single.spread is not None
    assert single.value + single.spread == pytest.approx(interval.high)
    assert paired({3: ours[0]}, baseline, "blind") is None


def test_a_table_of_nothing_yet_can_be_written(tmp_path: Path) -> None:
    write_tables(Grid(tmp_path, "a", (Run("a", 0, TrainConfig(out=str(tmp_path / "a")), ()),)))
    assert (tmp_path / "table.md").read_text().startswith("| variant | seeds |")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"variants": {}}, "accepted: base, sets, variants"),
        ({"base": None}, "base is None; accepted: the name of a YAML file"),
        ({"grid": 1}, "unknown key 'grid'"),
        ({"baseline": "none"}, "baseline 'none' is no variant; accepted: a"),
        ({"seeds": 3}, "seeds 3; accepted: a list of numbers"),
        ({"variants": {"a": {"loss": {"ftt": 0}}}}, "variant 'a': .*ftt"),
        ({"variants": {"a": 3}}, "variant 'a' is 3; accepted: settings"),
        ({"variants": {"a": {"tasks": ["dehaze"]}}}, "variant 'a': no source of the tasks dehaze"),
        ({"sets": "none.yaml"}, "none.yaml: No such file"),
    ],
)
def test_bad_grids_are_named_before_anything_runs(grid: Path, changes: dict[str, object], line: str) -> None:
    content = {**yaml.safe_load(grid.read_text()), "variants": {"a": {}}, **changes}
    grid.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=line) as error:
        load_grid(grid)
    assert "\n" not in str(error.value)
    assert json.dumps(str(error.value)).startswith('"' + json.dumps(str(grid))[1:-1])
