"""A model as one file that needs nothing of this package: a `torch.export` program, or ONNX."""

from __future__ import annotations

import copy
import io
import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

import r2r_kernels
from r2r.errors import InputError
from r2r.files import atomic_path
from r2r.model import R2R

SUFFIXES = (".pt2", ".onnx")
OPSET = 20
AXES = {0: "batch", 2: "height", 3: "width"}
METADATA = "metadata.json"  # inside a .pt2


def program(model: R2R) -> torch.export.ExportedProgram:
    """`model(lq)`, blind, with dynamic batch, height and width."""
    model = model.eval()
    model.bank.check_filled()
    size = torch.export.Dim.DYNAMIC
    weight = model.intro.weight
    lq = torch.zeros(2, 3, model.stride, 2 * model.stride, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        model(lq)  # the modules look at themselves in their first call, which is none of the program's work
        return torch.export.export(model, (lq,), dynamic_shapes=(dict.fromkeys(AXES, size),))


def metadata(model: R2R) -> dict[str, str]:
    """What a file says about itself: tasks, what goes in and comes out, the version, a fingerprint of the weights."""
    return {
        "model": "R2R, image restoration",
        "tasks": ",".join(model.tasks),
        "input": "lq: RGB in [0, 1], [batch, 3, height, width]",
        "output": "restored: RGB, [batch, 3, height, width], to be clipped to [0, 1]",
        "normalisation": "none",
        "scale": "1",
        "version": r2r_kernels.__version__,
        "fingerprint": model.fingerprint(),
    }


def export(model: R2R, path: str | Path, half: bool = False) -> None:
    """Write a model of plain PyTorch (`r2r.R2R`) to `path`: `.pt2`, which `torch.export.load` reads, or `.onnx`, with
    the input `lq` and the output `restored`, both [batch, 3, height, width] of any size. `metadata` goes
    with it: in ONNX as the model's properties, in a `.pt2` as the extra file `metadata.json`. half: weights, input and
    output are float16; norms, similarities and matching are computed in float32 all the same.

    Raises InputError for another suffix, an empty bank, a file that cannot be written, and for ONNX missing packages
    (onnx, onnxscript).
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: accepted are files named {' and '.join('*' + suffix for suffix in SUFFIXES)}")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise InputError(f"ONNX needs {' and '.join(missing)}: pip install 'r2r-restore[onnx]'")
    about = metadata(model)
    if half:
        model = copy.deepcopy(model).half()
    with atomic_path(path) as beside:
        beside.touch()  # where nothing can be written it is said now, not after minutes
        traced = program(model)
        written = io.BytesIO()
        if path.suffix == ".onnx":
            written.write(_onnx(traced, about))
        else:
            torch.export.save(traced, written, extra_files={METADATA: json.dumps(about)})
        beside.write_bytes(written.getbuffer())


def _onnx(traced: torch.export.ExportedProgram, about: dict[str, str]) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's to itself
        converted = torch.onnx.export(
            traced, dynamo=True, opset_version=OPSET, input_names=["lq"], output_names=["restored"], verbose=False
        )
    assert converted is not None
    model = converted.model_proto
    given = model.graph.input[0].type.tensor_type.shape.dim
    named = {given[axis].dim_param: name for axis, name in AXES.items()}  # s52 and the like
    symbols = re.compile("|".join(map(re.escape, named)))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = symbols.sub(lambda symbol: named[symbol[0]], size.dim_param)
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()
