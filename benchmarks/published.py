"""The rival "eager as published": the same model, computed as the published code computes it, operation by operation.

LayerNorm in eight elementwise passes, a block in some thirty, the bank as lists of slots that are concatenated at each
call, a top-k over equal counts. Answers are those of `r2r.R2R` with `similarity="published"`.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2r import R2R
from r2r.backbone import Decoder, Encoder
from r2r.extras import import_after_torchvision
from r2r_kernels.nn import BankRetrieval, GatedConv2d, LayerNorm2d, NAFBlock


class PublishedLayerNorm2d(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / (var + self.eps).sqrt()
        return self.weight.view(1, channels, 1, 1) * y + self.bias.view(1, channels, 1, 1)


class PublishedNAFBlock(NAFBlock):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv2(self.conv1(self.norm1(x))).chunk(2, dim=1)
        gated = first * second
        y = x + self.conv3(gated * self.sca(gated)) * self.beta
        first, second = self.conv4(self.norm2(y)).chunk(2, dim=1)
        return y + self.conv5(first * second) * self.gamma


class NAFNet(nn.Module):
    """[N, 3, H, W] -> [N, 3, H, W], H and W multiples of its stride; its blocks are those of `r2r_kernels.nn`."""

    def __init__(
        self, width: int, encoder_blocks: tuple[int, ...], middle_blocks: int, decoder_blocks: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.intro, self.ending = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.encoder = Encoder(width, encoder_blocks, middle_blocks, eager=True)
        self.decoder = Decoder(width, decoder_blocks, eager=True)

    def forward(self, image: Tensor) -> Tensor:
        deep, skips, _ = self.encoder(self.intro(image))
        return image + self.ending(self.decoder(deep, skips))


class PublishedRetrieval(nn.Module):
    """Takes the slots from lists, one tensor a slot, as the published bank keeps them."""

    def __init__(self, retrieval: BankRetrieval) -> None:
        super().__init__()
        self.mode = retrieval.mode
        self.slots: tuple[Tensor, Tensor, list[list[Tensor]], list[list[Tensor]]] | None = None

    def scores(self, queries: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
        """As `BankRetrieval.scores`: of flat queries [N, W, Ck * h * w] -> [N, W, T]."""
        return self._compared(queries.flatten(0, 1), keys, keys)[2].unflatten(0, queries.shape[:2])

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        flat_values, similarity, scores, numbers = self._compared(query.flatten(1), keys, values)
        chosen = scores.argmax(1) if task is None else task
        if chosen.dtype == torch.bool:  # a mask of one task for each image
            chosen = chosen.int().argmax(1)
        owner = torch.arange(len(numbers)).repeat_interleave(torch.tensor(numbers)).to(query.device)
        masked = similarity.clone()
        masked[owner != chosen[:, None]] = -1e6
        readout = torch.softmax(masked, dim=1) @ flat_values.flatten(1)
        return readout.view(len(query), *flat_values.shape[1:]), scores

    def _compared(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """All values, similarities [N, slots], scores [N, T] and how many slots each task has."""
        if self.slots is None or self.slots[0] is not keys or (self.slots[1] is not values and values is not keys):
            split = [[list(one.split(1)) for one in bank] for bank in (keys, values)]
            self.slots = (keys, values, split[0], split[1])
        _, _, key_lists, value_lists = self.slots
        numbers = [len(slots) for slots in key_lists]
        flat_keys = torch.cat([torch.cat(slots) for slots in key_lists]).flatten(1)
        flat_values = torch.cat([torch.cat(slots) for slots in value_lists])
        unit = F.normalize(queries, dim=1)
        similarity = unit @ F.normalize(flat_keys, dim=1).t() / math.sqrt(flat_keys.shape[1])
        parts = similarity.split(numbers, dim=1)
        scores = torch.stack([torch.topk(part, min(numbers), dim=1).values.mean(1) for part in parts], dim=1)
        return flat_values, similarity, scores, numbers


class PublishedGatedConv2d(GatedConv2d):
    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        if prior.shape[2:] != x.shape[2:]:
            prior = F.interpolate(prior, size=x.shape[2:], mode="area")
        both = torch.stack((x, prior), dim=2).flatten(1, 2)
        gate = torch.sigmoid(F.conv2d(both, self.weight, self.bias, padding=self.weight.shape[-1] // 2,
                                      groups=x.shape[1]))  # fmt: skip
        return x * (1 - gate) + prior * gate


AS_PUBLISHED: dict[type[nn.Module], type[nn.Module]] = {
    LayerNorm2d: PublishedLayerNorm2d,
    NAFBlock: PublishedNAFBlock,
    GatedConv2d: PublishedGatedConv2d,
}


def import_spandrel() -> ModuleType:
    """The package spandrel. Raises ImportError where it, or torchvision, is not installed."""
    return import_after_torchvision("spandrel")


def spandrel_nafnet(
    width: int, encoder_blocks: tuple[int, ...], middle_blocks: int, decoder_blocks: tuple[int, ...]
) -> nn.Module:
    """NAFNet as spandrel makes it when it loads a file."""
    import_spandrel()
    made = importlib.import_module("spandrel.architectures.NAFNet").NAFNet
    return made(width=width, enc_blk_nums=encoder_blocks, middle_blk_num=middle_blocks, dec_blk_nums=decoder_blocks)


def as_published(model: R2R) -> R2R:
    """Change an eager model with `similarity="published"` so that it computes as the published code does."""
    for module in model.modules():
        if type(module) in AS_PUBLISHED:
            module.__class__ = AS_PUBLISHED[type(module)]
    model.retrieval = PublishedRetrieval(model.retrieval)  # type: ignore[assignment]
    return model
