"""What every operator of `operators.py` keeps; what only one of them does is tested in its own file."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import r2r_kernels.functional as F
from r2r_kernels import reference
from tests.r2r_kernels.operators import CASES, Case, Shape
from tests.r2r_kernels.rule import FORMATS, answers, assert_follows, assert_same_bits, memory_format

GAPLESS = ("contiguous", "channels_last")


def on(names: Sequence[str]) -> list[object]:
    """Each operator with the device it is tested on."""
    found: list[object] = [pytest.param(name, "cpu", id=name) for name in names]
    marks = pytest.mark.gpu
    return found + [pytest.param(name, "cuda", id=f"{name} cuda", marks=marks) for name in names if CASES[name].gpu]


def of(kind: str) -> list[object]:
    """Each operator, on each of its devices, with each of its shapes of a kind."""
    return [
        pytest.param(name, shape, device, id=f"{name} {'x'.join(map(str, shape))} {device}", marks=marks)
        for name, case in CASES.items()
        for shape in getattr(case, kind)
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
        if device == "cpu" or case.gpu
    ]


def inputs(case: Case, shape: Shape, device: str) -> list[Tensor]:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return [t.to(device) for t in case.inputs(*shape)]


def formatted(case: Case, tensors: Sequence[Tensor], *names: str) -> list[Tensor]:
    """The images in these memory formats, or all of them in one."""
    names = names if len(names) == case.images else names * case.images
    images = [FORMATS[name](t) for name, t in zip(names, tensors, strict=False)]
    return [*images, *tensors[case.images :]]


def formats(case: Case) -> Sequence[str]:
    return GAPLESS if case.images else GAPLESS[:1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "shape", "device"), of("shapes"))
def test_follows_the_reference(name: str, shape: Shape, device: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = inputs(case, shape, device)
    for layout in formats(case):
        assert_follows(case.call, formatted(case, tensors, layout), dtype)


@pytest.mark.parametrize(("name", "shape", "device"), of("small"))
def test_small_and_empty_batches(name: str, shape: Shape, device: str) -> None:
    case = CASES[name]
    tensors = inputs(case, shape, device)
    for layout in formats(case):
        assert_follows(case.call, formatted(case, tensors, layout), torch.float32)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("name", "device"), on([name for name, case in CASES.items() if case.images]))
def test_answers_in_the_memory_format_of_x(name: str, device: str, layout: str) -> None:
    """The first images decide it, whatever the format of others."""
    case = CASES[name]
    tensors = inputs(case, (2, 8, 6, 5), device)
    for others in FORMATS if case.images > 1 else [layout]:
        given = formatted(case, tensors, *[layout, others][: case.images])
        assert_follows(case.call, given, torch.float32)
        assert case.call(F, given)[0].is_contiguous(memory_format=memory_format(given[0]))


@pytest.mark.parametrize(("name", "device"), on(list(CASES)))
def test_two_runs_give_the_same_bits(name: str, device: str) -> None:
    case = CASES[name]
    tensors = inputs(case, case.large, device)
    for layout in formats(case):
        assert_same_bits(case.call, formatted(case, tensors, layout))


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_reference_with_a_backward_of_its_own(name: str) -> None:
    case = CASES[name]
    tensors = [t.double() for t in case.inputs(*case.checked)]
    torch.testing.assert_close(answers(case.call, F, tensors), answers(case.call, reference, tensors))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.float32), ("channels_last", torch.float32), ("channels_last", torch.float64)],
)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, layout: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = [t.to(dtype) for t in formatted(case, case.inputs(*case.checked), layout)]
    with torch.no_grad():
        opcheck(getattr(torch.ops.r2r, case.name).default, case.forward(tensors))
        if case.backward:
            opcheck(getattr(torch.ops.r2r, f"{case.name}_backward").default, case.backward(tensors))
    leaves = [t.detach().requires_grad_() for t in tensors]
    opcheck(getattr(torch.ops.r2r, case.name).default, case.forward(leaves))
