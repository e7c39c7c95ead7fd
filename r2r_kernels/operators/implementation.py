"""The choice of an operator's implementation: by the tensors, or by the environment variable R2R_KERNELS.

Triton runs on a GPU, C++ runs float32 and bfloat16 on a CPU, plain PyTorch runs all else.
R2R_KERNELS=reference|native|triton forces one of them, for debugging. What the forced one cannot run is an error.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from r2r_kernels import extension, triton

NAMES = ("reference", "native", "triton")
NATIVE = torch.ops.r2r_native  # the extension fills it when it is loaded
CPU_DTYPES = (torch.float32, torch.bfloat16)  # of the native operators on a CPU
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of Triton's kernels, and of the native ones on a GPU


@cache
def triton_reason() -> str | None:
    """Why the Triton kernels cannot run here, in one line; None where they can."""
    return triton.reason() or None


@cache
def triton_kernels(operator: str) -> ModuleType:
    """The launchers of an operator; imports Triton itself, which takes a while, so only when it is needed."""
    return importlib.import_module(f"r2r_kernels.triton.{operator}")


def of(x: Tensor) -> str:
    """Which of NAMES runs the operators on x.

    R2R_KERNELS=triton with TRITON_INTERPRET=1 runs the Triton kernels on the CPU, in Triton's interpreter. Raises
    ValueError for an unknown R2R_KERNELS, RuntimeError where the forced one cannot run on x.
    """
    forced = os.environ.get("R2R_KERNELS")
    if forced and forced not in NAMES:
        raise ValueError(f"R2R_KERNELS must be one of {', '.join(NAMES)}, got {forced!r}")
    if forced == "reference" or x.numel() == 0:
        return "reference"
    interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    on_device = x.device.type == "cuda" or interpreted
    if on_device and forced != "native" and x.dtype in GPU_DTYPES and triton_reason() is None:
        return "triton"
    if x.device.type == "cpu" and forced != "triton" and x.dtype in CPU_DTYPES and extension.available():
        return "native"
    if forced:
        reason = extension.reason() if forced == "native" else triton_reason()
        raise RuntimeError(f"R2R_KERNELS={forced} cannot run {x.dtype} on {x.device}: {reason or 'not covered'}")
    return "reference"
