from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from r2r_kernels.triton.products import precision

backends: Any = torch.backends
matmul: Any = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    yield
    backends.fp32_precision = matmul.fp32_precision = "none"


def test_float32_is_multiplied_as_pytorch_was_told() -> None:
    x = torch.empty(0)
    assert precision(x) == "ieee"
    matmul.allow_tf32 = True
    assert precision(x) == "tf32"
    matmul.allow_tf32 = False
    assert precision(x) == "ieee"
    matmul.fp32_precision = "tf32"  # `allow_tf32` raises from here on
    assert precision(x) == "tf32"
    assert precision(x.half()) == "ieee"
    matmul.fp32_precision = "ieee"
    assert precision(x) == "ieee"


def test_the_setting_for_all_backends_counts_too() -> None:
    backends.fp32_precision = "tf32"
    assert precision(torch.empty(0)) == "tf32"
