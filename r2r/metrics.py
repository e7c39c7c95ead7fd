"""PSNR and SSIM as the field reports them for all-in-one restoration (PromptIR, NeurIPS 2023; R2R).

On RGB in [0, 1], clipped and not quantised, of images cropped with `centre_crop` before they are restored; the number
of a set is the mean over its images.
"""

from __future__ import annotations

import torch
from skimage.metrics import structural_similarity
from torch import Tensor

# Counted for equal images in means, whose PSNR is infinite.
MAX_PSNR = 100.0
SSIM_WINDOW = 7


def centre_crop(image: Tensor, multiple: int = 16) -> Tensor:
    """The middle of `image` [..., H, W] with sides that are multiples of `multiple`; a shorter side stays whole."""
    for dim in (-2, -1):
        surplus = image.shape[dim] % multiple
        if image.shape[dim] > multiple:
            image = image.narrow(dim, surplus // 2, image.shape[dim] - surplus)
    return image


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: [..., 3, H, W] in [0, 1] -> float64 [...].

    `image` is clipped first. Equal images give inf.
    """
    error = image.clamp(0, 1).double() - target.double()
    return -10 * torch.log10(error.square().mean((-3, -2, -1)))


def ssim(image: Tensor, target: Tensor) -> float:
    """Structural similarity of one image [3, H, W] in [0, 1], H, W >= 7 (scikit-image: 7 x 7 uniform window).

    `image` is clipped first. Raises ValueError for smaller images.
    """
    channels_last = (x.detach().float().movedim(0, -1).cpu().numpy() for x in (image.clamp(0, 1), target))
    return float(structural_similarity(*channels_last, channel_axis=-1, data_range=1.0))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """How far probabilities lie from how often they are right, on average over `bins` equal ranges (Guo et al., 2017).

    probabilities in [0, 1] and labels (1, 0, or 0.5 where nobody is sure, which does not count), both of one shape.
    """
    known = labels != 0.5
    probability, label = probabilities[known].double(), labels[known].double()
    if not len(label):
        return float("nan")
    place = (probability * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, label - probability)
    return float(gap.abs().sum() / len(label))
