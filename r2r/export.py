"""A model as one file that needs nothing of this package: a `torch.export` program, or ONNX."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import torch

from r2r.errors import InputError
from r2r.files import atomic_path
from r2r.model import R2R

SUFFIXES = (".pt2", ".onnx")


def program(model: R2R) -> torch.export.ExportedProgram:
    """`model(lq)`, blind, with dynamic batch, height and width, of which the latter two are above `model.stride` (the
    tracer cannot tell a single cell of the deepest features from a size that is always 1)."""
    model = model.eval()
    model._check_bank()
    size = torch.export.Dim.DYNAMIC
    side = 3 * model.stride
    weight = model.intro.weight
    lq = torch.zeros(2, 3, side, side + model.stride, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        return torch.export.export(model, (lq,), dynamic_shapes=({0: size, 2: size, 3: size},))


def export(model: R2R, path: str | Path) -> None:
    """Write a model of plain PyTorch (`r2r.R2R`) to `path`: `.pt2`, which `torch.export.load` reads, or `.onnx`, with
    the input `lq` [N, 3, H, W] and the output `restored`; see `program` for the sizes.

    Raises InputError for another suffix, an empty bank, a file that cannot be written, and for ONNX where the packages
    onnx and onnxscript are missing.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: accepted are files named {' and '.join('*' + suffix for suffix in SUFFIXES)}")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise InputError(f"ONNX needs {' and '.join(missing)}: pip install onnx onnxscript")
    traced = program(model)
    written = io.BytesIO()
    if path.suffix == ".onnx":
        converted = torch.onnx.export(traced, dynamo=True, input_names=["lq"], output_names=["restored"], verbose=False)
        assert converted is not None
        written.write(converted.model_proto.SerializeToString())
    else:
        torch.export.save(traced, written)
    with atomic_path(path) as beside:
        beside.write_bytes(written.getbuffer())
