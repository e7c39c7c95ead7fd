"""The compiled operators, `r2r_kernels._C`: loaded when first needed, with the reason kept where they are missing."""

from __future__ import annotations

import importlib
import re
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

REASON_FILE = Path(__file__).with_name("_C_missing.txt")  # written by setup.py where it could not compile


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("r2r_kernels._C"), None
    except ModuleNotFoundError:
        if REASON_FILE.exists():
            return None, REASON_FILE.read_text().strip()
        return None, "it was not built (pip install --no-build-isolation . builds it)"
    except ImportError as error:  # built for a Python, a C library or a torch that does not fit
        return None, f"it does not load: {str(error).splitlines()[0]}"


def module() -> ModuleType | None:
    """The extension, or None where there is none; importing it registers the operators `torch.ops.r2r_native`."""
    return _load()[0]


def reason() -> str | None:
    """Why there is no extension, in one line; None where there is one."""
    return _load()[1]


@cache
def available() -> bool:
    """Whether the compiled operators can be used; warns once where they cannot."""
    if module() is None:
        warnings.warn(f"r2r_kernels runs on plain PyTorch, slower: no native operators: {reason()}", stacklevel=2)
        return False
    return True


def _runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", architectures):
        built = int(major), int(minor)
        exact = built == capability
        if exact or (suffix != "a" and built[0] == capability[0] and built <= capability):
            return True
        if ptx and not suffix and built <= capability:  # the driver compiles it
            return True
    return False


@cache
def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the extension holds CUDA operators for a GPU of that compute capability: built for it, for an earlier one
    of the same major version, or as PTX for any earlier one."""
    built = module()
    return built is not None and _runs_on(built.cuda_architectures, capability)
