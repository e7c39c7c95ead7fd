"""What a file says beside its pixels is found again in what is written."""

from __future__ import annotations

import io
import os
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin

from r2r.data.images import read_photo, write_photo

PHOTO = skimage.data.astronaut()[:64, 100:196]
PICTURE = Image.fromarray(PHOTO)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
EXPOSURE, LATITUDE = 33434, 2


def exif_block(description: str = "Grandma, 1954") -> bytes:
    """EXIF with a camera, exposure and a place."""
    tags = Image.Exif()
    tags[270], tags[271] = description, "Camera"
    tags[ExifTags.IFD.Exif] = {EXPOSURE: TiffImagePlugin.IFDRational(1, 60), 37500: b"notes of the maker"}
    tags[ExifTags.IFD.GPSInfo] = {1: "N", LATITUDE: (47.0, 22.0, 30.0)}
    return tags.tobytes()


def written(path: Path, *how: Any) -> Path:
    """The file read and written again."""
    target = path.with_name(f"written{path.suffix}")
    write_photo(target, read_photo(path), *how)
    return target


def exif_of(path: Path) -> tuple[Any, ...]:
    with Image.open(path) as image:
        tags = image.getexif()
        exposure, gps = tags.get_ifd(ExifTags.IFD.Exif), tags.get_ifd(ExifTags.IFD.GPSInfo)
        return tags[270], tags[271], float(exposure[EXPOSURE]), exposure[37500], [float(x) for x in gps[LATITUDE]]


def test_jpeg_keeps_every_segment_a_person_could_miss(tmp_path: Path) -> None:
    iptc = b"8BIM\x04\x04\0\0\0\0\0\x0c\x1c\x02\x78\0\x07caption"
    segment = b"\xff\xed" + struct.pack(">H", 16 + len(iptc)) + b"Photoshop 3.0\0" + iptc
    path = tmp_path / "a.jpg"
    kept = {"exif": exif_block(), "icc_profile": ICC, "dpi": (600, 300), "comment": b"hello", "xmp": XMP}
    PICTURE.save(path, quality=83, subsampling="4:2:2", progressive=True, extra=segment, **kept)
    with Image.open(path) as before, Image.open(written(path)) as after:
        assert {name: after.info[name] for name in kept} == kept | {"exif": before.info["exif"]}
        assert after.info["photoshop"] == before.info["photoshop"] == {0x0404: b"\x1c\x02\x78\0\x07caption"}
        assert after.quantization == before.quantization
        assert after.layer == before.layer
        assert after.info["progressive"]
    assert exif_of(tmp_path / "written.jpg") == exif_of(path)
    with Image.open(written(path, None, 40)) as image:
        assert image.quantization != Image.open(path).quantization


@pytest.mark.parametrize("name", ["a.png", "deep.png", "a.webp", "a.avif", "a.tif", "deep.tif", "float.tif"])
def test_other_formats_keep_exif_gps_profile_and_what_else_they_hold(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    source = tmp_path / "source.jpg"
    PICTURE.save(source, quality=95, exif=exif_block(), icc_profile=ICC, dpi=(600, 300), xmp=XMP)
    photo = read_photo(source)
    if "deep" in name:
        photo.samples = photo.samples.astype(np.uint16) * 257
    elif "float" in name:
        photo.samples = photo.samples / np.float32(255)
    write_photo(path, photo, {".png": "PNG", ".tif": "TIFF", ".webp": "WEBP", ".avif": "AVIF"}[path.suffix])
    again = written(path)
    assert read_photo(again).samples.dtype == photo.samples.dtype
    if "deep" in name or "float" in name:
        with tifffile.TiffFile(again) if "tif" in name else Image.open(again) as file:
            assert file is not None
    for one in (path, again):
        found = read_photo(one).metadata
        assert (found.icc, found.xmp) == (ICC, XMP)
        if path.suffix in (".png", ".tif"):
            assert found.dpi == pytest.approx((600, 300), abs=0.01)
        tags = Image.Exif()
        assert found.exif is not None
        tags.load(found.exif)
        assert (tags[270], tags[271]) == ("Grandma, 1954", "Camera")
        assert float(tags.get_ifd(ExifTags.IFD.Exif)[EXPOSURE]) == pytest.approx(1 / 60)
        assert tags.get_ifd(ExifTags.IFD.Exif)[37500] == b"notes of the maker"
        assert [float(x) for x in tags.get_ifd(ExifTags.IFD.GPSInfo)[LATITUDE]] == [47, 22, 30]


def test_tags_of_a_scan_are_kept(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    own = {
        270: "Grandma, 1954",
        271: "Epson",
        305: "Scanner 1",
        306: "1999:01:02 03:04:05",
        315: "Jane",
        33432: "(c) Jane",
    }
    for tag, value in own.items():
        tags[tag] = value
    tags[700] = XMP
    tags[33723] = b"\x1c\x02\x78\0\x07caption"
    path = tmp_path / "scan.tif"
    PICTURE.save(path, tiffinfo=tags, dpi=(600, 600), compression="tiff_lzw")
    with Image.open(written(path)) as image:
        found = image.tag_v2
        assert {tag: found[tag] for tag in own} == own
        assert found[700] == XMP
        assert bytes(found[33723]) == b"\x1c\x02\x78\0\x07caption"
        assert image.info["dpi"] == (600, 600)
        assert np.array_equal(np.asarray(image), PHOTO)


@pytest.mark.parametrize("bits", [8, 16])
def test_text_of_a_png_is_kept(tmp_path: Path, bits: int) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "Jane")
    text.add_itxt("Title", "Großmutter", "de", "Titel")
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    path = tmp_path / "a.png"
    PICTURE.save(path, pnginfo=text, dpi=(300, 300))
    photo = read_photo(path)
    if bits == 16:
        photo.samples = photo.samples.astype(np.uint16) * 257
    write_photo(tmp_path / "b.png", photo)
    with Image.open(tmp_path / "b.png") as image:
        assert image.text == {"Author": "Jane", "Title": "Großmutter", "XML:com.adobe.xmp": XMP.decode()}
        assert image.text["Title"].lang == "de"
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    assert read_photo(tmp_path / "b.png").bit_depth == bits


def test_exif_beyond_64_kb_is_kept_in_several_segments(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    PICTURE.save(path)
    photo = read_photo(path)
    block = exif_block("x" * 90_000)
    write_photo(tmp_path / "b.jpg", type(photo)(photo.samples, 1, "JPEG", type(photo.metadata)(exif=block)))
    assert exif_of(tmp_path / "b.jpg")[0] == "x" * 90_000
    assert exif_of(written(tmp_path / "b.jpg"))[0] == "x" * 90_000


def with_thumbnail(thumbnail: bytes) -> bytes:
    first = struct.pack("<HHHIII", 1, 0x0112, 3, 1, 1, 26)
    second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second + thumbnail


def thumbnail_of(path: Path) -> Image.Image | None:
    tags = Image.open(path).getexif()
    ifd = tags.get_ifd(ExifTags.IFD.IFD1)
    if not ifd:
        return None
    block = Image.open(path).info["exif"]
    return Image.open(io.BytesIO(block[6 + ifd[513] : 6 + ifd[513] + ifd[514]]))


def test_an_embedded_thumbnail_shows_the_new_pixels(tmp_path: Path) -> None:
    small = io.BytesIO()
    PICTURE.resize((48, 32)).save(small, "JPEG", quality=90)
    path = tmp_path / "a.jpg"
    PICTURE.save(path, quality=95, exif=with_thumbnail(small.getvalue()))
    photo = read_photo(path)
    photo.pixels[...] = 255 - photo.pixels
    write_photo(tmp_path / "b.jpg", photo)
    thumbnail = thumbnail_of(tmp_path / "b.jpg")
    assert thumbnail is not None
    assert thumbnail.size == (48, 32)
    expected = np.asarray(Image.open(tmp_path / "b.jpg").resize((48, 32)), float)
    assert np.abs(np.asarray(thumbnail, float) - expected).mean() < 6


def test_a_thumbnail_that_cannot_be_drawn_anew_is_left_out(tmp_path: Path) -> None:
    flat = io.BytesIO()
    Image.new("RGB", (96, 64)).save(flat, "JPEG", quality=1, optimize=True)  # too few bytes for a picture
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(
        path, quality=95, exif=with_thumbnail(flat.getvalue())
    )
    assert thumbnail_of(path) is not None
    assert thumbnail_of(written(path)) is None
    assert Image.open(tmp_path / "written.jpg").getexif()[274] == 1


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_damaged_exif_block_does_not_stop_a_photo(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a.jpg"
    block = exif_block()
    PICTURE.save(path, exif=block[:20] + b"\xff" * (len(block) - 20))
    photo = read_photo(path)
    formats = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tif": "TIFF"}
    write_photo(tmp_path / f"b{suffix}", photo, formats[suffix])
    assert np.abs(read_photo(tmp_path / f"b{suffix}").pixels.astype(int) - photo.pixels).mean() < 3


def test_the_time_of_the_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PICTURE.save(path)
    os.utime(path, (1.5e9, 1.5e9))
    assert written(path).stat().st_mtime == 1.5e9


def test_a_file_is_what_its_bytes_say_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    opaque = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)])
    Image.fromarray(opaque).save(path, "PNG")
    with Image.open(written(path)) as image:
        assert (image.format, image.mode) == ("PNG", "RGBA")
        assert np.array_equal(np.asarray(image), opaque)
    write_photo(tmp_path / "b.jpg", read_photo(path), "JPEG")  # alpha that hides nothing
    assert Image.open(tmp_path / "b.jpg").mode == "RGB"


def test_a_smaller_copy_of_the_picture_in_a_tiff_is_no_page(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(PHOTO, photometric="rgb")
        tiff.write(PHOTO[::4, ::4], photometric="rgb", subfiletype=1)
    assert np.array_equal(read_photo(path).samples, PHOTO)


@pytest.mark.skipif(find_spec("pillow_heif") is None, reason="pillow-heif is absent")
def test_heif_is_read_and_written_where_pillow_heif_is(tmp_path: Path) -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    path = tmp_path / "a.heic"
    PICTURE.save(path, quality=95, exif=exif_block())
    again = written(path)
    assert again.read_bytes()[4:8] == b"ftyp"
    assert np.abs(read_photo(again).pixels.astype(int) - PHOTO).mean() < 6
    tags = Image.Exif()
    tags.load(read_photo(again).metadata.exif or b"")
    assert tags[271] == "Camera"
