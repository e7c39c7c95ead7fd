"""One photo is restored whole, whatever its size, and in tiles that show no seams."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import skimage.data
import torch

from r2r import R2R, InputError, tiling
from r2r.data.images import from_float
from r2r.tiling import restore_photo, whole_photos
from r2r_kernels.nn import NAFBlock

PHOTO = skimage.data.astronaut()[:400, 60:480] / np.float32(255)
SMALL = PHOTO[:40, 100:150]


def memory_for(side: int, across: int = PHOTO.shape[1]) -> int:
    """Just enough memory for the fixture's models to restore tiles of this side from a photo of this width."""
    # 84 bytes for each pixel and channel of the first level, of which they have 4; 64 for each pixel of a padded band.
    return 84 * 4 * side**2 + 64 * (across + -across % 16) * side


@pytest.mark.parametrize("size", [(1, 1), (17, 3), (1, 70), (48, 64)])
def test_any_size_is_restored_as_the_model_does(tiny_model: R2R, size: tuple[int, int]) -> None:
    pixels = PHOTO[: size[0], : size[1]]
    restored = restore_photo(tiny_model, pixels)
    lq = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    expected = tiny_model.restore(lq)
    assert restored.pixels.dtype == np.float32
    assert restored.pixels.shape == pixels.shape
    assert np.allclose(restored.pixels, expected.image[0].clamp(0, 1).permute(1, 2, 0).numpy(), atol=1e-6)
    assert restored.tasks == (tiny_model.tasks[int(expected.task)],)
    assert list(restored.scores.values()) == pytest.approx(expected.scores[0].softmax(0).tolist())
    assert restored.tiles == 1


def test_a_told_task_takes_part(tiny_model: R2R) -> None:
    results = {task: restore_photo(tiny_model, SMALL, task) for task in tiny_model.tasks}
    assert all(result.tasks == (task,) for task, result in results.items())
    assert len({result.pixels.tobytes() for result in results.values()}) == 3


def test_tiles_show_no_seams_and_share_one_query(tiny_model: R2R) -> None:
    whole = restore_photo(tiny_model, PHOTO)
    matched: list[torch.Size] = []
    tiny_model.retrieval.register_forward_hook(lambda module, given, made: matched.append(given[0].shape))
    shares: list[float] = []
    tiled = restore_photo(tiny_model, PHOTO, memory=memory_for(192), progress=shares.append)
    assert len(matched) == 1
    assert shares == [step / 18 for step in range(1, 19)]  # each tile is passed twice
    assert whole.tiles == 1
    assert tiled.tiles == 9
    change = np.abs(whole.pixels - PHOTO).mean()
    difference = np.abs(tiled.pixels - whole.pixels)
    assert change > 0.02  # the model does something that tiles could get wrong
    assert difference.mean() < 0.01 * change
    assert difference.max() < 0.1 * change
    assert tiled.tasks == whole.tasks
    assert list(tiled.scores.values()) == pytest.approx(list(whole.scores.values()), rel=0.01)


@pytest.mark.parametrize("length", [192, 208, 640, 896, 1024, 4000, 6000])
@pytest.mark.parametrize(("side", "margin"), [(192, 16), (192, 32), (208, 16), (544, 80), (880, 96)])
def test_windows_cover_a_side_and_repeat_no_more_than_their_overlap(length: int, side: int, margin: int) -> None:
    windows = tiling._windows(length, side, 16, margin)
    overlap = 2 * margin + tiling._BLEND
    total = torch.zeros(length)
    for start, stop, weight in windows:
        assert 0 <= start < stop <= length
        assert min(side, length, tiling._SMALLEST_TILE) <= stop - start <= side
        total[start:stop] += weight
    torch.testing.assert_close(total, torch.ones(length))
    shared = [before.stop - after.start for before, after in itertools.pairwise(windows)]
    assert all(one >= overlap for one in shared)
    if windows[0].stop > tiling._SMALLEST_TILE:
        assert sum(window.stop - window.start for window in windows) <= length + len(windows) * (overlap + 16)


def test_without_channel_attention_a_tiled_query_and_result_are_those_of_the_whole(tiny_model: R2R) -> None:
    # With attention that does not depend on the image a tile differs from the whole only through its borders, which
    # the overlap keeps out but for the deepest levels' reach.
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if ".sca." in name and name.endswith("weight"):
                parameter.zero_()
    whole = restore_photo(tiny_model, PHOTO)
    tiled = restore_photo(tiny_model, PHOTO, memory=memory_for(224))
    assert tiled.tiles > 1
    assert np.abs(tiled.pixels - whole.pixels).max() < 2e-3
    assert list(tiled.scores.values()) == pytest.approx(list(whole.scores.values()), rel=1e-3)


@pytest.mark.parametrize(("part", "bound"), [("encoder", 0.018), ("decoder", 0.005)])
def test_tiles_share_one_channel_attention_and_leave_the_model_its_own(
    tiny_model: R2R, part: str, bound: float
) -> None:
    # Bright on the left and dark on the right; attention that depends on the image strongly. Where it comes from each
    # tile, or from the left alone, tiles and whole differ by 0.028 and 0.007 of the change or more.
    photo = np.concatenate((PHOTO[:208], PHOTO[:208, ::-1] / 10), 1)
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if name.startswith(part) and ".sca." in name and name.endswith("weight"):
                parameter.mul_(16)
    memory = memory_for(192, photo.shape[1])
    whole, tiled = (restore_photo(tiny_model, photo, "derain", given) for given in (None, memory))
    assert (whole.tiles, tiled.tiles) == (1, 14)
    assert np.abs(tiled.pixels - whole.pixels).mean() < bound * np.abs(whole.pixels - photo).mean()
    assert all(block.attention is None for block in tiny_model.modules() if isinstance(block, NAFBlock))
    assert np.array_equal(restore_photo(tiny_model, photo, "derain").pixels, whole.pixels)


def several_tasks(tiny_model: R2R) -> R2R:
    model = R2R(**{**tiny_model.config, "mixtures": True})
    model.load_state_dict(tiny_model.state_dict())
    return model.eval()


@pytest.mark.parametrize("memory", [None, memory_for(192)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_where_nothing_is_found_the_photo_stays_bit_for_bit(
    tiny_model: R2R, memory: int | None, dtype: type[np.generic]
) -> None:
    model = several_tasks(tiny_model)
    model.bank.offset -= 1000
    pixels = from_float(PHOTO, np.dtype(dtype))
    restored = restore_photo(model, pixels, memory=memory)
    assert restored.tasks == ()
    assert max(restored.scores.values()) < 0.01
    assert restored.pixels.tobytes() == pixels.tobytes()
    assert restore_photo(model, pixels, "denoise+dehaze", memory).tasks == ("denoise", "dehaze")


@pytest.mark.parametrize("memory", [None, memory_for(192)])
def test_strength_mixes_the_restoration_in(tiny_model: R2R, memory: int | None) -> None:
    whole = restore_photo(tiny_model, PHOTO, "derain", memory).pixels
    half = restore_photo(tiny_model, PHOTO, "derain", memory, strength=0.5).pixels
    inside = (whole > 0.01) & (whole < 0.99)  # where nothing was clipped
    assert np.abs(half - (PHOTO + whole) / 2)[inside].max() < 1e-4
    assert np.abs(restore_photo(tiny_model, PHOTO, "derain", memory, strength=0.0).pixels - PHOTO).max() < 1e-6
    with pytest.raises(InputError, match="strength"):
        restore_photo(tiny_model, PHOTO, strength=2.0)


def test_hidden_colours_change_nothing_that_is_seen_and_stay(tiny_model: R2R) -> None:
    rows, columns = np.mgrid[:120, :140]
    visible = (rows - 50) ** 2 + (columns - 80) ** 2 < 35**2
    seen = []
    for hidden in (0.0, 1.0):
        pixels = np.where(visible[..., None], PHOTO[:120, :140], np.float32(hidden))
        restored = restore_photo(tiny_model, pixels, visible=visible)
        assert (restored.pixels[~visible] == hidden).all()
        seen.append((restored.pixels[visible], restored.tasks, restored.scores))
    assert seen[0][0].tobytes() == seen[1][0].tobytes()
    assert seen[0][1:] == seen[1][1:]
    assert np.abs(seen[0][0] - PHOTO[:120, :140][visible]).mean() > 0.01
    nothing = restore_photo(tiny_model, PHOTO, visible=np.zeros(PHOTO.shape[:2], bool))
    assert nothing.tasks == ()
    assert np.array_equal(nothing.pixels, PHOTO)


def test_with_local_attention_tiles_come_nearer_to_the_whole(tiny_model: R2R) -> None:
    apart = []
    for window in (0, 96):
        tiny_model.window = window
        whole, tiled = (restore_photo(tiny_model, PHOTO, "derain", memory).pixels for memory in (None, memory_for(288)))
        apart.append(np.abs(whole - tiled).mean())
    assert apart[1] < apart[0] / 3


def test_a_strip_needs_no_tiles_and_a_long_one_is_cut_along_one_side(tiny_model: R2R) -> None:
    memory = memory_for(192)
    assert restore_photo(tiny_model, PHOTO[:64], memory=memory).tiles == 1
    strip = np.tile(PHOTO[:100], (1, 2, 1))
    tiled = restore_photo(tiny_model, strip, memory=memory_for(192, strip.shape[1]))
    assert tiled.tiles > 1
    assert np.abs(tiled.pixels - restore_photo(tiny_model, strip).pixels).mean() < 2e-3


def test_what_the_first_pass_made_is_kept_as_far_as_the_memory_reaches(
    tiny_model: R2R, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = restore_photo(tiny_model, PHOTO, memory=memory_for(192))
    tile = memory_for(192, 0)  # the default does not depend on the photo
    beside = 64 * 432 * 192 + 4 * 8 * 25 * 27  # a band of the padded photo, and its query
    encoded: list[torch.Size] = []
    tiny_model.encoder.register_forward_hook(lambda module, given, made: encoded.append(given[0].shape))
    monkeypatch.setattr(tiling, "DEFAULT_MEMORY", tile)
    # From 4 channels, doubled on each of five levels, a tile's features are 7.75 floats a pixel: four times that.
    # The crops that give the attention are encoded too.
    for kept, number in ((0, 1 + 18), (4 * 31 * 192**2, 1 + 14), (2**32, 1 + 9)):
        encoded.clear()
        monkeypatch.setattr(tiling, "free_memory", lambda device, kept=kept: 2 * (tile + beside + kept))
        restored = restore_photo(tiny_model, PHOTO)
        assert len(encoded) == number
        assert (restored.tiles, restored.pixels.tobytes()) == (9, wanted.pixels.tobytes())


def test_mixtures_name_every_task_that_took_part(tiny_model: R2R) -> None:
    model = several_tasks(tiny_model)
    with torch.no_grad():
        query, _ = model.query(model.encode(torch.from_numpy(PHOTO.copy()).permute(2, 0, 1)[None]).deep)
        model.bank.keys.copy_(torch.nn.functional.adaptive_avg_pool2d(query, model.bank.size))
        model.bank.keys[1].neg_()  # a task that is the very opposite of this photo's
    for memory, tiles in ((None, 1), (memory_for(192), 9)):
        restored = restore_photo(model.eval(), PHOTO, memory=memory)
        assert restored.tasks == ("denoise", "dehaze")
        assert restored.scores["denoise"] > 0.5 > restored.scores["derain"] > 0
        assert restored.tiles == tiles
    mask = torch.tensor([[True, True, False]])
    assert restore_photo(model, SMALL, mask).tasks == ("denoise", "derain")


@pytest.mark.parametrize(
    ("pixels", "line"),
    [
        (PHOTO[..., 0], r"must be \[H, W, 3\].*got \[400, 420\]"),
        (PHOTO[:0], r"H, W >= 1, got \[0, 420, 3\]"),
        (PHOTO[:8] * 2, r"in \[0, 1\]"),
        (PHOTO[:8] * np.float32(np.nan), r"in \[0, 1\], got others or NaN"),
    ],
)
def test_bad_pixels(tiny_model: R2R, pixels: np.ndarray, line: str) -> None:
    with pytest.raises(InputError, match=line):
        restore_photo(tiny_model, pixels)


def test_as_many_photos_go_together_as_the_memory_takes(tiny_model: R2R) -> None:
    least = memory_for(192, 0)
    assert whole_photos(tiny_model, (96, 96, 3), least) == 4
    assert whole_photos(tiny_model, (64, 65), least) == whole_photos(tiny_model, (65, 64), least) == 7  # padded
    assert whole_photos(tiny_model, (193, 200, 3), least) == 0
