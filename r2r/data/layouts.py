"""The published training sets as AirNet, PromptIR and AdaIR lay them out below `Train/`, and as CDD-11 comes.

One function a data set: its root folder to its pairs. `lists` are the text files those projects publish, one file name
a line, which pick the part of a folder they train on. `REPEATS` says how often an epoch shows each image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from r2r.data.folders import Pair, by_name, check_sizes, some
from r2r.data.images import SUFFIXES
from r2r.errors import InputError

REPEATS: dict[int, dict[str, int]] = {
    # Noise: three times at each of three levels, one of which is drawn at a time.
    3: {"denoise": 9, "derain": 120, "dehaze": 1},
    5: {"denoise": 9, "derain": 80, "dehaze": 1, "deblur": 30, "lowlight": 60},
}
"""Number of tasks -> how often an epoch shows each image of a task's data set."""

CDD11_TASKS = {"low": "lowlight", "haze": "dehaze", "rain": "derain", "snow": "desnow"}
"""The tasks that the words in a class name of CDD-11 stand for."""


def bsd400_wed(root: str | Path, names: str | Path | None = None) -> list[Pair]:
    """BSD400 and WED, clean: `<root>/**/NAME.{jpg,bmp}`; names: the published `noisy/denoise.txt`.

    The list calls BSD's photos `a100007.jpg` where the data set itself calls them `100007.jpg`; both are found.
    """
    photos = by_name(Path(root))
    if names is None:
        return [Pair(name, path) for name, path in photos.items()]
    files = {path.name: path for path in photos.values()}
    listed = _read_list(names)
    found = {name: files.get(name) or files.get(name.removeprefix("a")) for name in listed}
    _require([name for name in listed if found[name] is None], names, root)
    return [Pair(Path(name).stem, path) for name, path in found.items() if path is not None]


def rain100l(root: str | Path, names: str | Path | None = None) -> list[Pair]:
    """RainTrainL, `<root>/rainy/rain-N.png` with `<root>/gt/norain-N.png`; names: the published `rainTrain.txt`."""
    return _matched(Path(root), "rainy", "gt", lambda name: f"no{name}", names)


def input_target(root: str | Path) -> list[Pair]:
    """The test sets Rain100L, GoPro and LOL, `<root>/input/NAME.png` with `<root>/target/NAME.png`."""
    return _matched(Path(root), "input", "target", lambda name: name)


def reside_ots(root: str | Path, names: str | Path | None = None) -> list[Pair]:
    """RESIDE OTS, `<root>/synthetic/**/NAME_A_BETA.jpg` with `<root>/original/NAME.*`; names: `hazy_outside.txt`."""
    return _matched(Path(root), "synthetic", "original", _before_underscore, names)


def reside_sots(root: str | Path) -> list[Pair]:
    """RESIDE SOTS outdoor, `<root>/input/NAME_A_BETA.jpg` with `<root>/target/NAME.png`."""
    return _matched(Path(root), "input", "target", _before_underscore)


def gopro(root: str | Path) -> list[Pair]:
    """GoPro, `<root>/blur/NAME.png` with `<root>/sharp/NAME.png`."""
    return _matched(Path(root), "blur", "sharp", lambda name: name)


def lol(root: str | Path) -> list[Pair]:
    """LOL (our485), `<root>/low/NAME.png` with `<root>/gt/NAME.png` or, as it comes, `<root>/high/NAME.png`."""
    root = Path(root)
    return _matched(root, "low", "gt" if (root / "gt").is_dir() else "high", lambda name: name)


def cdd11(root: str | Path, degradation: str) -> list[Pair]:
    """One class of CDD-11, such as low_haze: `<root>/low_haze/NAME.png` with `<root>/clear/NAME.png`."""
    return _matched(Path(root), degradation, "clear", lambda name: name)


def cdd11_tasks(degradation: str) -> tuple[str, ...]:
    """The tasks that undo a class of CDD-11: low_haze -> lowlight, dehaze."""
    return tuple(CDD11_TASKS[word] for word in degradation.split("_"))


LAYOUTS: dict[str, Callable[..., list[Pair]]] = {
    function.__name__: function
    for function in (bsd400_wed, rain100l, input_target, reside_ots, reside_sots, gopro, lol, cdd11)
}
"""The functions above by name, for configuration files."""


def _before_underscore(name: str) -> str:
    return name.split("_")[0]


def _matched(
    root: Path, degraded: str, clean: str, clean_name: Callable[[str], str], names: str | Path | None = None
) -> list[Pair]:
    """Pairs of `<root>/<degraded>` and `<root>/<clean>`; clean_name: degraded file's stem -> clean file's name."""
    files, clean_files = by_name(root / degraded), by_name(root / clean)
    if names is not None:
        # The published lists start at the root: rainy/rain-1.png.
        listed = [Path(name.removeprefix(f"{degraded}/")).with_suffix("").as_posix() for name in _read_list(names)]
        _require([name for name in listed if name not in files], names, root / degraded)
        files = {name: files[name] for name in listed}
    partner = {name: clean_name(path.stem) for name, path in files.items()}
    alone = [f"{degraded}/{name}" for name in files if partner[name] not in clean_files]
    if alone:
        raise InputError(f"{root}: no file in {clean} for {some(alone)}")
    pairs = [Pair(name, clean_files[partner[name]], path) for name, path in files.items()]
    check_sizes(pairs)
    return pairs


def _read_list(path: str | Path) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of file names: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or not all(name.lower().endswith(SUFFIXES) for name in names):
        raise InputError(f"{path}: not a list of image files; accepted: one file name a line")
    return names


def _require(missing: list[str], names: str | Path, folder: str | Path) -> None:
    if missing:
        raise InputError(f"{folder}: {some(missing)} listed in {names} but not there")
