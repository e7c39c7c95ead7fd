"""The backbone: NAF blocks on four levels, down and up again (R2R, section 3.1; NAFNet, ECCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from r2r_kernels.nn import NAFBlock, Upsample2d


def _blocks(channels: int, number: int, eager: bool) -> nn.Sequential:
    return nn.Sequential(*(NAFBlock(channels, eager) for _ in range(number)))


class Encoder(nn.Module):
    """Levels of NAF blocks, each followed by a 2x2 stride-2 convolution that doubles the channels, then the middle.

    [N, width, H, W] -> the deepest features [N, width * 2^L, H / 2^L, W / 2^L] and, of each of the L levels, the
    skip (before the downsampling) and the downsampled features.
    """

    def __init__(self, width: int, blocks: Sequence[int], middle: int, eager: bool) -> None:
        super().__init__()
        channels = [width << level for level in range(len(blocks) + 1)]
        self.levels = nn.ModuleList(_blocks(c, number, eager) for c, number in zip(channels, blocks, strict=False))
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in channels[:-1])
        self.middle = _blocks(channels[-1], middle, eager)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        skips, downsampled = [], []
        for level, down in zip(self.levels, self.downs, strict=True):
            x = level(x)
            skips.append(x)
            x = down(x)
            downsampled.append(x)
        return self.middle(x), skips, downsampled


class Decoder(nn.Module):
    """The mirror of `Encoder`: 1x1 convolution without bias, PixelShuffle(2), the skip added, NAF blocks."""

    def __init__(self, width: int, blocks: Sequence[int], eager: bool) -> None:
        super().__init__()
        channels = [width << level for level in reversed(range(len(blocks)))]
        self.ups = nn.ModuleList(Upsample2d(2 * c, eager) for c in channels)
        self.levels = nn.ModuleList(_blocks(c, number, eager) for c, number in zip(channels, blocks, strict=True))

    def forward(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        for up, level, skip in zip(self.ups, self.levels, reversed(skips), strict=True):
            x = level(up(x, skip))
        return x
