"""A grid of training runs that differ in a few settings, and one table of what came of them."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t as student

from r2r.config import FREE, TrainConfig, load_config
from r2r.errors import InputError
from r2r.evaluation import EvaluationSet, evaluate, load_sets
from r2r.files import atomic_path
from r2r.training import Display, Trainer

KEYS = ("base", "sets", "variants", "seeds", "baseline", "out")
KINDS = ("blind", "told", "misled", "ssim", "matched", "untouched")
RESULT, TABLE = "result.json", "table"


@dataclass(frozen=True)
class Run:
    """One training run of a grid. sets: what it is measured on, those of its tasks."""

    variant: str
    seed: int
    config: TrainConfig
    sets: tuple[EvaluationSet, ...]

    @property
    def result(self) -> Path:
        return Path(self.config.out, RESULT)


@dataclass(frozen=True)
class Grid:
    """runs: variant by variant, seed by seed. baseline: the variant that the others are compared with."""

    out: Path
    baseline: str
    runs: tuple[Run, ...]


Scores = dict[tuple[str, str], dict[str, float]]
"""Of one run, by set and image: those of KINDS that the image has. One with nothing wrong is not told."""


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid and check every run of it, before any is begun.

    base: a training configuration (`r2r.config`). sets: a file of sets (`r2r.evaluation.load_sets`). variants: names
    with the settings in which each differs, nested or with dots. seeds: each variant is trained with each of them, by
    default 0, 1 and 2. baseline: a variant, the first by default. out: a folder, by default `runs/` and the file's
    name. `base` and `sets` start at the file's folder. overrides: `key=value` for all runs, and `out`. A variant with
    fewer `tasks` leaves out the sources and sets of the others. Raises InputError.
    """
    content = _read(path)
    variants: dict[str, Any] = {str(name): changes or {} for name, changes in content["variants"].items()}
    baseline = str(content.get("baseline", next(iter(variants))))
    if baseline not in variants:
        raise InputError(f"{path}: baseline {baseline!r} is no variant; accepted: {', '.join(variants)}")
    seeds = content.get("seeds", [0, 1, 2])
    if not isinstance(seeds, list) or not seeds or any(not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise InputError(f"{path}: seeds {seeds!r}; accepted: a list of numbers, 0 or more")
    given = [one for one in overrides if one.startswith("out=")]
    out = Path(given[-1].removeprefix("out=") if given else content.get("out", f"runs/{path.stem}"))
    base, measured = (path.parent / content[key] for key in ("base", "sets"))
    runs = []
    for name, changes in variants.items():
        if not isinstance(changes, dict):
            raise InputError(f"{path}: variant {name!r} is {changes!r}; accepted: settings")
        sets: tuple[EvaluationSet, ...] | None = None
        for seed in seeds:
            place = out / name.replace("/", "_") / str(seed)
            own = [*dotted(changes), *(one for one in overrides if one not in given), f"seed={seed}", f"out={place}"]
            try:
                config = _own_tasks(load_config(base, own))
                sets = sets or tuple(load_sets(measured, config.tasks, _mixtures(config), partly=True))
            except InputError as error:
                raise InputError(f"{path}: variant {name!r}: {error}") from error
            if not sets:
                raise InputError(f"{path}: variant {name!r}: no set of its tasks in {measured}")
            runs.append(Run(name, seed, config, sets))
    return Grid(out, baseline, tuple(runs))


def run_grid(grid: Grid, display: Display, say: Callable[[str], object]) -> list[str]:
    """Train and measure what is not done yet, all variants with the first seed, then with the next; the tables are
    written anew after each run. Returns a line for each run that failed: the others go on.

    An interrupted run goes on where it was. Raises InputError where a folder holds a result of other settings.
    """
    for run in grid.runs:
        _done(run)
    failed = []
    seeds = list(dict.fromkeys(run.seed for run in grid.runs))
    for number, run in enumerate(sorted(grid.runs, key=lambda run: seeds.index(run.seed)), start=1):
        if _done(run) is None:
            say(f"{run.variant}, seed {run.seed} ({number} of {len(grid.runs)})")
            try:
                _run(run, display)
            except InputError as error:
                failed.append(f"{run.variant}, seed {run.seed}: {error}")
                say(f"failed: {failed[-1]}")
                continue
        write_tables(grid)
    return failed


def _run(run: Run, display: Display) -> None:
    trainer = Trainer(run.config, display)
    result = evaluate(trainer.run(), run.sets, trainer.device)
    images = [
        {
            "set": one.name,
            "image": image.name,
            "blind": image.blind.psnr,
            "ssim": image.blind.ssim,
            "told": image.told.psnr if image.told else None,
            "misled": image.misled.psnr if image.misled else None,
            "matched": set(one.tasks) <= set(image.chosen) <= {*one.tasks, *one.optional},
            "untouched": image.untouched,
        }
        for one in result.sets
        for image in one.images
    ]
    with atomic_path(run.result) as path:
        path.write_text(json.dumps({"settings": _settings(run), "images": images}))


def _settings(run: Run) -> dict[str, Any]:
    """What a result depends on, in the form JSON gives back."""
    config = {key: value for key, value in asdict(run.config).items() if key not in FREE}
    sets = [[one.name, len(one.pairs)] for one in run.sets]
    settings: dict[str, Any] = json.loads(json.dumps({"config": config, "sets": sets}, default=str))
    return settings


def _done(run: Run) -> Scores | None:
    """The scores of a run that is over. Raises InputError where they are of other settings, or cannot be read."""
    if not run.result.exists():
        return None
    try:
        content = json.loads(run.result.read_text())
        scores = {
            (one["set"], one["image"]): {kind: float(one[kind]) for kind in KINDS if one[kind] is not None}
            for one in content["images"]
        }
        same = content["settings"] == _settings(run)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{run.result} cannot be read: {error}; remove it to measure that run again") from error
    if not same:
        raise InputError(f"{run.result} is of other settings; use another out folder, or remove {run.config.out}")
    return scores


# -- the table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A figure of one variant, and how much it varies: the standard deviation over seeds, or half of a confidence
    interval. spread: None where there is one value."""

    value: float
    spread: float | None = None

    def text(self, digits: int, sign: bool = False, plus_minus: str = "±") -> str:
        value = f"{self.value:+.{digits}f}" if sign else f"{self.value:.{digits}f}"
        return value if self.spread is None else f"{value} {plus_minus} {self.spread:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One variant. figures: of KINDS; PSNR in dB, SSIM, and shares of images. Each is the mean over sets of the means
    over their images; what no set says is missing. Sets with nothing wrong count in `untouched` alone, and the others
    not there. differences: of blind and told PSNR to the baseline, on the images that both were measured on, with 95 %
    confidence. sets: blind PSNR."""

    variant: str
    seeds: int
    figures: Mapping[str, Cell]
    differences: Mapping[str, Cell]
    sets: Mapping[str, Cell]


def rows_of(grid: Grid) -> list[Row]:
    """Of all variants with at least one finished run."""
    done: dict[str, dict[int, Scores]] = {}
    for run in grid.runs:
        scores = _done(run)
        if scores is not None:
            done.setdefault(run.variant, {})[run.seed] = scores
    rows = []
    for variant, runs in done.items():
        baseline = done.get(grid.baseline, {}) if variant != grid.baseline else {}
        names = list(dict.fromkeys(name for scores in runs.values() for name, _ in scores))
        first = next(iter(runs.values()))  # of all seeds the same sets
        figures = {
            kind: _over_seeds([_mean(scores, kind, chosen) for scores in runs.values()])
            for kind in KINDS
            if (chosen := [name for name in names if _counts(first, kind, name)])
        }
        differences = {kind: paired(runs, baseline, kind) for kind in ("blind", "told")}
        known = {kind: cell for kind, cell in differences.items() if cell is not None}
        sets = {name: _over_seeds([_mean(scores, "blind", [name]) for scores in runs.values()]) for name in names}
        rows.append(Row(variant, len(runs), figures, known, sets))
    return rows


def paired(runs: Mapping[int, Scores], baseline: Mapping[int, Scores], kind: str) -> Cell | None:
    """The mean difference of two variants, and half of its 95 % confidence interval (Student's t).

    Runs are paired by seed, as the same seed draws the same photos in the same order. With one seed, images are paired,
    and how much training itself varies stays unknown. None where nothing can be paired.
    """
    seeds = [seed for seed in runs if seed in baseline]
    if not seeds:
        return None
    mine, others = runs[seeds[0]], baseline[seeds[0]]
    shared = [key for key in mine if key in others and _counts(mine, kind, key[0])]
    names = list(dict.fromkeys(name for name, _ in shared))
    if not names:
        return None
    if len(seeds) > 1:
        differences = [_mean(runs[seed], kind, names) - _mean(baseline[seed], kind, names) for seed in seeds]
    else:
        differences = [mine[key][kind] - others[key][kind] for key in shared]
    mean, number = statistics.fmean(differences), len(differences)
    if number == 1:
        return Cell(mean)
    return Cell(mean, float(student.ppf(0.975, number - 1)) * statistics.stdev(differences) / number**0.5)


def _counts(scores: Scores, kind: str, name: str) -> bool:
    """Whether the images of a set say something of this kind: a set with nothing wrong has no task to be told."""
    images = [image for (one, _), image in scores.items() if one == name]
    faulty = all("told" in image for image in images)
    return all(kind in image for image in images) and faulty != (kind == "untouched")


def _mean(scores: Scores, kind: str, names: Sequence[str]) -> float:
    """The mean over sets of the means over their images."""
    sets = [[image[kind] for (one, _), image in scores.items() if one == name] for name in names]
    return statistics.fmean(map(statistics.fmean, sets))


def _over_seeds(values: Sequence[float]) -> Cell:
    return Cell(float(np.mean(values)), statistics.stdev(values) if len(values) > 1 else None)


def write_tables(grid: Grid) -> None:
    """`table.md`, `table.csv` and `table.tex` in the grid's folder, atomically. Raises InputError."""
    rows = rows_of(grid)
    for suffix, text in ((".md", markdown(grid, rows)), (".tex", latex(grid, rows))):
        with atomic_path(grid.out / f"{TABLE}{suffix}") as path:
            path.write_text(text, encoding="utf-8")
    with atomic_path(grid.out / f"{TABLE}.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = _set_names(rows)
        figures = [*KINDS, "blind_difference", "told_difference", *names]
        writer.writerow(["variant", "seeds", *(f"{one}{end}" for one in figures for end in ("", "_plus_minus"))])
        for row in rows:
            cells = [row.figures.get(kind) for kind in KINDS]
            cells += [row.differences.get(kind) for kind in ("blind", "told")]
            cells += [row.sets.get(name) for name in names]
            values = [[cell.value, cell.spread] if cell else [None, None] for cell in cells]
            writer.writerow([row.variant, row.seeds, *(value for pair in values for value in pair)])


def _set_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.sets))


def _texts(grid: Grid, rows: Sequence[Row], plus_minus: str, none: str) -> list[list[str]]:
    """Headings and rows."""
    names = _set_names(rows)
    headings = ["blind", "vs baseline", "told", "vs baseline", "misled", "SSIM", "matched", "untouched"]

    def written(cell: Cell | None, digits: int = 2, sign: bool = False) -> str:
        return none if cell is None else cell.text(digits, sign, plus_minus)

    def share(cell: Cell | None) -> str:
        return none if cell is None else f"{100 * cell.value:.0f} %"

    lines = [["variant", "seeds", *headings, *names]]
    for row in rows:
        of, differs = row.figures.get, row.differences.get
        lines.append([
            row.variant, str(row.seeds),
            written(of("blind")), written(differs("blind"), sign=True),
            written(of("told")), written(differs("told"), sign=True),
            written(of("misled")), written(of("ssim"), 3), share(of("matched")), share(of("untouched")),
            *(written(row.sets.get(name)) for name in names),
        ])  # fmt: skip
    return lines


def _note(grid: Grid) -> str:
    return (
        f"PSNR in dB, the mean over sets; ± the standard deviation over seeds. Against {grid.baseline}: the mean "
        "difference on the images of both, ± half of its 95 % confidence interval, paired by seed (by image where "
        "there is one seed). Misled: told a wrong task. SSIM, matched and the sets' columns are blind. Untouched: of "
        "the images with nothing wrong, which count nowhere else."
    )


def markdown(grid: Grid, rows: Sequence[Row]) -> str:
    head, *body = _texts(grid, rows, "±", "-")
    lines = [head, ["---"] * len(head), *body]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return f"{table}\n\n{_note(grid)}\n"


def latex(grid: Grid, rows: Sequence[Row]) -> str:
    """For the package booktabs."""
    head, *body = ([_escaped(cell) for cell in line] for line in _texts(grid, rows, "±", "-"))
    lines = [" & ".join(line) + r" \\" for line in body]
    rule = [rf"% {_note(grid)}", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    return "\n".join([*rule, " & ".join(head) + r" \\", r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    for plain, written in (("\\", r"\textbackslash "), ("±", r"$\pm$"), ("→", r"$\to$")):
        text = text.replace(plain, written)
    return "".join(rf"\{one}" if one in "&%_#{}" else one for one in text)


# -- reading ----------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict) or not content["variants"]:
        raise InputError(f"{path}: accepted: {', '.join(KEYS)}, of which `variants` holds names with settings")
    unknown = sorted(map(str, content.keys() - {*KEYS}))
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; accepted: {', '.join(KEYS)}")
    for key in ("base", "sets"):
        if not isinstance(content.get(key), str):
            raise InputError(f"{path}: {key} is {content.get(key)!r}; accepted: the name of a YAML file")
    return content


def dotted(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key=value` for each setting."""
    pairs = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        pairs += dotted(value, f"{name}.") if isinstance(value, dict) else [f"{name}={json.dumps(value)}"]
    return pairs


def _own_tasks(config: TrainConfig) -> TrainConfig:
    """Without the sources of other tasks."""
    tasks = {*config.tasks}
    for key in ("data", "validation"):
        entries = getattr(config, key)
        setattr(config, key, [one for one in entries if {*_names(one, "task"), *_names(one, "optional")} <= tasks])
    if not config.data:
        raise InputError(f"no source of the tasks {', '.join(config.tasks)}")
    return config


def _mixtures(config: TrainConfig) -> bool:
    several = any(len(_names(entry, "task")) != 1 or entry.get("optional") for entry in config.data)
    return bool(config.model.get("mixtures", several))


def _names(entry: Mapping[str, Any], key: str) -> list[str]:
    named = entry.get(key) or []
    return [named] if isinstance(named, str) else list(named)
