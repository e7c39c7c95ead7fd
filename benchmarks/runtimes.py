"""Other runtimes of an exported model on a CPU, where they are installed: ONNX Runtime and OpenVINO.

Both run the ONNX file that `r2r export` writes of the rivals' model, on as many threads as PyTorch. The file is made
once for each code and kept in pytest-benchmark's folder, since making it takes a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import stamp
from benchmarks.timing import Contender, Unavailable
from r2r import R2R
from r2r.export import export
from r2r.files import atomic_path

ONNX_RUNTIME = "ONNX Runtime"
OPENVINO = "OpenVINO"

FOLDER = stamp.ROOT / ".benchmarks" / "exported"

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def exported(build: Callable[[], R2R], preset: str) -> Path:
    """The ONNX file of the model that `build` makes."""
    _require("onnx", "onnxscript")
    path = FOLDER / f"{preset}-{stamp.code_digest()}.onnx"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        for old in FOLDER.glob(f"{preset}-*.onnx"):
            old.unlink()
        with atomic_path(path) as beside:
            export(build(), beside)
    return path


def onnx_runtime(build: Callable[[], R2R], preset: str, lq: Tensor, dtype: torch.dtype) -> Contender:
    """In float32: ONNX Runtime has no bfloat16 on CPUs."""
    _require("onnxruntime")
    if dtype != torch.float32:
        raise Unavailable("it has no bfloat16 on CPUs")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on waiting in a loop after a call, and take the processors from the next rival.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(exported(build, preset), options, providers=["CPUExecutionProvider"])
    given = {"lq": lq.numpy()}
    return Contender({"": lambda: _tensor(session.run(None, given)[0])}, compiles=True)


def openvino(build: Callable[[], R2R], preset: str, lq: Tensor, dtype: torch.dtype) -> Contender:
    """With the hint for the least latency. Raises Unavailable for bfloat16 where the processor has no instructions for
    it: OpenVINO would take float32."""
    _require("openvino")
    import openvino

    core = openvino.Core()
    if dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("it has no bfloat16 on this processor")
    network = core.read_model(exported(build, preset))
    network.reshape(list(lq.shape))  # for these very shapes, as torch.compile
    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    given = lq.numpy()
    return Contender({"": lambda: _tensor(request.infer([given])[0])}, compiles=True)


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not installed: pip install 'r2r-restore[bench]'")


def _tensor(answer: Any) -> Tensor:
    return torch.from_numpy(np.asarray(answer))
