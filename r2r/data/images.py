"""Reading and writing image files the way a person looking at them expects.

A `Photo` holds the samples of a file as stored, 8 or 16 bits or floating point, and upright views of them: the EXIF
orientation is applied. Pillow decodes 8-bit files. OpenCV and tifffile decode what Pillow would cut to 8 bits: 16-bit
PNG, PNM and TIFF, floating-point TIFF. A file is what its first bytes say, whatever its name.
"""

from __future__ import annotations

import io
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import Image, JpegImagePlugin

from r2r.data import metadata as about
from r2r.data.metadata import ORIENTATION, Metadata
from r2r.errors import InputError
from r2r.files import atomic_path

logger = logging.getLogger(__name__)

ACCEPTED = "accepted: PNG, JPEG, BMP, TIFF, WebP, AVIF, PPM or PGM, of one frame"
MAX_PIXELS = 2**30
_SAMPLES = "accepted: 8 or 16 bits unsigned, or floating point in [0, 1]"

# Pillow's own limit refuses the 200-megapixel photos of today's phones; ours is checked on every file instead.
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, MAX_PIXELS)
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said by an InputError

Image.init()  # `formats=` knows only the plugins that are loaded
_FORMATS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "AVIF", "PPM"]
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ICC_PROFILE = 34675
_BAND = 1024  # rows that are copied between Pillow and numpy at once


class Format(NamedTuple):
    """What a format is named and what it can hold: bits a channel, alpha; whether it has a quality."""

    suffixes: tuple[str, ...]
    bits: int
    alpha: bool
    lossy: bool = False


FORMATS = {
    "PNG": Format((".png",), 16, True),
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif"), 8, False, lossy=True),
    "BMP": Format((".bmp", ".dib"), 8, False),
    "TIFF": Format((".tif", ".tiff"), 32, True),
    "WEBP": Format((".webp",), 8, True, lossy=True),
    "AVIF": Format((".avif",), 8, True, lossy=True),
    "PPM": Format((".ppm", ".pgm", ".pnm"), 16, False),
    "HEIF": Format((".heic", ".heif", ".hif"), 8, True, lossy=True),
}
SUFFIXES = tuple(suffix for name, one in FORMATS.items() if name != "HEIF" for suffix in one.suffixes)
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf", ".pef", ".srw")
EXTRA_SUFFIXES = (*FORMATS["HEIF"].suffixes, *RAW_SUFFIXES)  # read where an optional package is installed
_PEAKS = {"uint8": 255, "uint16": 65535, "float32": 1.0}


@dataclass(eq=False)
class Photo:
    """A decoded file and what must survive its restoration.

    samples: uint8, uint16 or float32 in [0, 1], [H, W, C], rows as in the file; C = 1 grey, 2 grey + alpha, 3 RGB,
    4 RGB + alpha. orientation: EXIF, 1 to 8, how the rows lie. file_format: a key of `FORMATS`. compression: arguments
    of Pillow's writer that keep a JPEG's quality and subsampling. times: last access and change of the file, in ns.
    """

    samples: np.ndarray
    orientation: int = 1
    file_format: str = "PNG"
    metadata: Metadata = field(default_factory=Metadata)
    compression: dict[str, Any] = field(default_factory=dict)
    times: tuple[int, int] | None = None

    @property
    def pixels(self) -> np.ndarray:
        """The colours, upright: a view [H, W, 1] or [H, W, 3]. What is written to it goes into the photo."""
        return _upright(self.samples[..., :1] if self.grey else self.samples[..., :3], self.orientation)

    @property
    def alpha(self) -> np.ndarray | None:
        """Upright, a view [H, W]."""
        if self.samples.shape[2] in (1, 3):
            return None
        return _upright(self.samples[..., -1], self.orientation)

    @property
    def grey(self) -> bool:
        return self.samples.shape[2] < 3

    @property
    def bit_depth(self) -> int:
        """8, 16, or 32 for floating point."""
        return 8 * self.samples.dtype.itemsize


def image_files(folder: str | Path) -> list[Path]:
    """The image files in `folder` and its subfolders, sorted; hidden files and folders are left out.

    Links to folders are not followed, as they may lead anywhere; the log names each. Raises InputError where there is
    no such folder. An empty folder gives an empty list.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(path := os.path.join(root, name)):
                logger.warning("%s: a link to a folder, which is not followed; name that folder beside this one", path)
        found = [name for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
        files += [Path(root, name) for name in found if os.path.isfile(os.path.join(root, name))]
    return sorted(files, key=lambda path: path.parts)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the upright image, from the file's header alone. Raises InputError."""
    path = Path(path)
    with _naming(path), open(path, "rb") as file:
        if file.read(4) in _TIFF_MAGIC:
            page = _tiff_page(file)
            height, width, orientation = page.imagelength, page.imagewidth, _tiff_orientation(page)
        else:
            file.seek(0)
            image = _open(file)
            _check(image)
            if image.format == "PNG" and "exif" not in image.info:
                file.seek(-min(path.stat().st_size, 2**17), io.SEEK_END)
                if b"eXIf" in file.read():  # it may stand behind the pixels, where only a full read finds it
                    image.load()
            # Not image.getexif(): for a PNG without EXIF that decodes the whole file.
            (width, height), orientation = image.size, _orientation(Image.Image.getexif(image))
    return (height, width) if orientation < 5 else (width, height)


def memory_to_read(path: str | Path) -> int:
    """Roughly how many bytes it takes to decode or to encode a file, the photo included; 0 where its size cannot be
    told."""
    path = Path(path)
    try:
        height, width = image_size(path)
        stored = path.stat().st_size
    except (InputError, OSError):
        return 0
    deep = stored > 4 * height * width or path.suffix.lower() in (*FORMATS["TIFF"].suffixes, *RAW_SUFFIXES)
    return stored + (20 if deep else 9) * height * width


def read_rgb(path: str | Path) -> np.ndarray:
    """The colours of an image file: float32 [H, W, 3] in [0, 1], upright, with the precision of the file.

    Grey becomes three equal channels; palettes and CMYK become RGB; alpha is dropped and the colour beneath it kept.
    Raises InputError, naming the file, for what cannot be read whole.
    """
    pixels = to_float(read_photo(path).pixels)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def map_rgb(path: Path) -> np.memmap | None:
    """The samples [H, W, 3] of an uncompressed RGB TIFF of 8 or 16 bits, of which only what is used is read; None for
    any other file, damaged ones too: `read_photo` says what is wrong with them."""
    if path.suffix.lower() not in FORMATS["TIFF"].suffixes:
        return None
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            plain = page.is_memmappable and page.photometric == tifffile.PHOTOMETRIC.RGB and len(file.pages) == 1
            shape = (page.imagelength, page.imagewidth, 3)
            whole = page.shape == shape and page.dtype in (np.uint8, np.uint16) and _tiff_orientation(page) == 1
            if not (plain and whole):
                return None
            dtype = np.dtype(page.dtype).newbyteorder(file.byteorder)
            return np.memmap(path, dtype, "r", page.dataoffsets[0], shape)
    except (OSError, ValueError, tifffile.TiffFileError):
        return None


def read_photo(source: str | Path | IO[bytes]) -> Photo:
    """An image file with all that `write_photo` needs to keep. Raises InputError, naming the file.

    Of a phone's multi-picture JPEG the first picture is read; animations and TIFFs of several pages are refused. Raw
    files of cameras and HEIF need the packages rawpy and pillow-heif; raw files are developed to 16 bits.
    """
    if not isinstance(source, str | Path):
        with _naming(Path("-")):
            return _decode(source.read())
    path = Path(source)
    with _naming(path):
        stat = path.stat()
        photo = _develop(path) if path.suffix.lower() in RAW_SUFFIXES else _decode(path.read_bytes())
        photo.times = (stat.st_atime_ns, stat.st_mtime_ns)
        return photo


def write_rgb(path: str | Path, pixels: np.ndarray) -> None:
    """Write [H, W, 3] in [0, 1] with 8 bits a channel, in the format of the suffix, atomically. Raises InputError."""
    write_photo(path, Photo(from_float(pixels, np.dtype(np.uint8)), file_format=format_of(path)))


def format_of(name: str | Path) -> str:
    """The key of `FORMATS` for a file's suffix, or for a bare "jpg". Raises InputError for an unknown one."""
    suffix = (Path(name).suffix or f".{name}").lower()
    for file_format, one in FORMATS.items():
        if suffix in one.suffixes:
            return file_format
    raise InputError(f"{name}: unknown format {suffix!r}; accepted: {', '.join(SUFFIXES)}")


def write_photo(
    target: str | Path | IO[bytes], photo: Photo, file_format: str | None = None, quality: int | None = None
) -> None:
    """Write a photo to a path, atomically, or to an open file, in its own format or another.

    Kept as far as the format can hold it: metadata, alpha, grey, and in the photo's own format the bit depth. The rows
    stay in the photo's order with its orientation tag, so that a viewer shows both files alike, whether it heeds
    the tag or not. A path's file gets the times of the photo.
    quality: 1 to 100. By default a JPEG keeps its quantisation and subsampling, another file becomes a JPEG of quality
    95 without subsampling, AVIF and HEIF are written at 90, WebP lossless. In another format 16 bits become 8 where
    need be, and alpha that hides nothing is dropped.
    Raises InputError where the format cannot hold the photo, or the file cannot be written.
    """
    name = target if isinstance(target, str | Path) else "-"
    chosen = file_format or photo.file_format
    try:
        samples = _fitting(photo, chosen)
    except InputError as error:
        raise InputError(f"cannot write {name}: {error}") from error
    if not isinstance(target, str | Path):
        return _encode(target, samples, photo, chosen, quality)
    with atomic_path(target) as temporary:
        with open(temporary, "w+b") as file:
            try:
                _encode(file, samples, photo, chosen, quality)
            except (ValueError, SyntaxError, struct.error, cv2.error) as error:  # what encoders raise
                raise InputError(f"cannot write {name} as {chosen}: {_first_line(error)}") from error
        if photo.times:
            os.utime(temporary, ns=photo.times)


def _fitting(photo: Photo, file_format: str) -> np.ndarray:
    """The photo's samples as the format can hold them. Raises InputError where it cannot."""
    samples, holds = photo.samples, FORMATS[file_format]
    if photo.alpha is not None and not holds.alpha:
        if photo.alpha.min() < _PEAKS[samples.dtype.name]:
            raise InputError(f"{file_format} cannot hold alpha; PNG, TIFF, WebP and AVIF can")
        samples = np.ascontiguousarray(samples[..., :-1])
    if photo.bit_depth > holds.bits:
        if file_format == photo.file_format:
            raise InputError(f"{file_format} cannot hold {photo.bit_depth} bits a channel; PNG and TIFF can")
        samples = from_float(to_float(samples), np.dtype(f"uint{holds.bits}"))
    return samples


def _encode(file: IO[bytes], samples: np.ndarray, photo: Photo, file_format: str, quality: int | None) -> None:
    details = photo.metadata

    def draw(size: tuple[int, int]) -> Image.Image:
        step = max(1, min(samples.shape[1] // size[0], samples.shape[0] // size[1]) // 4)  # enough for a thumbnail
        few = to_float(samples[::step, ::step, : 1 if photo.grey else 3])
        thumbnail = _as_image(from_float(few, np.dtype(np.uint8)))
        thumbnail.thumbnail(size)
        return thumbnail

    if details.exif:
        details = replace(details, exif=about.with_new_thumbnail(details.exif, draw))
    if file_format == "TIFF":
        about.write_tiff(file, samples, photo.orientation, details)
    elif samples.dtype == np.uint16:
        file.write(_encode_16_bit(samples, file_format, details))
    else:
        if file_format == "HEIF":
            _register_heif()
        options = _compression(photo, file_format, quality)
        _as_image(samples).save(file, file_format, **options, **about.save_options(details, file_format))


def _compression(photo: Photo, file_format: str, quality: int | None) -> dict[str, Any]:
    """Arguments of Pillow's writer that decide size and quality."""
    if file_format == "PNG":
        return {"compress_level": 4}
    if file_format == "WEBP":
        return {"lossless": True, "exact": True} if quality is None else {"quality": quality}
    if file_format == "JPEG":
        if quality is None and photo.file_format == "JPEG" and photo.compression:
            return photo.compression
        return {"quality": 95 if quality is None else quality, "subsampling": 0}
    if file_format in ("AVIF", "HEIF"):
        return {"quality": 90 if quality is None else quality}
    return {}


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
        raise InputError(f"{path}: not an image; {ACCEPTED}") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for this machine's memory") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{path}: {error.strerror}") from error
        raise InputError(f"{path}: damaged or cut short ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _check(image: Image.Image) -> None:
    _check_size(image.height, image.width)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in ("MPO", "TIFF"):  # `_tiff_page` has looked at a TIFF's pages
        raise InputError(f"{frames} frames; {ACCEPTED}")


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise InputError(f"{width} x {height} pixels; at most {MAX_PIXELS} pixels are accepted")


def _open(file: IO[bytes]) -> Image.Image:
    """The image in an open file, its pixels not decoded yet."""
    start = file.read(12)
    file.seek(0)
    if start[4:8] == b"ftyp" and start[8:] in _HEIF_BRANDS:
        _register_heif()
        return Image.open(file, formats=["HEIF"])
    return Image.open(file, formats=_FORMATS)


def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise InputError("HEIF needs the package pillow-heif: pip install 'r2r-restore[heif]'") from error
    register_heif_opener()


def _develop(path: Path) -> Photo:
    """A camera's raw file, developed by LibRaw with the camera's white balance: sRGB of 16 bits, upright."""
    try:
        import rawpy
    except ImportError as error:
        raise InputError("raw files need the package rawpy: pip install 'r2r-restore[raw]'") from error
    with rawpy.imread(str(path)) as raw:
        _check_size(raw.sizes.height, raw.sizes.width)
        samples = raw.postprocess(use_camera_wb=True, output_bps=16)
        return Photo(np.require(samples, requirements=["C", "W"]), file_format="TIFF")


def _decode(data: bytes) -> Photo:
    if not data:
        raise InputError(f"an empty file; {ACCEPTED}")
    if data[:4] in _TIFF_MAGIC:
        page = _tiff_page(io.BytesIO(data))
        if page.bitspersample > 8:
            return _decode_deep_tiff(data, page)
    image = _open(io.BytesIO(data))
    _check(image)
    peak = _peak(image, data)
    orientation = _orientation(image.getexif())  # first: loading a TIFF turns it and drops the tag
    image.load()  # raises where the file is cut off, on which OpenCV may only warn
    file_format = {"MPO": "JPEG"}.get(str(image.format), str(image.format))
    details = about.of_tiff(data) if file_format == "TIFF" else about.of_image(image)
    if file_format == "TIFF" and "icc_profile" in image.info:
        details = replace(details, icc=image.info["icc_profile"])
    if peak > 255:
        grey_alpha = file_format == "PNG" and data[25] == 4  # which OpenCV expands
        del image  # its pixels take more room than the file's own
        samples = _opencv(data)
        if grey_alpha:
            samples = np.ascontiguousarray(samples[..., [0, 3]])
        if samples.dtype == np.uint16 and peak < 65535:
            samples = np.rint(samples * (65535 / peak)).astype(np.uint16)
        return Photo(samples, orientation, file_format, details)
    compression = _jpeg_compression(image) if isinstance(image, JpegImagePlugin.JpegImageFile) else {}
    if image.mode in ("CMYK", "YCbCr", "LAB"):
        details = replace(details, icc=None)  # it describes the colours before the conversion
    samples = _as_array(image)
    if file_format == "TIFF":
        samples = np.ascontiguousarray(_as_stored(samples, orientation))
    return Photo(samples, orientation, file_format, details, compression)


def _jpeg_compression(image: JpegImagePlugin.JpegImageFile) -> dict[str, Any]:
    """How the file was compressed, as Pillow's writer takes it."""
    tables = [image.quantization[key] for key in sorted(image.quantization)]
    if not 1 <= len(tables) <= 4 or image.layers == 4:
        return {}
    return {
        "qtables": tables,
        "subsampling": JpegImagePlugin.get_sampling(image),
        "progressive": bool(image.info.get("progressive")),
    }


def _as_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a Pillow image of any 8-bit mode, copied in bands to hold it no more than twice."""
    grey = image.mode in ("1", "L", "LA", "La")
    transparent = image.has_transparency_data
    mode = {(True, False): "L", (True, True): "LA", (False, False): "RGB", (False, True): "RGBA"}[grey, transparent]
    samples = np.empty((image.height, image.width, len(mode)), np.uint8)
    for top in range(0, image.height, _BAND):
        bottom = min(top + _BAND, image.height)
        band = image.crop((0, top, image.width, bottom))
        samples[top:bottom] = np.asarray(band.convert(mode)).reshape(bottom - top, image.width, len(mode))
    return samples


def _as_image(samples: np.ndarray) -> Image.Image:
    return Image.fromarray(samples.squeeze(2) if samples.shape[2] == 1 else samples)


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
    if samples.shape[2] > 2:
        samples[..., [0, 2]] = samples[..., [2, 0]]
    return samples


def _tiff_page(file: IO[bytes]) -> tifffile.TiffPage:
    """The one page of a TIFF that is no smaller copy of another."""
    file.seek(0)
    pages = tifffile.TiffFile(file).pages
    whole = [page for page in (pages.first, *list(pages)[1:]) if not getattr(page, "is_reduced", False)]
    if len(whole) > 1:
        raise InputError(f"{len(whole)} pages; {ACCEPTED}")
    page = pages.first
    _check_size(page.imagelength, page.imagewidth)
    return page


def _tiff_orientation(page: tifffile.TiffPage) -> int:
    tag = page.tags.get(ORIENTATION)
    return _orientation({ORIENTATION: tag.value} if tag else {})


def _decode_deep_tiff(data: bytes, page: tifffile.TiffPage) -> Photo:
    photometric = tifffile.PHOTOMETRIC(page.photometric).name
    if photometric not in ("MINISBLACK", "MINISWHITE", "RGB") or page.samplesperpixel > 4:
        raise InputError(f"{page.samplesperpixel} channels of {photometric}; beyond 8 bits grey and RGB are accepted")
    if page.bitspersample not in (16, 32, 64) or page.dtype is None or page.dtype.kind not in "uf":
        raise InputError(f"{page.bitspersample}-bit samples; {_SAMPLES}")
    if tifffile.EXTRASAMPLE.ASSOCALPHA in page.extrasamples:
        raise InputError("colours multiplied by alpha; beyond 8 bits plain alpha is accepted")
    samples = _tiff_samples(data, page)
    profile = page.tags.get(_ICC_PROFILE)
    details = replace(about.of_tiff(data), icc=bytes(profile.value) if profile else None)
    orientation = _tiff_orientation(page)
    if samples.dtype.kind == "f":
        if not np.isfinite(samples).all():
            raise InputError(f"NaN or infinite values; {_SAMPLES}")
        if samples.min() < 0 or samples.max() > 1:
            raise InputError(f"values from {samples.min():g} to {samples.max():g}; {_SAMPLES}")
        return Photo(samples.astype(np.float32, order="C"), orientation, "TIFF", details)
    if samples.dtype.itemsize != 2:
        raise InputError(f"samples of type {samples.dtype}; {_SAMPLES}")
    samples = 65535 - samples if photometric == "MINISWHITE" else samples
    return Photo(np.require(samples, np.uint16, ["C", "W"]), orientation, "TIFF", details)


def _tiff_samples(data: bytes, page: tifffile.TiffPage) -> np.ndarray:
    """[H, W, C] as stored."""
    try:
        samples = page.asarray()
    except ValueError as error:
        # tifffile leaves LZW and the like to a large package; OpenCV knows them, but mixes up separate planes.
        if "imagecodecs" not in str(error) or page.planarconfig != tifffile.PLANARCONFIG.CONTIG:
            raise
        plain = bytearray(data)
        if page.tags.get(ORIENTATION):  # OpenCV would turn some files and fail on others
            struct.pack_into(f"{page.parent.byteorder}H", plain, page.tags[ORIENTATION].valueoffset, 1)
        return _opencv(plain)
    if samples.ndim == 2:
        return samples[..., None]
    return samples if page.planarconfig == tifffile.PLANARCONFIG.CONTIG else np.moveaxis(samples, 0, -1)


def _orientation(tags: Image.Exif | dict[int, int]) -> int:
    value = tags.get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _upright(rows: np.ndarray, orientation: int) -> np.ndarray:
    """`rows` [H, W, ...] as stored, turned as the EXIF orientation says: a view."""
    if orientation >= 5:
        rows = rows.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        rows = rows[::-1]
    if orientation in (2, 3, 6, 7):
        rows = rows[:, ::-1]
    return rows


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of `_upright`: each orientation is its own inverse, but for the quarter turns 6 and 8."""
    return _upright(upright, {6: 8, 8: 6}.get(orientation, orientation))


def to_float(samples: np.ndarray) -> np.ndarray:
    """uint8, uint16 or float32 samples as float32 in [0, 1]."""
    values = samples.astype(np.float32)
    if samples.dtype.kind == "u":
        values /= np.float32(_PEAKS[samples.dtype.name])
    return values


def from_float(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The inverse of `to_float`: clipped to [0, 1] and rounded."""
    values = np.clip(values, 0, 1)
    if dtype.kind == "u":
        values = np.rint(values * np.float32(_PEAKS[dtype.name]))
    return values.astype(dtype)


def _encode_16_bit(samples: np.ndarray, file_format: str, details: Metadata) -> bytes:
    channels = samples.shape[2]
    if channels == 2:  # OpenCV has no grey + alpha: equal colours say the same
        samples = samples[..., [0, 0, 0, 1]]
    elif channels > 2:
        samples = samples[..., [2, 1, 0, 3][:channels]]
    suffix = ".png" if file_format == "PNG" else ".pgm" if channels == 1 else ".ppm"
    _, encoded = cv2.imencode(suffix, np.ascontiguousarray(samples))
    if file_format != "PNG":
        return encoded.tobytes()
    header = 33  # bytes of a PNG's signature and first chunk
    return encoded[:header].tobytes() + about.png_chunks(details) + encoded[header:].tobytes()
