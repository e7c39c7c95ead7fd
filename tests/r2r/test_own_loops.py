"""What a training loop of one's own may do with the model: the README's example, the script in examples/, and more."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from skimage import data
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from r2r import R2R, fast
from r2r.data.images import write_rgb
from r2r.losses import LossWeights, classification, restoration_loss
from r2r.model import TrainingOutput
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
LABELS = torch.tensor([0, 1, 1, 0])

kinds = pytest.mark.parametrize("kind", [R2R, fast.R2R], ids=["eager", "fast"])


def new_model(kind: type[R2R], tasks: tuple[str, ...] = ("a", "b"), **changes: object) -> R2R:
    torch.manual_seed(0)
    model = kind(tasks=tasks, **{**TINY, **changes}).train()
    torch.nn.init.normal_(model.ending.weight)
    return model


def images(seed: int = 1) -> Tensor:
    """lq, hq, reference lq, reference hq."""
    return torch.rand(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def finite_gradients(model: R2R) -> bool:
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_readme_trains_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Train\n")[2].partition("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    model = R2R.from_pretrained(tmp_path / "my-model")
    assert model.amalgamator is None
    assert model.restore(torch.rand(1, 3, 40, 50)).image.isfinite().all()


def test_the_example_script_trains(tmp_path: Path) -> None:
    write_rgb(tmp_path / "photos" / "coffee.png", data.coffee()[:160, :160].astype("float32") / 255)
    command = [sys.executable, str(ROOT / "examples" / "train.py"), str(tmp_path / "photos"), str(tmp_path / "model")]
    done = subprocess.run([*command, "--steps", "4", "--workers", "0"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "pretraining step 0: pixel" in done.stdout
    assert "finetuning step 0: pixel" in done.stdout
    assert R2R.from_pretrained(tmp_path / "model").bank.counts.tolist() == [17, 17]


@kinds
def test_averaged_weights_with_buffers_have_the_bank(kind: type[R2R]) -> None:
    model = new_model(kind)
    averaged = AveragedModel(model, use_buffers=True)
    lq, _, ref_lq, ref_hq = images()
    model(lq, LABELS, reference=(ref_lq, ref_hq, LABELS))
    averaged.update_parameters(model)
    assert isinstance(averaged.module, R2R)
    assert not averaged.module.bank.empty
    assert averaged.module.eval().restore(lq).image.isfinite().all()


@kinds
def test_a_task_may_come_later_than_the_first_batch(kind: type[R2R]) -> None:
    model = new_model(kind, tasks=("a", "b", "c"))
    lq, hq, ref_lq, ref_hq = images()
    told, reference = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 0])
    output = model(lq, told, reference=(ref_lq, ref_hq, reference))
    losses = restoration_loss(output, hq, told, reference, LossWeights())
    losses["total"].backward()
    assert losses["total"].isfinite()
    assert finite_gradients(model)
    assert model.bank.counts.tolist() == [9, 9, 0]
    known = [0, 1, 3]
    expected = 0.1 * classification(output.scores[known], told[known], 0.1)
    torch.testing.assert_close(losses["match"], expected)
    model(lq, told, reference=(ref_lq, ref_hq, told))
    assert model.bank.counts.tolist() == [9, 9, 9]


@kinds
def test_a_mixture_may_name_a_task_that_comes_later(kind: type[R2R]) -> None:
    model = new_model(kind, mixtures=True)
    lq, hq, ref_lq, ref_hq = images()
    told = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    reference = torch.tensor([[1.0, 0.0]]).expand(4, -1)
    output = model(lq, told, reference=(ref_lq, ref_hq, reference))
    losses = restoration_loss(output, hq, told, reference, LossWeights())
    losses["total"].backward()
    assert losses["total"].isfinite()
    assert finite_gradients(model)


@kinds
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_are_any_integers(kind: type[R2R], dtype: torch.dtype) -> None:
    lq, hq, ref_lq, ref_hq = images()
    totals = []
    for labels in (LABELS, LABELS.to(dtype)):
        output = new_model(kind)(lq, labels, reference=(ref_lq, ref_hq, labels))
        totals.append(restoration_loss(output, hq, labels, labels, LossWeights())["total"])
    assert torch.equal(*totals)
    with pytest.raises(ValueError, match=r"labels must be integers, got torch\.float32"):
        new_model(kind)(lq, LABELS.float(), reference=(ref_lq, ref_hq, LABELS))


@kinds
@pytest.mark.parametrize("mixtures", [False, True])
def test_all_weights_may_be_bfloat16(kind: type[R2R], mixtures: bool) -> None:
    model = new_model(kind, mixtures=mixtures)
    wide = copy.deepcopy(model)
    labels = torch.nn.functional.one_hot(LABELS, 2) if mixtures else LABELS
    totals = []
    for one, dtype in ((wide, torch.float32), (model.to(torch.bfloat16), torch.bfloat16)):
        lq, hq, ref_lq, ref_hq = images().to(dtype)
        for stage in (0, 1):
            torch.manual_seed(stage)
            output = one(lq, labels, reference=(ref_lq, ref_hq, labels), stage=stage)
            total = restoration_loss(output, hq, labels, labels, LossWeights())["total"]
            total.backward()
        totals.append(float(total.detach()))
        assert finite_gradients(one)
    assert totals[1] == pytest.approx(totals[0], rel=0.03)
    assert {x.dtype for x in model.state_dict().values() if x.is_floating_point()} == {torch.bfloat16}
    assert model.freeze_bank().eval().restore(lq).image.dtype == torch.bfloat16


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_whole_model_changes_nothing(kind: type[R2R], reentrant: bool) -> None:
    plain, checkpointed = new_model(kind), new_model(kind)
    for step, stage in enumerate((0, 1, 1)):
        lq, hq, ref_lq, ref_hq = images(step)
        for model in (plain, checkpointed):
            torch.manual_seed(step)
            # Reentrant checkpointing asks for an input that needs a gradient, and forgets the names of a tuple.
            given = (lq.clone().requires_grad_(reentrant), LABELS, (ref_lq, ref_hq, LABELS), stage)
            output = model(*given) if model is plain else checkpoint(model, *given, use_reentrant=reentrant)
            output = TrainingOutput(*output)
            model.zero_grad()
            restoration_loss(output, hq, LABELS, LABELS, LossWeights())["total"].backward()
        for (name, wanted), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
            assert (wanted.grad is None) == (got.grad is None), name
            if wanted.grad is not None and got.grad is not None:
                torch.testing.assert_close(got.grad, wanted.grad, msg=name)
        buffers = zip(plain.named_buffers(), checkpointed.named_buffers(), strict=True)
        for (name, held), (_, again) in buffers:
            torch.testing.assert_close(again, held, msg=name)
