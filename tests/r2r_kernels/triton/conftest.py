"""The launchers are tested on a GPU where there is one, else in Triton's interpreter, by `test_interpreter.py`."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if INTERPRETED and request.param == "bfloat16":
        pytest.skip("bfloat16 arithmetic is wrong in Triton's interpreter")
    return getattr(torch, request.param)


@pytest.fixture
def device() -> str:
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU; test_interpreter.py runs this in Triton's interpreter")
    return "cuda"


@pytest.fixture
def gpu(device: str) -> str:
    if device != "cuda":
        pytest.skip("no GPU")
    return device
