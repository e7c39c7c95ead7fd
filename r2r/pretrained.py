"""A model's folder, read as what a stranger may have sent: sizes are checked before memory is taken."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from r2r.errors import InputError

Model = TypeVar("Model", bound=nn.Module)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB = "hf://"  # what the names of models on the Hugging Face Hub begin with
_LARGEST_CONFIG = 2**20  # bytes
_FLOAT = "floating point"
_KINDS = {**dict.fromkeys(("F64", "F32", "F16", "BF16"), _FLOAT), "I64": "int64"}  # of the tensors in a file
_SMALL = 1024  # values: whether less may be missing, `load_state_dict` decides
_TASK_NAME = re.compile(r"\w[\w .-]*")  # it is shown in terminals, and "+" joins several


def read_config(folder: Path, build: Callable[..., nn.Module]) -> dict[str, Any]:
    """Keyword arguments of `build`, from a folder's `config.json`. Raises InputError, naming the file."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError("it is larger than 1 MB")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a model: {CONFIG} is missing") from error
    except RecursionError as error:
        raise InputError(f"{path} does not describe an R2R model: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} does not describe an R2R model: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} does not describe an R2R model: it holds no names with values")
    known = inspect.signature(build).parameters
    unknown = config.keys() - known.keys()
    if unknown:
        raise InputError(f"{path} does not describe an R2R model: {', '.join(sorted(unknown))!r} is unknown")
    for name, value in config.items():
        if isinstance(known[name].default, bool) and not isinstance(value, bool):
            raise InputError(f"{path} does not describe an R2R model: {name} must be true or false, got {value!r}")
    tasks = config.get("tasks")
    if not isinstance(tasks, list) or not all(map(is_task_name, tasks)):
        raise InputError(f"{path} does not describe an R2R model: tasks must be names of letters, digits, - and _")
    return config


def check_folder(folder: Path) -> None:
    """Raises InputError where a model would be saved among other files. A folder that holds a model is replaced."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / WEIGHTS).exists())):
        raise InputError(f"{folder} holds no model; accepted: a new or empty folder, or one of a model to replace")


def is_task_name(name: object) -> bool:
    return isinstance(name, str) and _TASK_NAME.fullmatch(name) is not None


def read_model(folder: Path, config: Mapping[str, Any], build: Callable[..., Model]) -> tuple[Model, dict[str, Tensor]]:
    """`build(**config)` on the meta device, and the tensors of the folder's `model.safetensors`, on the CPU.

    Raises InputError, naming the file, where it is damaged, its names, shapes or types are others, or a value is NaN
    or infinite. Until the header is known to fit, no memory is taken for tensors.
    """
    path = folder / WEIGHTS
    try:
        found = _header(path)
        model = _described(folder / CONFIG, len(found), config, build)
        wanted = {name: ([*x.shape], _kind(x.dtype)) for name, x in model.state_dict().items()}
        _check_shapes(path, found, wanted)
        state = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a model: {WEIGHTS} is missing") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read, it is damaged or cut short: {error}") from error
    check_finite(path, state)
    counts, slots = state["bank.counts"], state["bank.keys"].shape[1]
    if not bool(((counts >= 0) & (counts <= slots)).all()):
        raise InputError(f"{path} does not fit its {CONFIG}: bank.counts must be 0 to {slots}, got {counts.tolist()}")
    return model, state


class OnMeta(TorchFunctionMode):
    """Modules that are built inside have shapes, and neither memory nor initial values, which take most of the time."""

    def __enter__(self) -> OnMeta:
        self._device = torch.device("meta")
        self._device.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._device.__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" and func.__name__.endswith("_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raises InputError where a value is NaN or infinite: such a model gives black pictures."""
    for name, x in state.items():
        if x.is_floating_point() and not bool(x.float().isfinite().all()):  # as which it is held
            raise InputError(f"{path} holds NaN or infinite values, in {name}")


def _kind(dtype: torch.dtype) -> str:
    return _FLOAT if dtype.is_floating_point else str(dtype).removeprefix("torch.")


def _header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and kind of each tensor, without reading any. All floats that a model is saved in are of one kind."""
    if not path.stat().st_size:
        raise InputError(f"{path} cannot be read, it is damaged or cut short: it is empty")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        parts = {name: file.get_slice(name) for name in names}
        return {
            name: (part.get_shape(), _KINDS.get(part.get_dtype(), part.get_dtype())) for name, part in parts.items()
        }


def _described(path: Path, tensors: int, config: Mapping[str, Any], build: Callable[..., Model]) -> Model:
    blocks = [config.get(name, []) for name in ("encoder_blocks", "decoder_blocks", "memory_blocks")]
    try:
        # A model of more blocks than the file has tensors would take long to build.
        if sum(sum(levels) for levels in blocks) + config.get("middle_blocks", 0) > tensors:
            raise ValueError(f"it asks for more blocks than the {tensors} tensors of {WEIGHTS} hold")
        with OnMeta():
            return build(**config)
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{path} does not describe an R2R model: {line}") from error


def _check_shapes(
    path: Path, found: Mapping[str, tuple[list[int], str]], wanted: Mapping[str, tuple[list[int], str]]
) -> None:
    def mismatch(what: str) -> InputError:
        return InputError(f"{path} does not fit its {CONFIG}: {what}")

    missing = {
        name
        for name in wanted.keys() - found.keys()
        if math.prod(wanted[name][0]) > _SMALL or name in ("bank.keys", "bank.counts")
    }
    for names, what in ((missing, "missing"), (found.keys() - wanted.keys(), "unexpected")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise mismatch(f"{min(names)}{more} {'is' if len(names) == 1 else 'are'} {what}")
    for name, (shape, kind) in wanted.items():
        given, given_kind = found.get(name, (shape, kind))
        wrong = given != shape
        if name.startswith("bank.") and len(given) == len(shape) == 5:  # learnt tasks may have added slots
            wrong = [given[0], max(given[1], shape[1]), *given[2:]] != [shape[0], given[1], *shape[2:]]
        if wrong:
            raise mismatch(f"{name} is {given}, not {shape}")
        if given_kind != kind:
            raise mismatch(f"{name} holds {given_kind} numbers, not {kind}")
