"""For pytest: tests of operators on the CPU meet the CUDA operators in the library at R2R_CUDA_ON_CPU."""

from __future__ import annotations

import os

import torch

from r2r_kernels import extension
from r2r_kernels.operators import implementation

assert extension.available()  # it defines the operators
torch.ops.load_library(os.environ["R2R_CUDA_ON_CPU"])
implementation.CPU_DTYPES = implementation.GPU_DTYPES  # type: ignore[assignment]  # float16 too
