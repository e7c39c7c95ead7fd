"""Methods that restore: our models, anyone's networks and functions, and folders of what another method has made."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2r import fast
from r2r.data.folders import by_name
from r2r.data.images import read_rgb, write_rgb
from r2r.errors import InputError
from r2r.extras import import_after_torchvision, needed
from r2r.metrics import centre_crop
from r2r.model import R2R
from r2r.pretrained import CONFIG, HUB

Restore = Callable[[Tensor], Tensor]
"""One degraded image [1, 3, H, W] in [0, 1], on the method's device -> the restored one, of the same shape."""

ACCEPTED = (
    "accepted: a folder of an R2R model, hf://OWNER/NAME, r2r for the weights that come along, a folder of restored "
    "images, a checkpoint that spandrel reads (.pth, .ckpt, .safetensors), module:function; each also as NAME=..."
)
_CHECKPOINTS = (".pth", ".ckpt", ".safetensors")


class Kind(StrEnum):
    R2R = "r2r"
    SIZES = "sizes"
    IMAGES = "images"
    SPANDREL = "spandrel"
    FUNCTION = "function"


@dataclass(frozen=True)
class Method:
    """What restores, before anything is loaded. where: a folder, a file, or module:function, as the kind has it. sizes:
    of an R2R that is built for measuring alone (kind `SIZES`). eager: R2R in plain PyTorch."""

    name: str
    kind: Kind
    where: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    eager: bool = False

    @property
    def runs(self) -> bool:
        """Whether it can be run, and its size and speed be measured."""
        return self.kind is not Kind.IMAGES

    def load(self, device: torch.device) -> Restore:
        """Raises InputError for what cannot be loaded."""
        match self.kind:
            case Kind.R2R | Kind.SIZES:
                return self._r2r(device)
            case Kind.SPANDREL:
                return _spandrel(Path(self.where), device)
            case Kind.FUNCTION:
                return _function(self.where, device)
        raise InputError(f"{self.name}: a folder of images does not run")

    def _r2r(self, device: torch.device) -> R2R:
        kind = R2R if self.eager else fast.R2R
        if self.kind is Kind.R2R:
            model = kind.from_pretrained(self.where or None, map_location=str(device))
        else:
            model = kind(**self.sizes).to(device)
            bank = model.bank
            present = torch.ones(len(bank.tasks), dtype=torch.bool, device=device)
            bank.replace(torch.rand_like(bank.keys), torch.rand_like(bank.values), present)
        return model.freeze_bank().eval()


def method_of(text: str, eager: bool = False) -> Method:
    """A method from what a person wrote, `NAME=WHAT` or WHAT. Raises InputError."""
    name, equals, what = text.partition("=")
    if not equals or Path(text).exists():
        name, what = "", text
    path = Path(what).expanduser()
    if what == "r2r":
        return Method(name or "r2r", Kind.R2R, eager=eager)
    if what.startswith(HUB) or (path / CONFIG).is_file():
        return Method(name or path.name, Kind.R2R, what if what.startswith(HUB) else str(path), eager=eager)
    if path.is_dir():
        return Method(name or path.name, Kind.IMAGES, str(path))
    if path.suffix.lower() in _CHECKPOINTS:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        return Method(name or path.stem, Kind.SPANDREL, str(path))
    if what.count(":") == 1 and "/" not in what and not path.exists():
        return Method(name or what.rpartition(":")[2], Kind.FUNCTION, what)
    raise InputError(f"{what}: not a method; {ACCEPTED}")


class RestoredImages:
    """What another method has made of a set's images: `NAME.*` in `<folder>/<set>`, or in the folder itself where it is
    the only set. Raises InputError where the folder is missing or two files share a name."""

    def __init__(self, folder: Path, name: str, only: bool) -> None:
        own = folder / _folder(name)
        if not own.is_dir() and not only:
            raise InputError(f"{folder}: no folder {own.name!r}; with several sets each has a folder of its own")
        self.folder = own if own.is_dir() else folder
        self.files = by_name(self.folder)

    def __getitem__(self, name: str) -> Path:
        if name not in self.files:
            raise InputError(f"{self.folder}: no image {name!r}")
        return self.files[name]

    def read(self, name: str, whole: Tensor) -> Tensor:
        """The image made of `whole` [3, H, W], or of its centre crop; cropped."""
        image = torch.tensor(read_rgb(self[name])).movedim(2, 0)
        cropped = centre_crop(whole)
        if image.shape == whole.shape:
            image = centre_crop(image)
        if image.shape != cropped.shape:
            (height, width), (rows, columns) = image.shape[1:], whole.shape[1:]
            raise InputError(f"{self[name]}: {width} x {height}, but the degraded image is {columns} x {rows}")
        return image


def save_restored(image: Tensor, folder: Path, name: str, *inside: str) -> None:
    """Write [3, H, W], clipped to [0, 1], with 8 bits to `folder/.../name.png`, below folders that are called as the
    sets and methods `inside`. Raises InputError."""
    place = folder.joinpath(*map(_folder, inside), f"{name}.png")
    write_rgb(place, image.float().clamp(0, 1).movedim(0, 2).cpu().numpy())


def _folder(name: str) -> str:
    return name.replace("/", "_").replace("\\", "_").strip(".") or "_"


def checked(name: str, restored: Any, lq: Tensor) -> Tensor:
    """What a method answered. Raises InputError where it is no image of the size of `lq`, or not finite."""
    if not isinstance(restored, Tensor) or restored.shape != lq.shape:
        found = [*restored.shape] if isinstance(restored, Tensor) else type(restored).__name__
        raise InputError(f"{name} answered {found} for an image of {[*lq.shape]}; accepted: the same shape")
    if not bool(restored.isfinite().all()):
        raise InputError(f"{name} answered NaN or infinity")
    return restored


def _spandrel(path: Path, device: torch.device) -> Restore:
    try:
        spandrel = import_after_torchvision("spandrel")
    except ImportError as error:
        raise needed(str(error.name), str(path), "'r2r-restore[metrics]'") from error
    try:  # Restormer, MPRNet and others, whose licences are narrower
        extra = importlib.import_module("spandrel_extra_arches")
        extra.install(ignore_duplicates=True)
        more = ""
    except ImportError:
        more = "; the package spandrel_extra_arches knows more"
    try:
        descriptor = spandrel.ModelLoader(device).load_from_file(path)
    except spandrel.UnsupportedModelError as error:
        raise InputError(f"{path}: no architecture that spandrel knows{more}") from error
    except Exception as error:  # of all sorts, for damaged and for strange files
        raise InputError(f"{path}: {next(iter(str(error).splitlines()), '') or type(error).__name__}") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or descriptor.scale != 1:
        raise InputError(f"{path}: {descriptor.architecture.name} changes the size of an image or needs a mask")
    if descriptor.input_channels != 3 or descriptor.output_channels != 3:
        raise InputError(f"{path}: takes {descriptor.input_channels} channels; accepted: 3")
    descriptor.eval()
    return descriptor


def _function(where: str, device: torch.device) -> Restore:
    module, _, name = where.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{where}: {error}") from error
    if not callable(found) or isinstance(found, type):
        raise InputError(f"{where} is not a function; accepted: image [1, 3, H, W] in [0, 1] -> image")
    return found.to(device).eval() if isinstance(found, nn.Module) else found
