"""Without a GPU: the operators' tests in a process of its own, where Triton interprets the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OPERATORS = [
    "layer_norm_2d",
    "simple_gate",
    "depthwise_gate",
    "naf_block",
    "gated_feed_forward",
    "upsample_add",
    "local_mean_2d",
    "bank_retrieve",
    "slot_conv",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these tests itself")
def test_in_the_interpreter() -> None:
    files = [str(Path(__file__).with_name(f"test_{operator}.py")) for operator in OPERATORS]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout[-4000:]
    for file in files:
        assert f"{Path(file).name}::" not in done.stdout  # nothing failed, nothing was left out of the summary
    assert " passed" in done.stdout
