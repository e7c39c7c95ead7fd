"""An adapter as PEFT puts one on a convolution."""

from __future__ import annotations

from torch import Tensor, nn


class Lora(nn.Module):
    """A convolution with two small ones beside it; weight and bias are its own, as in PEFT's layers."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))
