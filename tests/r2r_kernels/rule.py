"""The rule that every operator is held to: against the reference in float64, outputs and gradients have at most twice
the error of plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from r2r_kernels import functional, reference
from r2r_kernels.reference import NAFBlockParams

# operator(functional or reference, tensors) -> results
Operator = Callable[[ModuleType, Sequence[Tensor]], tuple[Tensor, ...]]

FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
}


def parameters(channels: int) -> list[Tensor]:
    """Random parameters of a NAF block, each of which matters."""
    made = []
    for name, shape in zip(NAFBlockParams._fields, functional.naf_block_shapes(channels), strict=True):
        convolution = name.startswith(("conv", "sca")) and name.endswith("weight")
        fan_in = shape[1] * shape[2] * shape[3] if convolution else 1
        made.append(torch.randn(shape) * fan_in**-0.5 if convolution else 0.3 * torch.randn(shape) + 0.3)
    return made


def answers(
    operator: Operator, ops: ModuleType, tensors: Sequence[Tensor], rounded_to: torch.dtype | None = None
) -> list[list[Tensor]]:
    """The results, the gradient of the images, and those of the parameters, for one random upstream gradient, which is
    rounded to a dtype: that of the images, or another."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = operator(ops, leaves)
    random = torch.Generator().manual_seed(0)
    given = rounded_to or tensors[0].dtype
    upstream = [torch.randn(r.shape, generator=random).to(given).to(r) for r in results]
    images, *parameters = torch.autograd.grad(results, leaves, upstream)
    return [*([r.detach()] for r in results), [images], parameters]


def error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative error; of several tensors the root of the mean square, as one of few numbers may be exact by luck."""
    each = [((g - w).norm() / w.norm().clamp(min=1e-30)).item() for g, w in zip(got, wanted, strict=True)]
    return (sum(e * e for e in each) / max(1, len(each))) ** 0.5


def assert_follows(operator: Operator, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """`tensors` are as given to the operator but for the dtype; the first is the images."""
    rounded = [t.to(dtype) for t in tensors]
    exact = answers(operator, reference, [t.double() for t in rounded], dtype)
    plain = answers(operator, reference, rounded)
    ours = answers(operator, functional, rounded)
    for index, (got, other, wanted) in enumerate(zip(ours, plain, exact, strict=True)):
        assert [(g.shape, g.dtype) for g in got] == [(w.shape, dtype) for w in wanted]
        # Grant the rounding of the result, and in float32 as much for what goes into it; of few numbers more, as plain
        # PyTorch is exact by luck where sums are short.
        few = min(tensors[0].numel(), sum(w.numel() for w in wanted)) < 16
        rounding = torch.finfo(dtype).eps / (1 if dtype == torch.float32 else 2) * (4 if few else 1)
        allowed = max(2 * error(other, wanted), rounding)
        assert error(got, wanted) <= allowed, f"answer {index}: error {error(got, wanted):.2e}, allowed {allowed:.2e}"


def assert_same_bits(operator: Operator, tensors: Sequence[Tensor], threads: int | None = None) -> None:
    """Of two runs; of the second, `threads` may be another number of threads."""
    before = torch.get_num_threads()
    first = answers(operator, functional, tensors)
    torch.set_num_threads(threads or before)
    try:
        second = answers(operator, functional, tensors)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) < x.stride(3) else torch.contiguous_format
