"""How launchers are compared: with the reference in float64, at most twice the error of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.r2r_kernels.rule import error

FORMATS = [torch.contiguous_format, torch.channels_last]
# Shapes (N, C, H, W) with channels that are no power of two, single rows and pixels; small and few, because the
# interpreter takes a millisecond for each line of each program.
CASES = [
    ((2, 7, 5, 17), torch.contiguous_format),
    ((1, 7, 1, 5), torch.channels_last),
    ((1, 48, 9, 3), torch.channels_last),
    ((1, 100, 1, 1), torch.contiguous_format),
]


def gradients(
    operator: Callable[..., Tensor | tuple[Tensor, ...]], tensors: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor]:
    """The operator's results and the gradients of its tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = operator(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, upstream)]


def assert_as_good(
    got: Sequence[Tensor],
    operator: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor],
) -> None:
    """`got`: the launchers' results and gradients of `tensors` for the gradients `upstream`."""
    exact = gradients(operator, [t.double() for t in tensors], [u.double() for u in upstream])
    plain = gradients(operator, tensors, upstream)
    for index, (ours, other, wanted) in enumerate(zip(got, plain, exact, strict=True)):
        assert ours.shape == wanted.shape
        assert ours.dtype == other.dtype
        # Grant the rounding of a result; in float32 a few, as plain PyTorch is exact by luck where sums are short.
        rounding = torch.finfo(ours.dtype).eps * (4 if ours.dtype == torch.float32 else 1)
        allowed = max(2 * error([other], [wanted]), rounding)
        assert error([ours], [wanted]) <= allowed, f"answer {index}: {error([ours], [wanted]):.2e} > {allowed:.2e}"
