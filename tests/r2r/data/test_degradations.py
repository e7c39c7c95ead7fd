from __future__ import annotations

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from r2r.data.degradations import (
    CDD11,
    DEGRADATIONS,
    TASK_DEGRADATIONS,
    Blur,
    Degradation,
    Haze,
    LowLight,
    Mixture,
    Noise,
    Rain,
    Snow,
    parse_degradation,
    shake_kernel,
)
from r2r.data.images import read_rgb
from r2r.errors import InputError

ALL = {**{name: kind() for name, kind in DEGRADATIONS.items()}, **{f"cdd11:{name}": it for name, it in CDD11.items()}}
everything = pytest.mark.parametrize("degradation", ALL.values(), ids=ALL.keys())


def degrade(degradation: Degradation, photo: np.ndarray, seed: int = 0, depth: np.ndarray | None = None) -> np.ndarray:
    return degradation(photo, np.random.default_rng(seed), depth)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((image - other) ** 2)))


def dark_channel(image: np.ndarray) -> float:
    return float(cv2.erode(image.min(axis=2), np.ones((15, 15))).mean())


@everything
def test_same_state_same_bits_and_the_input_is_left_alone(degradation: Degradation, photos: list[np.ndarray]) -> None:
    photo = photos[0]
    before = photo.copy()
    first, again, other = (degrade(degradation, photo, seed) for seed in (3, 3, 4))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    np.testing.assert_array_equal(photo, before)


@everything
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (2, 3), (33, 50)])
def test_any_size(degradation: Degradation, shape: tuple[int, int]) -> None:
    photo = np.random.default_rng(0).random((*shape, 3), np.float32)
    degraded = degrade(degradation, photo)
    assert degraded.shape == photo.shape
    assert degraded.dtype == np.float32
    assert degraded.min() >= 0
    assert degraded.max() <= 1
    np.testing.assert_array_equal(degraded, np.rint(degraded * 255) / np.float32(255))


@everything
def test_memory_layout_does_not_matter(degradation: Degradation, photos: list[np.ndarray]) -> None:
    crop = photos[1][10:90:1, 20:100]
    planar = np.ascontiguousarray(crop.transpose(2, 0, 1)).transpose(1, 2, 0)
    mirrored = np.ascontiguousarray(crop[:, ::-1])[:, ::-1]
    expected = degrade(degradation, np.ascontiguousarray(crop))
    for view in (crop, planar, mirrored, crop.astype(np.float64)):
        np.testing.assert_array_equal(degrade(degradation, view), expected)


@everything
def test_the_spec_says_it_all(degradation: Degradation) -> None:
    assert parse_degradation(str(degradation)) == degradation


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.float32), r"shape \(4, 4\); accepted: \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.float32), "shape"),
        (np.full((4, 4, 3), np.nan, np.float32), r"outside \[0, 1\]"),
        (np.full((4, 4, 3), 128.0, np.float32), r"outside \[0, 1\]"),
    ],
)
def test_arrays_that_are_no_photos(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        degrade(Noise(), array)


def test_noise_has_the_spread_asked_for() -> None:
    grey = np.full((200, 200, 3), 128 / 255, np.float32)
    for sigma in (5, 15, 25, 30):
        noise = 255 * (degrade(Noise(sigma=(sigma,)), grey).astype(np.float64) - 128 / 255)
        assert noise.std() == pytest.approx(sigma, rel=0.01)
        assert noise.mean() == pytest.approx(-0.5, abs=0.3)  # values are cut down to whole numbers, as published
        assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.02


def test_noise_draws_each_of_its_levels(photos: list[np.ndarray]) -> None:
    grey = np.full((64, 64, 3), 0.5, np.float32)
    levels = {int(np.rint(255 * degrade(Noise(), grey, seed).std() / 5) * 5) for seed in range(20)}
    assert levels == {15, 25, 50}


GREY = np.full((256, 256, 3), 128 / 255, np.float32)


def noise_of(spec: str, photo: np.ndarray = GREY, seed: int = 0) -> np.ndarray:
    return 255 * (degrade(parse_degradation(spec), photo, seed).astype(np.float64) - photo)


def test_a_range_of_noise_is_drawn_from_evenly() -> None:
    levels = [noise_of("noise:sigma=10..30", GREY[:64, :64], seed).std() for seed in range(60)]
    assert 9 < min(levels) < 13
    assert 27 < max(levels) < 31
    assert 18 < np.mean(levels) < 22
    assert {round(noise_of("noise:sigma=10/30", GREY[:64, :64], seed).std() / 10) for seed in range(20)} == {1, 3}


def test_grain_joins_neighbours_and_keeps_the_deviation() -> None:
    for grain, likeness in ((1, 0.0), (2, 0.63), (3, 0.84)):
        noise = noise_of(f"noise:sigma=20,grain={grain}")
        assert noise.std() == pytest.approx(20, rel=0.05)
        neighbours = np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]
        assert neighbours == pytest.approx(likeness, abs=0.05)


def test_shot_noise_grows_with_the_signal() -> None:
    dark, bright = np.full_like(GREY, 0.25), np.full_like(GREY, 0.5)
    for signal, ratio in ((0, 1.0), (1, 2**0.5)):
        spec = f"noise:sigma=10,signal={signal}"
        assert noise_of(spec, bright).std() / noise_of(spec, dark).std() == pytest.approx(ratio, rel=0.03)


def test_noise_may_be_weaker_in_one_colour() -> None:
    spread = np.sort(noise_of("noise:sigma=20,imbalance=0.5").std(axis=(0, 1)))
    assert spread == pytest.approx([10, 20, 20], rel=0.05)


def test_grey_noise_is_the_same_in_all_colours() -> None:
    for grey in (0, 0.5, 1):
        noise = noise_of(f"noise:sigma=20,grey={grey}")
        assert noise.std() == pytest.approx(20, rel=0.05)
        assert np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1] == pytest.approx(grey, abs=0.03)


def test_jpeg_is_what_pillow_writes(photos: list[np.ndarray]) -> None:
    for spec, subsampling in (("halved=1", "4:2:0"), ("halved=0", "4:4:4")):
        file = io.BytesIO()
        Image.fromarray(np.rint(255 * photos[0]).astype(np.uint8)).save(
            file, "JPEG", quality=30, subsampling=subsampling
        )
        wanted = np.asarray(Image.open(file), np.float32) / 255
        got = degrade(parse_degradation(f"jpeg:quality=30,{spec}"), photos[0])
        assert psnr(got, wanted) > 45
        assert psnr(got, photos[0]) < 40


def test_the_lower_the_quality_the_worse(photos: list[np.ndarray]) -> None:
    kept = [psnr(degrade(parse_degradation(f"jpeg:quality={q}"), photos[0]), photos[0]) for q in (10, 30, 60, 95)]
    assert kept == sorted(kept)


@pytest.mark.parametrize("kind", ["jpeg", "resize"])
def test_chance_is_the_share_of_photos_that_change(photos: list[np.ndarray], kind: str) -> None:
    photo = np.rint(255 * photos[0][:40, :40]) / np.float32(255)
    changed = [
        not np.array_equal(degrade(parse_degradation(f"{kind}:chance=0.3"), photo, seed), photo) for seed in range(100)
    ]
    assert 0.2 < np.mean(changed) < 0.4


def test_resizing_takes_detail_and_makes_noise_coarser(photos: list[np.ndarray]) -> None:
    noise = noise_of("noise:sigma=20+resize:factor=0.5")
    assert noise.std() < 14
    assert np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1] > 0.4
    assert 15 < psnr(degrade(parse_degradation("resize:factor=0.5"), photos[0]), photos[0]) < 45


def test_no_noise_changes_nothing(photos: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(degrade(Noise(sigma=(0,)), photos[0]), photos[0])


def test_rain_is_as_strong_as_in_rain100l(shared: Path) -> None:
    files = sorted((shared / "data/test/derain/clean").glob("*.png"))[:24]
    real, synthesised = [], []
    for seed, path in enumerate(files):
        clean = read_rgb(path)
        real.append(psnr(read_rgb(path.parents[1] / "degraded" / path.name), clean))
        synthesised.append(psnr(degrade(Rain(), clean, seed), clean))
    assert np.mean(synthesised) == pytest.approx(np.mean(real), abs=1.5)
    assert np.std(synthesised) == pytest.approx(np.std(real), abs=1.5)


def test_rain_brightens_all_channels_alike_in_streaks_of_one_direction() -> None:
    black = np.zeros((240, 320, 3), np.float32)
    for angle in (-25, 0, 25):
        streaks = degrade(Rain(angle=(angle, angle)), black)
        np.testing.assert_array_equal(streaks, streaks[..., :1].repeat(3, axis=2))
        assert 0.03 < (streaks[..., 0] > 0.03).mean() < 0.5
        smooth = cv2.GaussianBlur(streaks[..., 0], (0, 0), 1)
        across, down = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
        # The gradient points across the streaks; turned back by a right angle it runs down and right like them.
        lean = -0.5 * np.degrees(np.arctan2(2 * (across * down).mean(), (across**2 - down**2).mean()))
        assert lean == pytest.approx(angle, abs=4)


def test_haze_is_the_scattering_model(photos: list[np.ndarray]) -> None:
    photo = photos[2]
    depth = np.linspace(0, 1, photo.shape[1], dtype=np.float32)[None].repeat(photo.shape[0], axis=0)
    hazy = degrade(Haze(beta=(2, 2), airlight=(0.8, 0.8)), photo, depth=depth)
    t = np.exp(-2 * depth)[..., None]
    np.testing.assert_allclose(hazy, photo * t + 0.8 * (1 - t), atol=0.51 / 255)


def test_tinted_haze_is_weaker_in_each_colour_by_no_more_than_asked(photos: list[np.ndarray]) -> None:
    thick = Haze(beta=(100, 100), airlight=(0.9, 0.9), tint=(0.4, 0.4))
    airlights = np.array(
        [degrade(thick, photos[0], seed, np.ones(photos[0].shape[:2], np.float32))[0, 0] for seed in range(40)]
    )
    assert airlights.min() >= 0.9 * 0.6 - 1 / 255
    assert airlights.max() <= 0.9 + 1 / 255
    assert np.ptp(airlights, axis=1).max() > 0.2
    assert np.allclose(airlights.mean(axis=0), 0.9 * 0.8, atol=0.06)


def test_haze_lifts_the_dark_channel_with_made_up_depth(photos: list[np.ndarray]) -> None:
    for photo in photos:
        for seed in range(4):
            assert dark_channel(degrade(Haze(), photo, seed)) > dark_channel(photo) + 0.05


def test_haze_refuses_depth_of_another_size(photos: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="depth of shape"):
        degrade(Haze(), photos[0], depth=np.zeros((3, 3), np.float32))


def test_shake_kernels_do_not_shift_or_darken() -> None:
    for seed in range(50):
        extent = 1 + seed / 2
        kernel = shake_kernel(extent, np.random.default_rng(seed))
        middle = len(kernel) // 2
        y, x = np.mgrid[-middle : middle + 1, -middle : middle + 1]
        assert kernel.dtype == np.float32
        assert kernel.min() >= 0
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert (kernel * x).sum() == pytest.approx(0, abs=1e-4)
        assert (kernel * y).sum() == pytest.approx(0, abs=1e-4)
        used_y, used_x = np.nonzero(kernel > 1e-6)
        assert max(np.ptp(used_y), np.ptp(used_x)) <= extent + 2
        assert middle < Blur(extent=(extent, extent)).margin


def test_shake_paths_are_straight_sometimes_and_mostly_not() -> None:
    straightness = []
    for seed in range(60):
        kernel = shake_kernel(20, np.random.default_rng(seed))
        y, x = np.nonzero(kernel > 1e-3)
        spread = np.linalg.eigvalsh(np.cov(np.stack([y, x])))
        straightness.append(spread[0] / spread[1])
    assert 0.1 < np.mean(np.array(straightness) < 0.02) < 0.6


def test_blur_smooths_and_stays_in_place(photos: list[np.ndarray]) -> None:
    for seed, photo in enumerate(photos):
        blurred = degrade(Blur(), photo, seed)
        assert np.abs(np.diff(blurred, axis=0)).mean() < np.abs(np.diff(photo, axis=0)).mean()
        np.testing.assert_allclose(degrade(Blur(), np.full((40, 40, 3), 0.2, np.float32), seed), 51 / 255, atol=1e-6)


def test_a_blurred_dot_keeps_its_place_and_its_light() -> None:
    dot = np.zeros((61, 61, 3), np.float32)
    dot[28:33, 28:33] = 1
    y, x = np.mgrid[:61, :61]
    for seed in range(8):
        light = degrade(Blur(extent=(12, 12)), dot, seed)[..., 0].astype(np.float64) ** 2
        assert light.sum() == pytest.approx(25, rel=0.02)
        assert (light * y).sum() / light.sum() == pytest.approx(30, abs=0.1)
        assert (light * x).sum() / light.sum() == pytest.approx(30, abs=0.1)


def test_low_light_is_as_dark_as_lol(shared: Path) -> None:
    files = sorted((shared / "data/train/lowlight/clean").glob("*.png"))
    means, ratios = [], []
    for seed, path in enumerate(files[:16]):
        clean = read_rgb(path)
        dark = degrade(LowLight(), clean, seed)
        real = read_rgb(path.parents[1] / "degraded" / path.name)
        means.append((dark.mean(), real.mean()))
        ratios.append(psnr(dark, clean) - psnr(real, clean))
    synthesised, real_mean = np.mean(means, axis=0)
    assert 0.6 < synthesised / real_mean < 1.6
    assert abs(np.mean(ratios)) < 2


def test_low_light_darkens_and_is_noisier_where_it_is_brighter(photos: list[np.ndarray]) -> None:
    for seed, photo in enumerate(photos):
        assert degrade(LowLight(), photo, seed).mean() < 0.6 * photo.mean()
    steps = np.full((128, 256, 3), 0.1, np.float32)
    steps[:, 128:] = 1
    dark = degrade(LowLight(gain=(0.3, 0.3), gamma=(1, 1), shot=(6e-4, 6e-4)), steps)
    assert dark[:, 128:].std(axis=(0, 1)).min() > 1.5 * dark[:, :128].std(axis=(0, 1)).min()


def test_snow_brightens_a_dark_scene_in_spots() -> None:
    dark = np.full((200, 300, 3), 0.1, np.float32)
    spots = degrade(Snow(veil=(0, 0)), dark)
    assert spots.min() == pytest.approx(26 / 255)
    assert spots.max() > 0.4
    assert 0.01 < (spots[..., 0] > 0.2).mean() < 0.4
    assert degrade(Snow(density=(0, 0), veil=(0.2, 0.2)), dark).min() > 0.2


def test_mixtures_keep_their_order() -> None:
    grey = np.full((64, 64, 3), 0.5, np.float32)
    depth = np.ones((64, 64), np.float32)
    haze_last = degrade(parse_degradation("lowlight+haze:beta=5,airlight=0.9"), grey, depth=depth)
    dark_last = degrade(parse_degradation("haze:beta=5,airlight=0.9+lowlight"), grey, depth=depth)
    assert haze_last.mean() > 0.8
    assert dark_last.mean() < 0.5


def test_mixtures_need_what_their_parts_need() -> None:
    mixture = parse_degradation("blur:extent=10+haze+blur:extent=4")
    assert mixture.needs_depth
    assert mixture.margin == Blur(extent=(10, 10)).margin + Blur(extent=(4, 4)).margin
    assert not parse_degradation("rain+noise").needs_depth


def test_cdd11_classes_come_in_the_published_order() -> None:
    assert len(CDD11) == 11
    for name, degradation in CDD11.items():
        parts = degradation.parts if isinstance(degradation, Mixture) else (degradation,)
        expected = {"low": "lowlight", "haze": "haze", "rain": "rain", "snow": "snow"}
        assert {part.name for part in parts} == {expected[word] for word in name.split("_")}
        order = [("lowlight", "rain", "snow", "haze").index(part.name) for part in parts]
        assert order == sorted(order)


def test_each_task_undoes_a_degradation() -> None:
    for name in TASK_DEGRADATIONS.values():
        assert parse_degradation(name) == DEGRADATIONS[name]()


def test_parsing_values() -> None:
    assert parse_degradation("noise:sigma=25") == Noise(sigma=(25,))
    assert parse_degradation("noise:sigma=5/10") == Noise(sigma=(5, 10))
    assert parse_degradation("haze:beta=0.5..2,airlight=0.9") == Haze(beta=(0.5, 2), airlight=(0.9, 0.9))
    assert parse_degradation("rain:angle=-10..-5") == Rain(angle=(-10, -5))
    assert parse_degradation("lowlight + rain") == Mixture((LowLight(), Rain()))
    assert parse_degradation("cdd11:low_haze") == CDD11["low_haze"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "fog",
            "degradation 'fog' is unknown; accepted: noise, rain, haze, blur, lowlight, snow, jpeg, resize, cdd11:",
        ),
        ("", "degradation '' is unknown"),
        ("noise+", "degradation '' is unknown"),
        ("noise:level=3", "noise: 'level' is unknown; accepted: sigma"),
        ("noise:sigma=high", "noise: sigma is 'high'; accepted: numbers a/b/c or a range low..high within [0, 255]"),
        ("noise:sigma=300", "noise: sigma is '300'; accepted"),
        ("noise:sigma=nan", "noise: sigma is 'nan'; accepted"),
        ("haze:beta=2..1", "haze: beta is '2..1'; accepted: a number or a range low..high within [0, 100]"),
        ("haze:beta=1..2..3", "haze: beta is '1..2..3'; accepted"),
        ("haze:beta", "haze: beta is ''; accepted"),
        ("cdd11:fog", "cdd11: class 'fog' is unknown; accepted: low, haze"),
    ],
)
def test_specs_that_mean_nothing(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        parse_degradation(spec)
    assert "\n" not in str(caught.value)
