from __future__ import annotations

import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from r2r.data.dataset import EvaluationPairs, Source, TrainingPairs, dihedral, worker_init
from r2r.data.degradations import Blur, Haze, Jpeg, LowLight, Noise, Rain, parse_degradation
from r2r.data.folders import Pair, clean_folder, paired_folder
from r2r.data.images import Photo, read_rgb, write_photo, write_rgb
from r2r.data.sampler import EpochSampler
from r2r.errors import InputError

TASKS = (Noise(), Rain(), Haze(), Blur(), LowLight())


@pytest.fixture
def sources(photo_folder: Path) -> list[Source]:
    pairs = tuple(clean_folder(photo_folder))
    return [Source(task.name, (index,), pairs, task) for index, task in enumerate(TASKS)]


@pytest.fixture
def positions(tmp_path: Path) -> Source:
    """Real pairs whose colours say where a pixel lies: red = row, green = column; blue is 0 if clean, 1 if degraded."""
    row, column = np.mgrid[:40, :60].astype(np.float32) / 255
    for kind, blue in (("clean", 0), ("degraded", 1)):
        write_rgb(tmp_path / kind / "a.png", np.stack([row, column, np.full_like(row, blue)], axis=2))
    return Source("positions", (0,), tuple(paired_folder(tmp_path)))


def test_crops_tensors_and_labels(sources: list[Source]) -> None:
    dataset = TrainingPairs(sources, 48, 5)
    assert len(dataset) == 20
    for index in range(5):
        lq, hq, label = dataset[index, 1, 7]
        for image in (lq, hq):
            assert image.shape == (3, 48, 48)
            assert image.dtype == torch.float32
            assert image.is_contiguous()
            assert 0 <= image.min() <= image.max() <= 1
        assert not torch.equal(lq, hq)
        assert label.dtype == torch.int64
        assert label.shape == ()
        assert label == index


def test_the_key_and_the_seed_decide_everything(sources: list[Source]) -> None:
    keys = [(source, pair, draw) for source in range(5) for pair in (0, 3) for draw in (0, 2**63 - 1)]
    first, again, other = (TrainingPairs(sources, 32, 5, seed=seed) for seed in (1, 1, 2))
    expected = [first[key] for key in keys]
    for key, sample in zip(reversed(keys), reversed(expected), strict=True):  # in another order
        for tensor, same in zip(again[key], sample, strict=True):
            assert torch.equal(tensor, same)
        assert not torch.equal(other[key][1], sample[1])
    twice = Source("noise", (0,), sources[0].pairs[:1] * 2, Noise())
    dataset = TrainingPairs([twice, twice], 32, 1)
    crops = [dataset[key][1] for key in ((0, 0, 5), (0, 1, 5), (1, 0, 5), (0, 0, 6))]
    assert len({crop.numpy().tobytes() for crop in crops}) == 4


def test_photos_of_16_bits_train_with_all_of_them(tmp_path: Path) -> None:
    pixels = np.arange(48 * 48, dtype=np.uint16).reshape(48, 48, 1).repeat(3, axis=2) + 30000
    for kind in ("clean", "degraded"):
        write_photo(tmp_path / kind / "a.png", Photo(pixels + 1000 * (kind == "clean")))
    dataset = TrainingPairs([Source("a", (0,), tuple(paired_folder(tmp_path)))], 48, 1)
    for _ in range(2):  # the second time from the cache
        lq, hq, _ = dataset[0, 0, 0]
        assert len(lq.unique()) == 48 * 48
        torch.testing.assert_close(hq - lq, torch.full_like(lq, 1000 / 65535), rtol=0, atol=1e-6)
    for degradation in ("haze", "noise:sigma=5+lowlight"):
        dataset = TrainingPairs(
            [Source("a", (0,), tuple(clean_folder(tmp_path)), parse_degradation(degradation))], 32, 1
        )
        assert len(dataset[0, 0, 0][1].unique()) == 32 * 32


def test_the_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return Source("a", (0,), tuple(clean_folder(folder)), Noise()).fingerprint()

    for folder in ("one", "two"):
        for name in (b"a.png", b"\xff.png"):  # not all names are text
            write_rgb(tmp_path / folder / os.fsdecode(name), np.zeros((8, 8, 3), np.float32))
    before = fingerprint(tmp_path / "one")
    assert fingerprint(tmp_path / "two") == before
    with (tmp_path / "two" / "a.png").open("ab") as file:
        file.write(b"more")
    assert fingerprint(tmp_path / "two") != before
    (tmp_path / "one" / "a.png").rename(tmp_path / "one" / "b.png")
    assert fingerprint(tmp_path / "one") not in (before, fingerprint(tmp_path / "two"))


def test_workers_change_nothing(sources: list[Source]) -> None:
    dataset = TrainingPairs(sources, 32, 5)
    sampler = EpochSampler(sources, 10, 5, steps=4)
    alone = list(DataLoader(dataset, batch_sampler=sampler))
    together = list(DataLoader(dataset, batch_sampler=sampler, num_workers=2, worker_init_fn=worker_init))
    assert len(alone) == len(together) == 4
    for batch, same in zip(alone, together, strict=True):
        for tensor, other in zip(batch, same, strict=True):
            assert torch.equal(tensor, other)


def test_crops_of_pairs_are_of_one_place_and_come_from_everywhere(positions: Source) -> None:
    dataset = TrainingPairs([positions], 16, 1)
    seen: set[tuple[int, int]] = set()
    for draw in range(400):
        lq, hq, _ = dataset[0, 0, draw]
        assert torch.equal(lq[:2], hq[:2])
        assert (lq[2] == 1).all()
        assert (hq[2] == 0).all()
        rows, columns = (torch.round(255 * hq[channel]).int() for channel in (0, 1))
        assert rows.max() - rows.min() == columns.max() - columns.min() == 15
        seen.add((int(rows.min()), int(columns.min())))
    tops, lefts = zip(*seen, strict=True)
    assert (min(tops), max(tops)) == (0, 24)
    assert (min(lefts), max(lefts)) == (0, 44)


def test_all_eight_orientations_come_equally_often(positions: Source) -> None:
    dataset = TrainingPairs([positions], 8, 1)
    counts: dict[tuple[int, ...], int] = {}
    for draw in range(800):
        _, hq, _ = dataset[0, 0, draw]
        row, column = torch.round(255 * hq[:2]).int()
        steps = tuple(int(field[place]) - int(field[0, 0]) for field in (row, column) for place in ((0, 1), (1, 0)))
        counts[steps] = counts.get(steps, 0) + 1
    assert len(counts) == 8
    assert min(counts.values()) > 60
    assert (0, 1, 1, 0) in counts  # the photo as it is


def test_the_dihedral_group() -> None:
    image = np.arange(9).reshape(3, 3)
    images = [dihedral(image, element) for element in range(8)]
    np.testing.assert_array_equal(images[0], image)
    assert len({view.tobytes() for view in images}) == 8
    for view in images:
        assert sorted(view.ravel()) == list(range(9))
        assert view[1, 1] == 4


def test_a_crop_is_degraded_with_its_surroundings(tmp_path: Path) -> None:
    """Beyond the border of a blurred crop lies the rest of the photo, not its mirror image."""
    stripes = np.zeros((64, 64, 3), np.float32)
    stripes[:, 32:] = 1
    write_rgb(tmp_path / "stripes.png", stripes)
    source = Source("blur", (0,), (Pair("stripes", tmp_path / "stripes.png"),), Blur(extent=(16, 16)))
    dataset = TrainingPairs([source], 30, 1)
    bled = 0
    for draw in range(60):
        lq, hq, _ = dataset[0, 0, draw]
        if hq.max() == 0:  # all black: what is bright came from outside
            bled += bool(lq.max() > 0.1)
    assert bled > 0


def test_real_depth_is_cut_with_the_crop(tmp_path: Path) -> None:
    grey = np.full((40, 60, 3), 0.2, np.float32)
    write_rgb(tmp_path / "rgb/a.png", grey)
    depth = np.full((40, 60), 4000, np.uint16)
    depth[:, :30] = 1
    (tmp_path / "depth").mkdir()
    cv2.imwrite(str(tmp_path / "depth/a.png"), depth)
    pairs = tuple(clean_folder(tmp_path / "rgb", tmp_path / "depth"))
    source = Source("haze", (0,), pairs, parse_degradation("haze:beta=1,airlight=1"))
    far = round(255 * (51 / 255 * np.exp(-1) + 1 - np.exp(-1)))
    seen = set()
    dataset = TrainingPairs([source], 12, 1)
    for draw in range(60):
        seen |= set(torch.round(255 * dataset[0, 0, draw][0]).int().unique().tolist())
    assert seen == {51, far}
    whole = EvaluationPairs(source, 1)[0].lq
    assert set(torch.round(255 * whole[:, :, 30:]).int().unique().tolist()) == {far}


def test_mixtures_have_labels_of_zeros_and_ones(photo_folder: Path) -> None:
    pairs = tuple(clean_folder(photo_folder))
    sources = [
        Source("low_haze", (1, 3), pairs, parse_degradation("cdd11:low_haze")),
        Source("rain", (0,), pairs, parse_degradation("cdd11:rain")),
    ]
    dataset = TrainingPairs(sources, 32, 4, mixtures=True)
    labels = [dataset[index, 0, 0][2] for index in (0, 1)]
    assert labels[0].dtype == torch.float32
    assert labels[0].tolist() == [0, 1, 0, 1]
    assert labels[1].tolist() == [1, 0, 0, 0]
    with pytest.raises(InputError, match="low_haze: 2 labels; accepted: one"):
        TrainingPairs(sources, 32, 4)
    with pytest.raises(InputError, match="low_haze: label 3 of 3 tasks; accepted: 0 to 2"):
        TrainingPairs(sources, 32, 3, mixtures=True)


def damaged(photo_folder: Path, folder: Path) -> list[Pair]:
    """Four files: whole, cut off, no image at all, whole."""
    folder.mkdir()
    data = (photo_folder / "coffee.png").read_bytes()
    for name, content in (("a", data), ("b", data[: len(data) // 2]), ("c", b"no image"), ("d", data)):
        (folder / f"{name}.png").write_bytes(content)
    return clean_folder(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_counted_and_replaced(
    photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    source = Source("noise", (0,), tuple(damaged(photo_folder, tmp_path / "in")), Noise())
    with caplog.at_level(logging.WARNING):
        dataset = TrainingPairs([source], 32, 1)
        assert dataset.skipped == 1  # its header says nothing
        keys = [[(0, index, 5)] for _ in range(3) for index in range(4)]
        batches = list(DataLoader(dataset, batch_sampler=keys, num_workers=workers, worker_init_fn=worker_init))
    assert dataset.skipped == 2
    if workers == 0:  # workers log to where they stand
        assert [record.getMessage().count("skipped in training") for record in caplog.records] == [1, 1]
        assert "c.png" in caplog.text
        assert "b.png" in caplog.text
    whole = Source("noise", (0,), (source.pairs[0], source.pairs[3], source.pairs[3], source.pairs[3]), Noise())
    expected = TrainingPairs([whole], 32, 1)
    for [key], batch in zip(keys, batches, strict=True):
        for tensor, same in zip(batch, expected[key], strict=True):
            assert torch.equal(tensor[0], same)


def test_a_source_without_any_readable_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    dataset = TrainingPairs([Source("noise", (0,), tuple(clean_folder(tmp_path)), Noise())], 32, 1)
    with pytest.raises(InputError, match="noise: none of its 1 photos can be read"):
        dataset[0, 0, 0]


def test_photos_smaller_than_the_crop(sources: list[Source]) -> None:
    with pytest.raises(InputError, match=r"smaller than the crop of 200 x 200: .*chelsea\.png \(226 x 150\)"):
        TrainingPairs(sources, 200, 5)


def test_the_cache_stays_within_its_bytes_and_saves_reading(photo_folder: Path, tmp_path: Path) -> None:
    for name in ("astronaut", "chelsea", "coffee"):
        (tmp_path / f"{name}.png").write_bytes((photo_folder / f"{name}.png").read_bytes())
    source = Source("noise", (0,), tuple(clean_folder(tmp_path)), Noise())
    limit = 3 * 256 * 256 + 3 * 200 * 300  # the astronaut and the coffee
    dataset = TrainingPairs([source], 32, 1, cache_bytes=limit)
    for index in (0, 1, 2):
        dataset[0, index, 0]
        assert dataset._cache.size <= limit
    (tmp_path / "coffee.png").unlink()
    dataset[0, 2, 0]
    assert dataset.skipped == 0
    (tmp_path / "astronaut.png").unlink()
    dataset[0, 0, 0]  # made way for the others
    assert dataset.skipped == 1


def test_evaluation_gives_whole_photos_in_order(photo_folder: Path) -> None:
    pairs = clean_folder(photo_folder)
    source = Source("noise", (2,), tuple(pairs), Noise(sigma=(25,)))
    twice = EvaluationPairs(Source("noise", (2,), (pairs[0], pairs[0]), Noise()), 5)
    assert not torch.equal(twice[0].lq, twice[1].lq)
    evaluation, again = (EvaluationPairs(source, 5, seed=3) for _ in range(2))
    assert [item.name for item in evaluation] == [pair.name for pair in pairs]
    for index in (3, 0, 1, 2):
        name, lq, hq, label = evaluation[index]
        assert label == 2
        np.testing.assert_array_equal(hq.permute(1, 2, 0).numpy(), read_rgb(pairs[index].clean))
        assert lq.shape == hq.shape
        assert torch.equal(lq, again[index].lq), name
    assert not torch.equal(EvaluationPairs(source, 5, seed=4)[0].lq, evaluation[0].lq)


def test_evaluation_of_real_pairs(shared: Path) -> None:
    source = Source("derain", (1,), tuple(paired_folder(shared / "data/test/derain")[:3]))
    for item, pair in zip(EvaluationPairs(source, 2), source.pairs, strict=True):
        assert pair.degraded is not None
        np.testing.assert_array_equal(item.lq.permute(1, 2, 0).numpy(), read_rgb(pair.degraded))
        np.testing.assert_array_equal(item.hq.permute(1, 2, 0).numpy(), read_rgb(pair.clean))


def test_evaluation_fails_on_what_cannot_be_read(photo_folder: Path, tmp_path: Path) -> None:
    pairs = damaged(photo_folder, tmp_path / "in")
    with pytest.raises(InputError, match=r"c\.png"):
        EvaluationPairs(Source("noise", (0,), tuple(pairs), Noise()), 1)
    cut_off = EvaluationPairs(Source("noise", (0,), (pairs[1],), Noise()), 1)
    with pytest.raises(InputError, match=r"b\.png"):
        cut_off[0]


def test_pairs_that_turn_out_to_differ_in_size(tmp_path: Path) -> None:
    write_rgb(tmp_path / "clean.png", np.zeros((40, 40, 3), np.float32))
    write_rgb(tmp_path / "degraded.png", np.zeros((40, 41, 3), np.float32))
    source = Source("x", (0,), (Pair("x", tmp_path / "clean.png", tmp_path / "degraded.png"),))
    with pytest.raises(InputError, match=r"degraded\.png: 41 x 40, but its clean photo is 40 x 40"):
        EvaluationPairs(source, 1)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": ()}, "x: no photo"),
        ({"optional": (0,)}, "x: labels"),
        ({"share": 0.0}, "x: share"),
        ({"reduce": (0.5, 1.5)}, "x: reduce"),
        ({"labels": (1, 1)}, "x: labels"),
        ({"labels": (-1,)}, "x: labels"),
        ({"repeat": 0}, "x: repeat 0"),
        ({"degradation": None}, "either degraded photos for all, or a degradation"),
        ({"pairs": (Pair("a", Path("a"), Path("b")),)}, "either degraded photos for all, or a degradation"),
        ({"depth_encoding": "feet"}, "depth encoding 'feet' is unknown"),
    ],
)
def test_sources_that_make_no_sense(change: dict, message: str) -> None:
    good = {"name": "x", "labels": (0,), "pairs": (Pair("a", Path("a")),), "degradation": Noise()}
    with pytest.raises(InputError, match=message):
        Source(**{**good, **change})


def test_photos_with_nothing_wrong_are_to_stay_as_they_are(photo_folder: Path) -> None:
    pairs = tuple(clean_folder(photo_folder))
    source = Source("clean", (), pairs, Jpeg(quality=(20, 20)), optional=(1,))
    for pair in (
        TrainingPairs([source], 32, 3, mixtures=True)[0, 0, 5],
        EvaluationPairs(source, 3, mixtures=True)[0][1:],
    ):
        lq, hq, label = pair
        assert torch.equal(lq, hq)
        assert label.tolist() == [0, 0.5, 0]
    with pytest.raises(InputError, match="accepted: one, unless training on mixtures"):
        TrainingPairs([source], 32, 3)


def test_reduced_photos_show_more_in_a_crop(photo_folder: Path) -> None:
    pairs = tuple(clean_folder(photo_folder))[:1]
    whole = read_rgb(pairs[0].clean)
    side = min(whole.shape[:2])
    crop = side // 2
    reduced = Source("x", (0,), pairs, Jpeg(chance=(0, 0)), reduce=(crop / side, crop / side))
    _, hq, _ = TrainingPairs([reduced], crop, 1)[0, 0, 3]
    height, width = (round(length * crop / side) for length in whole.shape[:2])
    small = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    views = [small[y : y + crop, x : x + crop] for y in range(height - crop + 1) for x in range(width - crop + 1)]
    turned = [dihedral(hq.numpy().transpose(1, 2, 0), element) for element in range(8)]
    assert min(np.abs(view - one).mean() for view in views for one in turned) < 0.02
    _, _, clean, _ = EvaluationPairs(reduced, 1)[0]
    assert clean.shape[1:] == (height, width)


def test_a_reduction_leaves_enough_for_the_crop(photo_folder: Path) -> None:
    pairs = tuple(clean_folder(photo_folder))
    source = Source("x", (0,), pairs, Noise(), reduce=(0.01, 1.0))
    dataset = TrainingPairs([source], 40, 1)
    assert {dataset[0, index % len(pairs), index][0].shape for index in range(20)} == {(3, 40, 40)}
    with pytest.raises(InputError, match="smaller than the crop"):
        TrainingPairs([Source("x", (0,), pairs, Noise(), reduce=(0.01, 0.02))], 40, 1)
    with pytest.raises(InputError, match="accepted for evaluation: one number"):
        EvaluationPairs(source, 1)
