"""Drop-in modules over the operators: on the kernels (`r2r_kernels.functional`), or with `eager=True` on plain PyTorch
(`r2r_kernels.reference`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from r2r_kernels import functional, operators, reference
from r2r_kernels.reference import Mode, NAFBlockParams
from r2r_kernels.structure import MARK, Sights, Structure, constant_when_compiled, homes, modes_fit

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


def _path(name: str) -> str:
    """Where a NAF block keeps the parameter that NAFBlockParams calls `name`."""
    if name in ("beta", "gamma"):
        return name
    module, _, leaf = name.rpartition("_")
    return f"sca.1.{leaf}" if module == "sca" else f"{module}.{leaf}"


_PATHS = tuple(map(_path, NAFBlockParams._fields))


class Fusable(OperatorModule):
    """A module of several parts that one operator computes, while they are what they were made as.

    Adapters, replaced or reconfigured parts, hooks on them, dropout at work: then the parts themselves are called.
    """

    def __init__(self, eager: bool = False) -> None:
        super().__init__(eager)
        self.__dict__[MARK] = Sights()

    def seen(self) -> Any:
        """What the operator is to be called with; None where the parts are to be called instead."""
        sights = self.__dict__[MARK]
        if sights.own is not self.__dict__:
            sights = self.__dict__[MARK] = Sights(self.__dict__)
        return sights.see(self, type(self)._look)

    def _look(self) -> Any:
        raise NotImplementedError


@cache
def _new_block(channels: int, eager: bool, local: bool) -> Structure:
    with _disable_current_modes(), torch.device("meta"):  # while tracing there are modes that want tensors of their own
        block = NAFBlock(channels, eager)
    if local:
        block.sca[0] = LocalMean2d((1, 1), eager)
    return Structure.of(block)


_BORDER = 1 / 8  # of an image's side: what convolutions answer there depends on the zeros beyond it


class NAFBlock(Fusable):
    """NAFNet's block (ECCV 2022) on [N, C, H, W], with the parameter names of its checkpoints.

    `beta` and `gamma` start at 0, so that a new block is the identity. dropout, where not 0, is applied to both
    branches in training, which then runs unfused; so does a block of which a part was changed (adapters, hooks, another
    convolution), but for a `LocalMean2d` in place of `sca[0]`. `window`, where not 0, makes the attention local in
    evaluation: a `LocalMean2d` of that side takes the place of `sca[0]`. `attention` [C], where it is set, is taken in
    place of the attention of x itself: `share_attention` sets it, so that all tiles of an image get the same.
    """

    window = 0
    attention: Tensor | None = None

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
        return NAFBlockParams(*(home[name] for home, name in homes(self, _PATHS)))

    def fold(self, dtype: torch.dtype) -> FoldedNAFBlock | None:
        """The block for inference in `dtype`, with norms, beta and gamma folded into the convolutions (in float32): one
        launch a call less. None where the kernels of its device read the parameters as they are, where attention is
        local, and where the block runs unfused."""
        seen = self.seen()
        if seen is None or seen.window is not None or self.window:
            return None
        folded = operators.naf_block.fold(self.params(), dtype)
        return None if folded is None else FoldedNAFBlock(folded, self)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return self._compiled(x)
        seen = self.seen() if isinstance(x, Tensor) else None
        if seen is None:
            return self._by_parts(x)
        params = [home[name] for home, name in seen.tensors]
        if any(p is None for p in params):  # a bias that was set to None since
            return self._by_parts(x)
        return self._by_operator(x, NAFBlockParams(*params), seen.window)

    @torch.no_grad()
    def share_attention(self, x: Tensor) -> None:
        """Set `attention` to that of the mean over the batch x [N, C, H, W], without an eighth of each side."""
        hidden = self.conv1(self.norm1(x))
        if self.seen() is None:
            gated = self.ops.simple_gate(self.conv2(hidden))
        else:
            gated, _ = self.ops.depthwise_gate(hidden, self.conv2.weight, self.conv2.bias)
        (top, left), (height, width) = (int(side * _BORDER) for side in x.shape[2:]), x.shape[2:]
        inner = gated[:, :, top : height - top, left : width - left]
        attention = inner.mean((0, 2, 3), keepdim=True, dtype=torch.float32).to(gated.dtype)
        for part in list(self.sca)[1:]:
            attention = part(attention)
        self.attention = attention.flatten()

    def _by_operator(self, x: Tensor, params: NAFBlockParams, window: tuple[int, int] | None) -> Tensor:
        if self.attention is not None:  # whatever the mean is
            weight, bias = torch.zeros_like(params.sca_weight), self.attention.to(params.sca_bias)
            return self.ops.naf_block(x, params._replace(sca_weight=weight, sca_bias=bias), self.norm1.eps, None)
        return self.ops.naf_block(x, params, self.norm1.eps, self._window_for(x, window))

    def _look(self) -> _SeenBlock | None:
        pool = self.sca._modules.get("0")
        local = type(pool) is LocalMean2d
        made = _new_block(self.beta.numel(), self.eager, local)
        free = {"dropout1": frozenset({"p"}), "dropout2": frozenset({"p"}), "sca.0": frozenset({"kernel_size"})}
        if made.difference(self, free, own=False) is not None or not modes_fit(self, ("dropout1", "dropout2")):
            return None
        return _SeenBlock(homes(self, _PATHS), tuple(pool.kernel_size) if local else None)  # type: ignore[union-attr, arg-type]

    def _compiled(self, x: Tensor) -> Tensor:
        """As a compiler follows it: what it reads here, it asks for at each call."""
        if not _is_whole(self):
            return self._by_parts(x)
        sca: Any = self.sca
        convs: tuple[Any, ...] = (self.conv1, self.conv2, sca[1], self.conv3, self.conv4, self.conv5)
        for conv in convs:
            _ = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        first, second = ((norm.weight, norm.bias) for norm in (self.norm1, self.norm2))
        conv1, conv2, attention, conv3, conv4, conv5 = ((conv.weight, conv.bias) for conv in convs)
        _ = self.norm2.eps
        window = sca[0].kernel_size if isinstance(sca[0], LocalMean2d) else None
        params = NAFBlockParams(
            *(*first, *conv1, *conv2, *attention, *conv3, self.beta, *second, *conv4, *conv5, self.gamma)
        )
        return self._by_operator(x, params, window)

    def _window_for(self, x: Tensor, window: tuple[int, int] | None) -> tuple[int, int] | None:
        """Over what the attention pools on x, where `sca[0]` has this window; None: over the image."""
        if not self.window or self.training:
            return window
        height, width = (torch.sym_min(self.window, side) for side in x.shape[2:])
        if torch.compiler.is_exporting():  # a program is to hold for images of all sizes
            return height, width
        return None if (height, width) == tuple(x.shape[2:]) else (height, width)

    def _by_parts(self, x: Tensor) -> Tensor:
        gated = self.ops.simple_gate(self.conv2(self.conv1(self.norm1(x))))
        if self.attention is not None:
            attention = self.attention[:, None, None]
        elif self.window and not self.training:
            attention = self.ops.local_mean_2d(gated, (self.window, self.window))
            for part in list(self.sca)[1:]:
                attention = part(attention)
        else:
            attention = self.sca(gated)
        y = x + self.dropout1(self.conv3(gated * attention)) * self.beta
        return y + self.dropout2(self.conv5(self.ops.simple_gate(self.conv4(self.norm2(y))))) * self.gamma


class _SeenBlock(NamedTuple):
    tensors: list[tuple[dict[str, Any], str]]
    window: tuple[int, int] | None


@constant_when_compiled
def _is_whole(module: Fusable) -> bool:
    return module.seen() is not None


@cache
def _new_upsampling(channels: int, eager: bool) -> Structure:
    with _disable_current_modes(), torch.device("meta"):
        return Structure.of(Upsample2d(channels, eager))


class Upsample2d(Fusable):
    """1x1 convolution without bias (`0`), PixelShuffle(2) (`1`), and the skip added, as in NAFNet's decoder:
    x [N, 2C, h, w], skip [N, C, 2h, 2w] -> [N, C, 2h, 2w]. channels: 2C."""

    def __init__(self, channels: int, eager: bool = False) -> None:
        super().__init__(eager)
        self.add_module("0", nn.Conv2d(channels, 2 * channels, 1, bias=False))
        self.add_module("1", nn.PixelShuffle(2))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        conv: Any = self.get_submodule("0")
        if torch.compiler.is_dynamo_compiling():
            _ = (conv.stride, conv.padding, conv.dilation, conv.groups)
            whole = _is_whole(self)
        else:
            whole = isinstance(x, Tensor) and self.seen() is not None
        return self.ops.upsample_add(x, conv.weight, skip) if whole else self.get_submodule("1")(conv(x)) + skip

    def _look(self) -> bool | None:
        conv: Any = self.get_submodule("0")
        made = _new_upsampling(getattr(conv, "in_channels", 0), self.eager)
        return True if made.difference(self, own=False) is None else None


class FoldedNAFBlock(nn.Module):
    """What `NAFBlock.fold` returns: a block for inference in one dtype, on the device where it was folded. It takes the
    `attention` of the block that it was made of."""

    def __init__(self, folded: dict[str, Tensor], block: NAFBlock) -> None:
        super().__init__()
        for name, tensor in folded.items():
            self.register_buffer(name, tensor)
        self.block = block

    def share_attention(self, x: Tensor) -> None:
        """As `NAFBlock.share_attention`."""
        self.block.share_attention(x.to(self.block.beta.dtype))

    def forward(self, x: Tensor) -> Tensor:
        folded = dict(self.named_buffers(recurse=False))
        if self.block.attention is not None:
            bias = self.block.attention.to(folded["sca_bias"].dtype)
            folded.update(sca=torch.zeros_like(folded["sca"]), sca_bias=bias)
        values = list(folded.values())
        return torch.ops.r2r.naf_block_folded(x.to(values[0].dtype), values, self.block.norm1.eps)


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
