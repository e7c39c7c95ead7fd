"""What got slower, beyond noise: python -m benchmarks.compare OLD.json NEW.json

A row of ours is slower where its 20th percentile lies above the old 80th, and its median by more than 3 % above the
old one, after the old times were stretched by what happened to eager in the same group: where eager slowed down as
much, it was the machine. Faster is the mirror image. Exit code 1 where something got slower, 2 where the files do not
fit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import EAGER, Row, Run, duration, load
from r2r.errors import InputError

LEAST = 0.03


@dataclass(frozen=True)
class Change:
    """`times`: new median over old; `machine`: the same of eager in the group, 1 where there is none."""

    old: Row
    new: Row
    times: float
    machine: float

    def __str__(self) -> str:
        medians = f"{duration(self.old.median)} -> {duration(self.new.median)}"
        return f"{' | '.join(self.new.key)}: {medians} ({self.times:.2f} x; eager {self.machine:.2f} x)"


def changes(old: Run, new: Run) -> tuple[list[Change], list[Change], list[str]]:
    """Rows that got slower, worst first; faster, best first; and what the new run lacks."""
    before, after = ({row.key: row for row in run.rows} for run in (old, new))
    slower, faster = [], []
    for key, row in after.items():
        eager = (*key[:3], EAGER)
        control = eager in before and eager in after
        if key not in before or (control and not row.is_ours):
            continue
        was = before[key]
        machine = after[eager].median / before[eager].median if control else 1.0
        change = Change(was, row, row.median / was.median, machine)
        worse, better = max(machine, 1.0), min(machine, 1.0)
        if row.p20 > was.p80 * worse and row.median > was.median * worse * (1 + LEAST):
            slower.append(change)
        if row.p80 < was.p20 * better and row.median < was.median * better * (1 - LEAST):
            faster.append(change)
    lost = {(m.group, m.case, m.dtype, m.rival): m.reason for m in new.missing}
    gone = [f"{' | '.join(key)}: {lost.get(key, 'not measured')}" for key in before if key not in after]
    return sorted(slower, key=lambda c: -c.times), sorted(faster, key=lambda c: c.times), gone


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args(argv)
    try:
        old, new = load(given.old), load(given.new)
        if old.machine["name"] != new.machine["name"]:
            raise InputError(f"{given.old} is of {old.machine['name']}, {given.new} of {new.machine['name']}")
        slower, faster, gone = changes(old, new)
        if not {row.key for row in old.rows} & {row.key for row in new.rows}:
            raise InputError("the two runs have no row in common")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    moved = [name for name, value in new.machine["facts"].items() if old.machine["facts"].get(name) != value]
    if moved:
        print(f"Beware, the machine is not set up as before: {', '.join(name.strip() for name in moved)}.")
    for title, part in (("slower", slower), ("faster", faster), ("no longer measured", gone)):
        print(f"{title}: {len(part)}")
        for one in part:
            print(f"  {one}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
