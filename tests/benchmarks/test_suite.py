"""The benchmarks run: as pytest runs them, with every rival checked, without timing and with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rivals, sweep
from benchmarks.race import apart
from benchmarks.runs import OURS, load
from benchmarks.sweep import Config, neighbours, search

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--quick", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_group_is_measured_saved_and_shown(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    done = run(
        "benchmarks/test_scaling.py", "-k", "retrieval_by_tasks", f"--benchmark-json={saved}",
        f"--benchmark-storage=file://{tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "bank_retrieve by tasks" in done.stdout
    assert "Limits measured in this run" in done.stdout
    assert "Not for reporting: the whole test suite has not been run at this code" in done.stdout
    measured = load(saved)
    assert {(row.growth, row.rival) for row in measured.rows} >= {(("tasks", 1), OURS), (("tasks", 16), OURS)}
    assert all(row.p20 <= row.median <= row.p80 and row.floor and row.vs_eager for row in measured.rows)
    assert measured.refusal
    assert len(json.loads(saved.read_text())["benchmarks"][0]["stats"]["data"]) == measured.rows[0].rounds


def test_every_time_limit_leaves_a_reason(tmp_path: Path) -> None:
    done = run("benchmarks/test_scaling.py", "--time-limit=0", f"--benchmark-storage=file://{tmp_path}")
    assert done.returncode == 0, done.stdout
    assert "no figure for ours at" in done.stdout
    assert "the time limit of 0 s had passed" in done.stdout


def test_all_rivals_agree() -> None:
    """The models of all rivals, in float32 and bfloat16: what the race checks before it times."""
    done = run(
        "benchmarks/test_scaling.py", "-k", "by_batch", "--benchmark-disable", "--dtype=float32", "--dtype=bfloat16"
    )
    assert done.returncode == 0, done.stdout
    assert "answers" not in done.stdout


def test_eager_of_few_digits_is_not_the_measure() -> None:
    """In bfloat16 the gradients of a block at 224 x 224 are further from one another than from float32's."""
    done = run(
        "benchmarks/test_naf_block.py", "-k", "32x224x224-forward+backward", "--benchmark-disable", "--dtype=bfloat16"
    )
    assert done.returncode == 0, done.stdout
    assert "answers" not in done.stdout


def test_wrong_answers_are_noticed() -> None:
    import torch

    x = torch.rand(4, 4)
    assert apart([x.clone()], [x], None) == 0
    assert apart([x + 1], [x], None) > 0.5
    assert apart([x, x], [x], None) == float("inf")
    assert apart([x * torch.nan], [x], None) == float("inf")
    assert apart([x + 1e-3], [x + 2e-3], x) == pytest.approx(0.5, rel=0.01)  # what was added, not the picture


def test_a_rival_that_cannot_be_prepared_says_why() -> None:
    with pytest.raises(rivals.Unavailable, match="left out"):
        rivals.unavailable("torch.compile", "left out").prepare()


def test_search_finds_the_best_configuration() -> None:
    tried: list[Config] = []

    def cost(config: Config) -> float:
        tried.append(config)
        if config["BM"] > 128:
            return float("inf")  # too much shared memory
        return 10 + abs(config["BM"] - 128) / 16 + abs(config["num_warps"] - 8)

    best, least, first = search({"BM": 16, "num_warps": 4}, [{"BM": 32, "num_warps": 4}], cost)
    assert best == {"BM": 128, "num_warps": 8}
    assert (least, first) == (10, 21)
    assert len(tried) == len({tuple(one.items()) for one in tried}), "nothing is timed twice"


def test_neighbours_stay_launchable() -> None:
    assert {"num_warps": 32} not in neighbours({"num_warps": 16})
    assert {"num_warps": 0} not in neighbours({"num_warps": 1})


def test_candidates_of_every_kernel_take_its_arguments() -> None:
    pytest.importorskip("triton")
    found = [sweep.candidates("layer_norm_2d.forward", {"elements": 1, "num_warps": 1})]
    assert all(set(one) == {"elements", "num_warps"} for one in found[0])
    assert found[0]
