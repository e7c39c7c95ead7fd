"""The metrics are what scikit-image and the definitions say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.data
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from r2r.metrics import centre_crop, psnr, ssim

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
