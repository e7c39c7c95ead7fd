"""What `on_gpu.sh` runs: pieces, each a process of its own with a time limit, and one folder of at most eight files.

`summary.txt` reads on its own and is written anew after each piece; it is also the last thing printed. `rows.jsonl`
gets a line as soon as something was measured, so a stop at any second loses nothing. `logs.tar.gz` holds what each
piece said, `configs.tar.gz` the launch configurations that the sweep found. Nothing but the standard library is
imported here, so that a broken installation is a failed piece and not the end.

The build runs in the background while the Triton kernels are tested. A piece that hangs is killed, with all processes
that it started, and costs its own time. No piece begins without the time to say what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 470.0  # seconds, of which the last are for the summary
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
TRITON_TESTS = "tests/r2r_kernels/triton"
BEYOND = "2_to_31"  # in the names of tests of more than 2^31 elements
# Without a GPU: few of the Triton tests, as the interpreter is slow.
DRY_TESTS = [f"{TRITON_TESTS}/test_simple_gate.py"]


@dataclass
class Piece:
    """A command and its limit in seconds; `background`: what follows does not wait for it."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    background: bool = False


def architectures() -> dict[str, str]:
    """The environment in which the extension is built for the GPUs that are here alone: a quarter of the time."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return {"TORCH_CUDA_ARCH_LIST": ";".join(sorted(set(found)))} if found else {}


def pieces(rows: Path, dry: bool) -> list[Piece]:
    python, spread = [sys.executable], []
    if not dry and subprocess.run([*python, "-c", "import xdist"], capture_output=True).returncode == 0:
        spread = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    measured = [str(rows), *(["--dry"] if dry else [])]
    build = [*python, "setup.py", "-q", "build_ext", "--inplace"]
    if dry:  # goes through setup.py, and finds no compiler
        build = [*build[:-1], "--build-lib", str(rows.parent / "built"), "--build-temp", str(rows.parent / "built")]
    interpreted = {"TRITON_INTERPRET": "1", "R2R_KERNELS": "triton"} if dry else {}
    sweeping = ["--out", str(rows.parent / "configs"), "--time-limit", "45"]
    other = [
        "-k",
        f"not {BEYOND}",
        f"--ignore={TRITON_TESTS}/test_aot.py",
        f"--ignore={TRITON_TESTS}/test_interpreter.py",
    ]
    tests = DRY_TESTS if dry else [TRITON_TESTS]
    extension = [
        "tests/r2r_kernels/test_gated_conv.py",
        "tests/r2r/test_frozen.py",
        "tests/r2r_kernels/test_devices.py",
    ]
    found = [
        Piece("versions", [*python, "-m", "benchmarks.versions"], 30),
        Piece("build", build, 180, {"CXX": "/none"} if dry else architectures(), background=not dry),
        Piece("triton", [*PYTEST, *spread, "--timeout=40", *other, *tests], 110, interpreted),
        Piece("extension", [*PYTEST, *spread, "--timeout=40", "-m", "gpu", "-k", f"not {BEYOND}", *extension], 60),
        Piece("sanitize", [*python, "-m", "benchmarks.sanitize"], 45),
        Piece("kernels", [*python, "-m", "benchmarks.kernels", *measured], 100, interpreted),
        Piece("model", [*python, "-m", "benchmarks.model_times", *measured], 60),
        Piece("max-autotune", [*python, "-m", "benchmarks.model_times", *measured, "--max-autotune"], 75),
        Piece("sweep", [*python, "-m", "benchmarks.sweep", "--rows", *measured, *sweeping], 60, interpreted),
        Piece("beyond", [*PYTEST, "--timeout=40", "-m", "gpu", "-k", BEYOND, "tests/r2r_kernels"], 40),
    ]
    # A machine without a GPU is slower, and may be busy.
    return [replace(piece, limit=10 * piece.limit) if dry else piece for piece in found]


class Run:
    """One call: which pieces have run and how, in `out`."""

    def __init__(self, out: Path, dry: bool, total: float) -> None:
        self.out, self.dry = out, dry
        self.rows = out / "rows.jsonl"
        self.logs = Path(tempfile.mkdtemp(prefix="r2r-logs-"))
        self.end = time.monotonic() + total
        self.said: dict[str, str] = {}
        self.running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self.begun: dict[str, float] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    def start(self, piece: Piece) -> None:
        limit = min(piece.limit, self.left() - 3)
        if limit < 5:
            self.said[piece.name] = "left out: the time is up"
            return
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **piece.environment}
        environment.setdefault("OMP_NUM_THREADS", "2")
        self.begun[piece.name] = time.monotonic()
        with (self.logs / f"{piece.name}.log").open("wb") as log:
            process = subprocess.Popen(
                piece.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.running[piece.name] = process, time.monotonic() + limit

    def wait(self, name: str) -> None:
        if name not in self.running:
            return
        process, end = self.running.pop(name)
        try:
            code = process.wait(max(0.1, end - time.monotonic()))
            how = "well" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            how = "STOPPED at its limit"
        self.kill(process)
        self.said[name] = f"{how}, {time.monotonic() - self.begun[name]:.0f} s"
        print(f"== {name}: {self.said[name]}\n{self.last_lines(name, 12)}", flush=True)
        self.save()

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """The process and all that it started; those that ended are not there any more."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, how)
                process.wait(3)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        process.poll()

    def last_lines(self, name: str, number: int) -> str:
        text = (self.logs / f"{name}.log").read_text(errors="replace")
        return "\n".join(line[:200] for line in text.splitlines()[-number:])

    def save(self) -> None:
        for name, folder in (("logs", self.logs), ("configs", self.out / "configs")):
            if folder.is_dir():
                beside = self.out / f"{name}.tar.gz.part"
                with tarfile.open(beside, "w:gz") as archive:
                    archive.add(folder, name)
                beside.replace(self.out / f"{name}.tar.gz")
        beside = self.out / "summary.txt.part"
        beside.write_text(self.summary() + "\n")
        beside.replace(self.out / "summary.txt")

    def summary(self) -> str:
        failed = [name for name, how in self.said.items() if not how.startswith("well")]
        title = f"R2R on {platform.node()}, commit {commit()}"
        if self.dry:
            title += ": DRY RUN on a CPU, no times"
        elif failed or any(row.get("right") is False for row in read(self.rows)):
            title += ": UNVERIFIED, as not all was well"
        lines = [title, "", *(f"{name:14} {how}" for name, how in self.said.items()), ""]
        if "versions" in self.said:
            lines += [self.last_lines("versions", 12), ""]
        for name in ("triton", "extension", "beyond"):
            if name in self.said:
                text = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()
                reds = [line[:160] for line in text if line.startswith(("FAILED", "ERROR"))]
                lines += [f"{name}: {text[-1][:160] if text else ''}", *reds[:12]]
        return "\n".join([*lines, "", *table(read(self.rows))])


def commit() -> str:
    if os.environ.get("R2R_COMMIT"):
        return os.environ["R2R_COMMIT"]
    git = shutil.which("git")
    done = subprocess.run([git, "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True) if git else None
    return done.stdout.strip()[:12] if done and done.returncode == 0 else "unknown"


def read(rows: Path) -> list[dict[str, Any]]:
    """The rows so far; a last line that was cut short is left out."""
    found = []
    for line in rows.read_text().splitlines() if rows.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of the same name and size are one line: right or wrong with the error, time, rate, share of the limit."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        lines.setdefault((row["name"], row["size"]), {}).update(row)
    head = ("what", "size", "right", "error", "of eager's", "time", "GB/s", "TFLOP/s", "of limit", "predicted")
    body = [head]
    for (name, size), row in lines.items():
        us = row.get("us")
        body.append(
            (
                name,
                size,
                {True: "right", False: "WRONG", None: ""}[row.get("right")],
                f"{row['error']:.1e}" if "error" in row else "",
                f"{row['ratio']:.2f}" if "ratio" in row else "",
                "" if us is None else f"{us:.1f} us",
                f"{row['bytes'] / us / 1e3:.0f}" if us and row.get("bytes") else "",
                f"{row['flops'] / us / 1e6:.1f}" if us and row.get("flops") else "",
                f"{100 * row['limit_us'] / us:.0f} % {row['bound']}"
                if us and "limit_us" in row
                else row.get("note", ""),
                f"{row['predicted_us']:.1f} us" if "predicted_us" in row else "",
            )
        )
    widths = [max(len(row[i]) for row in body) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/on_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("pieces", nargs="*", help="some of the pieces; by default all")
    parser.add_argument("--dry", action="store_true", help="on a CPU: every piece, no times")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"in all ({TOTAL:.0f})")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given.out.resolve(), given.dry, given.seconds)
    known = pieces(run.rows, given.dry)
    unknown = set(given.pieces) - {piece.name for piece in known}
    if unknown:
        parser.error(f"no such piece: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in known)}")
    if not given.pieces:
        run.rows.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for piece in known:
            if given.pieces and piece.name not in given.pieces:
                continue
            if piece.name == "extension":
                run.wait("build")
            run.start(piece)
            if not piece.background:
                run.wait(piece.name)
        run.wait("build")
    finally:  # also when this is interrupted
        for process, _ in run.running.values():
            run.kill(process)
        run.save()
        shutil.rmtree(run.out / "configs", ignore_errors=True)
        shutil.rmtree(run.out / "built", ignore_errors=True)
        print(run.summary(), flush=True)
        shutil.rmtree(run.logs)
    return 0 if all(how.startswith("well") for how in run.said.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
