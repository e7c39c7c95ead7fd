"""The command line, `r2r`. Heavy imports wait until a command needs them, so that `--help` answers at once."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from r2r.errors import InputError
from r2r.terminal import (
    RestorationDisplay,
    TrainingDisplay,
    console,
    only_results,
    printable,
    progress_bar,
    show_growth,
    tolerate_any_character,
)

if TYPE_CHECKING:
    from r2r.model import R2R


EXTRAS = {
    "tensorboard": "train",
    "matplotlib": "demo",
    "sklearn": "demo",
    "gradio": "web",
    "starlette": "web",
    "ray": "ray",
    "pyarrow": "ray",
}  # packages that few commands need


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


def _gigabytes(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1e6:
        raise InputError(f"--memory {value}: accepted are gigabytes, more than 0")
    return value


def _show_version(wanted: bool) -> None:
    if wanted:
        import r2r

        console.print(r2r.__version__)
        raise typer.Exit


app = typer.Typer(
    name="r2r",
    help="Restore photos with one model for noise, rain, haze, blur, low light and more; train and measure it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
MODEL_HELP, COMES_ALONG = "Folder of a model, or hf://OWNER/NAME on the Hub.", "By default the one that comes along."
ModelArgument = Annotated[str | None, typer.Argument(help=f"{MODEL_HELP} {COMES_ALONG}")]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help=f"{MODEL_HELP} {COMES_ALONG}")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.")]
MemoryOption = Annotated[
    float | None, typer.Option(callback=_gigabytes, help="Gigabytes the work may take; larger photos are tiled.")
]
EagerOption = Annotated[bool, typer.Option("--eager", help="Use the plain PyTorch reference instead of the kernels.")]


def main() -> None:
    """Entry point: bad input becomes one line and exit code 2, an interruption exit code 130."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", module="PIL")  # about damaged files, which are reported
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    tolerate_any_character()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except InputError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"error: this needs the package {error.name}: pip install 'r2r-restore[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as ending:
        if ending.code == 130:  # typer's answer to a KeyboardInterrupt
            _interrupted()
        raise
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _interrupted() -> NoReturn:
    print("interrupted; what was done so far is kept", file=sys.stderr)
    sys.exit(130)


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def _load(model: str | None, device: str, eager: bool) -> R2R:
    from r2r import R2R, fast
    from r2r.device import pick_device

    return (R2R if eager else fast.R2R).from_pretrained(model, map_location=str(pick_device(device)))


def _load_frozen(model: str | None, device: str, eager: bool) -> R2R:
    from r2r.frozen import inference_form

    return inference_form(_load(model, device, eager))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the page and the pictures go.")] = Path("demo"),
    train: Annotated[
        bool, typer.Option("--train", help="Train a small model first, in minutes, and show that.")
    ] = False,
    seed: Annotated[int, typer.Option(help="With --train: another seed trains another model.")] = 0,
    minutes: Annotated[float, typer.Option(help="With --train: roughly how long, at most.")] = 3.5,
    eager: EagerOption = False,
) -> None:
    """Restore photos that come with scikit-image, each degraded in another way, and look at them.

    Example: `r2r demo`, then open `demo/index.html`.
    """
    if train:
        from r2r.demo.training import run_demo as train_and_show

        train_and_show(out, seed, minutes, console, eager)
    else:
        from r2r.demo.restoring import run_demo

        run_demo(out, console)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file; see docs/training.md.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. pretrain.epochs=20")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run; an interrupted run there goes on.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...")] = None,
    eager: EagerOption = False,
) -> None:
    """Train a model: pretraining with both stages, then finetuning. Run it again to go on after an interruption.

    Example: `r2r train configs/paper/five_tasks.yaml out=runs/five pretrain.epochs=60`
    """
    from r2r import ranks
    from r2r.config import load_config
    from r2r.device import keep_freed_memory
    from r2r.training import Trainer

    keep_freed_memory()

    pairs = list(overrides or ())
    if config is not None and "=" in str(config):  # no file, settings alone
        pairs.insert(0, str(config))
        config = None
    for key, value in (("out", out), ("device", device), ("eager", eager or None)):
        if value is not None:
            pairs.append(f"{key}={value}")
    settings = load_config(config, pairs)
    with ranks.joined(settings.device) as settings.device:
        display = TrainingDisplay()
        with display.progress if ranks.rank() == 0 else nullcontext():
            model = Trainer(settings, display).run()
        if ranks.rank() == 0:
            console.print(f"done: {settings.out}/last ({', '.join(model.tasks)}), log in {settings.out}/log.csv")


@app.command()
def ablate(
    grid: Annotated[Path, typer.Argument(help="YAML file; see docs/training.md.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for all runs, e.g. device=cpu")] = None,
) -> None:
    """Train variants of one configuration with several seeds, and write one table of them: Markdown, CSV and LaTeX.

    The same command again goes on where it was stopped. Exit code 1 where a run failed; the others go on.

    Example: `r2r ablate configs/paper/ablation.yaml out=runs/ablation`
    """
    from r2r.ablation import TABLE, load_grid, run_grid

    runs = load_grid(grid, list(overrides or ()))
    display = TrainingDisplay()
    with display.progress:
        failed = run_grid(runs, display, display.say)
    console.print(f"{runs.out / TABLE}.md, .csv and .tex")
    if failed:
        raise typer.Exit(1)


@app.command()
def restore(
    inputs: Annotated[
        list[str], typer.Argument(help="Photos, and folders of them; - for standard input; with --ray s3://... too.")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the restored photos and report.json, by default `restored` beside them; - for "
            "standard output.",
        ),
    ] = None,
    model: ModelOption = None,
    task: Annotated[
        str | None, typer.Option(help="Say what is wrong instead of having it recognised; several joined by +.")
    ] = None,
    strength: Annotated[float, typer.Option(help="How much of the restoration is mixed in, 0 to 1.")] = 1.0,
    file_format: Annotated[
        str | None, typer.Option("--format", help="jpg, png, webp, tiff or avif instead of the photo's own format.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of JPEG, WebP and AVIF. A JPEG keeps its own otherwise.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Do again what is done, and replace files in the way.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Write compare.html: before and after, a slider.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    log: Annotated[LogFormat, typer.Option(help="json: one JSON object a line.")] = LogFormat.TEXT,
    device: DeviceOption = "auto",
    memory: MemoryOption = None,
    eager: EagerOption = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Work on a Ray cluster: HOST:PORT, auto for that of this machine, local to start one here."),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="With --ray: of each worker; by default all of the smallest machine.")
    ] = None,
) -> None:
    """Restore photos: names, subfolders, format, bit depth, transparency and metadata stay as they are.

    The same command again goes on where it was stopped, and skips what is done and has not changed. Exit code 1 where
    photos failed or were left out; report.json says which and why.

    A photo in which nothing is found wrong is copied as it is, and so is a screenshot or another graphic.

    Example: `r2r restore holiday/ scan.tif`

    Example: `r2r restore s3://bucket/photos --out s3://bucket/restored --ray auto`
    """
    from r2r.compare import write_comparison
    from r2r.data.images import FORMATS, format_of
    from r2r.device import keep_freed_memory
    from r2r.restoration import Settings, prepare, restore_files, restore_stream
    from r2r.storage import location

    if memory is None:
        keep_freed_memory()
    written = format_of(file_format) if file_format else None
    if quality is not None and written and not FORMATS[written].lossy:
        raise InputError(f"--quality: {written} has none; JPEG, WebP and AVIF have")
    settings = Settings(task, strength, None if memory is None else int(memory * 1e9), written, quality)
    if cores is not None and ray is None:
        raise InputError("--cores goes with --ray")
    if "-" in (*inputs, out):
        if len(inputs) != 1 or out != "-" or ray is not None:
            raise InputError(
                "- stands for one photo, without --ray: r2r restore PHOTO --out -, or r2r restore - --out -"
            )
        loaded = _load_frozen(model, device, eager)
        restore_stream(loaded, inputs[0], sys.stdout.buffer, settings)
        return
    place = location(inputs[0]).parent / "restored" if out is None else location(out)
    if compare and not all(isinstance(one, Path) for one in map(location, (*inputs, place))):
        raise InputError("--compare shows photos where they lie; a page cannot show those of object storage")
    display = RestorationDisplay(as_json=log is LogFormat.JSON)
    with ExitStack() as stack:
        by = None
        if ray is not None and not dry_run:
            from r2r.fleet import Fleet, connected

            stack.enter_context(only_results())
            stack.enter_context(connected(ray))
            by = Fleet(_load(model, "cpu", eager), device, cores)
        loaded = _load_frozen(model, device if ray is None else "cpu", eager)
        if dry_run:
            report, items = prepare(loaded, inputs, place, settings, overwrite)
            display.plan(report, [(item.source, item.target) for item in items if not item.done])
            return
        with display.progress:
            report = restore_files(loaded, inputs, place, settings, overwrite, display.show, by)
    display.summary(report, place)
    if compare and isinstance(place, Path):
        write_comparison(place, report.files)
    if report.failed or report.skipped:
        raise typer.Exit(1)


@app.command()
def web(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine need --password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    password: Annotated[
        str | None, typer.Option(envvar="R2R_PASSWORD", help="Asked for before the page is shown.")
    ] = None,
    max_size: Annotated[int, typer.Option(min=1, help="Megabytes that an upload may have.")] = 500,
    max_pixels: Annotated[int, typer.Option(min=1, help="Megapixels that a photo may have.")] = 200,
    device: DeviceOption = "auto",
    memory: MemoryOption = None,
    eager: EagerOption = False,
) -> None:
    """Restore photos on a page in the browser, which this machine serves to itself alone. Ctrl-C ends it.

    Example: `r2r web`, then open http://127.0.0.1:7860
    """
    from r2r.web.address import check_address

    check_address(host, port, password)  # at once; what follows takes seconds to import
    from r2r.web.server import Limits, serve

    limits = Limits(max_size * 10**6, max_pixels * 10**6, None if memory is None else int(memory * 1e9))
    with suppress(KeyboardInterrupt):
        serve(
            lambda: _load_frozen(model, device, eager),
            host,
            port,
            password,
            limits,
            lambda address: console.print(f"{address} shows the page; Ctrl-C ends it"),
        )


@app.command()
def evaluate(
    sets: Annotated[Path | None, typer.Argument(help="YAML file with several sets; see docs/evaluation.md.")] = None,
    model: ModelOption = None,
    task: Annotated[str | None, typer.Option(help="The task of a single set; several joined by +.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Folder {degraded,clean}/NAME.*")] = None,
    clean: Annotated[Path | None, typer.Option(help="Folder of clean photos, to be degraded.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise level of 255 for clean photos.")] = None,
    degradation: Annotated[
        str | None, typer.Option(help="What to do to clean photos, e.g. haze or rain+noise.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Something to compare, as often as you like, each also as NAME=...: a model, a folder of restored "
            "images, a checkpoint that spandrel reads, module:function, r2r for the weights that come along."
        ),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="lpips or niqe, beside PSNR and SSIM.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for the restored images, as PNG.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the confusion of tasks to a picture.")] = None,
    csv_out: Annotated[Path | None, typer.Option("--csv", help="Write a line for each image to a file.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result to a file.")] = None,
    device: DeviceOption = "auto",
    eager: EagerOption = False,
) -> None:
    """Measure PSNR and SSIM, blind, told and misled, and how often the right tasks are found; or, with --method,
    several methods beside each other.

    Example: `r2r evaluate --task denoise --clean photos --sigma 25 --json result.json`

    Example: `r2r evaluate sets.yaml --method r2r --method NAFNet.pth --method PromptIR=their_outputs`
    """
    from r2r.comparison import Comparison, compare
    from r2r.data.sources import build_source
    from r2r.device import keep_freed_memory, pick_device
    from r2r.evaluation import Evaluation, evaluate, evaluation_set, load_sets
    from r2r.files import atomic_path, check_writable, write_csv
    from r2r.methods import method_of
    from r2r.metrics import Measures

    if (sets is None) == (task is None):
        raise InputError("give a YAML file of sets, or --task with --pairs or --clean")
    methods = [method_of(text, eager) for text in ([model] if model and method else []) + (method or [])]
    if plot is not None and methods:
        raise InputError("--plot draws the confusion of one model; it does not go with --method")
    for file in filter(None, (csv_out, json_out, plot)):
        check_writable(file)
    measures = Measures(metric or ())
    keep_freed_memory()
    loaded = None if methods else _load(model, device, eager)
    tasks, mixtures = (loaded.tasks, loaded.mixtures) if loaded else (None, True)
    if sets is not None:
        chosen = load_sets(sets, tasks, mixtures)
    else:
        named = str(task).split("+")
        given = {"pairs": pairs, "clean": clean, "sigma": sigma, "degradation": degradation}
        entry = {key: str(value) for key, value in given.items() if value is not None}
        source = build_source({"task": named, **entry}, tasks or named)
        chosen = [evaluation_set(source, len(tasks or named), mixtures)]
    where = pick_device(device)
    with progress_bar() as progress:
        number = sum(len(one.pairs) for one in chosen)
        bar = progress.add_task("evaluating", total=number * (len(methods) + 1 if methods else 1))
        result: Evaluation | Comparison
        if loaded is None:
            result = compare(methods, chosen, where, measures, save, lambda: progress.advance(bar))
        else:
            result = evaluate(loaded, chosen, where, True, lambda *_: progress.advance(bar), measures, save)
    result.render(console)
    if plot is not None and isinstance(result, Evaluation):
        from r2r.figures import plot_confusion

        plot_confusion(result, plot)
    if csv_out is not None:
        write_csv(csv_out, result.rows())
    if json_out is not None:
        with atomic_path(json_out) as path:
            path.write_text(json.dumps(result.to_dict(), indent=2) + "\n")


@app.command()
def complexity(
    method: Annotated[
        list[str] | None, typer.Option(help="Something to measure, as often as you like; see r2r evaluate --help.")
    ] = None,
    preset: Annotated[list[str] | None, typer.Option(help="Sizes of an untrained model: base, small or tiny.")] = None,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks the bank of such a model holds.")] = 5,
    size: Annotated[int, typer.Option(min=16, help="Height and width of the image.")] = 224,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result to a file.")] = None,
    device: DeviceOption = "auto",
    eager: EagerOption = False,
) -> None:
    """Measure parameters, multiply-accumulates, time and memory, of trained and of untrained models, each in a process
    of its own. Without options: the model of the paper, for 3 and 5 tasks and for mixtures.

    Example: `r2r complexity --preset base --method NAFNet.pth --method mine:restore`
    """
    from dataclasses import asdict

    from r2r.complexity import PAPER, measure_apart, settings, table
    from r2r.device import pick_device
    from r2r.files import atomic_path
    from r2r.methods import method_of

    where = pick_device(device)
    names = [f"task{number}" for number in range(tasks)]
    methods = [settings(name, names, eager=eager) for name in preset or ()]
    methods += [method_of(text, eager) for text in method or ()]
    if not methods:
        methods = [settings("base", names[:number], eager=eager) for number in (3, 5) if number <= tasks]
        methods.append(settings("base", names[:4], mixtures=True, eager=eager))
    idle = next((one for one in methods if not one.runs), None)
    if idle is not None:
        raise InputError(f"{idle.name}: a folder of images has no complexity")
    rows = [(one.name, measure_apart(one, where, size)) for one in methods]
    console.print(table(rows, size))
    console.print(PAPER)
    if json_out is not None:
        with atomic_path(json_out) as path:
            path.write_text(json.dumps({name: asdict(one) for name, one in rows}, indent=2) + "\n")


@app.command()
def curves(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("curves.png"),
) -> None:
    """Draw PSNR and SSIM of each validation set over a run, blind and told the task.

    Example: `r2r curves runs/five --out curves.png`
    """
    from r2r.figures import plot_curves

    plot_curves(run, out)
    console.print(str(out))


@app.command()
def degrade(
    clean: Annotated[Path, typer.Argument(help="Folder of clean photos.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for {degraded,clean}/NAME.png.")],
    kind: Annotated[str, typer.Option("--as", help="What to do, e.g. noise:sigma=25, haze or lowlight+rain+noise.")],
    seed: Annotated[int, typer.Option(help="The same seed makes the same pairs.")] = 0,
    depth: Annotated[Path | None, typer.Option(help="Folder of depth maps, for haze.")] = None,
    depth_encoding: Annotated[str, typer.Option(help="How the depth maps hold distance.")] = "distance",
) -> None:
    """Make pairs for training and testing from clean photos.

    Example: `r2r degrade photos --out pairs --as rain`
    """
    from r2r.data.degradations import parse_degradation
    from r2r.data.degrade import degrade_folder
    from r2r.data.folders import clean_folder

    degradation = parse_degradation(kind)
    photos = clean_folder(clean, depth)
    with progress_bar() as progress:
        bar = progress.add_task("degrading", total=len(photos))
        made = degrade_folder(photos, out, degradation, seed, depth_encoding, progress=lambda _: progress.advance(bar))
    console.print(f"{made} pairs made, {len(photos) - made} were there; {out}")


@app.command()
def unpack(
    photos: Annotated[Path, typer.Argument(help="Folder of photos, of pairs, or a published data set.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the same photos as uncompressed TIFF.")],
) -> None:
    """Write photos as uncompressed TIFF, of which training reads a crop without decoding the rest: for large photos.

    Example: `r2r unpack data/Train/Deblur --out data/unpacked/Deblur`
    """
    from r2r.data.unpack import unpack_folder

    with progress_bar() as progress:
        bar = progress.add_task("unpacking", total=None)
        made, there = unpack_folder(photos, out, lambda _: progress.advance(bar))
    console.print(f"{made} photos written, {there} were there; {out}")


@app.command()
def bank(
    model: ModelArgument = None,
    remove: Annotated[str | None, typer.Option(help="Drop this task.")] = None,
    add_from: Annotated[Path | None, typer.Option(help="Another model to take tasks from that this one lacks.")] = None,
    learn: Annotated[str | None, typer.Option(help="Learn a new task of this name, in minutes.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="What to learn from: a folder {degraded,clean}/NAME.*")] = None,
    clean: Annotated[Path | None, typer.Option(help="What to learn from: clean photos, with --degradation.")] = None,
    degradation: Annotated[str | None, typer.Option(help="How clean photos are degraded, e.g. snow.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How long to learn.")] = 300,
    calibrate: Annotated[
        Path | None, typer.Option(help="Sets (YAML) on which scores are turned into probabilities.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Save in half precision.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to save the changed model.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw keys and queries, before and after training, to a picture; with --sets.")
    ] = None,
    sets: Annotated[
        Path | None, typer.Option(help="With --plot: YAML file of sets whose photos are the queries.")
    ] = None,
) -> None:
    """Show what a model's bank holds, drop a task, take tasks over from another model of the same backbone, learn a new
    one (keys and values alone, the network stays as it is), or calibrate its scores.

    Example: `r2r bank --remove deblur --out smaller`

    Example: `r2r bank --learn desnow --clean photos --degradation snow --out larger`

    Example: `r2r bank MODEL --plot bank.png --sets sets.yaml`
    """
    import torch
    from rich.table import Table

    from r2r.fast import R2R
    from r2r.pretrained import check_folder

    changes = bool(remove or add_from or learn or calibrate or half)
    if changes and out is None:
        raise InputError("say with --out where to save the changed model")
    if out is not None:
        if not changes:
            raise InputError("--out takes a changed model; say what to change")
        check_folder(out)
    loaded = R2R.from_pretrained(model)
    if changes:
        assert out is not None
        try:
            loaded.freeze_bank()
            if remove:
                loaded.bank.remove_task(remove)
            if add_from:
                other = R2R.from_pretrained(add_from)
                if other.backbone_fingerprint() != loaded.backbone_fingerprint():
                    ours = model or "the model that comes along"
                    raise InputError(f"{add_from} has another backbone than {ours}: its bank does not fit")
                loaded.bank.take_over(other.bank)
            if learn:
                loaded = _learn(loaded, learn, pairs, clean, degradation, steps)
            if calibrate:
                _calibrate(loaded, calibrate)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error
        loaded.save_pretrained(out, dtype=torch.float16 if half else None)
    table = Table("task", "slots", *loaded.tasks, title="slots of each task, cosine of the tasks' mean keys")
    likeness = loaded.bank.likeness()
    for index, name in enumerate(loaded.tasks):
        table.add_row(name, str(int(loaded.bank.counts[index])), *(f"{x:.2f}" for x in likeness[index].tolist()))
    console.print(table)
    for name in loaded.bank.smooth_tasks:
        console.print(f"{name}: looked for and undone in a small copy of the photo")
    for name in loaded.bank.light_tasks:
        console.print(f"{name}: where it is not undone, a dark photo stays dark")
    for name, strength in loaded.bank.strengths.items():
        console.print(f"{name}: {strength:g} of what the model changes is mixed in")
    if plot is not None:
        from r2r.evaluation import load_sets
        from r2r.figures import plot_bank

        if sets is None:
            raise InputError("--plot needs --sets, a YAML file of photos that ask the bank")
        plot_bank(loaded, load_sets(sets, loaded.tasks, loaded.mixtures), plot)


def _calibrate(model: R2R, path: Path) -> None:
    from r2r.calibration import calibrate
    from r2r.evaluation import load_sets

    sets = load_sets(path, model.tasks, model.mixtures)
    with progress_bar() as progress:
        bar = progress.add_task("calibrating", total=sum(len(one.pairs) for one in sets))
        calibrate(model, sets, lambda one: progress.update(bar, advance=1))


def _learn(model: R2R, name: str, pairs: Path | None, clean: Path | None, spec: str | None, steps: int) -> R2R:
    """The model with one task more, and a table of what that did to it."""
    from r2r.data.sources import build_source
    from r2r.growing import Learning, growth, learn_task, old_sources, split

    if (pairs is None) == (clean is None):
        raise InputError("--learn needs one of --pairs and --clean")
    if pairs is not None and spec:
        raise InputError("--degradation goes with --clean; pairs are degraded already")
    folder = {"pairs": str(pairs)} if pairs else {"clean": str(clean), "degradation": spec}
    whole = build_source({"task": name, **folder}, (*model.tasks, name))
    learnt, held_out = split(whole.pairs)
    with progress_bar() as progress:
        bar = progress.add_task(f"learning {name}", total=steps)
        grown = learn_task(
            model,
            name,
            replace(whole, pairs=learnt),
            old_sources(model, learnt),
            Learning(steps=steps),
            lambda step, loss: progress.update(bar, completed=step, description=f"learning {name}, loss {loss:.2f}"),
        )
        progress.update(bar, total=None, description="measuring")
        before, after = growth(model, grown, replace(whole, pairs=held_out), old_sources(model, held_out))
    show_growth(before, after)
    return grown


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The published last.ckpt.")],
    bank: Annotated[Path, typer.Option(help="Folder of TASK_key.pt and TASK_value.pt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model.")],
) -> None:
    """Read a checkpoint of the published R2R into this project's format. Nothing in it is executed.

    Example: `r2r convert last.ckpt --bank prompts/240 --out models/r2r-5d`
    """
    from r2r.convert import convert_files

    model = convert_files(checkpoint, bank, out)
    console.print(f"{out}: {', '.join(model.tasks)}; {int(model.bank.counts.sum())} slots")


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="*.pt2, for torch.export.load, or *.onnx.")],
    model: ModelArgument = None,
    half: Annotated[bool, typer.Option("--half", help="Weights, input and output in float16.")] = False,
) -> None:
    """Write a model as one file that needs nothing of this package: blind, any batch, height and width.

    ONNX needs the extra `[onnx]`. It takes two minutes or more; docs/deploy.md tells how to use the file.

    Example: `r2r export --out model.onnx`
    """
    from r2r import R2R
    from r2r.export import export

    export(R2R.from_pretrained(model), out, half)
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@app.command()
def env() -> None:
    """Tell versions, devices, and which implementation of the operators runs and why.

    Example: `r2r env`
    """
    from r2r_kernels.env import facts

    for name, value in facts().items():
        console.print(f"{name}: {value}")


if __name__ == "__main__":
    main()
