"""Turn saved runs into a table and plots: python -m benchmarks.report [RUN.json ...] [--out FOLDER]

Without arguments, the newest run in .benchmarks/. Several files are pieces of one run (the last piece wins). Writes
benchmarks/results/<machine>/<kind>/: README.md, run.json (for compare.py) and plots. <kind> is full, everyday or quick.
Refuses, with exit code 2, a run of code whose test suite did not pass on that device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.rivals import COMPILE, FROZEN, GRAPH, MAX_AUTOTUNE
from benchmarks.roofline import Limits
from benchmarks.runs import (
    COLUMNS,
    EAGER,
    OURS,
    SLOPE_COLUMNS,
    Row,
    Run,
    by_group,
    cells,
    headline,
    load,
    merge,
    reasons,
    slope_cells,
    slopes,
)  # fmt: skip
from r2r.errors import InputError
from r2r.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {EAGER: "0.75", "eager channels_last": "0.5", COMPILE: "tab:orange", MAX_AUTOTUNE: "tab:red",
           OURS: "tab:blue", FROZEN: "tab:cyan", GRAPH: "tab:purple"}  # fmt: skip


def newest(storage: Path = ROOT / ".benchmarks") -> Path:
    """The run saved last. Raises InputError where there is none."""
    found = sorted(storage.rglob("*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"no run in {storage}; run pytest benchmarks first, or name a file")
    return found[-1]


def write(run: Run, out: Path) -> Path:
    """Write the report into `out`. Raises InputError where the run may not be reported or holds no rows."""
    if run.refusal:
        raise InputError(f"not reported: {run.refusal}")
    if not run.rows:
        raise InputError("not reported: the run holds no rows")
    out.mkdir(parents=True, exist_ok=True)
    plots = {
        "speedup": plot_speedup(run),
        "roofline": plot_roofline(run),
        "scaling": plot_scaling(run),
        "traffic": plot_traffic(run),
    }
    for name, figure in plots.items():
        if figure is not None:
            with atomic_path(out / f"{name}.png") as path:
                figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
    with atomic_path(out / "run.json") as path:
        path.write_text(json.dumps(saved_form(run), indent=1) + "\n")
    with atomic_path(out / "README.md") as path:
        path.write_text(markdown(run, [name for name, figure in plots.items() if figure is not None]))
    return out / "README.md"


def saved_form(run: Run) -> dict[str, Any]:
    """What `runs.load` reads, without the rest of pytest-benchmark's file."""
    return {
        "benchmarks": [{"extra_info": asdict(row)} for row in run.rows],
        "commit_info": run.commit,
        "datetime": run.date,
        "r2r": {
            "machine": run.machine,
            "limits": run.limits,
            "missing": [asdict(one) for one in run.missing],
            "refusal": run.refusal,
        },
    }


# -- the table ----------------------------------------------------------------------------------------------------


def markdown(run: Run, plots: list[str]) -> str:
    commit = str(run.commit.get("id", "unknown"))
    changed = " with changes that were not committed" if run.commit.get("dirty") else ""
    copies = ", ".join(f"{rate / 1e9:.1f} GB/s ({int(size) / 1e6:.0f} MB)" for size, rate in run.limits["copy"].items())
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s ({dtype})" for dtype, rate in run.limits["gemm"].items())
    effort = run.machine["effort"]
    kind = "" if effort == "full" else f" A run of the kind {effort}: few sizes, few rounds."
    facts = {"driver": run.machine["driver"], **run.machine["facts"]}
    lines = [
        f"# {run.machine['name']}",
        "",
        f"Measured on {run.date[:10]} at commit `{commit[:12]}`{changed} (code `{run.commit['code']}`), on which the "
        f"whole test suite passed on this device.{kind} "
        "How to read it: [docs/benchmarks.md](../../../../docs/benchmarks.md).",
        "",
        f"Limits measured in the same run: copy {copies}; matrix product {products}.",
        "",
        *(f"- {name.strip()}: {value}" for name, value in facts.items() if value),
        "",
        *(f"![{name}]({name}.png)\n" for name in plots),
        "## Ours against the best of the others",
        "",
        *_table(("group", "case", "dtype", *COLUMNS[2:]), [(row.group, *cells(row)) for row in headline(run.rows)]),
    ]
    scaling = slopes(run.rows)
    if scaling:
        lines += ["", "## Scaling", "", *_table(SLOPE_COLUMNS, [slope_cells(one) for one in scaling])]
    for group, members in by_group(run):
        rows = [cells(one) for one in members if isinstance(one, Row)]
        lines += ["", f"## {group}", "", *(_table(COLUMNS, rows) if rows else [])]
        missing = [f"- no figure for {rival}: {_plain(why)}" for rival, why in reasons(members)]
        lines += ["", *missing] if missing else []
    return "\n".join(lines) + "\n"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


# -- plots ----------------------------------------------------------------------------------------------------------


def plot_speedup(run: Run) -> Any:
    """Bars: how many times as fast as eager, by group, case and dtype."""
    rows = [row for row in run.rows if row.vs_eager and not row.growth]
    places = list(dict.fromkeys(row.key[:3] for row in rows))
    rivals = [name for name in COLOURS if name != EAGER and any(row.rival == name for row in rows)]
    if not places:
        return None
    figure, axes = plt.subplots(figsize=(9, 1 + 0.16 * len(places) * (len(rivals) + 1)))
    for index, rival in enumerate(rivals):
        speed = {row.key[:3]: row.vs_eager for row in rows if row.rival == rival}
        y = [place - (index - (len(rivals) - 1) / 2) * 0.8 / len(rivals) for place in range(len(places))]
        x = [(speed.get(place) or 1) - 1 for place in places]
        axes.barh(y, x, 0.8 / len(rivals), left=1, color=COLOURS[rival], label=rival)
    axes.set_yticks(range(len(places)), [" ".join(place) for place in places], fontsize=7)
    axes.set_ylim(-0.6, len(places) - 0.4)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel=f"times as fast as {EAGER}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7, loc="lower right")
    axes.set_title(run.machine["name"])
    return figure


def plot_roofline(run: Run) -> Any:
    """Operations a second against operations a byte, under the limits that were measured; a panel for each dtype."""
    rows = [row for row in run.rows if row.flops and row.bytes]
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    if not dtypes:
        return None
    figure, panels = plt.subplots(1, len(dtypes), figsize=(6.5 * len(dtypes), 4.5), squeeze=False)
    bandwidth = list(run.limits["copy"].values())[-1]
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        shown = [row for row in rows if row.dtype == dtype]
        x = [row.flops / row.bytes for row in shown]
        ends = [min(x) / 2, max(x) * 2]
        knee = run.limits["gemm"][dtype] / bandwidth
        roof = sorted({*ends, min(max(knee, ends[0]), ends[1])})
        axes.plot(roof, [min(a * bandwidth, run.limits["gemm"][dtype]) / 1e9 for a in roof], color="black",
                  label="large copy, matrix product")  # fmt: skip
        for rival, colour in COLOURS.items():
            of = [row for row in shown if row.rival == rival]
            axes.scatter([row.flops / row.bytes for row in of], [row.flops / row.median / 1e9 for row in of], s=14,
                         color=colour, label=rival if of else None)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="GFLOP/s", title=dtype)
        axes.legend(fontsize=7)
    return figure


def plot_scaling(run: Run) -> Any:
    """Time against size for each series, with a dotted line of slope 1 and the machine's limit in black."""
    rows = [row for row in run.rows if row.growth]
    groups = list(dict.fromkeys((row.group, row.dtype) for row in rows))
    if not groups:
        return None
    figure, panels = plt.subplots(
        -(-len(groups) // 3), min(3, len(groups)), figsize=(4.5 * min(3, len(groups)), 3.6 * -(-len(groups) // 3)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (group, dtype) in zip(panels.flat, groups, strict=False):
        shown = sorted((r for r in rows if (r.group, r.dtype) == (group, dtype)), key=_size)
        for rival in dict.fromkeys(row.rival for row in shown):
            of = [row for row in shown if row.rival == rival]
            axes.plot(list(map(_size, of)), [row.median * 1e3 for row in of], "o-", markersize=3,
                      color=COLOURS.get(rival, "tab:green"), label=rival)  # fmt: skip
        floors = {_size(row): row.floor * 1e3 for row in shown if row.floor}
        axes.plot(list(floors), list(floors.values()), color="black", label="limit of the machine")
        ends = [_size(shown[0]), _size(shown[-1])]
        first = min(row.median for row in shown if _size(row) == ends[0]) * 1e3
        axes.plot(ends, [first, first * ends[1] / ends[0]], ":", color="0.4", label="linear")
        axes.set(xscale="log", yscale="log", xlabel=shown[0].growth[0] if shown[0].growth else "", ylabel="ms")
        sizes = sorted(set(map(_size, shown)))
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], rotation=30, fontsize=7)
        axes.set_xticks([], minor=True)
        axes.set_title(f"{group}, {dtype}", fontsize=9)
        axes.legend(fontsize=6)
    return figure


def plot_traffic(run: Run) -> Any:
    """For the operators: what a plain copy moves in the time they take, over the bytes that must move. Hollow where the
    limit is arithmetic."""
    rows = [row for row in run.rows if row.floor and not row.growth and not row.group.startswith(("model", "training"))]
    places = list(dict.fromkeys(row.key[:3] for row in rows))
    if not places:
        return None
    limits = Limits({int(size): rate for size, rate in run.limits["copy"].items()}, run.limits["gemm"])
    rivals = [name for name in COLOURS if any(row.rival == name for row in rows)]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(places)))
    for rival in rivals:
        of = [row for row in rows if row.rival == rival]
        x = [row.median * limits.bandwidth(row.bytes) / row.bytes for row in of]
        y = [places.index(row.key[:3]) for row in of]
        fill = [COLOURS[rival] if row.bound == "memory" else "none" for row in of]
        axes.scatter(x, y, s=24, facecolors=fill, edgecolors=COLOURS[rival])
        axes.scatter([], [], s=24, color=COLOURS[rival], label=rival)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(places)), [" ".join(place) for place in places], fontsize=7)
    axes.invert_yaxis()
    axes.set(
        xscale="log",
        xlabel="bytes that a copy moves in the same time / bytes that must move (hollow: arithmetic)",
    )
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(fontsize=7)
    return figure


def _size(row: Row) -> float:
    return row.growth[1] if row.growth else 0.0


def slug(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="files of pytest-benchmark (.benchmarks/, --benchmark-json)")
    parser.add_argument("--out", type=Path, help="folder to write; by default benchmarks/results/<machine>/<kind>")
    given = parser.parse_args(argv)
    try:
        run = merge([load(path) for path in given.runs or [newest()]])
        print(write(run, given.out or RESULTS / slug(run.machine["name"]) / run.machine["effort"]))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
