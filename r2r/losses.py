"""The training loss (R2R, section 3.5): paired-domain and classification terms, each with a weight that may be 0."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r.model import TrainingOutput


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of `restoration_loss`; 0 turns a term off. `label_smoothing` in [0, 1)."""

    pixel: float = 1.0
    fft: float = 0.125
    log_error: float = 0.0
    degradation: float = 0.1
    match: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise ValueError(f"the loss weight {name} must not be negative, got {value}")
        if self.label_smoothing >= 1:
            raise ValueError(f"label_smoothing must be below 1, got {self.label_smoothing}")


def fft_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean absolute difference of the real and imaginary parts of the unnormalised 2D FFT of [N, C, H, W]."""
    difference = restored.float() - clean.float()
    width = difference.shape[3]
    spectrum = torch.view_as_real(torch.fft.rfft2(difference)).abs()
    # Of a real signal, the columns that rfft2 leaves out mirror those it gives, but the first and the middle one.
    alone = spectrum[:, :, :, :: width // 2] if width % 2 == 0 else spectrum[:, :, :, :1]
    return (2 * spectrum.sum() - alone.sum()) / (2 * difference.numel())


def log_error(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean over images [N, C, H, W] in [0, 1] of log10 of the mean squared error: a tenth of the PSNR, negated.

    Images with large errors do not outweigh the others (the PSNR loss of NAFNet, ECCV 2022). It levels off at 30 dB:
    without that, a photo with nothing wrong outweighs fifty dark ones, and nothing but noise is learnt.
    """
    error = (restored.float() - clean.float()).square().mean((1, 2, 3))
    return (error + 1e-3).log10().mean()


def classification(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of [N, T] with label smoothing; binary cross entropy where labels are float [N, T]: 1 and 0, and
    0.5 where nobody is sure, which does not count.

    Tasks the bank holds nothing for (score -inf) take no part, nor do images of theirs alone.
    """
    logits = logits.float()
    known = logits > -torch.inf
    finite = torch.where(known, logits, 0)
    if labels.dim() == 2:
        target = labels.to(finite)
        known = known & (target != 0.5)
        losses = F.binary_cross_entropy_with_logits(finite, target, reduction="none")
        return torch.where(known, losses, 0).sum() / known.sum().clamp(min=1)
    log_probability = F.log_softmax(logits, dim=1)
    index = labels.long()[:, None]
    log_probability = torch.where(known, log_probability, 0)
    told, counted = (x.gather(1, index).squeeze(1) for x in (log_probability, known))
    losses = (1 - smoothing) * told + smoothing * log_probability.sum(1) / known.sum(1)
    return -torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)


def restoration_loss(
    output: TrainingOutput, clean: Tensor, labels: Tensor, reference_labels: Tensor | None, weights: LossWeights
) -> dict[str, Tensor]:
    """The weighted terms that are on, by name, and their sum as "total".

    clean [N, 3, H, W] in [0, 1]; labels of the restored images and of the reference pairs as the model takes them. The
    output is clamped to [0, 1] first.
    """
    restored = output.restored.clamp(0, 1)
    terms = {}
    if weights.pixel:
        terms["pixel"] = weights.pixel * F.l1_loss(restored.float(), clean.float())
    if weights.fft:
        terms["fft"] = weights.fft * fft_l1(restored, clean)
    if weights.log_error:
        terms["log_error"] = weights.log_error * log_error(restored, clean)
    if weights.degradation and output.logits is not None and reference_labels is not None:
        terms["degradation"] = weights.degradation * classification(
            output.logits, reference_labels, weights.label_smoothing
        )
    if weights.match:
        terms["match"] = weights.match * classification(output.scores, labels, weights.label_smoothing)
    terms["total"] = sum(terms.values(), torch.zeros((), device=clean.device))
    return terms
