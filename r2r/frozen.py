"""The inference form of the model, which `r2r.fast.R2R.freeze` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2r.device import device_of
from r2r.model import R2R, Features, Restoration
from r2r.pretrained import OnMeta
from r2r.replay import Replays
from r2r_kernels.nn import NAFBlock

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Larger batches keep a GPU busy for longer than it takes to launch their kernels: a graph would only hold memory.
MOST_PIXELS = 2**20


class FrozenR2R(R2R):
    """A copy of a model that only restores: `restore`, `forward`, and the parts `encode`, `query`, `match`, `decode`.

    Network in `dtype`, by default bfloat16 on a GPU and float32 elsewhere, laid out channels_last; bank and retrieval
    in float32, keys at unit length, so that matching is as exact as the query. No amalgamator. Images of any float
    dtype come back in the wider of theirs and `dtype`.

    On a GPU, norms, beta and gamma of each NAF block are folded into its convolutions, and images of a shape and layout
    that was seen before are restored by replaying a CUDA graph (at most 8 of them, least recently used dropped first,
    each up to 2^20 pixels in all); a new shape just runs. Threads may share the model, on streams of their own too.
    """

    eager = False

    def __init__(self, model: R2R, dtype: torch.dtype | None = None) -> None:
        if dtype is None:  # a CPU without instructions for bfloat16 takes several times as long in it
            dtype = torch.bfloat16 if device_of(model).type == "cuda" else torch.float32
        if dtype not in DTYPES:
            raise ValueError(f"a model is frozen in float32, bfloat16 or float16, got {dtype}")
        model.bank.check_filled()
        with OnMeta():
            super().__init__(**{**model.config, "amalgamator": False})
        own = self.state_dict()
        kept = {name: x.detach().clone() for name, x in model.state_dict().items() if name in own}
        self.load_state_dict(kept, assign=True)
        blocks = {name: block.fold(dtype) for name, block in self.named_modules() if isinstance(block, NAFBlock)}
        for name, part in self.named_children():
            if name in ("bank", "retrieval"):
                part.float()
            else:
                part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, folded in blocks.items():
            if folded is not None:
                self.set_submodule(name, folded)
        self.bank.keys = F.normalize(self.bank.keys.flatten(2), dim=2).view_as(self.bank.keys)
        self.requires_grad_(False).eval()
        self.replays = Replays()

    def _check_dtype(self, lq: Tensor) -> None:
        """Any float dtype is taken."""

    def encode(self, lq: Tensor) -> Features:
        return super().encode(lq.to(self.intro.weight.dtype, memory_format=torch.channels_last))

    def query(self, deep: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().query(deep)
        return key.float(), value

    def decode(
        self, lq: Tensor, features: Features, value: Tensor, readout: Tensor, exposure: Tensor | None = None
    ) -> Tensor:
        return super().decode(lq, features, value, readout.to(value.dtype), exposure)

    def _restored(self, lq: Tensor, told: Tensor | None) -> Restoration:
        if not _replayable(lq):
            restored = super()._restored(lq, told)
            wider = torch.promote_types(lq.dtype, self.intro.weight.dtype)
            return restored._replace(image=restored.image.to(wider))  # also where nothing was found
        return Restoration(*self.replays(super()._restored, (lq, told), reads=list(_tensors(self))))

    def train(self, mode: bool = True) -> FrozenR2R:
        if mode:
            raise ValueError("a frozen model only restores; train the model it was made from")
        return super().train(mode)

    def save_pretrained(
        self, save_directory: str | Path, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> str | None:
        raise ValueError("a frozen model is not saved; save the model it was made from")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if "replays" in self.__dict__:
            self.replays.clear()  # they read the weights where those were
        return super()._apply(fn, recurse)


def inference_form(model: R2R) -> R2R:
    """The form that restores fastest on the model's device; an eager model, the reference, stays what it is."""
    if model.eager or isinstance(model, FrozenR2R):
        return model
    return FrozenR2R(model)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers; as `parameters()` and `buffers()`, which take five times as long."""
    for held in (module._parameters, module._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)
    for part in module._modules.values():
        if part is not None:
            yield from _tensors(part)


def _replayable(lq: Tensor) -> bool:
    if torch.compiler.is_compiling() or not lq.is_cuda or not 0 < lq.numel() <= 3 * MOST_PIXELS:
        return False
    recorded = torch.is_grad_enabled() and lq.requires_grad
    return not (recorded or torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing())
