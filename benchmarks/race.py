"""One race: the rivals of a group are prepared, checked against eager, timed in turn, and recorded."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_benchmark.stats import Metadata
from torch import Tensor

from benchmarks import runs, timing
from benchmarks.rivals import Rival, Unavailable, tensors_of
from benchmarks.roofline import Limits, Work

# How far answers may be apart, as norms, or twice as far as eager's are where it rounds more than that; the tests prove
# the operators, this shows that all rivals did the same work.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
TOGETHER = "in all"


@dataclass
class Session:
    """What all races of a run share. `code`, `refusal`: see `benchmarks.stamp`."""

    device: torch.device
    effort: timing.Effort
    time_limit: float
    code: str
    refusal: str | None
    limits: Limits | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)
    missing: list[runs.Missing] = field(default_factory=list)


class Race:
    """Prepares, checks, times and records the rivals of one group row."""

    def __init__(self, request: pytest.FixtureRequest, session: Session) -> None:
        self.node, self.session = request.node, session
        self.plugin = request.config._benchmarksession  # type: ignore[attr-defined]

    def __call__(
        self,
        group: str,
        case: str,
        dtype: str,
        rivals: Sequence[Rival],
        work: Work | dict[str, Work] | None = None,
        growth: tuple[str, float] | None = None,
        items: float | None = None,
        baseline: Tensor | None = None,
        needs: int = 0,
    ) -> None:
        """work: of each phase; several get a row for all of them together. baseline: taken off the answers before they
        are compared. needs: bytes that the hungriest rival takes; what would not fit is not tried."""
        device = self.session.device
        given = {**work, TOGETHER: sum(work.values(), Work())} if isinstance(work, dict) else {"": work or Work()}

        def missing(rival: str, reason: str) -> None:
            for phase in given:
                self.session.missing.append(runs.Missing(f"{group} {phase}".strip(), case, dtype, rival, reason))

        why = self._impossible(needs)
        if why:
            for rival in rivals:
                missing(rival.name, why)
            pytest.skip(why)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # else a second size would be compiled for any size

        contenders: dict[str, timing.Contender] = {}
        first: dict[str, timing.Observation] = {}
        ready: dict[str, float] = {}
        truth: tuple[str, list[Tensor]] | None = None
        allowed, wrong = TOLERANCE[dtype], ""
        for rival in rivals:
            start = time.perf_counter()
            try:
                contender = rival.prepare()
                answer, first[rival.name] = timing.observe(contender, device)
            except Exception as error:
                missing(rival.name, _reason(error))
                if rival.name == runs.OURS:
                    wrong = f"{runs.OURS}: {_reason(error)}"
                continue
            got = [t.detach().clone() for t in tensors_of(answer)]
            truth = truth or (rival.name, got)
            if not rival.timed:
                continue
            ready[rival.name] = time.perf_counter() - start
            distance = apart(got, truth[1], baseline)
            if rival.name == runs.EAGER and math.isfinite(distance):
                allowed = max(allowed, 2 * distance)
            if distance <= allowed:
                contenders[rival.name] = contender
                continue
            missing(rival.name, f"its answers are {distance:.1e} from those of {truth[0]}")
            if rival.name.startswith(runs.OURS):
                wrong = f"the answers of {rival.name} are {distance:.1e} from those of {truth[0]}"
        if wrong:
            pytest.fail(wrong, pytrace=False)
        if self.plugin.disabled:
            return

        measured = timing.measure(contenders, first, device, self.session.effort)
        for one in measured.values():
            one.samples[TOGETHER] = [sum(phases) for phases in zip(*one.samples.values(), strict=True)]
        for phase, part in given.items():
            rows = []
            for name, one in measured.items():
                samples = one.samples[phase]
                rows.append(
                    runs.Row(
                        f"{group} {phase}".strip(),
                        case,
                        dtype,
                        name,
                        timing.percentile(samples, 50),
                        timing.percentile(samples, 20),
                        timing.percentile(samples, 80),
                        len(samples),
                        ready[name],
                        one.peak,
                        part.bytes,
                        part.flops,
                        items=items if phase in ("", TOGETHER) else None,
                        growth=growth,
                        note=contenders[name].note,
                    )
                )
            runs.compare_within(rows)
            for row in rows:
                self._record(row, measured[row.rival], phase)

    def _impossible(self, needs: int) -> str | None:
        limit = self.session.time_limit
        if time.monotonic() - self.session.start > limit:
            return f"the time limit of {limit:.0f} s had passed"
        free = _free_memory(self.session.device)
        if needs > 0.9 * free:
            return f"needs about {needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return None

    def _record(self, row: runs.Row, measurement: timing.Measurement, phase: str) -> None:
        """An entry of pytest-benchmark, with the samples as its rounds."""
        name = "::".join(filter(None, (self.node.name, phase, row.rival)))
        entry = SimpleNamespace(
            name=name,
            fullname=f"{self.node.nodeid.partition('::')[0]}::{name}",
            group=f"{row.group} {row.case} {row.dtype}",
            param=None,
            params=None,
            extra_info=asdict(row),
            cprofile_stats=None,
            has_error=False,
        )
        stats = Metadata(entry, iterations=1, options={"calls_a_round": measurement.iterations})
        for seconds in measurement.samples[phase]:
            stats.update(seconds)
        self.plugin.benchmarks.append(stats)


def apart(got: list[Tensor], wanted: list[Tensor], baseline: Tensor | None) -> float:
    """The largest relative distance of two lists of tensors; infinite where they differ in shape or are not finite."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        if one is other or not one.is_floating_point():
            continue
        off = 0 if baseline is None or baseline.shape != other.shape else baseline.float()
        scale = (other.float() - off).norm()
        distance = ((one.float() - other.float()).norm() / scale.clamp(min=1e-12)).item()
        worst = max(worst, distance if distance == distance else float("inf"))
    return worst


def _reason(error: Exception) -> str:
    """An exception in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"[:160]


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return 1024 * next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
