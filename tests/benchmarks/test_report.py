"""Saved runs become reports and comparisons; red tests do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare, report, runs
from benchmarks.runs import EAGER, Missing, Row, Run
from benchmarks.stamp import ROOT, Stamp, code_digest, refusal


def row(rival: str, median: float, group: str = "naf_block forward", **more: object) -> Row:
    one = Row(group, "1 x 32 x 8 x 8", "float32", rival, median, 0.99 * median, 1.01 * median, 9, 0.5)
    return replace(one, **more)  # type: ignore[arg-type]


def a_run(scale: float = 1.0, ours: float = 1.0) -> Run:
    rows = [
        row(EAGER, 4e-3 * scale, bytes=10**6, flops=10**7, floor=1e-3, bound="memory", peak=10**7),
        row("torch.compile", 2e-3 * scale, bytes=10**6, flops=10**7, floor=1e-3, bound="memory"),
        row("ours", 1e-3 * scale * ours, bytes=10**6, flops=10**7, floor=1e-3, bound="arithmetic", items=2),
    ]
    runs.compare_within(rows)
    rows += [
        row("ours", 1e-3 * n * scale, "photo by pixels", growth=("pixels", 100.0 * n), case=f"{n}", floor=1e-4 * n)
        for n in (1, 2, 8)
    ]
    return Run(
        rows,
        [Missing("naf_block forward", "1 x 32 x 8 x 8", "float32", "ours frozen", "it does not | compile")],
        {"name": "Some CPU, 2 threads", "driver": "", "effort": "full", "facts": {"torch": "2.13.0"}},
        {"id": "0123456789abcdef", "dirty": False, "code": "feed"},
        "2026-01-02T03:04:05",
        {"copy": {"1000000": 1e9, "100000000": 5e8}, "gemm": {"float32": 1e11}},
    )


def save(run: Run, path: Path) -> Path:
    path.write_text(json.dumps(report.saved_form(run)))
    return path


def test_ratios_within_a_group() -> None:
    eager, compiled, ours = a_run().rows[:3]
    assert (eager.vs_eager, compiled.vs_eager, ours.vs_eager) == (1, 2, 4)
    assert (ours.vs_best_rival, compiled.vs_best_rival) == (2, 1)


def test_the_summary_holds_ours_against_the_best_rival() -> None:
    (line,) = runs.summary(a_run().rows)
    place = ("naf_block forward", "1 x 32 x 8 x 8", "float32")
    assert line == (False, (*place, "1 ms (ours)", "2 ms (torch.compile)", "2.00", "4.00", "100 %"))
    ((slower, cells),) = runs.summary(a_run(ours=2.5).rows)
    assert slower
    assert cells[3:6] == ("2.5 ms (ours)", "2 ms (torch.compile)", "0.80")


def test_a_run_survives_saving(tmp_path: Path) -> None:
    assert runs.load(save(a_run(), tmp_path / "run.json")) == a_run()


def test_report(tmp_path: Path) -> None:
    assert report.main([str(save(a_run(), tmp_path / "run.json")), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "README.md").read_text()
    assert "2026-01-02 at commit `0123456789ab`" in page
    assert "torch: 2.13.0" in page
    assert "| ours | 1 ms | 990 us, 1.01 ms | 4.00 | 2.00 |" in page
    assert "100 % arithmetic | 2e+03 |" in page
    assert "ours frozen at 1 x 32 x 8 x 8 float32: it does not \\| compile" in page
    assert "| photo by pixels | float32 | ours | 100 pixels | 800 | 1.00 | 1.00 | 8.0 x | 8.0 x |" in page
    for plot in ("speedup", "roofline", "scaling", "traffic"):
        assert f"({plot}.png)" in page
        assert (tmp_path / "out" / f"{plot}.png").stat().st_size > 1000
    assert runs.load(tmp_path / "out" / "run.json") == a_run()


def test_pieces_of_a_run_are_merged(tmp_path: Path) -> None:
    found = Missing("naf_block forward", "1 x 32 x 8 x 8", "float32", "ours", "left out")
    piece = replace(a_run(), rows=a_run().rows[:2], missing=[found])
    merged = runs.merge([piece, a_run()])
    assert {one.key for one in merged.rows} == {one.key for one in a_run().rows}
    assert found not in merged.missing, "what is missing in one piece was measured in the other"
    with pytest.raises(ValueError, match="different machines or of different code"):
        runs.merge([a_run(), replace(a_run(), commit={"code": "beef"})])


def test_red_or_missing_tests_are_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red = replace(a_run(), refusal="the tests are red at this code")
    assert report.main([str(save(red, tmp_path / "run.json")), "--out", str(tmp_path / "out")]) == 2
    assert "the tests are red" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "", "{}", '{"benchmarks": [{"extra_info": {}}]}'])
def test_files_that_are_no_runs(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 2
    assert compare.main([str(path), str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_stamp() -> None:
    green = Stamp("feed", "cpu", True)
    assert refusal(green, "feed", "cpu") is None
    assert "has not been run at this code" in str(refusal(green, "beef", "cpu"))
    assert "has not been run" in str(refusal(None, "feed", "cpu"))
    assert "run on cpu, not on NVIDIA" in str(refusal(green, "feed", "NVIDIA H200"))
    assert "red" in str(refusal(Stamp("feed", "cpu", False), "feed", "cpu"))


def test_digest_follows_the_code(tmp_path: Path) -> None:
    for name in ("setup.py", "r2r/a.py", "csrc/b.cu", "tests/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = code_digest(tmp_path)
    (tmp_path / "r2r/a.pyc").write_text("other")
    assert code_digest(tmp_path) == before
    (tmp_path / "csrc/b.cu").write_text("2")
    assert code_digest(tmp_path) != before


def test_only_whole_green_runs_are_stamped(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\naddopts = -m 'not slow'\nmarkers = slow\n")
    (tmp_path / "tests").mkdir()
    tests = tmp_path / "tests" / "test_it.py"
    kept = tmp_path / ".pytest_cache" / "v" / "r2r" / "tests"

    def stamped(*arguments: str) -> bool | None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.stamp", *arguments]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        return json.loads(kept.read_text())["passed"] if kept.exists() else None

    slow = "import pytest\n\n@pytest.mark.slow\ndef test_c(): assert False\n"
    tests.write_text("def test_a(): pass\n\ndef test_b(): pass\n\n" + slow)
    assert stamped("-k", "test_a") is None
    assert stamped("--deselect", "tests/test_it.py::test_a") is None
    assert stamped() is True
    kept.unlink()
    assert stamped("-n", "2") is True
    assert json.loads(kept.read_text())["code"] == code_digest()
    tests.write_text("def test_a(): pass\n\ndef test_b(): assert False\n")
    assert stamped("-k", "test_b") is False
    assert stamped("-k", "test_a") is False, "a part that passes makes no suite green"


def test_compare_sees_what_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = save(a_run(), tmp_path / "old.json"), save(a_run(ours=1.2), tmp_path / "new.json")
    assert compare.main([str(old), str(new)]) == 1
    said = capsys.readouterr().out
    assert "slower: 1" in said
    assert "| ours: 1 ms -> 1.2 ms (1.20 x; eager 1.00 x)" in said
    assert compare.main([str(new), str(old)]) == 0
    assert "faster: 1" in capsys.readouterr().out


def test_compare_is_not_misled_by_noise_or_a_slower_machine() -> None:
    slower, faster, _ = compare.changes(a_run(), a_run(scale=1.015))
    assert not slower
    assert not faster
    slower, _, _ = compare.changes(a_run(), a_run(scale=1.3))
    names = {(change.new.group, change.new.rival) for change in slower}
    assert ("naf_block forward", "ours") not in names, "eager slowed down as much: it was the machine"
    assert ("photo by pixels", "ours") in names, "nothing says that it was the machine"


def test_compare_names_what_is_gone() -> None:
    new = a_run()
    gone = new.rows.pop(2)
    new.missing.append(Missing(*gone.key, "ImportError: no"))
    assert compare.changes(a_run(), new)[2] == ["naf_block forward | 1 x 32 x 8 x 8 | float32 | ours: ImportError: no"]
