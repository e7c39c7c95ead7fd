"""The benchmarks run: as pytest runs them, with every rival checked, without timing and with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import rivals, runtimes, sweep
from benchmarks.race import apart
from benchmarks.runs import OURS, load
from benchmarks.sweep import Config, neighbours, search
from benchmarks.timing import Unavailable
from r2r import R2R
from r2r_kernels.triton import configs

ROOT = Path(__file__).resolve().parents[2]


# With its own SIGINT: what a shell starts in the background ignores it, and so do its children.
PYTEST = "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(pytest.main())"
COMMAND = [sys.executable, "-u", "-c", PYTEST, "-p", "no:cacheprovider", "--quick", "--device", "cpu"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}  # as on its own


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def test_a_group_is_measured_saved_and_shown(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    done = run(
        "benchmarks/test_scaling.py", "-k", "retrieval_by_tasks", f"--benchmark-json={saved}",
        f"--benchmark-storage=file://{tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"Saved in {saved}" in done.stdout
    assert "Limits measured in this run" in done.stdout
    assert "UNVERIFIED: the whole test suite has not been run at this code" in done.stdout
    measured = load(saved)
    assert {(row.growth, row.rival) for row in measured.rows} >= {(("tasks", 1), OURS), (("tasks", 16), OURS)}
    assert all(row.p20 <= row.median <= row.p80 and row.floor and row.vs_eager for row in measured.rows)
    assert measured.refusal
    assert len(json.loads(saved.read_text())["benchmarks"][0]["stats"]["data"]) == measured.rows[0].rounds


def test_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    options = [
        "benchmarks/test_scaling.py",
        "-v",
        f"--benchmark-json={saved}",
        f"--benchmark-storage=file://{tmp_path}",
    ]
    with subprocess.Popen(
        [*COMMAND, *options], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "PASSED" in line:
                break
        running.send_signal(signal.SIGINT)
        said = running.stdout.read()
    assert running.returncode != 0  # 2; or 1 where pytest fails to show an interruption between two lines of Python
    assert f"Saved in {saved}" in said
    assert OURS in {row.rival for row in load(saved).rows}


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


def test_a_runtime_without_bfloat16_says_so(tiny_model: R2R) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(Unavailable, match="no bfloat16"):
        runtimes.onnx_runtime(lambda: tiny_model, "tiny", torch.rand(1, 3, 48, 40), torch.bfloat16)


def test_each_kind_of_run_has_its_cases() -> None:
    def cases(*options: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", "--collect-only", "-q"]
        done = subprocess.run([*command, *options], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]

    assert cases("--device", "cpu") == [
        "test_bank_retrieve[5-1-forward-float32]",
        "test_model[1x224x224-float32]",
        "test_naf_block[1x32x224x224-forward-float32]",
        "test_naf_block[1x32x224x224-forward+backward-float32]",
        "test_nafnet[published-denoising-1-float32]",
        "test_training_step[base-8-128-float32]",
    ]
    quick, full = cases("--device", "cpu", "--quick"), cases("--device", "cpu", "--full")
    assert 20 < len(quick) < 60 < len(full)


def test_wrong_answers_are_noticed() -> None:

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

    def cost(config: Config | None) -> float:
        assert config is not None
        tried.append(config)
        if config["BM"] > 128:
            return float("inf")  # too much shared memory
        return 10 + abs(config["BM"] - 128) / 16 + abs(config["num_warps"] - 8)

    best, least, first = search({"BM": 16, "num_warps": 4}, [{"BM": 32, "num_warps": 4}], cost)
    assert best == {"BM": 128, "num_warps": 8}
    assert (least, first) == (10, 21)
    assert len(tried) == len({tuple(one.items()) for one in tried}), "nothing is timed twice"


def test_search_keeps_another_way_where_no_candidate_is_better() -> None:
    assert search(None, [{"BM": 16}], lambda config: 2.0 if config else 1.0) == (None, 1.0, 1.0)
    assert search(None, [{"BM": 16}], lambda config: 2.0 if config is None else 1 / config["BM"])[0] == {"BM": 1024}


def test_neighbours_stay_launchable() -> None:
    assert neighbours({"num_warps": 16}) == [{"num_warps": 8}]
    assert neighbours({"num_warps": 1, "ATTEND": 1}) == [{"num_warps": 2, "ATTEND": 1}]


def test_a_configuration_for_all_sizes_leaves_that_for_few_pixels() -> None:
    old, new = {"BM": 64}, {"BM": 32}
    assert sweep.placed({"64": old, "more": old}, "64", "more", new) == {
        "64": {"4096": old, "more": new},
        "more": old,
    }
    assert sweep.placed({"64": old}, "32", "4096", new) == {"32": {"4096": new}, "64": old}
    assert sweep.placed({"64": {"4096": new, "more": old}}, "64", "4096", None) == {"64": {"more": old}}
    assert sweep.placed({"64": {"more": old}, "128": {"more": old}}, "128", "more", None)["64"] == {"more": old}


def test_every_kernel_of_the_table_is_swept() -> None:
    """Each has candidates that take the arguments of what is in use, a call, and both sizes."""
    pytest.importorskip("triton")
    table = configs.table("default")
    found = list(sweep.jobs(table, []))
    assert {job.kernel for job in found} == set(table)
    assert {job.pixels for job in found} == {"4096", "more"}
    assert any(job.kernel == "naf_block.gated" and job.bound == "128" for job in found)
    for job in found:
        entry = table[job.kernel].get(job.size, {}).get(job.bound)
        for config in configs.by_pixels(entry).values() if entry else ():
            assert all(set(one) >= set(config) for one in sweep.candidates(job.kernel)), job


def test_what_is_furthest_from_its_limit_is_swept_first() -> None:
    pytest.importorskip("triton")
    rows = [
        {"name": "layer_norm_2d", "size": "32x32x224x224", "us": 200.0, "limit_us": 100.0},
        {"name": "naf_block.result", "size": "1x256x28x28", "us": 20.0, "limit_us": 10.0},
    ]
    first, *_ = sweep.jobs(configs.table("default"), rows)
    assert first == ("naf_block.result", "16-bit", "256", "4096")  # 28 of them


def failing(monkeypatch: pytest.MonkeyPatch) -> tuple[sweep.Sweep, list[int]]:
    """A sweep on the CPU whose kernel answers once and fails from then on, and how often it was called."""
    calls = [0]

    def call() -> torch.Tensor:
        calls[0] += 1
        if calls[0] > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return torch.ones(3)

    monkeypatch.setattr(sweep, "call_of", lambda *_: call)
    return sweep.Sweep(torch.device("cpu"), lambda: False), calls


def test_a_candidate_that_fails_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    one, calls = failing(monkeypatch)
    job = sweep.Job("simple_gate.forward", "16-bit", "more", "more")
    before = one.table[job.kernel][job.size]
    assert "inf" in one.tune(job)
    assert calls[0] > len(sweep.candidates(job.kernel))
    assert one.table[job.kernel][job.size] == sweep.placed(
        before, "more", "more", configs.by_pixels(before["more"])["more"]
    )


def test_a_gpu_that_answers_no_more_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access each call fails: the candidates after it would all seem worse than they are."""
    one, calls = failing(monkeypatch)
    one.device = torch.device("cuda")

    def synchronize(_device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    job = sweep.Job("simple_gate.forward", "16-bit", "more", "more")
    before = one.table[job.kernel][job.size]
    with pytest.raises(SystemExit, match="the GPU answers no more, after RuntimeError: CUDA error"):
        one.tune(job)
    assert calls[0] == 2
    assert one.table[job.kernel][job.size] == before
