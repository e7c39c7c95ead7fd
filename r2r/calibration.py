"""Scores that a person can read: how a task's matching score turns into a probability (Platt scaling, 1999)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r.device import device_of
from r2r.errors import InputError
from r2r.evaluation import EvaluationSet
from r2r.model import R2R
from r2r.overview import small_copy


@dataclass(frozen=True)
class Observations:
    """Scores [N, T] before calibration, labels [N, T] (1, 0, or 0.5 where nobody is sure), and the weight of each image
    [N], which sum up to the share of each set."""

    scores: Tensor
    labels: Tensor
    weights: Tensor


@torch.inference_mode()
def observe(
    model: R2R, sets: Sequence[EvaluationSet], progress: Callable[[EvaluationSet], object] | None = None
) -> Observations:
    """Match every image of the sets, whole, on the model's device."""
    if not model.mixtures:
        raise InputError("this model names one task, the likeliest; calibration is for models of mixtures")
    model.eval()
    scores, labels, weights = [], [], []
    for one in sets:
        label = torch.zeros(len(model.tasks))
        label[list(one.labels)], label[list(one.optional)] = 1, 0.5
        for index in range(len(one.pairs)):
            scores.append(_scores(model, one.pairs[index].lq[None].to(device_of(model)), label[None] == 1).cpu())
            labels.append(label)
            weights.append(one.share / len(one.pairs))
            if progress is not None:
                progress(one)
    return Observations(torch.cat(scores), torch.stack(labels), torch.tensor(weights))


def _scores(model: R2R, lq: Tensor, told: Tensor) -> Tensor:
    """[1, T]: as they are when the model restores. Of smooth tasks they are from the small copy, of those of light from
    the photo without what lies over it smoothly, of the others from what the model sees of that."""

    def votes(image: Tensor) -> Tensor:
        return model.vote(model.query(model.encode(image).deep)[0])

    if not model.takes_overview:
        return votes(lq)
    bank, cleared = model.bank, model.clear(lq, told.to(lq.device))
    scores = torch.where(bank.light, votes(cleared.image), votes(cleared.exposed))
    return torch.where(bank.smooth, votes(small_copy(lq)), scores)


def fit(seen: Observations) -> tuple[Tensor, Tensor]:
    """gain and offset, float32 [T], that turn scores into the logarithm of the odds, one logistic regression for each
    task. As Platt did, labels are drawn in a little, so that classes which a score separates do not make it infinite.

    Raises InputError where a task has no image, or all of them.
    """
    gain, offset = [], []
    for task in range(seen.scores.shape[1]):
        known = (seen.labels[:, task] != 0.5) & seen.scores[:, task].isfinite()
        line = logistic(seen.scores[known, task], seen.labels[known, task], seen.weights[known], f"task {task}")
        gain.append(line[0])
        offset.append(line[1])
    return torch.tensor(gain), torch.tensor(offset)


def logistic(score: Tensor, label: Tensor, weight: Tensor, name: str) -> tuple[float, float]:
    """gain and offset of one task, from scores [N], labels (1 or 0) and weights; see `fit`."""
    score, label, weight = score.double(), label.double(), weight.double()
    positive, negative = int(label.sum()), int((1 - label).sum())
    if not positive or not negative:
        raise InputError(f"{name}: {positive} images with it and {negative} without; accepted: some of each")
    target = torch.where(label == 1, (positive + 1) / (positive + 2), 1 / (negative + 2)).double()
    spread, middle = float(score.std().clamp(min=1e-6)), float(score.mean())
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([line], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        odds = line[0] * (score - middle) / spread + line[1]
        value = F.binary_cross_entropy_with_logits(odds, target, weight)
        value.backward()
        return value

    optimiser.step(loss)
    slope, intercept = line.detach().tolist()
    return slope / spread, intercept - slope * middle / spread


def calibrate(
    model: R2R, sets: Sequence[EvaluationSet], progress: Callable[[EvaluationSet], object] | None = None
) -> None:
    """Fit the bank's `gain` and `offset` to held-out sets, of which some should hold nothing wrong."""
    gain, offset = fit(observe(model, sets, progress))
    model.bank.gain.copy_(gain)
    model.bank.offset.copy_(offset)
