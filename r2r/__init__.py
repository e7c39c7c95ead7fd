"""R2R: all-in-one image restoration with a retrieval-based degradation bank."""

from r2r.bank import DegradationBank
from r2r.errors import InputError
from r2r.model import R2R, Restoration, TrainingOutput
from r2r.presets import PRESETS

__all__ = ["PRESETS", "R2R", "DegradationBank", "InputError", "Restoration", "TrainingOutput"]
