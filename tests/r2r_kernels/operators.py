"""Every operator as the tests call it, with random inputs: what `test_contract.py` runs over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2r_kernels.reference import GatedFeedForwardParams, NAFBlockParams
from tests.r2r_kernels.rule import Operator, parameters

Shape = tuple[int, ...]
SHAPES: Sequence[Shape] = [(2, 32, 16, 16), (1, 7, 5, 9), (2, 48, 9, 35), (1, 100, 7, 3), (3, 1, 1, 1)]
SMALL: Sequence[Shape] = [(0, 4, 5, 6), (1, 4, 1, 1), (1, 4, 1, 9), (1, 4, 9, 1)]


class Case(NamedTuple):
    """An operator, or one of its modes.

    inputs: the tensors for a shape, of which the first `images` are images; their memory formats may differ.
    forward, backward: the arguments of `torch.ops.r2r.<name>` and of `<name>_backward` for such tensors.
    shapes, small, large: for the rule; for the rule, small or empty; for two runs.
    gpu: held to the rule on a GPU too. (Triton's kernels have tests of their own.)
    """

    name: str
    call: Operator
    inputs: Callable[..., list[Tensor]]
    forward: Callable[[Sequence[Tensor]], tuple[Any, ...]]
    backward: Callable[[Sequence[Tensor]], tuple[Any, ...]] | None
    images: int = 1
    shapes: Sequence[Shape] = SHAPES
    small: Sequence[Shape] = SMALL
    large: Shape = (2, 32, 40, 70)
    checked: Shape = (2, 4, 5, 4)
    gpu: bool = False


def _upstream(*shape: int) -> Tensor:
    return torch.randn(shape)


# layer_norm_2d


def _layer_norm_2d(n: int, c: int, h: int, w: int) -> list[Tensor]:
    return [torch.randn(n, c, h, w) * 3 + 1, torch.randn(c), torch.randn(c)]


def _layer_norm_2d_backward(t: Sequence[Tensor]) -> tuple[Any, ...]:
    y, mean, rstd = torch.ops.r2r.layer_norm_2d(*t, 1e-6)
    return (y, *t[:2], mean, rstd)


# simple_gate, depthwise_gate, upsample_add: C is that of the result


def _simple_gate(n: int, c: int, h: int, w: int) -> list[Tensor]:
    return [torch.randn(n, 2 * c, h, w)]


def _depthwise_gate(n: int, c: int, h: int, w: int) -> list[Tensor]:
    return [torch.randn(n, 2 * c, h, w), torch.randn(2 * c, 1, 3, 3) / 3, torch.randn(2 * c)]


def _upsample_add(n: int, c: int, h: int, w: int) -> list[Tensor]:
    """x is [N, 2C, h, w], the result [N, C, 2h, 2w]; the skip is the second tensor here."""
    return [
        torch.randn(n, 2 * c, h, w),
        torch.randn(n, c, 2 * h, 2 * w),
        torch.randn(4 * c, 2 * c, 1, 1) / (2 * c) ** 0.5,
    ]


# Blocks


def _naf_block(n: int, c: int, h: int, w: int) -> list[Tensor]:
    return [torch.randn(n, c, h, w), *parameters(c)]


def _gated_feed_forward(n: int, c: int, h: int, w: int) -> list[Tensor]:
    return [torch.randn(n, c, h, w), *parameters(c)[11:]]


def _block(window: tuple[int, int] | None) -> Operator:
    def call(ops: ModuleType, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (ops.naf_block(t[0], NAFBlockParams(*t[1:]), 1e-6, window),)

    return call


# The bank


def _gated_conv(kernel: int, size: tuple[int, int] | None = None) -> Callable[..., list[Tensor]]:
    """The prior has the size of x, or that one."""

    def inputs(n: int, c: int, h: int, w: int) -> list[Tensor]:
        prior = torch.randn(n, c, *(size or (h, w)))
        return [torch.randn(n, c, h, w), prior, torch.randn(c, 2, kernel, kernel) / kernel, torch.randn(c)]

    return inputs


def _slot_conv(tasks: int, slots: int, channels: int, h: int, w: int, kernel: int) -> list[Tensor]:
    weight = torch.randn(tasks, channels, kernel, 3, 3)
    return [torch.randn(tasks, slots, channels, h, w), weight, torch.randn(tasks, channels)]


UNEVEN = [6, 2, 0, 4]


def bank(number: int = 3, tasks: int = 4, slots: int = 6, key: int = 5, value: int = 7, size: int = 3) -> list[Tensor]:
    """query, keys, values and scale; each sample is near the keys of a task of its own: rounding chooses none."""
    centres = torch.randn(tasks, 1, key, size, size)
    keys = centres + 0.3 * torch.randn(tasks, slots, key, size, size)
    query = centres[torch.arange(number) % tasks, 0] + 0.3 * torch.randn(number, key, size, size)
    return [query, keys, torch.randn(tasks, slots, value, size, size), torch.tensor(10.0)]


def _counts(keys: Tensor, counts: list[int] | None) -> Tensor:
    return torch.tensor(counts) if counts else torch.full(keys.shape[:1], keys.shape[1])


def retrieval(counts: list[int] | None = None, task: Any = None, mode: Any = "hard") -> Operator:
    def call(ops: ModuleType, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        query, keys, values, scale = tensors
        held = _counts(keys, counts)
        readout, scores = ops.bank_retrieve(query, keys, values, held, scale, task, mode)
        # What plain PyTorch calls the score of a task without slots is -inf, of which no error can be taken. Scores of
        # half precision are float32: they are held to the rule in the dtype of the query.
        assert torch.equal(scores == -torch.inf, (held == 0).expand(scores.shape))
        return readout, scores[:, held > 0].to(query.dtype)

    return call


def _retrieval_case(mode: str, counts: list[int] | None) -> Case:
    def forward(t: Sequence[Tensor]) -> tuple[Any, ...]:
        return (*t[:3], _counts(t[1], counts), t[3], None, mode)

    def backward(t: Sequence[Tensor]) -> tuple[Any, ...]:
        readout, scores, weights = torch.ops.r2r.bank_retrieve(*forward(t))
        return (readout, torch.where(scores.isfinite(), scores, 0), *forward(t)[:5], weights)

    usual = (3, 4, 6, 5, 7, 3)  # UNEVEN are the counts of four tasks
    return Case(
        "bank_retrieve",
        retrieval(counts, mode=mode),
        bank,
        forward,
        backward,
        images=0,
        shapes=[usual] if counts else [usual, (8, 5, 9, 16, 33, 4)],
        small=[],
        large=(8, 4, 6, 16, 40, 8) if counts else (8, 5, 20, 16, 40, 8),
        checked=usual,
    )


CASES: dict[str, Case] = {
    "layer_norm_2d": Case(
        "layer_norm_2d",
        lambda ops, t: (ops.layer_norm_2d(*t, 1e-6),),
        _layer_norm_2d,
        lambda t: (*t, 1e-6),
        _layer_norm_2d_backward,
    ),
    "simple_gate": Case(
        "simple_gate",
        lambda ops, t: (ops.simple_gate(*t),),
        _simple_gate,
        tuple,
        lambda t: (_upstream(2, 4, 5, 4).to(t[0]), *t),
    ),
    "depthwise_gate": Case(
        "depthwise_gate",
        lambda ops, t: ops.depthwise_gate(*t),
        _depthwise_gate,
        tuple,
        lambda t: (*torch.ops.r2r.depthwise_gate(*t), *t),
        small=[*SMALL, (1, 32, 1, 9), (1, 32, 9, 1)],
    ),
    "upsample_add": Case(
        "upsample_add",
        lambda ops, t: (ops.upsample_add(t[0], t[2], t[1]),),
        _upsample_add,
        lambda t: (t[0], t[2], t[1]),
        lambda t: (_upstream(2, 4, 10, 8).to(t[0]), t[0], t[2]),
        images=2,
        small=[*SMALL[1:], (1, 4, 3, 150)],  # PyTorch's pixel_shuffle has no gradient of an empty batch
    ),
    "local_mean_2d": Case(
        "local_mean_2d",
        lambda ops, t: (ops.local_mean_2d(*t, (3, 2)),),
        lambda *shape: [torch.randn(shape)],
        lambda t: (*t, [3, 2]),
        lambda t: (*t, [3, 2]),
    ),
    "naf_block": Case(
        "naf_block",
        _block(None),
        _naf_block,
        lambda t: (t[0], list(t[1:]), 1e-6),
        lambda t: (t[0], t[0], t[0].new_empty((0, t[0].shape[1]), dtype=torch.float32), list(t[1:]), 1e-6),
        small=[*SMALL, (3, 40, 1, 70)],
    ),
    "naf_block with a window": Case(
        "local_naf_block",
        _block((5, 4)),
        _naf_block,
        lambda t: (t[0], list(t[1:]), 1e-6, [3, 2]),
        None,
    ),
    "gated_feed_forward": Case(
        "gated_feed_forward",
        lambda ops, t: (ops.gated_feed_forward(t[0], GatedFeedForwardParams(*t[1:])),),
        _gated_feed_forward,
        lambda t: (t[0], list(t[1:]), 1e-6),
        lambda t: (t[0], t[0], list(t[1:]), 1e-6),
    ),
    **{
        f"gated_conv {kernel}x{kernel}{' of a small prior' if size else ''}": Case(
            "gated_conv",
            lambda ops, t: (ops.gated_conv(*t),),
            _gated_conv(kernel, size),
            tuple,
            lambda t: (_upstream(*t[0].shape).to(t[0]), *t),
            images=2,
            gpu=True,
        )
        for kernel in (1, 3)
        for size in (None, (3, 4))
    },
    "slot_conv": Case(
        "slot_conv",
        lambda ops, t: (ops.slot_conv(*t),),
        _slot_conv,
        tuple,
        lambda t: (torch.ops.r2r.slot_conv(*t), *t[:2]),
        images=0,
        shapes=[
            (2, 20, 6, 8, 8, 12),
            (3, 7, 3, 5, 9, 7),
            (1, 5, 2, 1, 1, 2),
            (2, 9, 4, 2, 2, 3),
            (1, 4, 2, 17, 40, 2),
            (1, 6, 3, 20, 3, 5),
            (1, 3, 1, 3, 16, 1),
        ],
        small=[(1, 5, 1, 1, 3, 2)],
        large=(2, 30, 40, 8, 8, 6),
        checked=(2, 5, 3, 4, 3, 2),
    ),
    **{
        f"bank_retrieve {mode}{' of uneven counts' if counts else ''}": _retrieval_case(mode, counts)
        for mode in ("hard", "multi", "soft")
        for counts in (None, UNEVEN)
    },
}
