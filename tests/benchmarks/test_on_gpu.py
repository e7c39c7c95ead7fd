"""`benchmarks/on_gpu.sh` without a GPU: every piece runs, a piece that hangs or fails costs only itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import kernels, on_gpu
from benchmarks.on_gpu import Piece, Run, read, table

ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]


@pytest.mark.timeout(1800)
def test_a_dry_run_goes_through_every_piece(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = ["bash", str(ROOT / "benchmarks/on_gpu.sh"), str(tmp_path), "--dry", "--seconds", "1700"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # under which nothing would be measured
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = (tmp_path / "summary.txt").read_text()
    assert "DRY RUN" in summary
    assert done.stdout.endswith(summary)
    for piece in on_gpu.pieces(tmp_path / "rows.jsonl", dry=True):
        assert any(line.split()[:2] == [piece.name, "well,"] for line in summary.splitlines()), piece.name
    assert len(list(tmp_path.iterdir())) <= 8
    rows = read(tmp_path / "rows.jsonl")
    assert all(row.get("right") is not False for row in rows)
    assert not any("Error" in row.get("note", "") for row in rows)
    names = {row["name"] for row in rows}
    assert names >= {"gated_conv", "naf_block.result", "naf_block backward", "model: ours frozen"}
    judged = {row["name"] for row in rows if row.get("right")}
    assert judged >= set(kernels.OPERATORS) | {"model: ours"}
    assert any(name.startswith("training step") for name in names)
    assert not any("us" in row for row in rows)
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert "logs/kernels.log" in archive.getnames()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, dry=False, total=60)


def test_a_piece_that_hangs_costs_only_itself(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    for piece in (Piece("hangs", SLEEP, 5.0), Piece("fails", [sys.executable, "-c", "1 / 0"], 30)):
        run.start(piece)
        run.wait(piece.name)
    run.start(Piece("works", [sys.executable, "-c", "print('fine')"], 30))
    run.wait("works")
    assert time.monotonic() - begin < 50
    assert run.said["hangs"].startswith("STOPPED at its limit")
    assert run.said["fails"].startswith("FAILED (1)")
    assert run.said["works"].startswith("well")
    summary = (run.out / "summary.txt").read_text()
    assert "UNVERIFIED" in summary
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_all_that_a_piece_started_ends_with_it(run: Run, tmp_path: Path) -> None:
    program = f"import subprocess; print(subprocess.Popen({SLEEP!r}).pid, flush=True); import time; time.sleep(600)"
    run.start(Piece("starts", [sys.executable, "-c", program], 5.0))
    run.wait("starts")
    child = int((run.logs / "starts.log").read_text().split()[0])
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_no_piece_begins_when_the_time_is_up(tmp_path: Path) -> None:
    run = Run(tmp_path, dry=False, total=2)
    run.start(Piece("late", SLEEP, 30))
    run.wait("late")
    assert run.said == {"late": "left out: the time is up"}


def test_rows_are_merged_and_a_last_one_cut_short_is_left_out(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"name": "gate", "size": "1x2", "right": True, "error": 1e-3, "ratio": 0.5},
        {"name": "gate", "size": "1x2", "us": 10.0, "bytes": 20_000_000, "flops": 0, "limit_us": 8.0,
         "bound": "memory", "predicted_us": 9.0},
        {"name": "norm", "size": "", "right": False, "note": "CUDA error"},
    ]  # fmt: skip
    rows.write_text("\n".join(map(json.dumps, lines)) + '\n{"name": "cut')
    head, gate, norm = table(read(rows))
    assert head.split()[:3] == ["what", "size", "right"]
    assert " ".join(gate.split()) == "gate 1x2 right 1.0e-03 0.50 10.0 us 2000 80 % memory 9.0 us"
    assert " ".join(norm.split()) == "norm WRONG CUDA error"


def test_unknown_pieces_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main([str(tmp_path), "nothing"])
    assert stopped.value.code == 2
    assert "no such piece: nothing; there are versions, build" in capsys.readouterr().err
