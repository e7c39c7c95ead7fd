"""The stamp "the whole test suite passed, on this device, at this very code", without which no figures are reported.

A pytest plugin: `tests/benchmarks/conftest.py` takes its hook, `pytest -p benchmarks.stamp` does where the tests are
spread over processes. The code is named by a digest of its files, so it works in a copy without git and with changes
that are not committed. Kept in pytest's cache.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
_KEY = "r2r/tests"
_FOLDERS = ("r2r", "r2r_kernels", "csrc", "tests", "benchmarks")
_SUFFIXES = (".py", ".json", ".h", ".cpp", ".cu", ".cuh")
_RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Stamp:
    """What a test run showed. `passed` is True for a whole, green suite (slow tests may be left out), and False where
    any test failed."""

    code: str
    device: str
    passed: bool


def code_digest(root: Path = ROOT) -> str:
    """Sixteen hex digits that change with every file that is compiled, imported or tested with."""
    digest = hashlib.sha256()
    files = [root / "setup.py", *(path for folder in _FOLDERS for path in (root / folder).rglob("*"))]
    for path in sorted(files):
        if path.suffix in _SUFFIXES and path.is_file() and _RESULTS not in path.parents:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def read(config: pytest.Config) -> Stamp | None:
    """The stamp of the last test run, of whatever code."""
    cache = getattr(config, "cache", None)  # -p no:cacheprovider
    kept: Any = cache.get(_KEY, None) if cache else None
    return Stamp(**kept) if kept else None


def refusal(stamp: Stamp | None, code: str, device: str) -> str | None:
    """Why a run of this code on this device must not be reported, in one line; None where it may."""
    if stamp is None or stamp.code != code:
        return "the whole test suite has not been run at this code (run pytest first)"
    if stamp.device != device:
        return f"the test suite was run on {stamp.device}, not on {device}"
    return None if stamp.passed else "the tests are red at this code"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    cache = getattr(config, "cache", None)
    if hasattr(config, "workerinput") or cache is None:  # a process of pytest-xdist; -p no:cacheprovider
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    left_out = reporter.stats.get("deselected", []) if reporter else []
    whole = (
        config.args in (config.getini("testpaths"), [str(ROOT / "tests")])
        and not config.option.keyword
        and config.option.markexpr in ("", "not slow")
        and all(item.get_closest_marker("slow") for item in left_out)
    )
    red = exitstatus == pytest.ExitCode.TESTS_FAILED
    if red or (whole and exitstatus == pytest.ExitCode.OK):
        cache.set(_KEY, asdict(Stamp(code_digest(), device_name(), not red)))
