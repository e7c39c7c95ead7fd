"""The metrics are what scikit-image and the definitions say."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from r2r import InputError
from r2r.metrics import Measures, centre_crop, luma, psnr, psnr_y, ssim, ssim_y

CLEAN = torch.from_numpy(skimage.data.chelsea()[:96, 100:228]).movedim(-1, 0).float() / 255
NOISY = CLEAN + 0.1 * torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(0))


def numpy(image: torch.Tensor) -> np.ndarray:
    return image.movedim(0, -1).numpy()


def test_psnr_and_ssim_agree_with_scikit_image_on_clipped_values() -> None:
    clipped = NOISY.clamp(0, 1)
    assert not torch.equal(clipped, NOISY)
    expected = peak_signal_noise_ratio(numpy(CLEAN), numpy(clipped), data_range=1.0)
    assert psnr(NOISY, CLEAN).item() == pytest.approx(expected, abs=1e-5)
    expected = structural_similarity(numpy(clipped), numpy(CLEAN), channel_axis=-1, data_range=1.0)
    assert ssim(NOISY, CLEAN) == pytest.approx(expected, abs=1e-6)


def test_psnr_of_a_known_error_is_not_quantised() -> None:
    target = torch.full((3, 8, 8), 0.5)
    assert psnr(target + 0.001, target).item() == pytest.approx(60, abs=1e-3)  # less than half of 1/255


def test_psnr_of_a_batch_is_each_images_own() -> None:
    batch = torch.stack((NOISY, CLEAN + 0.01))
    values = psnr(batch, CLEAN.expand_as(batch))
    assert values.shape == (2,)
    assert values.tolist() == [psnr(NOISY, CLEAN).item(), psnr(CLEAN + 0.01, CLEAN).item()]


def test_equal_images() -> None:
    assert psnr(CLEAN, CLEAN).item() == math.inf
    assert ssim(CLEAN, CLEAN) == pytest.approx(1)


@pytest.mark.parametrize(("size", "expected"), [((37, 50), (32, 48)), ((16, 17), (16, 16)), ((5, 40), (5, 32))])
def test_centre_crop(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = torch.arange(size[0] * size[1]).view(1, *size)
    cropped = centre_crop(image)
    assert cropped.shape[1:] == expected
    top, left = (size[0] - expected[0]) // 2, (size[1] - expected[1]) // 2
    assert cropped[0, 0, 0] == image[0, top, left]


def test_ssim_needs_seven_pixels() -> None:
    with pytest.raises(ValueError, match="win_size"):
        ssim(CLEAN[:, :6], CLEAN[:, :6])


def test_luma_is_that_of_matlab() -> None:
    assert luma(CLEAN)[0].numpy() * 255 == pytest.approx(rgb2ycbcr(numpy(CLEAN))[..., 0], abs=1e-3)


def test_on_luma_the_window_is_that_of_wang() -> None:
    noisy, clean = (luma(x.clamp(0, 1)).double() for x in (NOISY, CLEAN))
    error = (noisy - clean).square().mean().item()
    assert psnr_y(NOISY, CLEAN).item() == pytest.approx(-10 * math.log10(error), abs=1e-4)
    offsets = torch.arange(-5, 6).double()
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def smooth(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x[None], window)

    a, b = smooth(noisy), smooth(clean)
    variances = smooth(noisy * noisy) - a * a + smooth(clean * clean) - b * b
    covariance = smooth(noisy * clean) - a * b
    c1, c2 = 0.01**2, 0.03**2
    by_hand = (2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (variances + c2))
    assert ssim_y(NOISY, CLEAN) == pytest.approx(by_hand.mean().item(), abs=1e-6)


def test_measures_are_named() -> None:
    measured = Measures()(NOISY, CLEAN)
    assert measured["psnr"] == psnr(NOISY, CLEAN).item()
    assert measured["ssim_y"] == ssim_y(NOISY, CLEAN)
    assert Measures()(CLEAN, CLEAN)["psnr_y"] == 100
    assert math.isnan(Measures()(CLEAN[:, :9], CLEAN[:, :9])["ssim_y"])
    with pytest.raises(InputError, match="unknown metric 'fid'; accepted: lpips, niqe"):
        Measures(["fid"])


def test_weights_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("torchmetrics, of the extra `metrics`, is not installed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(InputError, match=r"^lpips needs a file .* fetch https://\S+/alexnet-\w+-\w+\.pth to \S+$"):
        Measures(["lpips"])
    assert not list(tmp_path.rglob("*.pth"))
