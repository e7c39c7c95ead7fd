"""The operators as Triton kernels, for NVIDIA and AMD GPUs: one file an operator.

Each file holds the kernels and plain launchers, `forward(...)` and `backward(...)`: no autograd and no checks of
arguments (`r2r_kernels.functional` makes them). Launchers take any memory format and answer in that of their input;
statistics and accumulators are float32 (`operators/layout.py`, `configs.py` and `docs/kernels/gpu.md` say more).
"""

from __future__ import annotations

import importlib.util
import os

import torch


def reason() -> str:
    """Why the kernels cannot run here, in one line; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA or ROCm device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return ""


def available() -> bool:
    """Whether the kernels can run: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    return not reason()
