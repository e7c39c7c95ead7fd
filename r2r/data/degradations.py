"""Degradations synthesised from a clean photo: what goes wrong, how strongly, and in which order.

Each is a frozen dataclass of ranges. Called with a photo and a random generator it draws its parameters and gives the
degraded photo: the same photo and generator state give the same bits. Lengths are in pixels, whatever the size of the
photo. A spec names one in text: `noise:sigma=25`, `haze:beta=0.6..1.8`, `lowlight+rain+haze`. docs/degradations.md
shows each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, ClassVar, NamedTuple, get_type_hints

import cv2
import numpy as np

from r2r.data.depth import plausible_depth
from r2r.errors import InputError

Range = tuple[float, float]
"""Lowest and highest value; one between them is drawn for each photo."""


class Span(NamedTuple):
    """A range, for a field that else holds a list of values."""

    low: float
    high: float


class Limits(NamedTuple):
    """What a field accepts: a range within [least, most]; with `choices` also a list, a value of which is drawn."""

    least: float
    most: float
    choices: bool = False

    def format(self, values: tuple[float, ...]) -> str:
        if len(set(values)) == 1:
            return f"{values[0]:.12g}"
        return ("/" if self._is_list(values) else "..").join(f"{value:.12g}" for value in values)

    def parse(self, text: str) -> tuple[float, ...]:
        if self.choices and ".." not in text:
            return tuple(map(float, text.split("/")))
        values = tuple(map(float, text.split("..")))
        values = values * 2 if len(values) == 1 else values
        return Span(*values) if self.choices and len(values) == 2 else values

    def accept(self, values: tuple[float, ...]) -> bool:
        ordered = self._is_list(values) or (len(values) == 2 and values[0] <= values[1])
        return ordered and bool(values) and all(self.least <= value <= self.most for value in values)

    def _is_list(self, values: tuple[float, ...]) -> bool:
        return self.choices and not isinstance(values, Span)

    def __str__(self) -> str:
        accepted = "numbers a/b/c" if self.choices else "a number"
        return f"{accepted} or a range low..high within [{self.least:g}, {self.most:g}]"


@dataclass(frozen=True)
class Degradation:
    """What can go wrong with a photo. Fields are ranges; `str()` gives the spec that `parse_degradation` reads."""

    name: ClassVar[str]

    @classmethod
    @cache
    def limits(cls) -> dict[str, Limits]:
        """The fields by name."""
        hints = get_type_hints(cls, include_extras=True)
        return {entry.name: hints[entry.name].__metadata__[0] for entry in fields(cls)}

    def __post_init__(self) -> None:
        for key, limits in self.limits().items():
            values = getattr(self, key)
            if not limits.accept(values):
                raise InputError(f"{self.name}: {key} is {limits.format(values)!r}; accepted: {limits}")

    @property
    def margin(self) -> int:
        """How many pixels beyond a crop's border its content can come from."""
        return 0

    @property
    def needs_depth(self) -> bool:
        return False

    def __call__(self, clean: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None = None) -> np.ndarray:
        """clean float32 [H, W, 3] in [0, 1] -> degraded, the same shape and range, in steps of 1/255 as in a file.

        depth: relative distance, float32 [H, W] in [0, 1]; where it is needed and not given it is made up
        (`r2r.data.depth.plausible_depth`). Raises InputError for other shapes, NaN and values outside [0, 1].
        """
        if clean.ndim != 3 or clean.shape[2] != 3 or 0 in clean.shape:
            raise InputError(f"{self.name}: an array of shape {clean.shape}; accepted: [H, W, 3]")
        if not (clean.min() >= 0 and clean.max() <= 1):
            raise InputError(f"{self.name}: NaN or values outside [0, 1]")
        if depth is not None and depth.shape != clean.shape[:2]:
            raise InputError(f"{self.name}: depth of shape {depth.shape} for a photo of {clean.shape[:2]}")
        photo = np.ascontiguousarray(clean, np.float32)
        if depth is None and self.needs_depth:
            depth = plausible_depth(photo, rng)
        degraded = self.apply(photo, rng, depth)
        return np.rint(np.clip(degraded, 0, 1) * 255) / np.float32(255)

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        """The degradation itself; `photo` is checked and left unchanged. Values may leave [0, 1]."""
        raise NotImplementedError

    def __str__(self) -> str:
        values = (f"{key}={limits.format(getattr(self, key))}" for key, limits in self.limits().items())
        return f"{self.name}:{','.join(values)}"


@dataclass(frozen=True)
class Mixture(Degradation):
    """Several degradations, one after the other, in the order given."""

    name: ClassVar[str] = "mixture"
    parts: tuple[Degradation, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("mixture: no degradation given")

    @property
    def margin(self) -> int:
        return sum(part.margin for part in self.parts)

    @property
    def needs_depth(self) -> bool:
        return any(part.needs_depth for part in self.parts)

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        for part in self.parts:
            photo = np.clip(part.apply(photo, rng, depth), 0, 1)
        return photo

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


@dataclass(frozen=True)
class Noise(Degradation):
    """Noise of the standard deviation `sigma`, on the scale 0 to 255. By default it is white and Gaussian.

    As in AirNet and PromptIR the noisy values are clipped and cut down to whole numbers, so results compare.
    sigma: a list of values, one of which is drawn, or a range. The rest makes it what cameras and films give.
    grain: diameter of a grain in pixels; 1 is white noise. signal: share of the variance that grows with the brightness
    (shot noise), the rest is the same everywhere (read noise). imbalance: by how much it may be weaker in one colour.
    grey: share of the variance that all colours have in common. `sigma` is the deviation at middle grey.
    """

    name: ClassVar[str] = "noise"
    sigma: Annotated[tuple[float, ...], Limits(0, 255, choices=True)] = (15, 25, 50)
    grain: Annotated[Range, Limits(1, 16)] = (1, 1)
    signal: Annotated[Range, Limits(0, 1)] = (0, 0)
    imbalance: Annotated[Range, Limits(0, 1)] = (0, 0)
    grey: Annotated[Range, Limits(0, 1)] = (0, 0)

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        if isinstance(self.sigma, Span):
            sigma = np.float32(rng.uniform(*self.sigma))
        else:
            sigma = np.float32(self.sigma[rng.integers(len(self.sigma))])
        noise = rng.standard_normal(photo.shape, np.float32)
        # A field that is off draws nothing, so that plain noise stays the same bits whatever is added here.
        if self.grey[1] > 0:
            share = np.float32(rng.uniform(*self.grey))
            common = rng.standard_normal((*photo.shape[:2], 1), np.float32)
            noise = np.sqrt(1 - share) * noise + np.sqrt(share) * common
        if self.grain[1] > 1:
            noise = _coarser(noise, rng.uniform(*self.grain))
        if self.imbalance[1] > 0:
            weaker = np.ones(3, np.float32)
            weaker[rng.integers(3)] -= np.float32(rng.uniform(*self.imbalance))
            noise = noise * weaker
        if self.signal[1] > 0:
            share = np.float32(rng.uniform(*self.signal))
            noise = noise * np.sqrt(1 - share + share * 2 * photo)
        noisy = np.rint(photo * 255) + sigma * noise
        return np.floor(np.clip(noisy, 0, 255)) / np.float32(255)


@dataclass(frozen=True)
class Rain(Degradation):
    """Bright streaks added to the photo, in layers from far (short, thin, faint, many) to near, as in Rain100L.

    angle: degrees from the vertical, positive where drops fall to the right; length, width: of the nearest streaks;
    density: streaks in 1000 pixels, all layers together; opacity: brightness that the nearest streaks add.
    """

    name: ClassVar[str] = "rain"
    angle: Annotated[Range, Limits(-60, 60)] = (-30, 30)
    length: Annotated[Range, Limits(1, 400)] = (30, 100)
    width: Annotated[Range, Limits(0.5, 40)] = (1.5, 3.5)
    density: Annotated[Range, Limits(0, 100)] = (1.5, 6)
    opacity: Annotated[Range, Limits(0, 1)] = (0.2, 0.9)

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        angle, density = rng.uniform(*self.angle), rng.uniform(*self.density) / 1000
        length, width, opacity = (_log_uniform(rng, span) for span in (self.length, self.width, self.opacity))
        streaks = np.zeros(photo.shape[:2], np.float32)
        for nearness, share in ((0.45, 0.5), (0.7, 0.3), (1.0, 0.2)):
            streaks += _streaks(
                streaks.shape,
                rng,
                density=share * density,
                length=nearness * length * rng.uniform(0.7, 1.3),
                width=max(1.0, nearness * width),
                opacity=nearness * opacity,
                angle=angle + rng.normal(0, 1.5),
            )
        return photo + streaks[..., None]


@dataclass(frozen=True)
class Haze(Degradation):
    """Scattering: photo * t + airlight * (1 - t) with t = exp(-beta * depth), the ranges those of RESIDE's indoor set.

    beta is for relative depth; RESIDE's outdoor set draws 0.04 to 0.2 a metre and an airlight from 0.8. tint: by how
    much the airlight may be weaker in a colour; lamps, smoke and sand colour it.
    """

    name: ClassVar[str] = "haze"
    beta: Annotated[Range, Limits(0, 100)] = (0.6, 1.8)
    airlight: Annotated[Range, Limits(0, 1)] = (0.7, 1.0)
    tint: Annotated[Range, Limits(0, 1)] = (0, 0)

    @property
    def needs_depth(self) -> bool:
        return True

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        assert depth is not None, "__call__ makes depth up where there is none"
        beta, airlight = np.float32(rng.uniform(*self.beta)), np.full(3, rng.uniform(*self.airlight), np.float32)
        if self.tint[1] > 0:  # a field that is off draws nothing, as for noise
            airlight = airlight * (1 - np.float32(rng.uniform(*self.tint)) * rng.random(3, np.float32))
        transmission = np.exp(-beta * depth.astype(np.float32, copy=False))[..., None]
        return airlight + (photo - airlight) * transmission


@dataclass(frozen=True)
class Blur(Degradation):
    """Camera shake: the photo is averaged along a random walk with inertia (after Boracchi and Foi 2012, as in GoPro).

    extent: how far, in pixels, the camera moves. Light adds up before the camera's tone curve, here a square root.
    """

    name: ClassVar[str] = "blur"
    extent: Annotated[Range, Limits(1, 200)] = (4, 20)

    @property
    def margin(self) -> int:
        return math.ceil(1.01 * self.extent[1]) + 2  # no point of the path is farther from its mean

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        kernel = shake_kernel(rng.uniform(*self.extent), rng)
        light = cv2.filter2D(photo * photo, -1, kernel, borderType=cv2.BORDER_REFLECT)
        return np.sqrt(np.maximum(light, 0))


@dataclass(frozen=True)
class LowLight(Degradation):
    """A short exposure: gain * photo ** gamma, a shifted white balance, read and shot noise; the default reaches from
    a dim room to the darkest of LOL.

    balance: largest relative change of a colour channel; read: noise at black, on the scale 0 to 255; shot: variance of
    the noise relative to the signal, on the scale 0 to 1.
    """

    name: ClassVar[str] = "lowlight"
    gain: Annotated[Range, Limits(0.001, 1)] = (0.08, 0.5)
    gamma: Annotated[Range, Limits(0.5, 5)] = (1.1, 2.2)
    balance: Annotated[Range, Limits(0, 0.9)] = (0, 0.12)
    read: Annotated[Range, Limits(0, 255)] = (0.4, 1.2)
    shot: Annotated[Range, Limits(0, 1)] = (1e-4, 6e-4)

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        gain, gamma = _log_uniform(rng, self.gain), rng.uniform(*self.gamma)
        balance = 1 + rng.uniform(*self.balance) * rng.uniform(-1, 1, 3)
        read, shot = rng.uniform(*self.read) / 255, rng.uniform(*self.shot)
        dark = cv2.pow(photo, gamma) * (gain * balance).astype(np.float32)
        # A colour filter array has twice the green samples, and red and blue need more gain.
        channels = np.array([1.5, 0.9, 1.2], np.float32)
        spread = np.sqrt(np.float32(read**2) + np.float32(shot) * dark) * channels
        return dark + spread * rng.standard_normal(photo.shape, np.float32)


@dataclass(frozen=True)
class Snow(Degradation):
    """Flakes in three sizes, smeared a little by their fall, over a thin veil of those too far off to see.

    radius: of the nearest flakes; density: flakes in 1000 pixels, all sizes together; opacity: of the flakes; fall: how
    far the nearest ones move; angle: of the fall, degrees from the vertical; veil: opacity of the veil.
    """

    name: ClassVar[str] = "snow"
    radius: Annotated[Range, Limits(0.5, 50)] = (2, 5)
    density: Annotated[Range, Limits(0, 100)] = (2, 10)
    opacity: Annotated[Range, Limits(0, 1)] = (0.5, 0.95)
    fall: Annotated[Range, Limits(0, 100)] = (0, 10)
    angle: Annotated[Range, Limits(-90, 90)] = (-40, 40)
    veil: Annotated[Range, Limits(0, 1)] = (0, 0.2)

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        radius, density = rng.uniform(*self.radius), rng.uniform(*self.density) / 1000
        opacity, fall = rng.uniform(*self.opacity), rng.uniform(*self.fall)
        angle, veil = math.radians(rng.uniform(*self.angle)), rng.uniform(*self.veil)
        clear = np.full(photo.shape[:2], 1 - veil, np.float32)  # what comes through
        for nearness, share in ((0.25, 0.8), (0.5, 0.15), (1.0, 0.05)):
            flake = _flake(max(0.6, nearness * radius), nearness * fall, angle + rng.normal(0, 0.1), rng)
            flakes = _scatter(clear.shape, share * density, len(flake) // 2, rng)
            flakes = _crop(cv2.filter2D(flakes, -1, flake, borderType=cv2.BORDER_CONSTANT), clear.shape)
            clear *= 1 - opacity * np.clip(flakes, 0, 1)
        white = np.float32(rng.uniform(0.9, 1.0))
        return white + (photo - white) * clear[..., None]


@dataclass(frozen=True)
class Jpeg(Degradation):
    """JPEG compression, as libjpeg does it.

    quality: libjpeg's, 1 to 100. halved: share of the photos whose colours are halved in both directions (4:2:0), as
    cameras, phones and sites do; the others keep them (4:4:4). chance: share of the photos that are compressed at all.
    """

    name: ClassVar[str] = "jpeg"
    quality: Annotated[Range, Limits(1, 100)] = (10, 60)
    halved: Annotated[Range, Limits(0, 1)] = (0.8, 0.8)
    chance: Annotated[Range, Limits(0, 1)] = (1, 1)

    @property
    def margin(self) -> int:
        return 16  # the largest block of pixels that is coded together

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        quality, halved = round(rng.uniform(*self.quality)), rng.random() < rng.uniform(*self.halved)
        if rng.random() >= rng.uniform(*self.chance):
            return photo
        sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420 if halved else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
        how = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
        pixels = np.rint(photo * 255).astype(np.uint8)
        _, code = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), how)
        decoded = cv2.imdecode(code, cv2.IMREAD_COLOR)
        assert decoded is not None
        return decoded[..., ::-1].astype(np.float32) / 255


@dataclass(frozen=True)
class Resize(Degradation):
    """What a site does to photos: reduced by `factor`, and enlarged to the size it had.

    chance: share of the photos that are resized at all. It is meant to follow another degradation, whose noise it makes
    coarser and whose JPEG blocks it shifts.
    """

    name: ClassVar[str] = "resize"
    factor: Annotated[Range, Limits(0.05, 1)] = (0.6, 0.95)
    chance: Annotated[Range, Limits(0, 1)] = (1, 1)

    @property
    def margin(self) -> int:
        return math.ceil(4 / self.factor[0])

    def apply(self, photo: np.ndarray, rng: np.random.Generator, depth: np.ndarray | None) -> np.ndarray:
        factor = rng.uniform(*self.factor)
        if rng.random() >= rng.uniform(*self.chance):
            return photo
        height, width = photo.shape[:2]
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        reduced = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
        return cv2.resize(reduced, (width, height), interpolation=cv2.INTER_CUBIC)


KINDS = (Noise, Rain, Haze, Blur, LowLight, Snow, Jpeg, Resize)
DEGRADATIONS: dict[str, type[Degradation]] = {kind.name: kind for kind in KINDS}

TASK_DEGRADATIONS = {
    "denoise": "noise",
    "derain": "rain",
    "dehaze": "haze",
    "deblur": "blur",
    "lowlight": "lowlight",
    "desnow": "snow",
    "dejpeg": "jpeg",
}
"""The degradation that a task undoes."""


def _cdd11() -> dict[str, Degradation]:
    # Noise of 0.03 to 0.08; beta from 1 to 2 where the published recipe cuts the depth off at 0.7.
    low = LowLight(gain=(0.25, 0.6), gamma=(1.0, 1.8), balance=(0, 0), read=(7.5, 20), shot=(0, 0))
    parts = {"low": low, "rain": Rain(), "snow": Snow(), "haze": Haze(beta=(0.7, 1.4), airlight=(0.6, 0.9))}
    singles, pairs = ["low", "haze", "rain", "snow"], ["low_haze", "low_rain", "low_snow", "haze_rain", "haze_snow"]
    names = [*singles, *pairs, "low_haze_rain", "low_haze_snow"]
    # The class names list haze before rain and snow; the scene gets them in the order of `parts`.
    mixtures = {name: tuple(parts[part] for part in parts if part in name.split("_")) for name in names}
    return {name: Mixture(mixture) if len(mixture) > 1 else mixture[0] for name, mixture in mixtures.items()}


CDD11: dict[str, Degradation] = _cdd11()
"""The eleven classes of CDD-11 (OneRestore, ECCV 2024): darkness first, then rain or snow, and haze over it all."""


def parse_degradation(spec: str) -> Degradation:
    """The degradation that a text names: `NAME[:FIELD=VALUE,...]`, several joined by `+` in order, or `cdd11:CLASS`.

    VALUE is a number, a range `low..high`, or for the noise's sigma also numbers `a/b/c`, one of which is drawn.
    Raises InputError for unknown names and values that do not fit.
    """
    parts = tuple(_parse_part(part.strip()) for part in spec.split("+"))
    return parts[0] if len(parts) == 1 else Mixture(parts)


def _parse_part(spec: str) -> Degradation:
    name, _, values = spec.partition(":")
    if name == "cdd11":
        if values not in CDD11:
            raise InputError(f"cdd11: class {values!r} is unknown; accepted: {', '.join(CDD11)}")
        return CDD11[values]
    if name not in DEGRADATIONS:
        accepted = ", ".join([*DEGRADATIONS, "cdd11:CLASS"])
        raise InputError(f"degradation {name!r} is unknown; accepted: {accepted}, joined by +")
    kind = DEGRADATIONS[name]
    given: dict[str, tuple[float, ...]] = {}
    for item in filter(None, values.split(",")):
        key, _, text = item.partition("=")
        if key not in kind.limits():
            raise InputError(f"{name}: {key!r} is unknown; accepted: {', '.join(kind.limits())}")
        limits = kind.limits()[key]
        try:
            given[key] = limits.parse(text)
        except ValueError:
            raise InputError(f"{name}: {key} is {text!r}; accepted: {limits}") from None
    return kind(**given)


def shake_kernel(extent: float, rng: np.random.Generator) -> np.ndarray:
    """The path of a shaken camera as a kernel: float32 [k, k] with odd k, sum 1, centroid in the middle.

    extent: greatest distance between two points of the path, in pixels.
    """
    steps = 128
    if rng.random() < 0.25:  # a pan: nearly straight, at an even speed
        turns = rng.normal(0, 0.004, steps)
    else:  # a hand: the turning itself has inertia, and now and then a jerk
        turns = np.convolve(rng.normal(0, rng.uniform(0.02, 0.12), steps + 15), np.ones(16) / 4, "valid")
        turns += np.where(rng.random(steps) < 0.012, rng.uniform(-2.5, 2.5, steps), 0)
    speed = np.convolve(rng.uniform(0.2, 1.8, steps + 15), np.ones(16) / 16, "valid") ** 2
    path = np.cumsum(speed * np.exp(1j * (rng.uniform(0, 2 * np.pi) + np.cumsum(turns))))
    path -= path.mean()
    path *= extent / max(np.ptp((path * np.exp(-1j * angle)).real) for angle in np.linspace(0, np.pi, 12, False))
    half = max(1, math.ceil(np.abs(np.concatenate([path.real, path.imag])).max()) + 1)
    # Each point is shared among the four pixels around it, which keeps the centroid.
    column, row = np.floor(path.real).astype(int), np.floor(path.imag).astype(int)
    right, down = path.real - column, path.imag - row
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    for shift_y, shift_x, weight in (
        (0, 0, (1 - down) * (1 - right)),
        (0, 1, (1 - down) * right),
        (1, 0, down * (1 - right)),
        (1, 1, down * right),
    ):
        np.add.at(kernel, (half + row + shift_y, half + column + shift_x), weight)
    return (kernel / kernel.sum()).astype(np.float32)


def _streaks(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    density: float,
    length: float,
    width: float,
    opacity: float,
    angle: float,
) -> np.ndarray:
    """Rain streaks of one layer, float32 [H, W]: upright ones by two cheap one-dimensional filters, then sheared."""
    height, columns = shape
    slope = math.tan(math.radians(angle))
    reach, overhang = math.ceil(length / 2), math.ceil(abs(slope) * height)
    canvas = _scatter((height, columns + overhang), density, reach, rng)
    along = np.hanning(2 * reach + 3)[1:-1]
    across = np.exp(-0.5 * (np.arange(-math.ceil(width), math.ceil(width) + 1) / (width / 2.355)) ** 2)
    streaks = cv2.sepFilter2D(canvas, -1, across, along, borderType=cv2.BORDER_CONSTANT)
    start = reach + (overhang if slope > 0 else 0)
    shear = np.array([[1, -slope, start], [0, 1, reach]], np.float32)
    streaks = cv2.warpAffine(streaks, shear, (columns, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return opacity * np.clip(streaks, 0, 1)


def _scatter(shape: tuple[int, ...], density: float, margin: int, rng: np.random.Generator) -> np.ndarray:
    """Points of random brightness, float32, on a canvas `margin` larger than `shape` on every side."""
    canvas = np.zeros((shape[0] + 2 * margin, shape[1] + 2 * margin), np.float32)
    count = rng.poisson(density * canvas.size)
    canvas.flat[rng.integers(canvas.size, size=count)] = rng.uniform(0.3, 1, count)
    return canvas


def _crop(canvas: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    top, left = (canvas.shape[0] - shape[0]) // 2, (canvas.shape[1] - shape[1]) // 2
    return canvas[top : top + shape[0], left : left + shape[1]]


def _flake(radius: float, fall: float, angle: float, rng: np.random.Generator) -> np.ndarray:
    """One snowflake: a soft, slightly irregular disc smeared over `fall` pixels; float32 [k, k], peak 1."""
    half = math.ceil(1.5 * radius + fall / 2) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    flake = np.zeros_like(x)
    phases = rng.uniform(0, 2 * np.pi, 3)
    for step in np.linspace(-0.5, 0.5, 1 + math.ceil(fall)) * fall:
        shifted_x, shifted_y = x - step * math.sin(angle), y - step * math.cos(angle)
        turn = np.arctan2(shifted_y, shifted_x)
        outline = radius * (1 + sum(0.12 * np.sin((k + 2) * turn + phase) for k, phase in enumerate(phases)))
        flake += 1 / (1 + np.exp(np.clip((np.hypot(shifted_x, shifted_y) - outline) / (0.25 * radius), -30, 30)))
    return (flake / flake.max()).astype(np.float32)


def _coarser(noise: np.ndarray, grain: float) -> np.ndarray:
    """White noise [H, W, 3] smoothed to grains of this diameter in pixels, with the same deviation."""
    spread = max(math.sqrt(grain**2 - 1) / 2.355, 0.1)  # a pixel is one wide itself
    reach = math.ceil(3 * spread)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
    kernel /= np.sqrt((kernel**2).sum())  # keeps the variance of white noise
    return cv2.sepFilter2D(noise, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT)


def _log_uniform(rng: np.random.Generator, span: Range) -> float:
    """Equal chances for equal ratios: half the streaks, gains ... lie below the geometric mean."""
    low, high = span
    return low * (high / low) ** rng.random() if low > 0 else rng.uniform(low, high)
