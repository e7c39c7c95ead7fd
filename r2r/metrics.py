"""PSNR and SSIM as the field reports them for all-in-one restoration (PromptIR, NeurIPS 2023; R2R), on RGB and on luma,
and measures of perception by packages that keep them.

On images in [0, 1], clipped and not quantised, cropped with `centre_crop` before they are restored; the number of a set
is the mean over its images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from r2r.errors import InputError
from r2r.extras import import_after_torchvision, needed

# Counted for equal images in means, whose PSNR is infinite.
MAX_PSNR = 100.0
SSIM_WINDOW = 7

Measure = Callable[[Tensor, Tensor], float]
"""Of a restored and a clean image, each [3, H, W] in [0, 1]."""


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


def luma(image: Tensor) -> Tensor:
    """RGB [..., 3, H, W] in [0, 1] -> Y of YCbCr [..., 1, H, W], 16 to 235 of 255 (ITU-R BT.601, as MATLAB's
    `rgb2ycbcr`)."""
    weights = image.new_tensor([65.481, 128.553, 24.966])[:, None, None] / 255
    return (image * weights).sum(-3, keepdim=True) + 16 / 255


def psnr_y(image: Tensor, target: Tensor) -> Tensor:
    """`psnr` of the luma, as work on rain and on super-resolution reports it."""
    return psnr(luma(image.clamp(0, 1)), luma(target))


def ssim_y(image: Tensor, target: Tensor) -> float:
    """Structural similarity of the luma with the window of Wang et al. (2004): Gaussian, 11 x 11, sigma 1.5.

    One image [3, H, W] in [0, 1], which is clipped first; NaN where a side is below 11.
    """
    if min(image.shape[1:]) < 11:
        return math.nan
    grey = (luma(x)[0].detach().double().cpu().numpy() for x in (image.clamp(0, 1), target))
    return float(
        structural_similarity(*grey, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    )


OPTIONAL = ("lpips", "niqe")
"""Measures that need more packages, and weights that nothing here downloads. Lower is better."""


class Measures:
    """PSNR and SSIM on RGB and on luma, and of `OPTIONAL` the named ones: `measures(restored, clean)` -> {name: value}.

    Equal images count `MAX_PSNR` dB. A measure that needs a larger image is NaN. Raises InputError, in one line that
    says what to install and which file to fetch, where a measure cannot be taken.
    """

    def __init__(self, optional: Sequence[str] = ()) -> None:
        unknown = [name for name in optional if name not in OPTIONAL]
        if unknown:
            raise InputError(f"unknown metric {unknown[0]!r}; accepted: {', '.join(OPTIONAL)}")
        self.optional: dict[str, Measure] = {name: {"lpips": _lpips, "niqe": _niqe}[name]() for name in optional}

    def __call__(self, image: Tensor, target: Tensor) -> dict[str, float]:
        clipped = image.clamp(0, 1)
        return {
            "psnr": min(float(psnr(image, target)), MAX_PSNR),
            "ssim": ssim(image, target),
            "psnr_y": min(float(psnr_y(image, target)), MAX_PSNR),
            "ssim_y": ssim_y(image, target),
            **{name: measure(clipped, target) for name, measure in self.optional.items()},
        }


def mean_measures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each measure; NaN, where an image was too small for one, does not count."""
    found = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in rows[0]}
    return {name: sum(values) / len(values) if values else math.nan for name, values in found.items()}


def measure_cells(measures: dict[str, float]) -> list[str]:
    """For a table: decibels with two digits, the rest with four."""
    return ["-" if math.isnan(x) else f"{x:.{2 if 'psnr' in name else 4}f}" for name, x in measures.items()]


def _lpips() -> Measure:
    """LPIPS with AlexNet (Zhang et al., CVPR 2018) by torchmetrics."""
    try:
        torchvision = import_after_torchvision("torchvision.models")
        lpips = import_after_torchvision("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
    except ImportError as error:
        raise needed(str(error.name), "lpips", "'r2r-restore[metrics]'") from error
    _fetched("lpips", torchvision.AlexNet_Weights.DEFAULT.url, "checkpoints")
    network = lpips(net_type="alex", normalize=True)

    def measure(image: Tensor, target: Tensor) -> float:
        if min(image.shape[1:]) < 32:
            return math.nan
        with torch.inference_mode():
            return float(network(image[None].float(), target[None].float()))

    return measure


def _niqe() -> Measure:
    """NIQE (Mittal et al., 2013) by pyiqa; it needs no clean image."""
    try:
        pyiqa = import_after_torchvision("pyiqa")
    except ImportError as error:
        raise needed(str(error.name), "niqe", "pyiqa") from error
    address = import_after_torchvision("pyiqa.archs.arch_util").get_url_from_name("niqe_modelparameters.mat")
    path = _fetched("niqe", address, "pyiqa")
    network = pyiqa.create_metric("niqe", device="cpu", pretrained_model_path=str(path))

    def measure(image: Tensor, target: Tensor) -> float:
        if min(image.shape[1:]) < 2 * 96:  # blocks of 96 x 96, whose covariance is taken
            return math.nan
        return float(network(image[None].float()))

    return measure


def _fetched(metric: str, address: str, folder: str) -> Path:
    """Where the packages look for a file of weights. Raises InputError where it is not there yet."""
    path = Path(torch.hub.get_dir(), folder, address.rpartition("/")[2])
    if not path.is_file():
        raise InputError(f"{metric} needs a file that is not downloaded by itself: fetch {address} to {path}")
    return path


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
