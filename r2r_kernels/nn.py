"""Drop-in modules over the operators: on the kernels (`r2r_kernels.functional`), or with `eager=True` on plain PyTorch
(`r2r_kernels.reference`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from r2r_kernels import functional, library, reference
from r2r_kernels.reference import Mode, NAFBlockParams

Similarity = Literal["cosine", "published"]


class OperatorModule(nn.Module):
    """A module on the operators; `ops` is where it takes them from."""

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.eager = eager

    @property
    def ops(self) -> ModuleType:
        return reference if self.eager else functional


class KeepsLayout(nn.Module):
    """A module with 5-d tensors that are no volumes: `.to(memory_format=torch.channels_last)` leaves their layout alone
    (PyTorch would refuse it)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsLayout:
        return super()._apply(lambda x: fn(x.flatten(2)).view(x.shape) if x.dim() == 5 else fn(x), recurse)


class LayerNorm2d(OperatorModule):
    """LayerNorm over the channels of [N, C, H, W]; the parameters of NAFNet's `LayerNorm2d`."""

    def __init__(self, channels: int, eps: float = 1e-6, eager: bool = False) -> None:
        super().__init__(eager)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm_2d(x, self.weight, self.bias, self.eps)


class SimpleGate(OperatorModule):
    """First half of the channels times the second half: [N, 2C, H, W] -> [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.simple_gate(x)


class LocalMean2d(OperatorModule):
    """The mean over a window (height, width) around each pixel, moved inside the image at its borders.

    In place of a block's `sca[0]` it makes channel attention local (TLC, Chu et al., ECCV 2022).
    """

    def __init__(self, kernel_size: tuple[int, int], eager: bool = False) -> None:
        super().__init__(eager)
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.local_mean_2d(x, self.kernel_size)


def pools_globally(pool: nn.Module | None) -> bool:
    """Whether a block's `sca[0]` is the one that it is made with."""
    return type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))


class NAFBlock(OperatorModule):
    """NAFNet's block (ECCV 2022) on [N, C, H, W], with the parameter names of its checkpoints.

    `beta` and `gamma` start at 0, so that a new block is the identity. dropout, where not 0, is applied to both
    branches in training, which then runs unfused; so does a block whose `sca[0]` was replaced by anything but a
    `LocalMean2d`. `window`, where not 0, makes the attention local in evaluation: a `LocalMean2d` of that side.
    """

    window = 0

    def __init__(self, channels: int, eager: bool = False, dropout: float = 0.0) -> None:
        super().__init__(eager)
        self.norm1 = LayerNorm2d(channels, eager=eager)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.norm2 = LayerNorm2d(channels, eager=eager)
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def params(self) -> NAFBlockParams:
        sca: Any = self.sca[1]
        convs: tuple[Any, ...] = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)
        conv1, conv2, conv3, conv4, conv5 = convs
        return NAFBlockParams(
            norm1_weight=self.norm1.weight,
            norm1_bias=self.norm1.bias,
            conv1_weight=conv1.weight,
            conv1_bias=conv1.bias,
            conv2_weight=conv2.weight,
            conv2_bias=conv2.bias,
            sca_weight=sca.weight,
            sca_bias=sca.bias,
            conv3_weight=conv3.weight,
            conv3_bias=conv3.bias,
            beta=self.beta,
            norm2_weight=self.norm2.weight,
            norm2_bias=self.norm2.bias,
            conv4_weight=conv4.weight,
            conv4_bias=conv4.bias,
            conv5_weight=conv5.weight,
            conv5_bias=conv5.bias,
            gamma=self.gamma,
        )

    def fold(self, dtype: torch.dtype) -> FoldedNAFBlock | None:
        """The block for inference in `dtype`, with norms, beta and gamma folded into the convolutions (in float32): one
        launch a call less. None where the kernels of its device read the parameters as they are, and where attention is
        local."""
        if self.window or not pools_globally(self.sca[0]):
            return None
        folded = library.fold_naf_block(self.params(), dtype)
        return None if folded is None else FoldedNAFBlock(folded, self.norm1.eps)

    def forward(self, x: Tensor) -> Tensor:
        pool: Any = self.sca[0]
        window = pool.kernel_size if isinstance(pool, LocalMean2d) else None
        if self.window and not self.training:
            height, width = (min(self.window, side) for side in x.shape[2:])
            window = None if (height, width) == tuple(x.shape[2:]) else (height, width)
        if (self.training and self.dropout1.p > 0) or (window is None and not pools_globally(pool)):
            return self._by_parts(x)
        return self.ops.naf_block(x, self.params(), self.norm1.eps, window)

    def _by_parts(self, x: Tensor) -> Tensor:
        gated, _ = self.ops.depthwise_gate(self.conv1(self.norm1(x)), self.conv2.weight, self.conv2.bias)
        y = x + self.dropout1(self.conv3(gated * self.sca(gated))) * self.beta
        return y + self.dropout2(self.conv5(self.ops.simple_gate(self.conv4(self.norm2(y))))) * self.gamma


class FoldedNAFBlock(nn.Module):
    """What `NAFBlock.fold` returns: a block for inference in one dtype, on the device where it was folded."""

    def __init__(self, folded: dict[str, Tensor], eps: float) -> None:
        super().__init__()
        for name, tensor in folded.items():
            self.register_buffer(name, tensor)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        folded = list(self.buffers())
        return torch.ops.r2r.naf_block_folded(x.to(folded[0].dtype), folded, self.eps)


class BankRetrieval(OperatorModule):
    """Retrieval from a bank; see `reference.bank_retrieve` for shapes and meaning.

    similarity "cosine": cosine times a learnt scale, kept as its logarithm, which starts at 10 and is held below 100
    (as CLIP's). "published": cosine / sqrt(Ck * h * w), a constant.
    """

    def __init__(self, similarity: Similarity = "cosine", mode: Mode = "hard", eager: bool = False) -> None:
        super().__init__(eager)
        if similarity not in ("cosine", "published"):
            raise ValueError(f'similarity must be "cosine" or "published", got {similarity!r}')
        self.similarity = similarity
        self.mode = mode
        if similarity == "cosine":
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def scale(self, query: Tensor) -> Tensor | float:
        if self.similarity == "published":
            return 1 / math.sqrt(query.shape[1:].numel())
        return self.log_scale.clamp(max=math.log(100.0)).exp()

    def scores(self, queries: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
        """The scores of `forward` alone: flat queries [N, W, Ck * h * w], W of each image -> [N, W, T].

        The mean over a task's slots is taken of its unit keys, which comes to the same.
        """
        wide = torch.promote_types(queries.dtype, torch.float32)
        kind = queries.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # as exact as in `forward`
            used = torch.arange(keys.shape[1], device=keys.device) < counts[:, None]
            unit_keys = nn.functional.normalize(keys.to(wide).flatten(2), dim=2) * used[:, :, None]
            mean = unit_keys.sum(1) / counts.clamp(min=1)[:, None]
            scores = self.scale(queries[:, 0]) * (nn.functional.normalize(queries.to(wide), dim=2) @ mean.T)
        return scores.masked_fill(counts == 0, -torch.inf)

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.ops.bank_retrieve(query, keys, values, counts, self.scale(query), task, self.mode)


class SlotConv3d(KeepsLayout, OperatorModule):
    """Depthwise (k, 3, 3) convolution along the slots: [T, S, C, h, w] -> [T, S - k + 1, C, h, w]."""

    def __init__(self, tasks: int, channels: int, kernel: int, eager: bool = False) -> None:
        super().__init__(eager)
        bound = 1 / math.sqrt(9 * kernel)
        self.weight = nn.Parameter(torch.empty(tasks, channels, kernel, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(tasks, channels).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.slot_conv(x, self.weight, self.bias)


class GatedConv2d(OperatorModule):
    """Gated fusion of features and prior, both [N, C, H, W]; see `reference.gated_conv`."""

    def __init__(self, channels: int, kernel: int = 1, eager: bool = False) -> None:
        super().__init__(eager)
        if kernel not in (1, 3):
            raise ValueError(f"kernel must be 1 or 3, got {kernel}")
        bound = 1 / math.sqrt(2 * kernel * kernel)
        self.weight = nn.Parameter(torch.empty(channels, 2, kernel, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        return self.ops.gated_conv(x, prior, self.weight, self.bias)
