"""Figures show what the model does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from r2r import R2R, InputError
from r2r.data.dataset import EvaluationPair
from r2r.evaluation import EvaluationSet, evaluate
from r2r.figures import _before, _keys, _queries, plot_bank, plot_confusion


@pytest.fixture
def sets() -> list[EvaluationSet]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for task, name in enumerate(("noise", "rain", "haze")):
        photos = torch.rand(4, 3, 48, 64, generator=generator)
        share, label = 0.3 + 0.3 * task, torch.tensor(task)
        pairs = [EvaluationPair(f"{i}", photo * share, photo, label) for i, photo in enumerate(photos)]
        made.append(EvaluationSet(name, (task,), pairs))
    return made


def test_the_bank_is_drawn_before_and_after_training(
    tiny_model: R2R, sets: list[EvaluationSet], tmp_path: Path
) -> None:
    plot_bank(tiny_model, sets, tmp_path / "bank.png")
    with Image.open(tmp_path / "bank.png") as image:
        assert image.size[0] > 1.9 * image.size[1]
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    with pytest.raises(InputError, match="ten photos"):
        plot_bank(tiny_model, sets[:2], tmp_path / "bank.png")
    with pytest.raises(InputError, match=r"bank\.doc: a picture as \.doc; accepted: .*png"):
        plot_bank(tiny_model, sets, tmp_path / "bank.doc")
    assert {path.name for path in tmp_path.iterdir()} == {"bank.png"}


def test_the_points_are_those_that_retrieval_compares(tiny_model: R2R, sets: list[EvaluationSet]) -> None:
    keys, tasks = _keys(tiny_model)
    queries, labels = _queries(tiny_model, sets)
    assert (len(tasks), len(labels)) == (3 * 9, 12)
    likeness = cosine_similarity(queries[:, None], keys[None], dim=2)
    scores = torch.stack([likeness[:, np.array(tasks) == task].mean(1) for task in range(3)], dim=1)
    scale = tiny_model.retrieval.log_scale.exp()
    for number, query in enumerate(scores):
        pair = sets[number // 4].pairs[number % 4]
        assert torch.allclose(query * scale, tiny_model.restore(pair.lq[None]).scores[0], atol=1e-4)


def test_before_training_keys_are_of_other_photos_than_queries(tiny_model: R2R, sets: list[EvaluationSet]) -> None:
    (keys, tasks), (queries, labels) = _before(tiny_model, sets, seed=0)
    assert [tasks.count(task) for task in range(3)] == [9, 9, 9]
    assert labels == [0, 0, 1, 1, 2, 2]
    assert torch.equal(_before(tiny_model, sets, seed=0)[1][0], queries)
    assert not torch.equal(keys, _keys(tiny_model)[0])


def test_confusion_is_drawn(tiny_model: R2R, sets: list[EvaluationSet], tmp_path: Path) -> None:
    result = evaluate(tiny_model, sets, told=False)
    plot_confusion(result, tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").size[0] > 300
    nothing = evaluate(for_mixtures(tiny_model), [EvaluationSet("clean", (), sets[0].pairs)])
    with pytest.raises(InputError, match="no set has a task"):
        plot_confusion(nothing, tmp_path / "confusion.png")


def for_mixtures(model: R2R) -> R2R:
    mixed = R2R(**{**model.config, "mixtures": True})
    mixed.load_state_dict(model.state_dict())
    return mixed
