"""The published NAFNets of width 32 under `r2r_kernels.accelerate`, in the memory format that they come in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.published import NAFNet, spandrel_nafnet
from benchmarks.race import Race
from benchmarks.rivals import nafnet_rivals
from benchmarks.sizes import settle
from benchmarks.timing import Effort

SOURCES = ["published", "spandrel"]  # as the published code computes, and as the package spandrel loads it
NETS: dict[str, dict[str, Any]] = {
    "denoising": {"encoder_blocks": (2, 2, 4, 8), "middle_blocks": 12, "decoder_blocks": (2, 2, 2, 2)},
    "deblurring": {"encoder_blocks": (1, 1, 1, 28), "middle_blocks": 1, "decoder_blocks": (1, 1, 1, 1)},
}


@pytest.mark.grid(
    quick={"source": SOURCES, "net": ["deblurring"], "n": [1]},
    everyday={"source": ["published"], "net": ["denoising"], "n": [1]},
    full={"source": SOURCES, "net": list(NETS), "n": [1]},
    gpu={"source": SOURCES, "net": list(NETS), "n": [32]},
)
def test_nafnet(race: Race, source: str, net: str, n: int, dtype: str, device: torch.device, effort: Effort) -> None:
    sizes = {"width": 32, **NETS[net]}
    kind: torch.dtype = getattr(torch, dtype)
    image = torch.rand(n, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device, kind)
    made = spandrel_nafnet if source == "spandrel" else NAFNet
    race(
        "nafnet" if source == "published" else "nafnet of spandrel",
        f"{net} {n} x 224 x 224",
        dtype,
        nafnet_rivals(settle(made(**sizes), device, dtype), image, effort),
        roofline.total(roofline.backbone(n, 224, 224, kind.itemsize, sizes)),
        items=n,
        baseline=image,
    )
