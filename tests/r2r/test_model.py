"""The model: shapes of any kind, told and blind, training passes, saving and loading, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from r2r import PRESETS, R2R, InputError, fast
from r2r_kernels.reference import task_mask
from tests.conftest import TINY, fill_randomly

TASKS = ("denoise", "derain", "dehaze")


def train_pass(model: R2R, stage: int = 0, labels: tuple[int, ...] = (0, 1, 2)) -> None:
    lq, hq = torch.rand(2, 3, 3, 32, 32)
    told, own = torch.tensor(labels), torch.tensor([0, 1, 2])
    if model.mixtures:
        told, own = (torch.eye(3)[indices] for indices in (told, own))
    out = model(lq, own, reference=(lq, hq, told), stage=stage)
    out.restored.sum().backward()


def test_paper_sizes() -> None:
    model = R2R(tasks=("a", "b", "c", "d", "e"), **PRESETS["base"])
    inference = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("amalgamator."))
    assert inference == pytest.approx(19.77e6, rel=1e-3)
    assert model.bank.keys.shape == (5, 53, 64, 8, 8)
    assert model.bank.values.shape == (5, 53, 512, 8, 8)


@pytest.mark.parametrize("size", [(1, 1), (17, 3), (16, 16), (33, 70)])
def test_any_size_comes_back(tiny_model: R2R, size: tuple[int, int]) -> None:
    lq = torch.rand(2, 3, *size)
    assert tiny_model(lq).shape == lq.shape
    assert tiny_model(lq[:0]).shape == (0, 3, *size)


@pytest.mark.parametrize("padding", ["mirror", "zeros"])
@pytest.mark.parametrize("size", [(20, 23), (16, 5), (1, 3)])
def test_padding_is_cropped_from_the_right_and_below(tiny_model: R2R, padding: str, size: tuple[int, int]) -> None:
    tiny_model.padding = padding  # type: ignore[assignment]
    lq = torch.rand(1, 3, *size)
    least = 32 if padding == "mirror" else 16  # a slot is 2 x 2 cells of 16 pixels
    border = [(0, 0), (0, 0), *((0, max(-length % 16, least - length)) for length in size)]
    padded = torch.from_numpy(np.pad(lq.numpy(), border, "reflect" if padding == "mirror" else "constant"))
    torch.testing.assert_close(tiny_model(lq), tiny_model(padded)[:, :, : size[0], : size[1]])


def test_memory_formats_agree(tiny_model: R2R) -> None:
    lq = torch.rand(2, 3, 40, 24)
    wanted = tiny_model(lq)
    torch.testing.assert_close(tiny_model(lq.to(memory_format=torch.channels_last)), wanted)
    torch.testing.assert_close(tiny_model(lq.transpose(2, 3).contiguous().transpose(2, 3)), wanted)
    tiny_model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(tiny_model(lq.to(memory_format=torch.channels_last)), wanted)


def test_telling_the_task_by_name_index_and_tensor(tiny_model: R2R) -> None:
    lq = torch.rand(3, 3, 32, 32)
    by_name = tiny_model.restore(lq, ["dehaze", "denoise", "derain"])
    assert by_name.task.tolist() == [2, 0, 1]
    torch.testing.assert_close(tiny_model.restore(lq, [2, 0, 1]).image, by_name.image)
    torch.testing.assert_close(tiny_model.restore(lq, torch.tensor([2, 0, 1])).image, by_name.image)
    assert tiny_model.restore(lq, "derain").task.tolist() == [1, 1, 1]
    blind = tiny_model.restore(lq)
    assert torch.equal(blind.task, blind.scores.argmax(1))
    torch.testing.assert_close(tiny_model.restore(lq, blind.task).image, blind.image)
    assert not torch.allclose(by_name.image, tiny_model.restore(lq, [0, 1, 2]).image)


def test_the_three_parts_are_the_whole(tiny_model: R2R) -> None:
    lq = torch.rand(2, 3, 48, 33)
    features = tiny_model.encode(lq)
    key, value = tiny_model.query(features.deep)
    match = tiny_model.match(key)
    torch.testing.assert_close(tiny_model.decode(lq, features, value, match.readout), tiny_model(lq))


def test_fast_model_has_the_same_answers(tiny_model: R2R) -> None:
    quick = fast.R2R(tasks=TASKS, **TINY).eval()
    quick.load_state_dict(tiny_model.state_dict())
    lq = torch.rand(2, 3, 40, 24)
    torch.testing.assert_close(quick(lq), tiny_model(lq))


def test_mixtures_let_several_tasks_take_part() -> None:
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, mixtures=True, **TINY)
    fill_randomly(model)
    lq, hq = torch.rand(2, 4, 3, 32, 32)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]]).float()
    out = model(lq, labels, reference=(lq, hq, labels))
    assert out.logits is not None
    assert out.logits.shape == out.scores.shape == (4, 3)
    model.eval()
    told = model.restore(lq, labels.bool())
    assert torch.equal(told.task, labels.bool())
    blind = model.restore(lq)
    assert blind.task.dtype == torch.bool
    assert torch.equal(blind.task, blind.scores > 0)
    one = model.restore(lq, "derain")
    assert one.task.tolist() == [[False, True, False]] * 4


def test_where_nothing_is_found_the_image_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, mixtures=True, **TINY)
    fill_randomly(model)
    model.eval()
    lq = torch.rand(4, 3, 32, 32)
    model.bank.offset -= 1000
    result = model.restore(lq)
    assert not result.task.any()
    assert torch.equal(result.image, lq)
    assert not torch.equal(model.restore(lq, "derain").image, lq)  # told is told
    found = torch.tensor([-1000.0, 1000.0, -1000.0])
    model.bank.offset.copy_(found)
    result = model.restore(lq)
    assert result.task.tolist() == [[False, True, False]] * 4
    torch.testing.assert_close(result.image, model.restore(lq, "derain").image)


def test_several_tasks_are_told_by_names_joined_with_plus() -> None:
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, mixtures=True, **TINY)
    train_pass(model)
    model.eval()
    lq = torch.rand(2, 3, 32, 32)
    assert model.restore(lq, "dehaze+denoise").task.tolist() == [[True, False, True]] * 2
    assert model.restore(lq, ["derain", "derain+dehaze"]).task.tolist() == [[False, True, False], [False, True, True]]
    with pytest.raises(InputError, match="unknown task 'fog'"):
        model.restore(lq, "derain+fog")


def test_images_without_a_label_are_restored_as_the_model_finds() -> None:
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, mixtures=True, **TINY)
    fill_randomly(model)
    train_pass(model)
    lq = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        out = model(lq, torch.zeros(4, 3, dtype=torch.bool))
        own = task_mask(out.scores, None, "multi")
        torch.testing.assert_close(out.restored, model(lq, own).restored)


@pytest.mark.parametrize("mixtures", [False, True])
def test_strength_mixes_the_restoration_in(tiny_model: R2R, mixtures: bool) -> None:
    lq = torch.rand(2, 3, 32, 32)
    whole = tiny_model.restore(lq, "derain").image
    torch.testing.assert_close(tiny_model.restore(lq, "derain", strength=0.25).image, 0.75 * lq + 0.25 * whole)
    assert torch.equal(tiny_model.restore(lq, strength=0.0).image, lq)
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"strength must be in 0\.\.1"):
            tiny_model.restore(lq, strength=strength)


def test_windows_that_hold_the_whole_image_change_nothing(tiny_model: R2R) -> None:
    lq = torch.rand(2, 3, 48, 64)
    wanted = tiny_model.restore(lq)
    tiny_model.window = 64
    torch.testing.assert_close(tiny_model.restore(lq), wanted)
    tiny_model.window = 32
    assert not torch.allclose(tiny_model.restore(lq).image, wanted.image)
    with pytest.raises(ValueError, match="multiple of 16"):
        tiny_model.window = 24


def test_windows_vote_for_the_task(tiny_model: R2R) -> None:
    tiny_model.window = 32
    size = tiny_model.bank.size
    query = torch.randn(1, tiny_model.bank.keys.shape[2], 4, 4)  # of 64 x 64 pixels: three windows along each side
    pooled = torch.nn.functional.interpolate(query, size=(2 * size, 2 * size), mode="nearest")
    scores = [
        tiny_model.retrieval(
            pooled[:, :, y : y + size, x : x + size].contiguous(),
            tiny_model.bank.keys,
            tiny_model.bank.values,
            tiny_model.bank.counts,
        )[1]
        for y in range(0, size + 1, size // 2)
        for x in range(0, size + 1, size // 2)
    ]
    torch.testing.assert_close(tiny_model.match(query).scores, torch.stack(scores).mean(0))


def test_probabilities_are_shares() -> None:
    scores = torch.tensor([[0.0, 2.0, -torch.inf]])
    hard, several = R2R(tasks=TASKS, **TINY), R2R(tasks=TASKS, mixtures=True, **TINY)
    torch.testing.assert_close(hard.probabilities(scores).sum(1), torch.ones(1))
    assert several.probabilities(scores)[0].tolist() == pytest.approx([0.5, 0.8808, 0.0], abs=1e-4)


def test_soft_matching_mixes_all_tasks_and_names_the_best(tiny_model: R2R) -> None:
    soft = R2R(tasks=TASKS, matching="soft", **TINY).eval()
    soft.load_state_dict(tiny_model.state_dict())
    lq = torch.rand(2, 3, 32, 32)
    result = soft.restore(lq)
    assert torch.equal(result.task, result.scores.argmax(1))
    assert not torch.allclose(result.image, tiny_model.restore(lq, result.task).image)
    torch.testing.assert_close(soft.restore(lq, "derain").image, tiny_model.restore(lq, "derain").image)


def test_stage_0_builds_the_bank_anew_and_stage_1_goes_on() -> None:
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, **TINY)
    assert model.amalgamator is not None
    train_pass(model)
    assert model.bank.counts.tolist() == [9, 9, 9]
    before = model.bank.keys.clone()
    lq, hq = torch.rand(2, 3, 3, 32, 32)
    labels = torch.tensor([0, 1, 2])
    fresh = R2R(tasks=TASKS, **TINY)
    fresh.load_state_dict(model.state_dict())
    for one, stage in ((model, 0), (fresh, 1)):
        one.amalgamator.shuffle = False  # type: ignore[union-attr]
        one(lq, labels, reference=(lq, hq, labels), stage=stage)
    assert not torch.equal(model.bank.keys, before)
    assert not torch.allclose(model.bank.keys, fresh.bank.keys)
    emptied = R2R(tasks=TASKS, **TINY)
    emptied.load_state_dict(fresh.state_dict() | {"bank.counts": torch.zeros(3, dtype=torch.int64)})
    emptied.amalgamator.shuffle = False  # type: ignore[union-attr]
    emptied(lq, labels, reference=(lq, hq, labels), stage=1)  # nothing to go on from: filled with samples alone
    torch.testing.assert_close(emptied.bank.keys, model.bank.keys)


def test_a_task_without_samples_keeps_its_slots_and_statistics() -> None:
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, **TINY)
    train_pass(model)
    assert model.amalgamator is not None
    norm = model.amalgamator.key_slots.norm
    keys, mean = model.bank.keys.clone(), norm.running_mean.clone()
    train_pass(model, labels=(0, 2, 2))
    assert torch.equal(model.bank.keys[1], keys[1])
    assert torch.equal(norm.running_mean[1], mean[1])
    assert not torch.equal(model.bank.keys[0], keys[0])
    assert not torch.equal(norm.running_mean[2], mean[2])


def test_every_parameter_learns_through_the_bank() -> None:
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, **TINY)
    fill_randomly(model)
    lq, hq = torch.rand(2, 3, 3, 32, 32)
    labels = torch.tensor([0, 1, 2])
    out = model(lq, labels, reference=(lq, hq, labels), stage=1)
    assert out.logits is not None
    loss = out.restored.square().sum() + out.scores.square().sum() + out.logits.square().sum()
    loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a bias before a BatchNorm moves nothing
    assert {name.rsplit(".", 1)[1] for name in dead} <= {"bias", "pointwise_bias"}
    assert all("_slots." in name for name in dead)


def test_full_residual_reads_three_channels() -> None:
    model = R2R(tasks=TASKS, residual="full", **TINY)
    assert model.amalgamator is not None
    assert model.amalgamator.intro.in_channels == 6
    train_pass(model)


def test_frozen_model_trains_on_its_bank_alone(tiny_model: R2R) -> None:
    tiny_model.freeze_bank().train()
    bank = tiny_model.bank.keys.clone()
    lq = torch.rand(2, 3, 32, 32)
    out = tiny_model(lq, torch.tensor([0, 2]))
    assert out.logits is None
    out.restored.sum().backward()
    assert torch.equal(tiny_model.bank.keys, bank)
    with pytest.raises(ValueError, match="no amalgamator"):
        tiny_model(lq, torch.tensor([0, 2]), reference=(lq, lq, torch.tensor([0, 2])))


def test_saving_and_loading_keep_everything(tiny_model: R2R, tmp_path: Path) -> None:
    lq = torch.rand(1, 3, 32, 32)
    tiny_model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"model.safetensors", "config.json"}
    again = R2R.from_pretrained(tmp_path / "model")
    assert torch.equal(again(lq), tiny_model(lq))
    assert again.amalgamator is not None
    assert isinstance(fast.R2R.from_pretrained(tmp_path / "model"), fast.R2R)

    bank = tiny_model.bank
    tiny_model.freeze_bank()
    bank.add_task("desnow", torch.rand(12, *bank.keys.shape[2:]), torch.rand(12, *bank.values.shape[2:]))
    bank.remove_task("derain")
    tiny_model.save_pretrained(tmp_path / "model")
    again = R2R.from_pretrained(tmp_path / "model")
    assert again.tasks == ("denoise", "dehaze", "desnow")
    assert again.bank.counts.tolist() == [9, 9, 12]
    assert again.amalgamator is None
    assert torch.equal(again(lq), tiny_model(lq))
    assert again.restore(lq, "desnow").task.tolist() == [2]


def test_half_precision_stays_close(tiny_model: R2R) -> None:
    lq = torch.rand(1, 3, 32, 32)
    wanted = tiny_model(lq)
    half = tiny_model.to(torch.bfloat16)(lq.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).abs().max() < 0.1


@pytest.mark.parametrize(
    ("lq", "message"),
    [
        (torch.rand(3, 32, 32), r"\[N, 3, H, W\]"),
        (torch.rand(1, 4, 32, 32), r"got \[1, 4, 32, 32\]"),
        (torch.rand(1, 3, 0, 32), "H, W >= 1"),
        (torch.full((1, 3, 8, 8), 1.5), r"\[0, 1\], got 1.5 to 1.5"),
        (torch.full((1, 3, 8, 8), torch.nan), "NaN or infinity"),
    ],
)
def test_bad_images_are_named(tiny_model: R2R, lq: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model.restore(lq)


def test_other_bad_input_is_named(tiny_model: R2R) -> None:
    lq = torch.rand(2, 3, 16, 16)
    with pytest.raises(TypeError, match="float tensor"):
        tiny_model((lq * 255).byte())
    with pytest.raises(InputError, match="unknown task 'snow'; the model knows denoise, derain, dehaze"):
        tiny_model.restore(lq, "snow")
    with pytest.raises(InputError, match="unknown task 3"):
        tiny_model.restore(lq, 3)
    with pytest.raises(InputError, match="or 2 of them, got 3"):
        tiny_model.restore(lq, [0, 1, 2])
    for wrong_task in (torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"a task tensor must be int64 \[2\]"):
            tiny_model.restore(lq, wrong_task)
    with pytest.raises(ValueError, match="told tasks must be 0 to 2"):
        tiny_model.restore(lq, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"labels must be \[2\]"):
        tiny_model(lq, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"labels must be 0 to 2, got \[1, 3\]"):
        tiny_model(lq, torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"labels must be 0 to 2, got \[-1, 0\]"):
        tiny_model(lq, torch.tensor([-1, 0]))
    with pytest.raises(TypeError, match=r"lq must be torch\.float32 as the model is, got torch\.float64"):
        tiny_model.restore(lq.double())
    with pytest.raises(InputError, match=r"lq must hold values in \[0, 1\], got \S+ to 1\.0001"):
        tiny_model.restore(lq.clamp(max=0.9) + torch.tensor([0.1001, 0.0]).view(2, 1, 1, 1) * (lq > 0.9))
    with pytest.raises(ValueError, match="tasks must be one or more different names of letters"):
        R2R(tasks=("denoise+derain",), **TINY)
    assert tiny_model.restore(lq[:0]).image.shape == (0, 3, 16, 16)
    with pytest.raises(InputError, match="the bank is empty"):
        R2R(tasks=TASKS, **TINY)(lq)
    for wrong, message in (
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("a", "a")}, "tasks"),
        ({"tasks": TASKS, "capacity": 4}, "capacity"),
        ({"tasks": TASKS, "encoder_blocks": (1, 1)}, "levels"),
        ({"tasks": TASKS, "similarity": "euclid"}, "similarity"),
        ({"tasks": TASKS, "residual": "none"}, "residual"),
        ({"tasks": TASKS, "matching": "multi"}, "matching"),
        ({"tasks": TASKS, "gate_kernel": 2}, "kernel must be 1 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            R2R(**{**TINY, **wrong})


def test_half_precision_on_disk_is_float32_again_when_loaded(tiny_model: R2R, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "whole")
    tiny_model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.8 * sizes[0]  # many small tensors: names take their part
    again = R2R.from_pretrained(tmp_path / "half")
    assert {x.dtype for x in again.state_dict().values()} == {torch.float32, torch.int64}
    lq = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again(lq), tiny_model(lq), rtol=0, atol=2e-2)


def test_a_missing_folder_is_never_looked_for_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="demo/model is not a model: no such folder"):
        R2R.from_pretrained("demo/model")


def test_models_of_one_backbone_are_known_by_it(tiny_model: R2R) -> None:
    other = R2R(tasks=("a",), **TINY)
    other.load_state_dict(
        {
            **other.state_dict(),
            **{k: v for k, v in tiny_model.state_dict().items() if k.startswith(("encoder", "intro", "query"))},
        }
    )
    assert other.backbone_fingerprint() == tiny_model.backbone_fingerprint()
    assert other.bank.take_over(tiny_model.bank) == tiny_model.tasks
    assert other.bank.counts.tolist() == [0, 9, 9, 9]
    with torch.no_grad():
        other.query_key.weight[0] += 1e-3
    assert other.backbone_fingerprint() != tiny_model.backbone_fingerprint()


def test_damaged_models_are_named(tiny_model: R2R, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    with pytest.raises(InputError, match="no such folder"):
        R2R.from_pretrained(tmp_path / "other")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read, it is damaged or cut short"):
        R2R.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"width": 8}))
    with pytest.raises(InputError, match=r"does not fit its config\.json: intro\.weight is"):
        R2R.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="does not describe an R2R model"):
        R2R.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        R2R.from_pretrained(folder)


def test_a_failed_save_leaves_the_old_model(tiny_model: R2R, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(InputError, match="cannot save the model"):
        tiny_model.save_pretrained(blocked)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob(".saving-*"))
