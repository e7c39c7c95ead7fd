"""Packages that come with extras of this one, imported where they are needed."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from r2r.errors import InputError


@functools.cache
def _without_operators() -> torch.library.Library:
    """What torchvision describes at its import. PyPI's build for Linux is made for CUDA, and beside a PyTorch for CPUs
    its operators do not load; no network that is measured here needs them."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    return library


def import_after_torchvision(name: str) -> ModuleType:
    """A package that imports torchvision. Raises ImportError where it, or torchvision, is not installed."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        _without_operators()
    return importlib.import_module(name)


def needed(package: str, what: str, installed_by: str) -> InputError:
    """One line for a package that `what` needs and that is not there."""
    return InputError(f"{what} needs the package {package}: pip install {installed_by}")
