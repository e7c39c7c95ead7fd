"""The model that comes with the package: it loads, answers as it did, and restores as well as it did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from r2r import R2R, fast
from r2r.data.degradations import parse_degradation
from r2r.metrics import psnr
from r2r.weights import default_weights

STORED = Path(__file__).with_name("default_weights.json")
TASKS = ("denoise", "derain", "dehaze", "deblur", "lowlight", "dejpeg")
PHOTOS = {
    "astronaut": skimage.data.astronaut()[:256, 100:356],
    "chelsea": skimage.data.chelsea()[:256, :256],
    "coffee": skimage.data.coffee()[100:356, 150:406],
}


@pytest.fixture(scope="module")
def model() -> fast.R2R:
    loaded = fast.R2R.from_pretrained()
    assert isinstance(loaded, fast.R2R)
    return loaded


def degraded(photo: str, spec: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A photo as it is, whole, or a part of it that is degraded."""
    clean = (getattr(skimage.data, photo)() if spec is None else PHOTOS[photo]).astype(np.float32) / 255
    lq = clean if spec is None else parse_degradation(spec)(clean, np.random.default_rng(0))
    first, second = (torch.from_numpy(x).permute(2, 0, 1)[None].contiguous() for x in (lq, clean))
    return first, second


def cases() -> list[dict]:
    return json.loads(STORED.read_text())


def test_they_come_with_the_package_in_16_mb() -> None:
    files = {path.name: path.stat().st_size for path in default_weights().iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    assert sum(files.values()) <= 16e6
    model = R2R.from_pretrained()
    assert model.tasks == TASKS
    assert model.mixtures
    assert {x.dtype for x in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case['photo']} {case['degradation']}")
def test_answers_and_quality_are_those_stored(model: fast.R2R, case: dict) -> None:
    lq, hq = degraded(case["photo"], case["degradation"])
    result = model.restore(lq)
    assert [task for task, found in zip(TASKS, result.task[0].tolist(), strict=True) if found] == case["found"]
    sample = result.image[0, :, 16::64, 16::64].flatten()
    torch.testing.assert_close(sample, torch.tensor(case["sample"]), rtol=0, atol=1e-3)
    assert float(psnr(result.image, hq)) > case["psnr"] - 0.05
    if case["degradation"] is None:
        assert torch.equal(result.image, lq)
    else:
        assert case["psnr"] >= float(psnr(lq, hq)) - 1e-3  # a photo in which nothing was found is left as it is
