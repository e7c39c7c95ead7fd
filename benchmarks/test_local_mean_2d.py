"""The local mean of TLC: windows of 3/8 of the image, as NAFNet's local inference takes them on images of four times
the training size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import operator_rivals
from benchmarks.sizes import FULL, GPU, QUICK, Size, direction, images, name
from benchmarks.timing import Effort
from r2r_kernels.nn import LocalMean2d


class PublishedLocalMean2d(LocalMean2d):
    """Sums from an integral image, the border's repeated outwards."""

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.kernel_size
        corner = F.pad(x.cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        top, bottom = corner[:, :, :-down], corner[:, :, down:]
        mean = (bottom[..., across:] - bottom[..., :-across] - top[..., across:] + top[..., :-across]) / (down * across)
        below, beside = (size - got for size, got in zip(x.shape[2:], mean.shape[2:], strict=True))
        return F.pad(mean, (beside // 2, (beside + 1) // 2, below // 2, (below + 1) // 2), mode="replicate")


@pytest.mark.grid(
    quick={"size": QUICK[:1], "backward": [False]}, full={"size": FULL, "backward": [False, True]}, gpu={"size": GPU}
)
def test_local_mean_2d(
    race: Race, size: Size, backward: bool, dtype: str, device: torch.device, effort: Effort
) -> None:
    n, c, h, w = size
    x = images(size, device, dtype)
    window = (3 * h // 8, 3 * w // 8)
    # In half precision an integral image overflows or loses the answer: there the plain operator is the published form.
    published = PublishedLocalMean2d(window, eager=True) if dtype == "float32" else None
    race(
        f"local_mean_2d {direction(backward)}",
        name(size),
        dtype,
        operator_rivals("local_mean_2d", LocalMean2d(window, eager=True), [x], published, backward, effort=effort),
        roofline.local_mean_2d(n, c, h, w, x.itemsize, backward),
    )
