"""What gated_conv does beside the contract; see test_contract.py."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import r2r_kernels.functional as F
from r2r_kernels import extension, reference
from r2r_kernels.nn import GatedConv2d
from tests.r2r_kernels.rule import FORMATS, assert_follows, error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def operator(ops: ModuleType, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (ops.gated_conv(*tensors),)


def inputs(
    shape: tuple[int, int, int, int], kernel: int, size: tuple[int, int] | None = None, device: str = "cpu"
) -> list[Tensor]:
    n, c, h, w = shape
    prior = torch.randn(n, c, *(size or (h, w)))
    tensors = [torch.randn(shape), prior, torch.randn(c, 2, kernel, kernel) / kernel, torch.randn(c)]
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 40), (26, 18), (7, 11)])
def test_resizes_the_prior(size: tuple[int, int], kernel: int, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, prior, *rest = inputs((2, 20, 13, 18), kernel, size, device)
        for name in ("contiguous", "channels_last"):
            assert_follows(operator, [FORMATS[name](x), FORMATS[name](prior), *rest], dtype)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_any_alignment(offset: int, kernel: int, device: str) -> None:
    """Views that begin anywhere, not on 16 bytes."""
    n, c, h, w = 1, 8, 6, 16
    memory = torch.randn(2, n * c * h * w + offset, device=device)
    x, prior = (part[offset:].view(n, c, h, w) for part in memory)
    assert_follows(operator, [x, prior, *inputs((n, c, h, w), kernel, device=device)[2:]], torch.float32)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2, 20, 300), (1, 1000, 3, 40)])
def test_several_strips_and_tiles(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: int, device: str
) -> None:
    for size in (shape[2:], (2, 5)):
        x, prior, *rest = inputs(shape, kernel, size, device)
        for name in ("contiguous", "channels_last"):
            assert_follows(operator, [FORMATS[name](x), FORMATS[name](prior), *rest], dtype)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", (5, 64, 128, 128)), ("bfloat16", (9, 64, 128, 128)), ("bfloat16", (9, 64, 127, 131))],
)
def test_a_result_larger_than_the_caches_has_the_same_bits(
    name: str, kernel: int, dtype: str, shape: tuple[int, int, int, int]
) -> None:
    """It is written past them, in lines that begin anywhere in a plane of odd size; those of its images are not."""
    for size in ((shape[2], shape[3]), (8, 8)):
        x, prior, *rest = (t.to(getattr(torch, dtype)) for t in inputs(shape, kernel, size))
        x, prior = FORMATS[name](x), FORMATS[name](prior)
        whole = F.gated_conv(x, prior, *rest)
        for n in range(len(x)):
            assert torch.equal(whole[n : n + 1], F.gated_conv(x[n : n + 1], prior[n : n + 1], *rest))


@pytest.mark.parametrize("kernel", [1, 3])
def test_bfloat16_is_hardly_worse_than_one_rounding(kernel: int, device: str) -> None:
    """As plain PyTorch rounds after every operation, twice its error would hide a gate that is wrong by a hundredth."""
    tensors = [t.bfloat16() for t in inputs((1, 32, 24, 40), kernel, device=device)]
    exact = reference.gated_conv(*(t.double() for t in tensors))
    for name in ("contiguous", "channels_last"):
        x, prior, *rest = tensors
        got = F.gated_conv(FORMATS[name](x), FORMATS[name](prior), *rest)
        assert error([got], [exact]) <= 1.1 * error([exact.bfloat16()], [exact])


def test_large_logits_give_a_closed_or_an_open_gate() -> None:
    x, prior = torch.full((1, 2, 3, 20), 175.0), torch.full((1, 2, 3, 20), -175.0)
    for sign, wanted in ((1.0, prior), (-1.0, x)):
        weight = torch.full((2, 2, 1, 1), sign) * torch.tensor([1.0, -1.0])[None, :, None, None]
        assert torch.equal(F.gated_conv(x, prior, weight, torch.zeros(2)), wanted)


@pytest.mark.parametrize("size", [(3, 20), (2, 7)])
def test_an_open_gate_gives_the_prior_however_large_x_is(size: tuple[int, int]) -> None:
    x, prior = torch.full((1, 2, 3, 20), 1e8), torch.full((1, 2, *size), 0.5)
    weight = torch.tensor([[[[1.0]], [[0.0]]]]).expand(2, 2, 1, 1).contiguous()
    assert torch.equal(F.gated_conv(x, prior, weight, torch.zeros(2)), torch.full_like(x, 0.5))
    assert F.gated_conv(torch.full_like(x, torch.inf), prior, -weight, torch.zeros(2)).isinf().all()


def test_a_resized_prior_in_float64_is_exact() -> None:
    assert (reference.averaging(9, 7, torch.zeros(1, dtype=torch.float64)).sum(1) - 1).abs().max() < 1e-15


def test_autocast_and_flops() -> None:
    module = GatedConv2d(4, 3)
    x, prior = torch.randn(1, 4, 6, 7), torch.randn(1, 4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, prior).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        module(x, prior)
    assert counter.get_total_flops() == 2 * 4 * 6 * 7 * 18


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("8.0;9.0;10.0;12.0+PTX", [(8, 0), (8, 6), (9, 0), (10, 3), (12, 1), (13, 0)], [(7, 5), (11, 0)]),
        ("9.0", [(9, 0)], [(8, 9), (10, 0)]),
        ("8.6 9.0a+PTX", [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(12, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_runs_on_gpus_that_it_was_built_for(
    architectures: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    for capability in runs + does_not:
        assert extension._runs_on(architectures, capability) == (capability in runs), capability


def test_cuda_kernels_do_not_spill() -> None:
    """Compiled without a GPU: registers that did not fit would lie on the stack."""
    module = extension.module()
    if module is None or not module.cuda_architectures:
        pytest.skip("the extension was built without CUDA")
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("no cuobjdump")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    assert module.__file__
    report = subprocess.run([tool, "-res-usage", module.__file__], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    assert found
    for registers, stack, shared, local in found:
        assert int(stack) == int(local) == 0
        assert int(registers) <= 128  # two blocks of 256 threads a multiprocessor
        assert int(shared) <= 48 << 10


def test_bad_input() -> None:
    x, prior, weight, bias = inputs((2, 3, 5, 4), 1)
    with pytest.raises(ValueError, match=r"prior must be \[2, 3, h, w\] with h, w >= 1 .* got \[2, 4, 5, 4\]"):
        F.gated_conv(x, torch.randn(2, 4, 5, 4), weight, bias)
    with pytest.raises(ValueError, match=r"prior must be .* got \[2, 3, 0, 4\]"):
        F.gated_conv(x, prior[:, :, :0], weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \[3, 2, k, k\] with k = 1 or 3 .* got \[3, 2, 5, 5\]"):
        F.gated_conv(x, prior, torch.randn(3, 2, 5, 5), bias)
    with pytest.raises(ValueError, match=r"weight must be .* got \[3, 2, 3, 1\]"):
        F.gated_conv(x, prior, torch.randn(3, 2, 3, 1), bias)
    with pytest.raises(ValueError, match=r"prior must be on cpu as x is, got meta"):
        F.gated_conv(x, prior.to("meta"), weight, bias)
    with pytest.raises(TypeError, match=r"prior must be torch.float32 as x is, got torch.bfloat16"):
        F.gated_conv(x, prior.bfloat16(), weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_more_than_2_to_31_elements(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    _, _, weight, bias = (t.to("cuda", torch.bfloat16) for t in inputs((1, 16, 1, 1), 1))
    x = FORMATS[name](torch.randn(1, 16, 16384, 8208, device="cuda", dtype=torch.bfloat16))
    y = F.gated_conv(x, x.flip(3), weight, bias)
    wanted = F.gated_conv(x[:, :, -8:].contiguous(), x[:, :, -8:].flip(3).contiguous(), weight, bias)
    assert torch.equal(y[:, :, -8:], wanted)
