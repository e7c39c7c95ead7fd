"""What this installation runs on: the facts a bug report needs."""

from __future__ import annotations

import os
import platform

import torch

from r2r_kernels import __version__, extension
from r2r_kernels.operators.implementation import triton_reason


def facts() -> dict[str, str]:
    """Name and value of each fact, in the order to show them."""
    module = extension.module()
    shown = {
        "r2r_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native operators": "yes" if module else f"no: {extension.reason()}",
    }
    if module:
        shown |= {
            "  compiler": module.compiler,
            "  flags": module.flags,
            "  built with torch": module.torch,
            "  CUDA architectures": module.cuda_architectures or "none",
            "  instruction set": module.instruction_set,
        }
    shown["triton operators"] = "yes" if triton_reason() is None else f"no: {triton_reason()}"
    shown["CPU threads"] = str(torch.get_num_threads())
    shown["GPUs"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    shown["R2R_KERNELS"] = os.environ.get("R2R_KERNELS") or "not set"
    return shown
