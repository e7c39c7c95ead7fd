"""Where operators run: on a GPU other than the first, on several in one process, on a stream of one's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import OPERATORS, inputs
from r2r_kernels import functional
from tests.r2r_kernels.rule import answers

pytestmark = pytest.mark.gpu


@pytest.fixture
def several() -> int:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.cuda.device_count()


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda"


def on(device: str, operator: str) -> list[Tensor]:
    """Results and gradients, on the CPU."""
    tensors = [t.to(device, torch.bfloat16) for t in inputs(operator, 20, 9, 11)]
    return [t.cpu() for part in answers(OPERATORS[operator], functional, tensors) for t in part]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def repeated(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    torch.manual_seed(0)
    return call()


@pytest.mark.parametrize("operator", OPERATORS)
def test_other_gpus_give_the_bits_of_the_first(operator: str, several: int) -> None:
    wanted = repeated(lambda: on("cuda:0", operator))
    for index in range(1, several):
        assert torch.cuda.current_device() == 0
        assert_equal(repeated(lambda index=index: on(f"cuda:{index}", operator)), wanted)  # type: ignore[misc]
    assert_equal(repeated(lambda: on("cuda:0", operator)), wanted)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_stream_of_ones_own_is_kept_to(operator: str, gpu: str) -> None:
    """The input comes late on that stream: a kernel on another would read what was there before."""
    wanted = repeated(lambda: on(gpu, operator))
    torch.manual_seed(0)
    given = [t.to(gpu, torch.bfloat16) for t in inputs(operator, 20, 9, 11)]
    late = [torch.zeros_like(t) for t in given]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for to, source in zip(late, given, strict=True):
            to.copy_(source)
        got = [t for part in answers(OPERATORS[operator], functional, late) for t in part]
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal([t.cpu() for t in got], wanted)
