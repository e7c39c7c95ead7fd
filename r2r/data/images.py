"""Reading and writing image files the way a person looking at them expects.

Pixels are float32 RGB [H, W, 3] in [0, 1], upright: the EXIF orientation is applied. 8-bit files are decoded by Pillow;
what Pillow would cut to 8 bits (16-bit PNG, PNM and TIFF, floating-point TIFF) by OpenCV.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import tifffile
from PIL import Image

from r2r.errors import InputError
from r2r.files import atomic_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
ACCEPTED = "accepted: PNG, JPEG, BMP, TIFF, WebP, PPM or PGM, of one frame"
MAX_PIXELS = 2**30
_SAMPLES = "accepted: 8 or 16 bits unsigned, or floating point in [0, 1]"

# Pillow's own limit refuses the 200-megapixel photos of today's phones; ours is checked on every file instead.
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, MAX_PIXELS)

Image.init()  # `formats=` knows only the plugins that are loaded
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 274  # the tag's number in EXIF and in TIFF
_ICC_PROFILE = 34675

# What a file of this suffix can hold: bits a channel, alpha.
_HOLDS = {
    ".png": (16, True),
    ".jpg": (8, False),
    ".jpeg": (8, False),
    ".bmp": (8, False),
    ".tif": (32, True),
    ".tiff": (32, True),
    ".webp": (8, True),
    ".ppm": (16, False),
    ".pgm": (16, False),
}


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo and what must survive its restoration. `pixels` and `alpha` are upright."""

    pixels: np.ndarray  # float32 [H, W, 3] in [0, 1]
    alpha: np.ndarray | None = None  # float32 [H, W] in [0, 1]
    bit_depth: int = 8  # 8, 16, or 32 for floating point
    grey: bool = False
    orientation: int = 1  # EXIF: how the file's rows lie, 1 to 8
    icc: bytes | None = None
    exif: bytes | None = None


@dataclass(frozen=True, eq=False)
class _Stored:
    """A decoded file: samples [H, W, C] in the file's row order; C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha."""

    samples: np.ndarray
    peak: float
    orientation: int = 1
    icc: bytes | None = None
    exif: bytes | None = None


def image_files(folder: str | Path) -> list[Path]:
    """The image files in `folder` and its subfolders, sorted; hidden files and folders are left out.

    Raises InputError where there is no such folder. An empty folder gives an empty list.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the upright image, from the file's header alone. Raises InputError."""
    path = Path(path)
    with _naming(path), open(path, "rb") as file:
        if file.read(4) in _TIFF_MAGIC:
            page = _tiff_page(file)
            height, width, orientation = page.imagelength, page.imagewidth, _tiff_orientation(page)
        else:
            image = Image.open(file, formats=_FORMATS)
            _check(image)
            if image.format == "PNG" and "exif" not in image.info:
                file.seek(-min(path.stat().st_size, 2**17), io.SEEK_END)
                if b"eXIf" in file.read():  # it may stand behind the pixels, where only a full read finds it
                    image.load()
            # Not image.getexif(): for a PNG without EXIF that decodes the whole file.
            (width, height), orientation = image.size, _orientation(Image.Image.getexif(image))
    return (height, width) if orientation < 5 else (width, height)


def read_rgb(path: str | Path) -> np.ndarray:
    """The colours of an image file: float32 [H, W, 3] in [0, 1], upright, with the precision of the file.

    Grey becomes three equal channels; palettes and CMYK become RGB; alpha is dropped and the colour beneath it kept.
    Raises InputError, naming the file, for what cannot be read whole.
    """
    path = Path(path)
    with _naming(path):
        return _colours(_decode(path.read_bytes()))


def read_photo(path: str | Path) -> Photo:
    """An image file with all that `write_photo` needs to keep. Raises InputError, naming the file.

    Of a phone's multi-picture JPEG the first picture is read; animations and TIFFs of several pages are refused.
    """
    path = Path(path)
    with _naming(path):
        stored = _decode(path.read_bytes())
        samples = stored.samples
        alpha = None
        if samples.shape[2] in (2, 4):
            alpha = _upright(_scaled(samples[..., -1], stored.peak), stored.orientation)
        return Photo(
            pixels=_colours(stored),
            alpha=alpha,
            bit_depth=8 * samples.dtype.itemsize,
            grey=samples.shape[2] < 3,
            orientation=stored.orientation,
            icc=stored.icc,
            exif=stored.exif,
        )


def write_rgb(path: str | Path, pixels: np.ndarray) -> None:
    """Write [H, W, 3] in [0, 1] with 8 bits a channel, in the format of the suffix, atomically. Raises InputError."""
    write_photo(path, pixels, Photo(pixels))


def write_photo(path: str | Path, pixels: np.ndarray, photo: Photo) -> None:
    """Write restored `pixels`, upright [H, W, 3], as the file `photo` came from: atomically, in the suffix's format.

    Kept: bit depth, alpha, grey, the ICC profile and the EXIF block (of a TIFF: the orientation). The rows are stored
    in the order of the original with its orientation tag, so a viewer shows the two files alike, whether it heeds
    the tag or not. JPEG is written at quality 95 without chroma subsampling, WebP lossless.
    Raises InputError where the format cannot hold the photo's bit depth or alpha, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _HOLDS:
        raise InputError(f"cannot write {path}: unknown suffix {path.suffix!r}; accepted: {', '.join(SUFFIXES)}")
    bits, alpha = _HOLDS[suffix]
    if photo.bit_depth > bits or (photo.alpha is not None and not alpha):
        what = f"{photo.bit_depth} bits a channel" if photo.bit_depth > bits else "alpha"
        raise InputError(f"cannot write {path}: {suffix} cannot hold {what}; PNG and TIFF can")
    samples = _samples(pixels, photo)
    with atomic_path(path) as temporary:
        if suffix in (".tif", ".tiff"):
            _write_tiff(temporary, samples, photo)
        elif photo.bit_depth == 16:
            temporary.write_bytes(_encode_16_bit(suffix, samples, photo))
        else:
            kept: dict[str, Any] = {k: v for k, v in (("icc_profile", photo.icc), ("exif", photo.exif)) if v}
            image = Image.fromarray(samples.squeeze(2) if samples.shape[2] == 1 else samples)
            # Options that a format does not know are ignored.
            image.save(temporary, quality=95, subsampling=0, lossless=True, compress_level=4, **kept)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises into an InputError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Image.UnidentifiedImageError as error:
        what = "not an image" if path.stat().st_size else "an empty file"
        raise InputError(f"{path}: {what}; {ACCEPTED}") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for this machine's memory") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{path}: {error.strerror}") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged or cut short ({reason})") from error


def _check(image: Image.Image) -> None:
    _check_size(image.height, image.width)
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise InputError(f"{getattr(image, 'n_frames', 1)} frames; {ACCEPTED}")


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise InputError(f"{width} x {height} pixels; at most {MAX_PIXELS} pixels are accepted")


def _decode(data: bytes) -> _Stored:
    if data[:4] in _TIFF_MAGIC:
        page = _tiff_page(io.BytesIO(data))
        if page.bitspersample > 8:
            return _decode_deep_tiff(data, page)
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check(image)
    peak = _peak(image, data)
    orientation = _orientation(image.getexif())  # first: loading a TIFF turns it and drops the tag
    image.load()  # raises where the file is cut off, on which OpenCV may only warn
    icc, exif = image.info.get("icc_profile"), image.info.get("exif")
    if peak > 255:
        samples = _opencv(data)
        if image.format == "PNG" and data[25] == 4:  # grey + alpha, which OpenCV expands
            samples = samples[..., [0, 3]]
        return _Stored(samples, peak, orientation, icc, exif)
    if image.mode in ("CMYK", "YCbCr", "LAB"):
        icc = None  # it describes the colours before the conversion
    samples = _as_array(image)
    if image.format == "TIFF":
        samples = _as_stored(samples, orientation)
    return _Stored(samples, peak, orientation, icc, exif)


def _as_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a Pillow image of any 8-bit mode."""
    grey = image.mode in ("1", "L", "LA", "La")
    transparent = image.has_transparency_data
    mode = {(True, False): "L", (True, True): "LA", (False, False): "RGB", (False, True): "RGBA"}[grey, transparent]
    if image.mode != mode:
        image = image.convert(mode)
    samples = np.asarray(image)
    return samples[..., None] if samples.ndim == 2 else samples


def _peak(image: Image.Image, data: bytes) -> int:
    """The sample value of white: above 255 where Pillow would lose precision."""
    if image.format == "PNG":
        return 65535 if data[24] == 16 else 255
    if image.format == "PPM":
        args = image.tile[0].args  # type: ignore[attr-defined]
        maximum = args[1] if isinstance(args, tuple) and isinstance(args[1], int) else 255
        return max(255, maximum)  # up to 255 Pillow scales by itself
    return 255


def _opencv(data: bytes | bytearray) -> np.ndarray:
    """[H, W, C], RGB or RGBA order, dtype and row order as stored."""
    samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None:
        raise InputError("damaged, or of a kind that OpenCV cannot decode")
    if samples.ndim == 2:
        return samples[..., None]
    return np.ascontiguousarray(samples[..., [2, 1, 0, 3][: samples.shape[2]]])


def _tiff_page(file: IO[bytes]) -> tifffile.TiffPage:
    file.seek(0)
    pages = tifffile.TiffFile(file).pages
    if len(pages) != 1:
        raise InputError(f"{len(pages)} pages; {ACCEPTED}")
    page = pages.first
    _check_size(page.imagelength, page.imagewidth)
    return page


def _tiff_orientation(page: tifffile.TiffPage) -> int:
    tag = page.tags.get(_ORIENTATION)
    return _orientation({_ORIENTATION: tag.value} if tag else {})


def _decode_deep_tiff(data: bytes, page: tifffile.TiffPage) -> _Stored:
    photometric = tifffile.PHOTOMETRIC(page.photometric).name
    if photometric not in ("MINISBLACK", "MINISWHITE", "RGB") or page.samplesperpixel > 4:
        raise InputError(f"{page.samplesperpixel} channels of {photometric}; beyond 8 bits grey and RGB are accepted")
    if page.bitspersample not in (16, 32, 64) or page.dtype is None or page.dtype.kind not in "uf":
        raise InputError(f"{page.bitspersample}-bit samples; {_SAMPLES}")
    if tifffile.EXTRASAMPLE.ASSOCALPHA in page.extrasamples:
        raise InputError("colours multiplied by alpha; beyond 8 bits plain alpha is accepted")
    samples = _tiff_samples(data, page)
    profile = page.tags.get(_ICC_PROFILE)
    orientation, icc = _tiff_orientation(page), bytes(profile.value) if profile else None
    if samples.dtype == np.uint16:
        return _Stored(65535 - samples if photometric == "MINISWHITE" else samples, 65535, orientation, icc)
    if samples.dtype.kind != "f":
        raise InputError(f"samples of type {samples.dtype}; {_SAMPLES}")
    if not np.isfinite(samples).all():
        raise InputError(f"NaN or infinite values; {_SAMPLES}")
    if samples.min() < 0 or samples.max() > 1:
        raise InputError(f"values from {samples.min():g} to {samples.max():g}; {_SAMPLES}")
    return _Stored(samples.astype(np.float32, copy=False), 1.0, orientation, icc)


def _tiff_samples(data: bytes, page: tifffile.TiffPage) -> np.ndarray:
    """[H, W, C] as stored."""
    try:
        samples = page.asarray()
    except ValueError as error:
        # tifffile leaves LZW and the like to a large package; OpenCV knows them, but mixes up separate planes.
        if "imagecodecs" not in str(error) or page.planarconfig != tifffile.PLANARCONFIG.CONTIG:
            raise
        plain = bytearray(data)
        if page.tags.get(_ORIENTATION):  # OpenCV would turn some files and fail on others
            struct.pack_into(f"{page.parent.byteorder}H", plain, page.tags[_ORIENTATION].valueoffset, 1)
        return _opencv(plain)
    if samples.ndim == 2:
        return samples[..., None]
    return samples if page.planarconfig == tifffile.PLANARCONFIG.CONTIG else np.moveaxis(samples, 0, -1)


def _orientation(tags: Image.Exif | dict[int, int]) -> int:
    value = tags.get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _upright(rows: np.ndarray, orientation: int) -> np.ndarray:
    """`rows` [H, W, ...] as stored, turned as the EXIF orientation says."""
    if orientation >= 5:
        rows = rows.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        rows = rows[::-1]
    if orientation in (2, 3, 6, 7):
        rows = rows[:, ::-1]
    return np.ascontiguousarray(rows)


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of `_upright`: each orientation is its own inverse, but for the quarter turns 6 and 8."""
    return _upright(upright, {6: 8, 8: 6}.get(orientation, orientation))


def _scaled(samples: np.ndarray, peak: float) -> np.ndarray:
    return samples.astype(np.float32) / np.float32(peak)


def _colours(stored: _Stored) -> np.ndarray:
    channels = stored.samples[..., :1] if stored.samples.shape[2] < 3 else stored.samples[..., :3]
    colours = np.broadcast_to(_scaled(channels, stored.peak), (*channels.shape[:2], 3))
    return _upright(colours, stored.orientation)


def _samples(pixels: np.ndarray, photo: Photo) -> np.ndarray:
    """What goes into the file: [H, W, C] in the photo's row order, bit depth and kind of channels."""
    channels = [pixels.mean(axis=2, keepdims=True) if photo.grey else pixels]
    if photo.alpha is not None:
        channels.append(photo.alpha[..., None])
    values = np.clip(np.concatenate(channels, axis=2), 0, 1)
    if photo.bit_depth == 32:
        return _as_stored(values.astype(np.float32, copy=False), photo.orientation)
    peak = 2**photo.bit_depth - 1
    return _as_stored(np.rint(values * peak).astype(np.uint8 if peak == 255 else np.uint16), photo.orientation)


def _write_tiff(path: Path, samples: np.ndarray, photo: Photo) -> None:
    tifffile.imwrite(
        path,
        samples.squeeze(2) if samples.shape[2] == 1 else samples,
        photometric="minisblack" if photo.grey else "rgb",
        planarconfig="contig" if samples.shape[2] > 1 else None,
        extrasamples=["unassalpha"] if photo.alpha is not None else None,
        compression="zlib",
        metadata=None,
        software=False,
        iccprofile=photo.icc,
        extratags=[(_ORIENTATION, "H", 1, photo.orientation, True)],
    )


def _encode_16_bit(suffix: str, samples: np.ndarray, photo: Photo) -> bytes:
    if samples.shape[2] == 2:  # OpenCV has no grey + alpha: equal colours say the same
        samples = samples[..., [0, 0, 0, 1]]
    if samples.shape[2] > 1:
        samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]
    metadata = {}
    if suffix == ".png" and photo.icc:
        metadata[cv2.IMAGE_METADATA_ICCP] = photo.icc
    if suffix == ".png" and photo.exif:
        metadata[cv2.IMAGE_METADATA_EXIF] = photo.exif.removeprefix(b"Exif\0\0")
    blocks = [np.frombuffer(block, np.uint8) for block in metadata.values()]
    suffix = suffix if suffix == ".png" else ".pgm" if photo.grey else ".ppm"
    _, encoded = cv2.imencodeWithMetadata(suffix, np.ascontiguousarray(samples), list(metadata), blocks)
    return encoded.tobytes()
