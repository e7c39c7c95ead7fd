"""Restoring one photo of any size within a memory budget: whole, or in tiles that share one query."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2r.data.images import from_float, to_float
from r2r.device import device_of, free_memory
from r2r.errors import InputError
from r2r.graphics import is_graphic
from r2r.model import R2R, Features, Task, mixed
from r2r.overview import Overview, small_size
from r2r_kernels.nn import FoldedNAFBlock, NAFBlock
from r2r_kernels.reference import area_resize

_SMALLEST_TILE = 192
_LEAST_MARGIN = 16  # pixels at a tile's edge that do not count, as convolutions see zeros beyond it
_CROPS = 3  # across and down, each of a third of a tile's side: what the attention that all tiles share is taken from
_BLEND = 32  # pixels over which one tile turns into the next

# Peak of the eager float32 forward beyond the weights, in floats for each pixel and channel of the first level.
# Measured as the growth of a process at 512^2 and 1024^2: 21, 20 at width 8; 21, 15 at width 16; 18, 14 at width 32.
# The kernels take less (9 on a CPU), but the fast model is to cut the same tiles, so that its answers are the same.
_FLOATS_PER_PIXEL = 21

# Of the rows of tiles that are being blended, for each pixel: twice in floats, and what storing them takes.
_BYTES_PER_BAND_PIXEL = 64

# The default budget of a tile. Constant, so that a photo gives the same result on most machines, and no larger, as the
# eager model's time for a pixel doubles on a CPU from tiles of 512^2 to 1536^2.
DEFAULT_MEMORY = 2 * 2**30

Progress = Callable[[float], object]


@dataclass(frozen=True, eq=False)
class RestoredPhoto:
    """`pixels` of the shape and dtype given; `tasks` that took part, none where nothing was found and the pixels stay
    as they are; `scores`, how likely each task is, in [0, 1]; number of `tiles`. graphic: it is no photo
    (`r2r.graphics`), so that nothing was looked for, and there are no scores."""

    pixels: np.ndarray
    tasks: tuple[str, ...]
    scores: dict[str, float]
    tiles: int
    graphic: bool = False


@torch.inference_mode()
def restore_photo(
    model: R2R,
    pixels: np.ndarray,
    task: Task = None,
    memory: int | None = None,
    out: np.ndarray | None = None,
    strength: float = 1.0,
    visible: np.ndarray | None = None,
    progress: Progress | None = None,
) -> RestoredPhoto:
    """Restore one photo, [H, W, 3] or grey [H, W, 1] with H, W >= 1, blind or told the task; for `task` and `strength`
    see `R2R.restore`.

    pixels: uint8, uint16, or float32 in [0, 1], of any strides. out: where the result goes, of their shape and dtype;
    it may be `pixels`. visible: bool [H, W], False where transparency hides the colours: those stay as they are, and
    have no part in the result. progress: told after each tile which share of the work is done, in [0, 1].
    memory: bytes that the activations may take; by default half of what is free on the model's device, of which those
    of one tile take at most 2 GiB. A photo that needs more is restored in overlapping tiles, blended without seams,
    after a first pass over them has assembled one query for the whole photo: every tile gets its part of the same
    readout, and the same channel attention. What a small copy shows (`r2r.overview`) is seen to before, as in one
    piece. Features of that pass are kept as far as the memory reaches; those of other tiles are made again.
    What still differs from one piece is that attention: it comes from crops of the photo. In a model with a `window`
    each tile has its own, which differs only where the window reaches beyond the tile.
    Blind, a model for mixtures leaves graphics as they are.
    Raises InputError for other arrays, NaN, values outside [0, 1], another strength, and a budget too small for the
    smallest tile.
    """
    _check_pixels(pixels)
    if not 0 <= strength <= 1:
        raise InputError(f"strength must be in 0..1, got {strength}")
    out = np.empty_like(pixels) if out is None else out
    if _left_alone(model, pixels, task, visible):
        return _untouched_graphic(pixels, out)
    if visible is not None and not visible.all():
        return _restore_visible(model, pixels, task, memory, out, strength, visible, progress)
    return _restore_all(model, pixels, task, memory, out, strength, progress)


def _left_alone(model: R2R, pixels: np.ndarray, task: Task, visible: np.ndarray | None = None) -> bool:
    """Whether it is a graphic that nobody asked to change."""
    return task is None and model.mixtures and is_graphic(pixels, visible)


def _untouched_graphic(pixels: np.ndarray, out: np.ndarray) -> RestoredPhoto:
    out[...] = pixels
    return RestoredPhoto(out, (), {}, 0, graphic=True)


def _restore_all(
    model: R2R,
    pixels: np.ndarray,
    task: Task,
    memory: int | None,
    out: np.ndarray,
    strength: float,
    progress: Progress | None,
) -> RestoredPhoto:
    """As `restore_photo`, a photo that is seen everywhere."""
    if whole_photos(model, pixels.shape, memory):
        return _restore_batch(model, [pixels], task, [out], strength)[0]
    device, width = device_of(model), model.padded(pixels.shape[1])
    budget = free_memory(device) // 2 if memory is None else memory
    side = tile_side(model, memory, across=width)
    chosen, scores, tiles = _restore_tiled(model, pixels, out, side, task, strength, budget, progress)
    return _described(model, [out], chosen, scores, tiles)[0]


@torch.inference_mode()
def restore_together(
    model: R2R, photos: Sequence[np.ndarray], task: Task, outs: Sequence[np.ndarray], strength: float
) -> list[RestoredPhoto]:
    """As `restore_photo`, for one or more photos of one size, as a batch and in one piece each."""
    for pixels in photos:
        _check_pixels(pixels)
    done = {
        index: _untouched_graphic(pixels, out)
        for index, (pixels, out) in enumerate(zip(photos, outs, strict=True))
        if _left_alone(model, pixels, task)
    }
    left = [index for index in range(len(photos)) if index not in done]
    if left:
        restored = _restore_batch(model, [photos[i] for i in left], task, [outs[i] for i in left], strength)
        done.update(zip(left, restored, strict=True))
    return [done[index] for index in range(len(photos))]


def _restore_batch(
    model: R2R, photos: Sequence[np.ndarray], task: Task, outs: Sequence[np.ndarray], strength: float
) -> list[RestoredPhoto]:
    batch = torch.cat([_as_tensor(pixels) for pixels in photos])
    images, chosen, scores = model.restore(batch.to(device_of(model)), task, strength)
    for image, out in zip(images, outs, strict=True):
        _store(image[None], out)
    return _described(model, outs, chosen, scores, 1)


def whole_photos(model: R2R, shape: Sequence[int], memory: int | None) -> int:
    """How many photos of shape [H, W, ...] `memory` bytes restore at once, in one piece each; 0 where not even one."""
    return tile_side(model, memory) ** 2 // (model.padded(shape[0]) * model.padded(shape[1]))


def _described(
    model: R2R, outs: Sequence[np.ndarray], chosen: Tensor, scores: Tensor, tiles: int
) -> list[RestoredPhoto]:
    if chosen.dtype != torch.bool:
        chosen = F.one_hot(chosen, len(model.tasks)).bool()
    likely = model.probabilities(scores).tolist()
    return [
        RestoredPhoto(
            out,
            tuple(name for name, taken in zip(model.tasks, taking_part, strict=True) if taken),
            dict(zip(model.tasks, likelihood, strict=True)),
            tiles,
        )
        for out, taking_part, likelihood in zip(outs, chosen.tolist(), likely, strict=True)
    ]


def _restore_visible(
    model: R2R,
    pixels: np.ndarray,
    task: Task,
    memory: int | None,
    out: np.ndarray,
    strength: float,
    visible: np.ndarray,
    progress: Progress | None,
) -> RestoredPhoto:
    """The part of the photo around what can be seen; what is hidden in it looks like the nearest pixel that is seen."""
    out[...] = pixels
    if not visible.any():
        return RestoredPhoto(out, (), dict.fromkeys(model.tasks, 0.0), 0)
    rows, columns = (np.flatnonzero(visible.any(axis)) for axis in (1, 0))
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    seen = visible[part]
    from scipy.ndimage import distance_transform_edt  # slow to import, and few photos have hidden colours

    y, x = distance_transform_edt(~seen, return_distances=False, return_indices=True)
    photo = pixels[part][y, x]
    restored = _restore_all(model, photo, task, memory, photo, strength, progress)
    out[part][seen] = restored.pixels[seen]
    return replace(restored, pixels=out)


def _check_pixels(pixels: np.ndarray) -> None:
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise InputError(f"a photo must be [H, W, 3] or [H, W, 1] with H, W >= 1, got {list(pixels.shape)}")
    if pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise InputError(f"a photo must be of uint8, uint16 or float32, got {pixels.dtype}")
    if pixels.dtype == np.float32 and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise InputError("a photo must hold values in [0, 1], got others or NaN")


def _as_tensor(pixels: np.ndarray) -> Tensor:
    """[H, W, C] samples -> float32 [1, 3, H, W] in [0, 1]."""
    values = torch.from_numpy(np.ascontiguousarray(to_float(pixels))).permute(2, 0, 1)[None]
    return values.expand(-1, 3, -1, -1).contiguous()


def _store(image: Tensor, out: np.ndarray) -> None:
    """float [1, 3, H, W] -> the samples `out` [H, W, C], clipped and rounded; grey is the mean of the colours."""
    values = image[0].float().mean(0, keepdim=True) if out.shape[2] == 1 else image[0].float()
    if not bool(values.isfinite().all()):
        raise InputError("the model's answer is not finite: its weights are damaged, or too large for this precision")
    out[...] = from_float(values.permute(1, 2, 0).cpu().numpy(), out.dtype)


def tile_side(model: R2R, memory: int | None = None, across: int = 0) -> int:
    """Side in pixels of the largest square that `memory` bytes restore at once; across: width of the photo that the
    squares are cut from, of which a band is held too. Raises InputError for too few bytes."""
    bytes_per_pixel, band = _bytes_per_pixel(model), _BYTES_PER_BAND_PIXEL * across
    least = _SMALLEST_TILE * (_SMALLEST_TILE * bytes_per_pixel + band)
    if memory is None:
        band = 0  # the default does not depend on the photo
        memory = max(least, min(DEFAULT_MEMORY, free_memory(device_of(model)) // 2))
    if memory < least:
        raise InputError(
            f"memory of {memory / 1e9:.3g} GB for the network; this model needs {least / 1e9:.3g} GB or more"
        )
    side = (math.isqrt(band**2 + 4 * bytes_per_pixel * memory) - band) // (2 * bytes_per_pixel)
    return side // model.stride * model.stride


def _bytes_per_pixel(model: R2R) -> int:
    return 4 * _FLOATS_PER_PIXEL * model.intro.out_channels


class _Window(NamedTuple):
    """One tile along one axis: pixels [start, stop), and the weight of each of them in the blend."""

    start: int
    stop: int
    weight: Tensor

    def cells(self, stride: int) -> slice:
        """The window on the grid of the deepest features."""
        return slice(self.start // stride, self.stop // stride)


def _windows(length: int, side: int, stride: int, margin: int) -> list[_Window]:
    """Evenly spread windows over `length`: as few of `side` pixels as cover it, then no larger than it takes; multiples
    of `stride`. `margin` pixels of each do not count at its edges. The weights sum to 1 everywhere."""
    overlap = 2 * margin + _BLEND
    number = 1 if side >= length else math.ceil((length - overlap) / (side - overlap))
    enough = math.ceil((length + (number - 1) * overlap) / number / stride) * stride
    side = min(side, length, max(enough, _SMALLEST_TILE))
    starts = [(length - side) * index // max(number - 1, 1) // stride * stride for index in range(number)]
    weights = torch.zeros(number, length)
    for weight, start in zip(weights, starts, strict=True):
        before = torch.arange(side) + 0.5 - margin if start > 0 else torch.full((side,), torch.inf)
        after = (torch.arange(side) + 0.5 - margin).flip(0) if start + side < length else torch.full((side,), torch.inf)
        weight[start : start + side] = torch.minimum(before, after).clamp(0, _BLEND)
    weights /= weights.sum(0)
    return [_Window(start, start + side, w[start : start + side]) for start, w in zip(starts, weights, strict=True)]


def _restore_tiled(
    model: R2R,
    pixels: np.ndarray,
    out: np.ndarray,
    side: int,
    task: Task,
    strength: float,
    budget: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor, int]:
    """Fill `out`; give the chosen task, the scores, and the number of tiles. Of the budget in bytes, what a tile leaves
    is for features of the first pass."""
    stride = model.stride
    padded = [model.padded(length) for length in pixels.shape[:2]]
    # Attention reaches half a window far. As much at a tile's edge does not count, as long as enough of it is left.
    margin = max(_LEAST_MARGIN, min(model.window // 2, side // 6) // stride * stride)
    rows, columns = (_windows(length, side, stride, margin) for length in padded)

    tiles, steps = len(rows) * len(columns), count(1)
    photo = _Photo(model, pixels, task)
    passes = 1 if photo.settled else 2

    def tell() -> None:
        if progress is not None:
            progress(next(steps) / (passes * tiles))

    def blended(changed: Callable[[_Window, _Window, Tensor], Tensor]) -> None:
        """Fill `out` with what is made of each tile that nothing lies smoothly over any more."""

        def restored(y: _Window, x: _Window) -> Tensor:
            place = y.start, x.start, y.stop - y.start, x.stop - x.start
            image = changed(y, x, photo.cleared(*place))
            tell()
            return torch.lerp(photo.part(*place), image.float(), strength).cpu()

        _blend(rows, columns, restored, out)

    if photo.settled:
        assert photo.overview is not None
        blended(lambda y, x, cleared: cleared)
        return photo.overview.task, photo.overview.scores, tiles
    # With a window they reach no farther than a margin, so that each tile may have its own.
    attention = None if model.window else _SharedAttention(model, photo, side)
    if attention:
        model = attention.model
        attention.share_in_encoder()
    query, kept = _assemble_query(model, photo, tell, rows, columns, padded, budget)
    match = model.match(query, task, photo.overview)
    restores = bool(match.strength.any())
    if not restores:
        if bool(match.task.any()):
            blended(lambda y, x, cleared: cleared)
        else:
            out[...] = pixels
        return match.task, match.scores, tiles
    spread = [_spreading(match.readout.shape[2], length // stride, match.readout) for length in padded]

    def readout_at(y_cells: slice, x_cells: slice) -> Tensor:
        return spread[0][y_cells] @ match.readout @ spread[1][x_cells].T

    if attention:
        attention.share_in_decoder(readout_at)

    def restored(y: _Window, x: _Window, cleared: Tensor) -> Tensor:
        features = kept.pop((y.start, x.start), None) or model.encode(photo.exposed(cleared))
        _, value = model.query(features.deep)
        readout = readout_at(y.cells(stride), x.cells(stride))
        decoded = model.decode(cleared, features, value, readout, match.exposure)
        return mixed(cleared, decoded, match.strength)

    blended(restored)
    return match.task, match.scores, tiles


class _Photo:
    """Parts of a photo as the model takes them, and the `overview` of it, None for a model that takes none. settled:
    the overview is all that is needed."""

    def __init__(self, model: R2R, pixels: np.ndarray, task: Task) -> None:
        self.pixels = pixels
        self.device = device_of(model)
        self.overview: Overview | None = None
        if model.takes_overview:
            small = self._small()
            self.overview = model.overview(small, model.encode(small), pixels.shape[:2], task)
        self.settled = self.overview is not None and model.settles_all(self.overview, task)

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """float32 [1, 3, height, width], less where the photo ends, from where on it is padded."""
        return _as_tensor(self.pixels[top : top + height, left : left + width]).to(self.device)

    def cleared(self, top: int, left: int, height: int, width: int) -> Tensor:
        """As `part`, without what lies smoothly over the photo."""
        part = self.part(top, left, height, width)
        return part if self.overview is None else self.overview.taken_off(part, self.pixels.shape[:2], top, left)

    def exposed(self, part: Tensor) -> Tensor:
        """A part, or several, as the model is to see them."""
        return part if self.overview is None else self.overview.exposed(part)

    def _small(self) -> Tensor:
        """`small_copy` of the photo, row by row, as no more of it than that may be in memory as floats."""
        height, width = self.pixels.shape[:2]
        rows, columns = small_size(height, width)
        starts = [(row * height // rows, -(-(row + 1) * height // rows)) for row in range(rows)]
        return torch.cat(
            [area_resize(self.part(top, 0, bottom - top, width), 1, columns) for top, bottom in starts], dim=2
        )


class _SharedAttention:
    """A copy of the model, whose blocks have one channel attention for all tiles of a photo: that of crops spread over
    it, as large together as one tile. With the attention of its own mean each tile would change otherwise, and seams
    would show. The copy has the model's own tensors; other threads may go on with the model.
    """

    def __init__(self, model: R2R, photo: _Photo, side: int) -> None:
        self.model: R2R = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
        self.photo = photo
        lengths = photo.pixels.shape[:2]
        crop = max(model.padded(1), side // _CROPS // model.stride * model.stride)
        number = max(1, min(_CROPS, side // crop))
        self.size = [min(crop, length) for length in lengths]
        self.starts = [
            sorted({round(place) // model.stride * model.stride for place in np.linspace(0, length - own, number)})
            for length, own in zip(lengths, self.size, strict=True)
        ]

    def share_in_encoder(self) -> None:
        self.crops = torch.cat([self.photo.cleared(y, x, *self.size) for y in self.starts[0] for x in self.starts[1]])
        with self._shared(self.model.encoder):
            self.features = self.model.encode(self.photo.exposed(self.crops))

    def share_in_decoder(self, readout_at: Callable[[slice, slice], Tensor]) -> None:
        stride, (_, value) = self.model.stride, self.model.query(self.features.deep)
        rows, columns = (
            [slice(start // stride, start // stride + cells) for start in starts]
            for starts, cells in zip(self.starts, value.shape[2:], strict=True)
        )
        readout = torch.cat([readout_at(y, x) for y in rows for x in columns])
        with self._shared(self.model.decoder):
            self.model.decode(self.crops, self.features, value, readout)
        del self.crops, self.features  # they take a tenth of a tile's memory

    @contextmanager
    def _shared(self, network: nn.Module) -> Iterator[None]:
        """What runs inside gives the network's blocks the attention of its mean."""
        blocks = [block for block in network.modules() if isinstance(block, (NAFBlock, FoldedNAFBlock))]
        hooks = [
            block.register_forward_pre_hook(lambda block, inputs: block.share_attention(inputs[0])) for block in blocks
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _blend(
    rows: Sequence[_Window], columns: Sequence[_Window], restored: Callable[[_Window, _Window], Tensor], out: np.ndarray
) -> None:
    """Fill `out` with the tiles, blended."""
    # Rows of `out` that no later tile reads or adds to are stored at once: `out` may be what tiles are cut from.
    carried = torch.zeros(1, 3, 0, out.shape[1])
    for y, following in zip(rows, [*rows[1:], None], strict=True):
        stop = min(y.stop, out.shape[0])
        band = F.pad(carried, (0, 0, 0, stop - y.start - carried.shape[2]))
        for x in columns:
            image = restored(y, x)
            height, width = image.shape[2:]
            weight = y.weight[:height, None] * x.weight[:width]
            band[:, :, :, x.start : x.start + width] += image * weight
        done = (following.start if following else stop) - y.start
        _store(band[:, :, :done], out[y.start : y.start + done])
        carried = band[:, :, done:].clone()


def _assemble_query(
    model: R2R,
    photo: _Photo,
    tell: Callable[[], None],
    rows: Sequence[_Window],
    columns: Sequence[_Window],
    padded: Sequence[int],
    budget: int,
) -> tuple[Tensor, dict[tuple[int, int], Features]]:
    """One query [1, Ck, H / stride, W / stride] of all tiles, and the features that the budget has room for."""
    device, stride = device_of(model), model.stride
    query = torch.zeros(1, model.bank.keys.shape[2], *(length // stride for length in padded), device=device)
    kept: dict[tuple[int, int], Features] = {}
    room = budget - _bytes_per_pixel(model) * max(
        (y.stop - y.start) * (x.stop - x.start) for y in rows for x in columns
    )
    room -= query.nbytes + _BYTES_PER_BAND_PIXEL * padded[1] * max(y.stop - y.start for y in rows)
    for y in rows:
        for x in columns:
            y_weight, x_weight = (F.avg_pool1d(one.weight[None], stride)[0].to(device) for one in (y, x))
            part = photo.cleared(y.start, x.start, y.stop - y.start, x.stop - x.start)
            features = model.encode(photo.exposed(part))
            key, _ = model.query(features.deep)
            query[:, :, y.cells(stride), x.cells(stride)] += key * y_weight[:, None] * x_weight
            size = sum(part.nbytes for part in (features.deep, *features.skips))
            if size <= room:
                kept[y.start, x.start] = features
                room -= size
            tell()
    return query, kept


def _spreading(size: int, length: int, like: Tensor) -> Tensor:
    """[length, size]: what area resizing from `size` to `length` cells multiplies with, along one axis."""
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    return F.adaptive_avg_pool1d(identity[None], length)[0].T
