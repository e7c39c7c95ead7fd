"""Scores become probabilities that are as often right as they say."""

from __future__ import annotations

import math

import pytest
import torch

from r2r import R2R, InputError
from r2r.calibration import Observations, calibrate, fit, observe
from r2r.data.dataset import EvaluationPair
from r2r.evaluation import EvaluationSet
from r2r.metrics import expected_calibration_error
from tests.conftest import TINY, fill_randomly

TASKS = ("denoise", "derain", "dehaze")


def drawn(number: int, gain: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, and labels as often 1 as the logistic curve says."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(number, generator=generator)
    return scores, (torch.rand(number, generator=generator) < (gain * scores + offset).sigmoid()).float()


def test_the_curve_that_made_the_labels_is_found() -> None:
    columns = [drawn(20_000, 2.0, -1.0), drawn(20_000, 5.0, 2.0)]
    scores, labels = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    gain, offset = fit(Observations(scores, labels, torch.ones(len(scores))))
    torch.testing.assert_close(gain, torch.tensor([2.0, 5.0]), rtol=0.08, atol=0)
    torch.testing.assert_close(offset, torch.tensor([-1.0, 2.0]), rtol=0.08, atol=0)


def test_classes_that_a_score_separates_give_a_finite_curve_between_them() -> None:
    scores = torch.tensor([-3.0, -2.0, -1.0, 2.0, 3.0])[:, None]
    gain, offset = fit(Observations(scores, (scores > 0).float(), torch.ones(5)))
    assert 0 < gain < 100
    assert -1 < -offset / gain < 2


def test_what_nobody_is_sure_of_does_not_count() -> None:
    scores, labels = drawn(2_000, 2.0, 0.0)
    wanted = fit(Observations(scores[:, None], labels[:, None], torch.ones(2_000)))
    unsure = torch.cat((labels, torch.full((500,), 0.5)))[:, None]
    more = torch.cat((scores, torch.full((500,), 9.0)))[:, None]
    torch.testing.assert_close(fit(Observations(more, unsure, torch.ones(2_500))), wanted)


def test_rarer_sets_ask_for_more_certainty() -> None:
    """A share of 1/5 takes the logarithm of 5 from the odds of what the set holds."""
    scores, labels = drawn(20_000, 2.0, 0.0)
    gain, offset = fit(Observations(scores[:, None], labels[:, None], torch.where(labels == 1, 0.2, 1.0)))
    torch.testing.assert_close(gain, torch.tensor([2.0]), rtol=0.08, atol=0)
    torch.testing.assert_close(offset, torch.tensor([-math.log(5)]), rtol=0.05, atol=0)


def test_a_task_that_all_images_have_cannot_be_fitted() -> None:
    with pytest.raises(InputError, match="5 images with it and 0 without"):
        fit(Observations(torch.randn(5, 1), torch.ones(5, 1), torch.ones(5)))


def test_a_model_is_calibrated_on_sets() -> None:
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, mixtures=True, **TINY)
    fill_randomly(model)
    images = torch.rand(6, 3, 32, 32)

    def pairs(start: int) -> list[EvaluationPair]:
        return [EvaluationPair(str(i), images[i], images[i], torch.zeros(3)) for i in range(start, start + 2)]

    sets = [
        EvaluationSet("noise", (0,), pairs(0), (2,)),
        EvaluationSet("both", (1, 2), pairs(2)),
        EvaluationSet("clean", (), pairs(4), share=0.2),
    ]
    seen = observe(model, sets)
    assert seen.labels.tolist()[::2] == [[1, 0, 0.5], [0, 1, 1], [0, 0, 0]]
    assert seen.weights.tolist() == pytest.approx([0.5] * 4 + [0.1] * 2)
    calibrate(model, sets)
    gain, offset = fit(seen)
    torch.testing.assert_close(model.restore(images).scores, seen.scores * gain + offset)
    with pytest.raises(InputError, match="for models of mixtures"):
        observe(R2R(tasks=TASKS, **TINY), sets)


def test_expected_calibration_error_is_the_gap_between_said_and_seen() -> None:
    said = torch.tensor([0.05, 0.05, 0.95, 0.95, 0.95, 0.95, 0.5])
    seen = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.5])  # the last does not count
    assert expected_calibration_error(said, seen) == pytest.approx((2 * 0.05 + 4 * 0.2) / 6)
    assert expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0
    assert math.isnan(expected_calibration_error(torch.tensor([0.3]), torch.tensor([0.5])))
