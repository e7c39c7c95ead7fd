"""R2R: all-in-one image restoration with a retrieval-based degradation bank."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2r.bank import DegradationBank
    from r2r.errors import InputError
    from r2r.model import R2R, Restoration, TrainingOutput
    from r2r.presets import PRESETS

__all__ = ["PRESETS", "R2R", "DegradationBank", "InputError", "Restoration", "TrainingOutput"]

# PyTorch is imported when a name is first asked for, so that `r2r --help` answers at once.
_HOMES = {
    "PRESETS": "r2r.presets",
    "R2R": "r2r.model",
    "DegradationBank": "r2r.bank",
    "InputError": "r2r.errors",
    "Restoration": "r2r.model",
    "TrainingOutput": "r2r.model",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("r2r-restore")
    if name not in _HOMES:
        raise AttributeError(f"module 'r2r' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
