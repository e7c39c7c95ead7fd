"""What a small copy shows: what lies smoothly over a photo is taken off, and a dark photo is seen brightened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

from r2r import R2R, InputError, fast
from r2r.bank import DegradationBank
from r2r.calibration import observe
from r2r.config import TrainConfig
from r2r.data.dataset import EvaluationPair
from r2r.evaluation import EvaluationSet, evaluate
from r2r.frozen import inference_form
from r2r.metrics import centre_crop, psnr
from r2r.model import Task
from r2r.overview import SIDE, UNDONE_SIDE, Overview, exposure, gain_and_offset, small_copy, small_size
from r2r.training import build_model
from tests.conftest import TINY, fill_randomly, finding_nothing, whole_and_tiled, with_the_same_attention_everywhere

TASKS = ("denoise", "derain", "dehaze")
PHOTO = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255  # [1, 3, 400, 600]


@pytest.fixture
def model() -> R2R:
    """Haze is a smooth task."""
    return finding_nothing(mixtures=True, smooth_tasks=["dehaze"])


def finding(model: R2R, *tasks: str) -> R2R:
    for task in tasks:
        model.bank.offset[TASKS.index(task)] += 200
    return model


def test_small_copies_have_the_photos_shape() -> None:
    assert small_size(4000, 6000) == (341, SIDE)
    assert small_size(600, 512) == (SIDE, 437)
    assert small_size(100, SIDE) == (100, SIDE)
    assert small_size(1, 5000) == (1, SIDE)
    assert small_copy(PHOTO).shape == (1, 3, 341, SIDE)
    wanted = F.interpolate(PHOTO[:, :, :384, :512], scale_factor=0.5, mode="area")
    torch.testing.assert_close(small_copy(PHOTO[:, :, :384, :512], 256), wanted)
    assert torch.equal(small_copy(PHOTO[:, :, :77, :99]), PHOTO[:, :, :77, :99])


def test_haze_over_a_photo_is_taken_off_with_what_its_small_copy_shows() -> None:
    height, width = PHOTO.shape[2:]
    clear = 0.8 - 0.5 * torch.linspace(0, 1, height)[:, None] * torch.linspace(1, 0.5, width)
    hazy = PHOTO * clear + 0.9 * (1 - clear)
    gain, offset = gain_and_offset(small_copy(hazy, UNDONE_SIDE), small_copy(PHOTO, UNDONE_SIDE))
    overview = Overview(torch.tensor([[True]]), torch.zeros(1, 1), gain, offset, None)
    restored = overview.taken_off(hazy, (height, width))
    assert float(psnr(hazy, PHOTO)) < 12
    assert float(psnr(restored, PHOTO)) > 30  # a photo of which the small copy alone was restored has 24 dB
    for top, left in ((0, 0), (100, 37), (390, 560)):
        part = overview.taken_off(hazy[:, :, top : top + 64, left : left + 80], (height, width), top, left)
        torch.testing.assert_close(part, restored[:, :, top : top + 64, left : left + 80], rtol=0, atol=1e-6)


def test_between_the_cells_of_a_layer_it_is_interpolated() -> None:
    torch.manual_seed(0)
    gain, offset = torch.rand(2, 1, 3, 5, 7)
    overview = Overview(torch.tensor([[True]]), torch.zeros(1, 1), gain, offset / 10, None)
    image = torch.rand(1, 3, 41, 38) * 0.9
    wide = [F.interpolate(x, size=(41, 38), mode="bilinear") for x in (gain, offset / 10)]
    torch.testing.assert_close(overview.taken_off(image, (41, 38)), wide[0] * image + wide[1])


def test_a_photo_without_a_layer_stays_bit_for_bit_beside_one_with(model: R2R) -> None:
    small = small_copy(PHOTO).expand(2, -1, -1, -1)
    overview = model.overview(
        small, model.encode(small), PHOTO.shape[2:], torch.tensor([[True, True, True], [True, True, False]])
    )
    cleared = overview.taken_off(PHOTO.expand(2, -1, -1, -1), PHOTO.shape[2:])
    assert torch.equal(cleared[1:], PHOTO)
    assert (cleared[0] - PHOTO).abs().mean() > 0.01
    assert overview.task.tolist() == [[False, False, True], [False, False, False]]


def test_smooth_tasks_come_first_and_the_others_see_what_is_left(model: R2R) -> None:
    nothing = model.restore(PHOTO)
    assert torch.equal(nothing.image, PHOTO)
    assert not nothing.task.any()
    cleared, overview, _ = finding(model, "dehaze").clear(PHOTO)
    assert overview is not None
    hazy = model.restore(PHOTO)
    assert hazy.task.tolist() == [[False, False, True]]
    assert torch.equal(hazy.image, cleared)
    assert torch.equal(hazy.scores[:, 2], overview.scores[:, 2])  # as the small copy had it

    both = finding(model, "derain").restore(PHOTO)
    assert both.task.tolist() == [[False, True, True]]
    plain = R2R(**{**model.config, "smooth_tasks": []}).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(both.image, plain.restore(cleared, "derain").image)
    assert torch.equal(model.restore(PHOTO, "derain+dehaze").image, both.image)
    assert torch.equal(model.restore(PHOTO, "derain").image, plain.restore(PHOTO, "derain").image)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 2), (17, 300)])
def test_photos_of_any_size_are_cleared(model: R2R, size: tuple[int, int]) -> None:
    photo = F.interpolate(PHOTO, size=size) if max(size) > 400 else PHOTO[:, :, : size[0], : size[1]]
    restored = finding(model, "dehaze").restore(photo)
    assert restored.task.tolist() == [[False, False, True]]
    assert restored.image.shape == photo.shape
    assert restored.image.isfinite().all()
    assert not torch.equal(restored.image, photo)


def test_photos_of_a_batch_are_restored_as_alone(model: R2R) -> None:
    finding(model, "dehaze")
    photos = torch.cat((PHOTO[:, :, :300, :280], PHOTO[:, :, 100:, 320:] / 3))
    tasks = ["dehaze", "denoise"]
    together = model.restore(photos, tasks)
    for photo, task, image in zip(photos, tasks, together.image, strict=True):
        torch.testing.assert_close(image, model.restore(photo[None], task).image[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("found", [("dehaze",), ("dehaze", "denoise"), ()])
def test_tiles_give_what_one_piece_gives(model: R2R, found: tuple[str, ...]) -> None:
    finding(with_the_same_attention_everywhere(model), *found)
    pixels = np.ascontiguousarray(PHOTO[0, :, :400, :420].permute(1, 2, 0).numpy())
    whole, tiled = whole_and_tiled(model, pixels)
    assert set(whole.tasks) == set(tiled.tasks) == set(found)
    assert np.abs(whole.pixels - tiled.pixels).max() < 2e-3
    assert list(tiled.scores.values()) == pytest.approx(list(whole.scores.values()), rel=1e-3)
    assert (np.abs(whole.pixels - pixels).max() > 0.01) == bool(found)
    whole, tiled = whole_and_tiled(model, pixels, strength=0.5)
    assert np.abs(whole.pixels - tiled.pixels).max() < 2e-3


@pytest.mark.parametrize("task", ["dehaze", torch.tensor([[False, False, False]])], ids=["dehaze", "nothing"])
def test_a_photo_told_nothing_but_smooth_tasks_is_not_encoded(model: R2R, task: Task) -> None:
    cleared, overview, _ = model.clear(PHOTO, task)
    encoded: list[int] = []
    model.encoder.register_forward_hook(lambda module, given, made: encoded.append(max(given[0].shape[2:])))
    restored = model.restore(PHOTO, task)
    assert torch.equal(restored.image, cleared)
    assert restored.image.data_ptr() != PHOTO.data_ptr()
    assert overview is not None
    assert torch.equal(restored.scores, overview.scores)
    shares: list[float] = []
    pixels = np.ascontiguousarray(PHOTO[0].permute(1, 2, 0).numpy())
    whole, tiled = whole_and_tiled(model, pixels, task=task, progress=shares.append)
    assert np.abs(whole.pixels - tiled.pixels).max() < 1e-6
    assert list(tiled.scores.values()) == pytest.approx(list(whole.scores.values()), abs=1e-5)
    assert shares == pytest.approx([(tile + 1) / tiled.tiles for tile in range(tiled.tiles)])
    assert max(encoded) <= SIDE

    both = model.restore(PHOTO.expand(2, -1, -1, -1), torch.tensor([[False, False, True], [True, False, False]]))
    torch.testing.assert_close(both.scores[0], model.restore(PHOTO, "dehaze").scores[0])  # whatever is beside it
    assert not torch.equal(both.scores[1], both.scores[0])


def test_frozen_and_fast_models_do_the_same(model: R2R) -> None:
    finding(model, "dehaze", "denoise")
    quick = fast.R2R(**model.config)
    quick.load_state_dict(model.state_dict())
    wanted = model.restore(PHOTO)
    for one in (quick.eval(), inference_form(quick.eval())):
        given = one.restore(PHOTO)
        assert torch.equal(given.task, wanted.task)
        torch.testing.assert_close(given.image, wanted.image, rtol=0, atol=1e-3)


def test_a_compiled_model_looks_at_the_small_copy_outside_of_the_graph(model: R2R) -> None:
    finding(suspecting(model, SUSPECTED), "dehaze", "denoise").bank.light_tasks = ("derain",)
    quick = fast.R2R(**model.config)
    quick.load_state_dict(model.state_dict())
    quick.eval()
    torch.compiler.reset()
    compiled = torch.compile(quick, dynamic=True, backend="aot_eager")
    dark = PHOTO / 8
    with torch.no_grad():
        for number, size in enumerate(((90, 101), (120, 75), (61, 64), (200, 133))):
            photos = dark[:, :, : size[0], : size[1]].expand(2, -1, -1, -1)
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                torch.testing.assert_close(compiled(photos), quick(photos), rtol=0, atol=1e-5)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable\(self\._cleared"):
            torch.compile(quick, fullgraph=True, backend="aot_eager")(photos)


def test_a_program_of_a_model_that_looks_at_the_small_copy_takes_any_size(model: R2R) -> None:
    finding(suspecting(model, SUSPECTED), "dehaze", "denoise")
    quick = fast.R2R(**model.config)
    quick.load_state_dict(model.state_dict())
    quick.eval()
    size = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        for one in (quick, quick.freeze(torch.float32)):
            sizes = ({0: size, 2: size, 3: size},)
            program = torch.export.export(one, (torch.rand(2, 3, 48, 64),), dynamic_shapes=sizes).module()
            for photos in (PHOTO[:, :, :90, :101], PHOTO[:, :, :33, :40].expand(3, -1, -1, -1)):
                torch.testing.assert_close(program(photos), one(photos), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("light", [[], ["derain"]])
def test_replays_on_a_gpu_give_the_bits_of_the_plain_call(model: R2R, light: list[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    finding(suspecting(model, SUSPECTED), "dehaze", "denoise").bank.light_tasks = tuple(light)
    quick = fast.R2R(**model.config)
    quick.load_state_dict(model.state_dict())
    frozen = quick.eval().cuda().freeze(torch.float32)
    photo = PHOTO[:, :, :300, :320].cuda() / 8
    wanted = R2R._restored(frozen, photo, None)
    for _ in range(3):  # runs, captures, replays
        assert torch.equal(frozen.restore(photo).image, wanted.image)
    assert len(frozen.replays) == 1
    torch.testing.assert_close(wanted.image.cpu(), model.restore(photo.cpu()).image, rtol=0, atol=1e-2)


def test_calibration_takes_the_scores_that_restoring_takes(model: R2R) -> None:
    model.bank.offset.zero_()
    hazy = EvaluationSet("haze", (2,), [EvaluationPair("photo", PHOTO[0], PHOTO[0], torch.zeros(()))])
    (scores,) = observe(model, [hazy]).scores
    cleared, overview, _ = model.clear(PHOTO, "dehaze")
    assert overview is not None
    assert scores[2] == overview.scores[0, 2]
    torch.testing.assert_close(scores[:2], model.match(model.query(model.encode(cleared).deep)[0]).scores[0, :2])


def test_evaluation_tells_and_misleads_with_smooth_tasks_too(model: R2R) -> None:
    finding(model, "denoise")
    crop = PHOTO[0, :, :200, :300]
    sets = [EvaluationSet("haze", (2,), [EvaluationPair("photo", crop / 2, crop, torch.zeros(()))])]
    (image,) = evaluate(model, sets).sets[0].images
    lq, hq = (centre_crop(x)[None] for x in (crop / 2, crop))
    assert image.chosen == ("denoise",)
    assert image.told is not None
    assert image.misled is not None
    for quality, task in ((image.blind, None), (image.told, "dehaze"), (image.misled, "denoise")):
        assert quality.psnr == pytest.approx(float(psnr(model.restore(lq, task).image, hq)), abs=1e-3)


# -- dark photos ------------------------------------------------------------------------------------------------

DARK = PHOTO[:, :, :200, :240] / 8
SUSPECTED = -2.0  # the logarithm of the odds


@pytest.fixture
def night() -> R2R:
    """Rain is a task of light, and suspected everywhere."""
    return suspecting(finding_nothing(mixtures=True, light_tasks=["derain"]), SUSPECTED)


def suspecting(model: R2R, odds: float) -> R2R:
    model.bank.gain[1], model.bank.offset[1] = 0, odds
    return model


def in_daylight(model: R2R) -> R2R:
    """The same without tasks of light: it sees every photo as it is."""
    plain = R2R(**{**model.config, "light_tasks": []}).eval()
    plain.load_state_dict(model.state_dict())
    return plain


def seen_brightened(model: R2R, dark: Tensor, task: str) -> Tensor:
    by = float(0.25 / small_copy(dark).mean())
    bright = (by * dark).clamp(max=1)
    return dark + (in_daylight(model).restore(bright, task).image - bright) / by


def test_dark_copies_are_exposed_unless_a_task_of_light_may_be_found_or_nothing_suspects_one() -> None:
    means = torch.tensor([0.125, 0.3, 0.001, 0.05, 0.05, 0.05])
    small = means[:, None, None, None].expand(-1, 3, 4, 5)
    scores = torch.tensor([[-9.0, -2], [-2, -9], [-0.5, -9], [0.1, -2], [-4, -5], [-2, -0.5]])
    wanted = torch.tensor([2.0, 1, 16, 1, 1, 5])
    torch.testing.assert_close(exposure(small, scores, None, (SIDE, SIDE)), wanted)
    # A copy that was reduced shows less noise, so that -0.5 does not rule the task out.
    wanted[2] = wanted[5] = 1
    torch.testing.assert_close(exposure(small, scores, None, (SIDE + 1, 3)), wanted)
    told = torch.zeros(6, 2, dtype=torch.bool)
    torch.testing.assert_close(exposure(small, scores, told, (9999, 9)), torch.tensor([2.0, 1, 16, 5, 1, 5]))
    told[0, 1] = True
    assert exposure(small, scores, told, (9999, 9))[0] == 1


def test_told_other_tasks_a_dark_photo_is_restored_as_a_bright_one(night: R2R) -> None:
    for task in ("denoise", "denoise+dehaze"):
        given = night.restore(DARK, task).image
        torch.testing.assert_close(given, seen_brightened(night, DARK, task), rtol=0, atol=1e-6)
        assert (given - in_daylight(night).restore(DARK, task).image).abs().max() > 0.01
    bright = (PHOTO + 0.2).clamp(max=1)
    for photo, task in ((DARK, "derain"), (DARK, "derain+denoise"), (bright, "denoise")):
        assert torch.equal(night.restore(photo, task).image, in_daylight(night).restore(photo, task).image)
    unsuspected = suspecting(night, -3.5)
    assert torch.equal(unsuspected.restore(DARK, "denoise").image, in_daylight(night).restore(DARK, "denoise").image)


def test_what_a_dark_photo_is_cut_off_at_stays_as_it_was(night: R2R) -> None:
    dark = DARK.clone()
    dark[:, :, 50:60, 50:60] = 0.9  # a lamp
    torch.testing.assert_close(
        night.restore(dark, "denoise").image, seen_brightened(night, dark, "denoise"), rtol=0, atol=1e-6
    )


def test_blind_other_tasks_are_looked_for_in_what_was_brightened(night: R2R) -> None:
    assert torch.equal(night.restore(DARK).image, DARK)  # nothing was found
    finding(night, "denoise")
    blind = night.restore(DARK)
    assert blind.task.tolist() == [[True, False, False]]
    assert torch.equal(blind.image, night.restore(DARK, "denoise").image)
    bright = (DARK * float(0.25 / DARK.mean())).clamp(max=1)
    wanted = in_daylight(night).restore(bright).scores
    torch.testing.assert_close(blind.scores[:, ::2], wanted[:, ::2])
    assert float(blind.scores[0, 1]) == SUSPECTED
    night.bank.gain[1] = 1  # from here on the score depends on what is seen
    night.bank.offset[1] += SUSPECTED - night.restore(DARK).scores[0, 1]
    assert float(night.restore(DARK).scores[0, 1]) == pytest.approx(SUSPECTED, abs=1e-4)
    assert abs(float(in_daylight(night).restore(bright).scores[0, 1]) - SUSPECTED) > 1e-3
    lit = suspecting(night, 1.0).restore(DARK)
    assert lit.task.tolist() == [[True, True, False]]
    assert torch.equal(lit.image, in_daylight(night).restore(DARK).image)


def test_a_large_photo_settles_itself_whether_it_is_dark(night: R2R) -> None:
    finding(suspecting(night, -0.5), "denoise")
    large = (PHOTO[:, :, :120] / 8).repeat(1, 1, 1, 2)  # 1200 pixels wide
    assert torch.equal(night.restore(large).image, in_daylight(night).restore(large).image)
    given = suspecting(night, -1.5).restore(large).image
    torch.testing.assert_close(given, seen_brightened(night, large, "denoise"), rtol=0, atol=1e-6)


def test_dark_and_bright_photos_of_a_batch_are_restored_as_alone(night: R2R) -> None:
    photos = torch.cat((DARK, DARK * 8, DARK))
    tasks = ["denoise", "denoise", "derain"]
    for photo, task, image in zip(photos, tasks, night.restore(photos, tasks).image, strict=True):
        torch.testing.assert_close(image, night.restore(photo[None], task).image[0], rtol=0, atol=1e-5)


def test_tiles_share_the_attention_of_what_was_brightened(night: R2R) -> None:
    pixels = np.ascontiguousarray(PHOTO[0, :, :400, :420].permute(1, 2, 0).numpy() / 8)
    by = 0.25 / pixels.mean()
    bright = (by * pixels).clip(max=1)
    _, wanted = whole_and_tiled(in_daylight(night), bright, task="denoise")
    _, tiled = whole_and_tiled(night, pixels, task="denoise")
    # What comes out is cut off at 0 and 1.
    seen = (wanted.pixels > 0) & (wanted.pixels < 1) & (tiled.pixels > 0)
    assert seen.mean() > 0.5
    assert np.abs(tiled.pixels - pixels - (wanted.pixels - bright) / by)[seen].max() < 1e-5


@pytest.mark.parametrize("task", ["denoise", None])
def test_tiles_of_a_dark_photo_give_what_one_piece_gives(night: R2R, task: str | None) -> None:
    finding(with_the_same_attention_everywhere(night), "denoise")
    pixels = np.ascontiguousarray(PHOTO[0, :, :400, :420].permute(1, 2, 0).numpy() / 8)
    whole, tiled = whole_and_tiled(night, pixels, task=task)
    assert whole.tasks == tiled.tasks == ("denoise",)
    assert np.abs(whole.pixels - tiled.pixels).max() < 1e-3
    unlit, _ = whole_and_tiled(in_daylight(night), pixels, task=task)
    assert np.abs(whole.pixels - unlit.pixels).max() > 0.01


def test_frozen_and_fast_models_see_dark_photos_brightened_too(night: R2R) -> None:
    quick = fast.R2R(**night.config)
    quick.load_state_dict(night.state_dict())
    wanted = night.restore(DARK, "denoise").image
    for one in (quick.eval(), inference_form(quick.eval())):
        torch.testing.assert_close(one.restore(DARK, "denoise").image, wanted, rtol=0, atol=1e-4)
    half = quick.freeze(torch.bfloat16).restore(DARK, "denoise").image
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted, rtol=0, atol=0.01)


def test_calibration_takes_scores_of_light_as_the_photo_is_and_others_as_it_is_seen(night: R2R) -> None:
    def votes(image: Tensor) -> Tensor:
        return night.vote(night.query(night.encode(image).deep)[0])[0]

    noisy = EvaluationSet("noise", (0,), [EvaluationPair("photo", DARK[0], DARK[0], torch.zeros(()))])
    (scores,) = observe(night, [noisy]).scores
    bright = (DARK * float(0.25 / DARK.mean())).clamp(max=1)
    torch.testing.assert_close(scores[::2], votes(bright)[::2])
    assert scores[1] == votes(DARK)[1]


def test_evaluation_tells_dark_photos_other_tasks(night: R2R) -> None:
    finding(suspecting(night, 1.0), "denoise")
    crop = PHOTO[0, :, :200, :240]
    sets = [EvaluationSet("dark", (1,), [EvaluationPair("photo", crop / 8, crop, torch.zeros(()))])]
    (image,) = evaluate(night, sets).sets[0].images
    lq, hq = (centre_crop(x)[None] for x in (crop / 8, crop))
    assert image.chosen == ("denoise", "derain")
    assert image.misled is not None
    for quality, task in ((image.blind, None), (image.misled, "denoise")):
        assert quality.psnr == pytest.approx(float(psnr(night.restore(lq, task).image, hq)), abs=1e-3)


def test_evaluation_tells_what_it_found_in_a_large_photo_that_may_be_dark(night: R2R) -> None:
    """Blind such a photo is seen as it is, told that it is noisy it is seen brightened."""
    finding(suspecting(night, -0.5), "denoise")
    clean = PHOTO[0, :, :120].repeat(1, 1, 2)
    sets = [EvaluationSet("noise", (0,), [EvaluationPair("photo", clean / 8, clean / 8, torch.zeros(()))])]
    (image,) = evaluate(night, sets).sets[0].images
    assert image.told is not None
    lq = centre_crop(clean / 8)[None]
    for quality, task in ((image.blind, None), (image.told, "denoise")):
        assert quality.psnr == pytest.approx(float(psnr(night.restore(lq, task).image, lq)), abs=1e-3)
    assert image.blind.psnr != pytest.approx(image.told.psnr, abs=0.1)


# -- in configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["smooth", "light"])
def test_which_tasks_are_smooth_or_of_light_is_saved_and_goes_with_the_bank(kind: str, tmp_path: Path) -> None:
    key = f"{kind}_tasks"
    some: dict[str, Any] = {key: ["dehaze"]}
    model = R2R(TASKS, **TINY, mixtures=True, **some)
    fill_randomly(model)
    model.save_pretrained(tmp_path / "model")
    loaded = R2R.from_pretrained(tmp_path / "model")
    assert loaded.config[key] == ["dehaze"]
    assert getattr(loaded.bank, kind).tolist() == [False, False, True]
    other = DegradationBank(["denoise"], 9, 8, 64, 2)
    other.add_task("snow", torch.rand(3, 8, 2, 2), torch.rand(3, 64, 2, 2))
    assert other.take_over(loaded.bank) == ("derain", "dehaze")
    assert getattr(other, kind).tolist() == [False, False, False, True]
    other.remove_task("denoise")
    assert getattr(other, kind).tolist() == [False, False, True]
    other.remove_task("dehaze")
    assert getattr(other, key) == ()

    config = TrainConfig(tasks=["dehaze", "desnow"], data=[{}], init=str(tmp_path / "model"))
    assert getattr(build_model(config, mixtures=True).bank, key) == ("dehaze",)
    config.tasks = ["denoise"]
    assert getattr(build_model(config, mixtures=True).bank, key) == ()
    config.model = {key: ["derain"]}
    with pytest.raises(InputError, match=f"model: {key} are derain; accepted: denoise"):
        build_model(config, mixtures=True)


@pytest.mark.parametrize("key", ["smooth_tasks", "light_tasks"])
def test_only_tasks_of_mixtures_are_smooth_or_of_light(key: str) -> None:
    some: dict[str, Any] = {key: ["snow"]}
    with pytest.raises(ValueError, match=f"{key} are snow; accepted: denoise, derain, dehaze"):
        R2R(TASKS, **TINY, mixtures=True, **some)
    some = {key: ["dehaze"]}
    with pytest.raises(ValueError, match=f"{key} are dehaze; accepted: none, as this is no model for mixtures"):
        R2R(TASKS, **TINY, **some)
