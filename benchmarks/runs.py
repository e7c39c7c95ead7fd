"""What a run holds: rows, what could not be measured, limits, machine; read from the files of pytest-benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from r2r.errors import InputError

OURS = "ours"
EAGER = "eager as published"


@dataclass
class Row:
    """One rival in one group. Times in seconds a call; `floor` is the least the machine could take, after its measured
    limits; `growth`, (name, value), places the row in a series over sizes; `items` are done in a call."""

    group: str
    case: str
    dtype: str
    rival: str
    median: float
    p20: float
    p80: float
    rounds: int
    first_call: float
    peak: int | None = None
    bytes: int = 0
    flops: int = 0
    floor: float | None = None
    bound: str = ""
    vs_eager: float | None = None
    vs_best_rival: float | None = None
    items: float | None = None
    growth: tuple[str, float] | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.group, self.case, self.dtype, self.rival

    @property
    def is_ours(self) -> bool:
        return self.rival.startswith(OURS)


@dataclass
class Missing:
    """A rival that gave no figure, and why, in one line."""

    group: str
    case: str
    dtype: str
    rival: str
    reason: str


@dataclass
class Run:
    rows: list[Row]
    missing: list[Missing]
    machine: dict[str, Any] = field(default_factory=dict)
    commit: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    limits: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None


def compare_within(rows: Sequence[Row]) -> None:
    """Set the ratios of rows of one group, case and dtype: how many times as fast as eager, and as the best of those
    that are not ours."""
    eager = next((row.median for row in rows if row.rival == EAGER), None)
    best = min((row.median for row in rows if not row.is_ours), default=None)
    for row in rows:
        row.vs_eager = eager / row.median if eager else None
        row.vs_best_rival = best / row.median if best else None


def load(path: Path) -> Run:
    """Read a saved run. Raises InputError where the file is missing or none of ours."""
    try:
        saved = json.loads(path.read_text())
        names = {one.name for one in fields(Row)}
        rows = []
        for bench in saved["benchmarks"]:
            values = {name: value for name, value in bench["extra_info"].items() if name in names}
            if values["growth"]:
                values["growth"] = (values["growth"][0], values["growth"][1])
            rows.append(Row(**values))
        ours = saved["r2r"]
        return Run(
            rows, [Missing(**one) for one in ours["missing"]], ours["machine"], saved["commit_info"], saved["datetime"],
            ours["limits"], ours["refusal"],
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no saved run of these benchmarks") from error


def merge(runs: Sequence[Run]) -> Run:
    """One run out of pieces of it. Raises InputError where they are of different machines or code."""
    first = runs[0]
    for run in runs[1:]:
        if run.machine["name"] != first.machine["name"] or run.commit.get("code") != first.commit.get("code"):
            raise InputError("the runs are of different machines or of different code; report them apart")
    rows = {row.key: row for run in runs for row in run.rows}
    missing = {(m.group, m.case, m.dtype, m.rival): m for run in runs for m in run.missing}
    kept = [m for key, m in missing.items() if key not in rows]
    refusal = next((run.refusal for run in runs if run.refusal), None)
    return Run(list(rows.values()), kept, first.machine, first.commit, max(r.date for r in runs), first.limits, refusal)


# -- tables -------------------------------------------------------------------------------------------------------

COLUMNS = ("case", "dtype", "rival", "median", "p20, p80", "x eager", "x best rival", "peak MB", "GB/s", "GFLOP/s",
           "of limit", "a second", "first call")  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row as the tables show it, in the order of COLUMNS."""
    return (
        row.case,
        row.dtype,
        f"{row.rival} ({row.note})" if row.note else row.rival,
        duration(row.median),
        f"{duration(row.p20)}, {duration(row.p80)}",
        _ratio(row.vs_eager),
        _ratio(row.vs_best_rival),
        "" if row.peak is None else f"{row.peak / 1e6:.1f}",
        f"{row.bytes / row.median / 1e9:.1f}" if row.bytes else "",
        f"{row.flops / row.median / 1e9:.1f}" if row.flops else "",
        f"{100 * row.floor / row.median:.0f} % {row.bound}" if row.floor else "",
        f"{row.items / row.median:.3g}" if row.items else "",
        duration(row.first_call),
    )


def headline(rows: Iterable[Row]) -> list[Row]:
    """Of each group, case and dtype that is no series: the fastest of ours."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        place = row.key[:3]
        if row.is_ours and not row.growth and (place not in best or row.median < best[place].median):
            best[place] = row
    return list(best.values())


SUMMARY_COLUMNS = ("group", "case", "dtype", "ours", "best rival", "x best rival", "x eager", "of limit")


def summary(rows: Sequence[Row]) -> list[tuple[bool, tuple[str, ...]]]:
    """Of each case the fastest of ours beside the fastest rival: whether the rival is faster, and the cells."""
    rivals: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.median, reverse=True):
        if not row.is_ours:
            rivals[row.key[:3]] = row
    lines: list[tuple[bool, tuple[str, ...]]] = []
    for row in headline(rows):
        rival = rivals.get(row.key[:3])
        cells = (
            *row.key[:3],
            f"{duration(row.median)} ({row.rival})",
            f"{duration(rival.median)} ({rival.rival})" if rival else "",
            _ratio(row.vs_best_rival),
            _ratio(row.vs_eager),
            f"{100 * row.floor / row.median:.0f} %" if row.floor else "",
        )
        lines.append((rival is not None and rival.median < row.median, cells))
    return lines


def by_group(run: Run) -> list[tuple[str, list[Row | Missing]]]:
    """Group -> its rows and what is missing of it, in the order they were measured."""
    everything: list[Row | Missing] = [*run.rows, *run.missing]
    order = {name: index for index, name in enumerate(dict.fromkeys(one.group for one in everything))}
    cases = {one: index for index, one in enumerate(dict.fromkeys((o.group, o.case, o.dtype) for o in everything))}
    everything.sort(key=lambda one: (order[one.group], cases[one.group, one.case, one.dtype]))
    return [(name, list(part)) for name, part in groupby(everything, key=lambda one: one.group)]


def reasons(members: Iterable[Row | Missing]) -> list[tuple[str, str]]:
    """Rival, with the cases it is missing from where it is in others, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in members:
        if isinstance(one, Missing):
            found.setdefault((one.rival, one.reason), []).append(f"{one.case} {one.dtype}")
    return [(f"{rival} at {', '.join(cases)}", why) for (rival, why), cases in found.items()]


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# -- scaling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """Of one rival's time over sizes, on logarithmic axes: 1 is linear. `end`: between the two largest sizes. `time`,
    `floor`: how many times more the largest size takes than the smallest, and would take at the machine's limits."""

    group: str
    dtype: str
    rival: str
    axis: str
    first: float
    last: float
    slope: float
    end: float
    time: float
    floor: float | None


def slopes(rows: Iterable[Row]) -> list[Slope]:
    series: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.growth:
            series.setdefault((row.group, row.dtype, row.rival, row.growth[0]), []).append(row)
    found = []
    for (group, dtype, rival, axis), points in series.items():
        points.sort(key=lambda row: row.growth[1] if row.growth else 0)
        sizes = [row.growth[1] for row in points if row.growth]
        if len(set(sizes)) < 2:
            continue
        x, y = [math.log(size) for size in sizes], [math.log(row.median) for row in points]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
        floors = points[0].floor, points[-1].floor
        found.append(
            Slope(
                group,
                dtype,
                rival,
                axis,
                sizes[0],
                sizes[-1],
                slope,
                (y[-1] - y[-2]) / (x[-1] - x[-2]),
                points[-1].median / points[0].median,
                floors[1] / floors[0] if floors[0] and floors[1] else None,
            )
        )
    return found


SLOPE_COLUMNS = ("group", "dtype", "rival", "from", "to", "slope", "slope at the end", "time grows", "limit grows")


def slope_cells(one: Slope) -> tuple[str, ...]:
    return (
        one.group,
        one.dtype,
        one.rival,
        f"{one.first:,.0f} {one.axis}",
        f"{one.last:,.0f}",
        f"{one.slope:.2f}",
        f"{one.end:.2f}",
        f"{one.time:.1f} x",
        "" if one.floor is None else f"{one.floor:.1f} x",
    )
