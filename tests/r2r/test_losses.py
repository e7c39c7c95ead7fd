"""The loss: each term, its weight, and labels of both kinds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from r2r.losses import LossWeights, classification, fft_l1, log_error, restoration_loss
from r2r.model import TrainingOutput


def test_classification_is_smoothed_cross_entropy() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(classification(logits, labels, 0.1), wanted)
    masks = torch.randint(2, (6, 4)).float()
    torch.testing.assert_close(classification(logits, masks, 0.1), F.binary_cross_entropy_with_logits(logits, masks))


def test_labels_that_nobody_is_sure_of_do_not_count() -> None:
    logits, masks = torch.randn(6, 4), torch.randint(2, (6, 4)).float()
    unsure = torch.rand(6, 4) < 0.3
    losses = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    got = classification(logits, torch.where(unsure, 0.5, masks), 0.1)
    torch.testing.assert_close(got, losses[~unsure].mean())


def test_the_log_of_the_error_weighs_images_alike() -> None:
    clean = torch.rand(2, 3, 16, 16)
    errors = torch.tensor([0.1, 0.01])
    restored = clean + errors[:, None, None, None]
    assert float(log_error(restored, clean)) == pytest.approx(-3, abs=0.03)  # -2 and -4
    assert float(log_error(clean, clean)) == pytest.approx(-5)
    terms = restoration_loss(
        TrainingOutput(restored.clamp(0, 1), torch.zeros(2, 1), None),
        clean,
        torch.ones(2, 1),
        None,
        LossWeights(pixel=0, fft=0, match=0, log_error=2),
    )
    torch.testing.assert_close(terms["total"], 2 * log_error(restored.clamp(0, 1), clean))


def test_empty_tasks_take_no_part_and_leave_gradients_finite() -> None:
    scores = torch.randn(3, 4)
    labels = torch.tensor([0, 1, 0])
    without = classification(scores[:, :3], labels, 0.1)
    scores = torch.cat((scores[:, :3], torch.full((3, 1), -torch.inf)), dim=1).requires_grad_()
    with_empty = classification(scores, labels, 0.1)
    torch.testing.assert_close(with_empty, without)
    with_empty.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 64])
@pytest.mark.parametrize("height", [1, 2, 5, 8])
def test_fft_term_is_the_mean_over_real_and_imaginary_parts(height: int, width: int) -> None:
    a, b = torch.rand(2, 2, 3, height, width)
    a.requires_grad_()
    wanted = torch.view_as_real(torch.fft.fft2(a) - torch.fft.fft2(b)).abs().mean()
    torch.testing.assert_close(fft_l1(a, b), wanted)
    # Parts that are 0 but for rounding have gradients of either sign, of one in many at most.
    gradients = [torch.autograd.grad(value, a)[0] for value in (fft_l1(a, b), wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_terms_can_be_off_and_the_output_is_clamped() -> None:
    clean = torch.rand(2, 3, 8, 8)
    output = TrainingOutput(clean + 2, torch.randn(2, 3), torch.randn(2, 3))
    labels = torch.tensor([0, 1])
    terms = restoration_loss(output, clean, labels, labels, LossWeights())
    assert set(terms) == {"pixel", "fft", "degradation", "match", "total"}
    torch.testing.assert_close(terms["pixel"], (1 - clean).mean())
    total = sum(value for name, value in terms.items() if name != "total")
    torch.testing.assert_close(terms["total"], torch.as_tensor(total))
    terms = restoration_loss(output, clean, labels, None, LossWeights(fft=0, match=0))
    assert set(terms) == {"pixel", "total"}
    with pytest.raises(ValueError, match="match must not be negative"):
        LossWeights(match=-1)
    with pytest.raises(ValueError, match="label_smoothing"):
        LossWeights(label_smoothing=1)
