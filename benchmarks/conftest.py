"""`pytest benchmarks [--quick | --full] [--device D]`: rivals race group by group; a summary; a file for report.py.

Every run is saved in pytest-benchmark's storage (.benchmarks/, see --benchmark-storage; --benchmark-json FILE writes it
elsewhere too). --benchmark-disable checks that everything runs and agrees, and times nothing.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import asdict
from datetime import datetime
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import runs, stamp
from benchmarks.race import Race, Session
from benchmarks.roofline import Work, measure_limits
from benchmarks.timing import EVERYDAY, FULL, QUICK, Effort
from r2r_kernels import env

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("r2r benchmarks")
    group.addoption("--quick", dest="effort", action="store_const", const=QUICK, default=EVERYDAY, help="two minutes")
    group.addoption("--full", dest="effort", action="store_const", const=FULL, help="everything; hours on a CPU")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--dtype", action="append", help="float32 or bfloat16, instead of what the kind of run takes")
    group.addoption("--time-limit", type=float, default=float("inf"), help="seconds after which no group is begun")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "grid(quick, everyday, full, gpu): values of each parameter, by kind of run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The grid of a test for this kind of run, on a GPU with what `gpu` changes in a full one; no cases without one."""
    marker = metafunc.definition.get_closest_marker("grid")
    if marker is None:
        return
    config = metafunc.config
    effort, gpu = config.getoption("effort"), config.getoption("device").startswith("cuda")
    grid: dict[str, list[Any]] = dict(marker.kwargs.get(effort.name, {name: [] for name in marker.kwargs["full"]}))
    if gpu and effort is FULL:
        grid |= marker.kwargs.get("gpu", {})
    if "dtype" in metafunc.fixturenames:
        usual = ["float32", "bfloat16"] if effort is FULL else ["bfloat16" if gpu else "float32"]
        grid["dtype"] = config.getoption("dtype") or grid.get("dtype") or usual
    values = [pytest.param(*one, id="-".join(map(_id, one))) for one in itertools.product(*grid.values())]
    metafunc.parametrize(list(grid), values)


def _id(value: Any) -> str:
    if isinstance(value, bool):
        return "forward+backward" if value else "forward"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if "NOTSET" in item.name]  # tests without a case in this kind of run
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        item.add_marker(pytest.mark.timeout(0))  # full runs take what they take


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    code, effort = stamp.code_digest(), config.getoption("effort")
    refusal = stamp.refusal(stamp.read(config), code, stamp.device_name())
    device = torch.device(config.getoption("device"))
    config.stash[_SESSION] = Session(device, effort, config.getoption("time_limit"), code, refusal)
    if effort is FULL:
        # "First call" then includes all compiling, and no half-written file of a killed run is found.
        cache = tempfile.TemporaryDirectory(prefix="r2r-benchmarks-")
        config.add_cleanup(cache.cleanup)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    storage: Any = config._benchmarksession  # type: ignore[attr-defined]
    storage.quiet = True  # the table below says more
    storage.autosave = storage.autosave or f"{datetime.now():%Y%m%d_%H%M%S}_{effort.name}"


# -- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def limits(pytestconfig: pytest.Config) -> None:
    """What this machine can do, measured before and after everything else."""
    if not pytestconfig._benchmarksession.disabled:  # type: ignore[attr-defined]
        session = pytestconfig.stash[_SESSION]
        session.limits = measure_limits(session.device)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    """Measure the limits once more, since a disturbance must not lower them, and set the rows' floors."""
    ours = session.config.stash[_SESSION]
    rows = [one.extra_info for one in session.config._benchmarksession.benchmarks]  # type: ignore[attr-defined]
    if ours.limits is not None and rows:
        ours.limits = ours.limits.best(measure_limits(ours.device))
        for row in rows:
            if row["bytes"]:
                row["floor"], row["bound"] = ours.limits.floor(Work(row["bytes"], row["flops"]), row["dtype"])
    return (yield)


@pytest.fixture
def race(request: pytest.FixtureRequest) -> Race:
    return Race(request, request.config.stash[_SESSION])


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    return pytestconfig.stash[_SESSION].device


@pytest.fixture
def effort(pytestconfig: pytest.Config) -> Effort:
    return pytestconfig.stash[_SESSION].effort


# -- what is saved, and the table at the end ----------------------------------------------------------------------


def _device_name(config: pytest.Config) -> str:
    device = config.getoption("device")
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _machine(config: pytest.Config, cpu: dict[str, Any]) -> dict[str, Any]:
    """What the report is stamped with."""
    name, driver = _device_name(config), ""
    if name == "cpu":
        # A virtual machine may hide its model's name: those of family 25 (Zen 4) and 26 (Zen 5) are both "AMD EPYC"
        kind = f" (family {cpu['family']}, model {cpu['model']})" if {"family", "model"} <= cpu.keys() else ""
        name = f"{cpu.get('brand_raw') or platform.machine()}{kind}, {torch.get_num_threads()} threads"
    else:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if torch.version.cuda else ""
    facts = env.facts() | {"float32 products": torch.backends.cuda.matmul.fp32_precision}
    return {"name": name, "driver": driver, "effort": config.getoption("effort").name, "facts": facts}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """R2R_COMMIT names the commit where the code is a copy without git."""
    commit_info["id"] = os.environ.get("R2R_COMMIT") or commit_info["id"]
    commit_info["code"] = config.stash[_SESSION].code


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    session = config.stash[_SESSION]
    machine = session.machine = _machine(config, output_json["machine_info"].get("cpu") or {})
    output_json["r2r"] = {
        "machine": machine,
        "limits": asdict(session.limits) if session.limits else {},
        "missing": [asdict(one) for one in session.missing],
        "refusal": session.refusal,
    }


def pytest_terminal_summary(config: pytest.Config) -> None:
    """The tables of all rivals with -v; then a summary."""
    session = config.stash.get(_SESSION, None)
    storage: Any = config._benchmarksession  # type: ignore[attr-defined]
    rows = [runs.Row(**one.extra_info) for one in storage.benchmarks]
    if session is None or not (rows or session.missing):
        return
    console = Console(file=sys.stdout, width=max(160, shutil.get_terminal_size((200, 0)).columns))
    if config.option.verbose > 0:
        _show_tables(console, session, rows)
    _show_summary(console, session, rows)
    if rows:
        saved = storage.json or storage.storage.path
        console.print(f"Saved in {saved}; python -m benchmarks.report writes tables and plots.", soft_wrap=True)


def _show_tables(console: Console, session: Session, rows: list[runs.Row]) -> None:
    for group, members in runs.by_group(runs.Run(rows, session.missing)):
        table = Table(*runs.COLUMNS, title=group, title_justify="left", box=None, pad_edge=False)
        for one in members:
            if isinstance(one, runs.Row):
                table.add_row(*runs.cells(one), style="bold" if one.is_ours else "")
        console.print(table, "")
    scaling = runs.slopes(rows)
    if scaling:
        table = Table(*runs.SLOPE_COLUMNS, title="scaling", title_justify="left", box=None, pad_edge=False)
        for slope in scaling:
            table.add_row(*runs.slope_cells(slope))
        console.print(table, "")


def _show_summary(console: Console, session: Session, rows: list[runs.Row]) -> None:
    """Ours against the best of the others; red where another was faster."""
    name = session.machine.get("name", "this machine")
    table = Table(*runs.SUMMARY_COLUMNS, title=name, title_justify="left", box=None, pad_edge=False)
    for slower, line in runs.summary(rows):
        table.add_row(*line, style="red" if slower else "")
    console.print(table)
    for group, members in runs.by_group(runs.Run([], session.missing)):
        for rival, why in runs.reasons(members):
            console.print(f"{group}: no figure for {rival}: {why}", style="dim", markup=False, soft_wrap=True)
    if session.limits is not None:
        copies = ", ".join(
            f"{rate / 1e9:.1f} GB/s at {size / 1e6:.0f} MB" for size, rate in session.limits.copy.items()
        )
        products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in session.limits.gemm.items())
        console.print(f"Limits measured in this run: copy {copies}; matrix product {products}.")
    if session.refusal:
        console.print(f"UNVERIFIED: {session.refusal}.", style="bold red")
