"""What an image file says beside its pixels: EXIF, XMP, IPTC, colour profile, resolution, text.

`of_image` and `of_tiff` read it, `save_options` gives it to Pillow's writers and `write_tiff` writes it with tifffile.
EXIF blocks pass through unchanged, because notes of a camera's maker break when a block is built anew.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import tifffile
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

ORIENTATION = 274  # the tag's number in EXIF and in TIFF
_ICC, _XMP, _PHOTOSHOP = 34675, 700, 34377
_RESOLUTION = (282, 283, 296)  # x, y, unit
_EXIF_PREFIX = b"Exif\0\0"
_PHOTOSHOP_PREFIX = b"Photoshop 3.0\0"
_XMP_OF_PNG = "XML:com.adobe.xmp"
_SEGMENT = 65533  # bytes that a segment of a JPEG holds

# Tags that say how a TIFF stores its pixels: the writer makes them anew. 34665 and 34853 point to EXIF and GPS.
_STRUCTURE = {254, 255, *range(256, 260), 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, *range(288, 294),
              301, 317, 318, 319, 320, 321, *range(322, 326), 330, 332, *range(338, 348), *range(512, 522),
              *range(529, 533), 559, 32997, 33421, 33422}  # fmt: skip
_NESTED = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


@dataclass(frozen=True)
class Metadata:
    """exif: a TIFF structure behind b"Exif\\0\\0". photoshop: image resource blocks, in which JPEG and TIFF keep IPTC.
    dpi: pixels an inch, across and down. comment: of a JPEG. text: of a PNG, by keyword."""

    exif: bytes | None = None
    xmp: bytes | None = None
    icc: bytes | None = None
    photoshop: bytes | None = None
    dpi: tuple[float, float] | None = None
    comment: bytes | None = None
    text: dict[str, str] = field(default_factory=dict)


def of_image(image: Image.Image) -> Metadata:
    """The metadata of a loaded image of any format but TIFF."""
    info = image.info
    exif, xmp, comment = (info.get(name) for name in ("exif", "xmp", "comment"))
    text = dict(getattr(image, "text", {}))
    text.pop(_XMP_OF_PNG, None)
    blocks = [
        part.removeprefix(_PHOTOSHOP_PREFIX)
        for name, part in getattr(image, "applist", ())
        if name == "APP13" and part.startswith(_PHOTOSHOP_PREFIX)
    ]
    return Metadata(
        exif=_EXIF_PREFIX + exif.removeprefix(_EXIF_PREFIX) if exif else None,
        xmp=xmp.encode() if isinstance(xmp, str) else xmp or None,
        icc=info.get("icc_profile") or None,
        photoshop=b"".join(blocks) or None,
        dpi=_resolution(info.get("dpi")),
        comment=comment if isinstance(comment, bytes) else None,
        text=text,
    )


def of_tiff(data: bytes) -> Metadata:
    """The metadata of a TIFF; empty for what cannot be understood."""
    exif = Image.Exif()
    try:
        exif.load_from_fp(io.BytesIO(data))
        tags = dict(exif)
        nested = {tag: exif.get_ifd(tag) for tag in _NESTED if tag in tags}
    except Exception:  # a tag that Pillow cannot read does not make the picture unreadable
        return Metadata()
    dpi = None
    with suppress(LookupError, TypeError, ValueError, ZeroDivisionError):
        scale = {2: 1.0, 3: 2.54}.get(tags.get(_RESOLUTION[2], 2))
        dpi = _resolution(tuple(float(tags[tag]) * scale for tag in _RESOLUTION[:2])) if scale else None
    icc, xmp, photoshop = (_bytes(tags.get(tag)) for tag in (_ICC, _XMP, _PHOTOSHOP))
    for tag in tags.keys() & (_STRUCTURE | {*_RESOLUTION, _ICC, _XMP, _PHOTOSHOP, ExifTags.IFD.Interop}):
        del exif[tag]
    for tag, values in nested.items():
        exif[tag] = values
    block = None
    with suppress(Exception):  # a value that Pillow reads but cannot write
        block = exif.tobytes() if len(exif) else None
    return Metadata(block, xmp, icc, photoshop, dpi)


def _bytes(value: Any) -> bytes | None:
    if isinstance(value, tuple):
        with suppress(TypeError, ValueError):
            return bytes(value)
    return value if isinstance(value, bytes) and value else None


def _resolution(dpi: Any) -> tuple[float, float] | None:
    """A resolution that every format can hold, or None."""
    try:
        across, down = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 1 <= across < 65535 and 1 <= down < 65535 else None


def save_options(metadata: Metadata, file_format: str) -> dict[str, Any]:
    """Arguments of `Image.save` for a format other than TIFF. What the format cannot hold is left out."""
    options: dict[str, Any] = {}
    if file_format == "JPEG":
        options = {"comment": metadata.comment, "extra": _segments(metadata)}
        if metadata.exif and len(metadata.exif) <= _SEGMENT:
            options["exif"] = metadata.exif
        if metadata.dpi:
            options["dpi"] = tuple(round(value) for value in metadata.dpi)
    elif file_format == "PNG":
        options = {"exif": metadata.exif, "dpi": metadata.dpi, "pnginfo": _png_text(metadata)}
    elif file_format in ("WEBP", "AVIF", "HEIF"):
        options = {"exif": metadata.exif, "xmp": metadata.xmp}
    elif file_format == "BMP":
        options = {"dpi": metadata.dpi}
    if file_format not in ("BMP", "PPM"):
        options["icc_profile"] = metadata.icc
    return {name: value for name, value in options.items() if value}


def _segments(metadata: Metadata) -> bytes:
    """Segments of a JPEG that Pillow does not write, or not at this length: XMP, IPTC, and EXIF beyond 64 kB."""
    written = b""
    if metadata.exif and len(metadata.exif) > _SEGMENT:
        written += _split(1, _EXIF_PREFIX, metadata.exif.removeprefix(_EXIF_PREFIX))
    xmp_prefix = b"http://ns.adobe.com/xap/1.0/\0"
    if metadata.xmp and len(metadata.xmp) <= _SEGMENT - len(xmp_prefix):
        written += _split(1, xmp_prefix, metadata.xmp)
    if metadata.photoshop:
        written += _split(13, _PHOTOSHOP_PREFIX, metadata.photoshop)
    return written


def _split(number: int, prefix: bytes, data: bytes) -> bytes:
    """`data` in as many APPn segments as it takes, each with the prefix."""
    room = _SEGMENT - len(prefix)
    parts = (data[start : start + room] for start in range(0, len(data), room))
    return b"".join(struct.pack(">BBH", 0xFF, 0xE0 + number, 2 + len(prefix) + len(p)) + prefix + p for p in parts)


def _png_text(metadata: Metadata) -> PngImagePlugin.PngInfo | None:
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in metadata.text.items():
        with suppress(ValueError, UnicodeError):  # a keyword that PNG does not allow
            if isinstance(text, PngImagePlugin.iTXt):
                chunks.add_itxt(keyword, text, text.lang or "", text.tkey or "", zip=len(text) > 1024)
            else:
                chunks.add_text(keyword, text, zip=len(text) > 1024)
    if metadata.xmp:
        with suppress(UnicodeError):
            chunks.add_itxt(_XMP_OF_PNG, metadata.xmp.decode())
    return chunks if chunks.chunks else None


def png_chunks(metadata: Metadata) -> bytes:
    """The metadata as chunks of a PNG, to stand behind its header."""
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "PNG", **save_options(metadata, "PNG"))
    data = pixel.getvalue()
    return data[33 : data.index(b"IDAT") - 4]  # between the header and the pixels


def write_tiff(file: IO[bytes], samples: np.ndarray, orientation: int, metadata: Metadata) -> None:
    """Write samples [H, W, C] with their metadata; C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha."""
    channels = samples.shape[2]
    tags, nested = _tiff_tags(metadata.exif) if metadata.exif else ([], {})
    tags.append((ORIENTATION, "H", 1, orientation, True))
    for code, value in ((_XMP, metadata.xmp), (_PHOTOSHOP, metadata.photoshop)):
        if value:
            tags.append((code, "B", len(value), value, True))
    # tifffile writes no tags that point elsewhere. The tags before them hold their places until `_point`.
    tags += [(tag - 1, "I", 1, 0, True) for tag in nested]
    tifffile.imwrite(
        file,
        samples.squeeze(2) if channels == 1 else samples,
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        compression="zlib",
        metadata=None,
        software=False,
        iccprofile=metadata.icc,
        resolution=metadata.dpi,
        resolutionunit="INCH" if metadata.dpi else None,
        extratags=tags,
    )
    if nested:
        _point(file, nested)


def _tiff_tags(exif: bytes) -> tuple[list[tuple[int, Any, int, Any, bool]], dict[int, dict[int, Any]]]:
    """Of an EXIF block: its own tags as tifffile takes them, and the directories that it points to."""
    left_out = {ORIENTATION, *_STRUCTURE, *_RESOLUTION, *_NESTED, _ICC, _XMP, _PHOTOSHOP}
    parsed = Image.Exif()
    try:
        parsed.load(exif)
        nested = {int(tag): ifd for tag in _NESTED if tag in parsed and (ifd := parsed.get_ifd(tag))}
        with tifffile.TiffFile(io.BytesIO(exif.removeprefix(_EXIF_PREFIX))) as block:
            own = [tag for tag in block.pages.first.tags if tag.code not in left_out]
    except Exception:  # a damaged block is no reason to lose the picture
        return [], {}
    return [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in own], nested


def _point(file: IO[bytes], nested: dict[int, dict[int, Any]]) -> None:
    """Append directories of tags to a TIFF, and let the tags that were written for them point there."""
    file.seek(0)
    with tifffile.TiffFile(file) as written:
        places = {tag: written.pages.first.tags[tag - 1].offset for tag in nested}
    for tag, values in nested.items():
        directory = TiffImagePlugin.ImageFileDirectory_v2()
        for code, value in values.items():
            directory[code] = value
        offset = file.seek(0, io.SEEK_END)
        offset = file.seek(offset + offset % 2)
        file.write(directory.tobytes(offset))
        file.seek(places[tag])
        file.write(struct.pack("<HHII", tag, tifffile.DATATYPE.LONG, 1, offset))


def with_new_thumbnail(exif: bytes, draw: Callable[[tuple[int, int]], Image.Image]) -> bytes:
    """The EXIF block with its thumbnail drawn anew, or without it where that cannot be done. Everything else keeps
    its place.

    draw: gives the picture at a size (width, height), which it may fall short of.
    """
    tags = Image.Exif()
    try:
        tags.load(exif)
        ifd = tags.get_ifd(ExifTags.IFD.IFD1)
        start, length = ifd[513], ifd[514]
        start += len(_EXIF_PREFIX)
        old = exif[start : start + length]
        with Image.open(io.BytesIO(old), formats=["JPEG"]) as thumbnail:
            size = thumbnail.size
    except Exception:  # no thumbnail, or none that can be read
        return exif
    picture = draw(size)
    for quality in (90, 80, 65, 50, 30, 10):
        made = io.BytesIO()
        picture.save(made, "JPEG", quality=quality)
        if made.tell() <= length:
            return exif[:start] + made.getvalue().ljust(length, b"\0") + exif[start + length :]
    # Cut the directory of the thumbnail off: the pointer to it stands behind the first directory's tags.
    order = "<" if exif[6:8] == b"II" else ">"
    (first,) = struct.unpack_from(f"{order}I", exif, 10)
    (number,) = struct.unpack_from(f"{order}H", exif, 6 + first)
    pointer = 6 + first + 2 + 12 * number
    return exif[:pointer] + bytes(4) + exif[pointer + 4 :]
