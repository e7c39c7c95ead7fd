"""Image files are read and written as a person who looks at them expects."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, ImageCms, ImageOps

from r2r.data.images import (
    image_files,
    image_size,
    read_photo,
    read_rgb,
    to_float,
    write_photo,
    write_rgb,
)
from r2r.data.metadata import Metadata
from r2r.errors import InputError
from tests.r2r.photos import photo_of

PHOTO = skimage.data.astronaut()[:64, 100:196]  # uint8 [64, 96, 3]
GREY = PHOTO[..., 1]
ALPHA = np.linspace(0, 255, 96).astype(np.uint8)[None].repeat(64, 0)
RGBA = np.dstack([PHOTO, ALPHA])
DEEP = (PHOTO.astype(np.uint16) << 8) + np.arange(96, dtype=np.uint16)[None, :, None]  # the low byte counts
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274], tags[271] = orientation, "Camera"
    return tags.tobytes()


def png_16(path: Path, pixels: np.ndarray) -> Path:
    """A 16-bit PNG of RGB(A) or grey pixels, by hand: grey + alpha too, which OpenCV cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if pixels.ndim == 2 else pixels.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_image_files_are_found_in_subfolders_sorted_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "sub/c.tiff", "notes.txt", ".hidden.png", ".cache/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)] == ["a.jpg", "b.PNG", "sub/c.tiff"]
    with pytest.raises(InputError, match="nowhere: no such folder"):
        image_files(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("rgb.png", Image.fromarray(PHOTO), PHOTO),
        ("rgb.bmp", Image.fromarray(PHOTO), PHOTO),
        ("rgb.tif", Image.fromarray(PHOTO), PHOTO),
        ("rgb.ppm", Image.fromarray(PHOTO), PHOTO),
        ("grey.png", Image.fromarray(GREY), GREY),
        ("grey.pgm", Image.fromarray(GREY), GREY),
        ("rgba.png", Image.fromarray(RGBA), PHOTO),  # the colour under the alpha, not a blend
        ("la.png", Image.fromarray(np.dstack([GREY, ALPHA])), GREY),
        ("one.png", Image.fromarray(GREY > 99), 255 * (GREY > 99)),
    ],
)
def test_8_bit_files_read_exactly(tmp_path: Path, name: str, image: Image.Image, expected: np.ndarray) -> None:
    path = saved(tmp_path / name, image)
    pixels = read_rgb(path)
    expected = expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
    assert pixels.dtype == np.float32
    assert np.array_equal(np.rint(pixels * 255), expected)
    assert np.abs(pixels - expected / 255).max() < 1e-7
    assert image_size(path) == (64, 96)
    assert read_photo(path).grey == (path.stem in ("grey", "la", "one"))


def test_palettes_and_cmyk_become_rgb(tmp_path: Path) -> None:
    palette = Image.fromarray(PHOTO).quantize(64)
    expected = np.asarray(palette.convert("RGB")) / np.float32(255)
    assert np.allclose(read_rgb(saved(tmp_path / "p.png", palette)), expected, atol=1e-6)
    photo = read_photo(saved(tmp_path / "t.png", palette, transparency=0))
    assert photo.alpha is not None
    assert np.array_equal(photo.alpha == 0, np.asarray(palette) == 0)
    assert np.allclose(to_float(photo.pixels)[photo.alpha > 0], expected[photo.alpha > 0], atol=1e-6)
    cmyk = read_photo(saved(tmp_path / "c.jpg", Image.fromarray(PHOTO).convert("CMYK"), quality=95, icc_profile=ICC))
    assert np.abs(to_float(cmyk.pixels) - PHOTO / 255).mean() < 0.02
    assert cmyk.metadata.icc is None  # a CMYK profile would be wrong for the RGB that is written


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_files_keep_their_precision(tmp_path: Path, suffix: str, channels: int) -> None:
    alpha = ALPHA.astype(np.uint16)[..., None] * 257
    pixels = {1: DEEP[..., :1], 2: np.dstack([DEEP[..., :1], alpha]), 3: DEEP, 4: np.dstack([DEEP, alpha])}[channels]
    path = tmp_path / f"deep{suffix}"
    if suffix == ".png":
        png_16(path, pixels.squeeze())
    else:
        tifffile.imwrite(
            path,
            pixels.squeeze(),
            photometric="rgb" if channels > 2 else "minisblack",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
        )
    photo = read_photo(path)
    assert (photo.bit_depth, photo.grey) == (16, channels < 3)
    assert np.array_equal(photo.pixels, pixels[..., :3] if channels > 2 else pixels[..., :1])
    if channels in (2, 4):
        assert photo.alpha is not None
        assert np.array_equal(photo.alpha, alpha[..., 0])
    else:
        assert photo.alpha is None
    assert image_size(path) == (64, 96)


def test_other_16_bit_layouts(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(DEEP, 2, 0), photometric="rgb", planarconfig="separate")
    cv2.imwrite(str(tmp_path / "lzw.tif"), DEEP[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    cv2.imwrite(str(tmp_path / "rgb.ppm"), DEEP[..., ::-1])
    for name in ("planes.tif", "lzw.tif", "rgb.ppm"):
        assert np.array_equal(np.rint(read_rgb(tmp_path / name) * 65535), DEEP), name
    tifffile.imwrite(tmp_path / "white.tif", DEEP[..., 0], photometric="miniswhite")
    assert np.array_equal(np.rint(read_rgb(tmp_path / "white.tif")[..., 0] * 65535), 65535 - DEEP[..., 0])
    (tmp_path / "ten.pgm").write_bytes(b"P5\n2 1\n1023\n" + np.array([1023, 341], ">u2").tobytes())
    assert np.allclose(read_rgb(tmp_path / "ten.pgm")[0, :, 0], [1, 1 / 3])


def test_floating_point_tiffs_hold_0_to_1(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((5, 7, 3), np.float32)
    path = tmp_path / "f.tif"
    tifffile.imwrite(path, pixels, photometric="rgb")
    photo = read_photo(path)
    assert np.array_equal(photo.pixels, pixels)
    write_photo(tmp_path / "out.tif", photo)
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), pixels)
    for bad, line in ((np.nan, "NaN or infinite"), (7.5, "values from .* to 7.5; accepted: .*\\[0, 1\\]")):
        pixels[2, 3, 1] = bad
        tifffile.imwrite(path, pixels, photometric="rgb")
        with pytest.raises(InputError, match=rf"f\.tif: {line}"):
            read_rgb(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "deep.png", "deep.tif", "lzw.tif"])
def test_every_orientation_is_read_upright_and_written_as_it_was(tmp_path: Path, name: str, orientation: int) -> None:
    path, block = tmp_path / name, exif(orientation)
    expected = np.asarray(ImageOps.exif_transpose(tagged := Image.open(io.BytesIO(jpeg(block)))))
    stored = np.asarray(tagged)
    if name == "a.jpg":
        path.write_bytes(jpeg(block))
    elif name == "deep.png":
        _, data = cv2.imencodeWithMetadata(
            ".png",
            stored[..., ::-1].astype(np.uint16) * 257,
            [cv2.IMAGE_METADATA_EXIF],
            [np.frombuffer(block.removeprefix(b"Exif\0\0"), np.uint8)],
        )
        path.write_bytes(data.tobytes())
    elif name == "deep.tif":
        tifffile.imwrite(path, stored.astype(np.uint16) * 257, extratags=[(274, "H", 1, orientation, True)])
    elif name == "lzw.tif":
        Image.fromarray(stored).save(path, compression="tiff_lzw", tiffinfo={274: orientation})
    else:
        Image.fromarray(stored).save(path, exif=block, lossless=True)

    photo = read_photo(path)
    assert np.array_equal(np.rint(to_float(photo.pixels) * 255), expected)
    assert image_size(path) == expected.shape[:2]
    write_photo(tmp_path / f"out{path.suffix}", photo)
    with Image.open(tmp_path / f"out{path.suffix}") as written:
        assert written.getexif()[274] == orientation
        if path.suffix != ".tif":  # Pillow turns those by itself
            assert written.size == tagged.size
        turned = np.asarray(ImageOps.exif_transpose(written), np.float32)
        assert np.abs(turned - expected).mean() < (2 if name == "a.jpg" else 1e-6)


def jpeg(block: bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "JPEG", exif=block, quality=95)
    return file.getvalue()


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(PHOTO))
    data, block = path.read_bytes(), b"eXIf" + exif(6).removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert image_size(path) == read_rgb(path).shape[:2] == (96, 64)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "deep.png", "deep.tif"])
def test_icc_and_exif_are_kept(tmp_path: Path, name: str) -> None:
    pixels = PHOTO / np.float32(255)
    kept = Metadata(icc=ICC, exif=exif(6))
    photo = photo_of(name, pixels, bits=16 if "deep" in name else 8, metadata=kept, orientation=6)
    write_photo(tmp_path / name, photo)
    again = read_photo(tmp_path / name)
    assert again.metadata.icc == ICC
    assert (again.orientation, again.bit_depth) == (6, photo.bit_depth)
    with Image.open(tmp_path / name) as image:
        assert image.info["icc_profile"] == ICC
        assert image.getexif().get(271) == "Camera"


@pytest.mark.parametrize("bit_depth", [8, 16])
@pytest.mark.parametrize(("grey", "alpha"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_is_written_reads_back(tmp_path: Path, suffix: str, grey: bool, alpha: bool, bit_depth: int) -> None:
    peak = np.float32(2**bit_depth - 1)
    pixels = np.rint(DEEP / np.float32(65535) * peak) / peak
    pixels = pixels[..., [0, 0, 0]] if grey else pixels
    cover = ALPHA / np.float32(255) if alpha else None
    write_photo(tmp_path / f"a{suffix}", photo_of(suffix[1:], pixels, cover, bit_depth, grey))
    again = read_photo(tmp_path / f"a{suffix}")
    assert again.bit_depth == bit_depth
    assert np.abs(to_float(again.pixels) - pixels).max() < 1e-6
    assert (again.alpha is None) == (cover is None)
    if again.alpha is not None and cover is not None:
        assert np.abs(to_float(again.alpha) - cover).max() < 1e-6
    # PNG with 16 bits, grey and alpha is written with three equal colours: the same picture.
    assert again.grey == (grey and not (suffix == ".png" and alpha and bit_depth == 16))


def test_jpeg_is_written_finely_and_grey_stays_grey(tmp_path: Path) -> None:
    pixels = PHOTO / np.float32(255)
    write_rgb(tmp_path / "a.jpg", pixels)
    assert np.abs(read_rgb(tmp_path / "a.jpg") - pixels).mean() < 2 / 255
    image: Any = Image.open(tmp_path / "a.jpg")
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    write_photo(tmp_path / "g.jpg", photo_of("g.jpg", pixels, grey=True))
    assert Image.open(tmp_path / "g.jpg").mode == "L"


def test_values_are_clipped_and_rounded(tmp_path: Path) -> None:
    pixels = np.array([[[-0.5, 1.5, 0.5], [0.4 / 255, 0.6 / 255, 1]]], np.float32)
    write_rgb(tmp_path / "a.png", pixels)
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[[0, 255, 128], [0, 1, 255]]]


def test_a_format_that_cannot_hold_the_photo_is_refused(tmp_path: Path) -> None:
    pixels = PHOTO / np.float32(255)
    with pytest.raises(InputError, match=r"a\.jpg: JPEG cannot hold 16 bits a channel; PNG and TIFF can"):
        write_photo(tmp_path / "a.jpg", photo_of("a.jpg", pixels, bits=16))
    with pytest.raises(InputError, match=r"a\.jpg: JPEG cannot hold alpha; PNG, TIFF, WebP and AVIF can"):
        write_photo(tmp_path / "a.jpg", photo_of("a.png", pixels, pixels[..., 0]), "JPEG")
    with pytest.raises(InputError, match=r"unknown format '\.gif'; accepted: \.png"):
        write_rgb(tmp_path / "a.gif", pixels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.webp", "a.ppm", "deep.png", "deep.tif"])
def test_cut_off_files_are_named(tmp_path: Path, name: str) -> None:
    path, pixels = tmp_path / name, PHOTO / np.float32(255)
    write_photo(path, photo_of(name, pixels, bits=16 if "deep" in name else 8))
    data = path.read_bytes()
    for kept in (len(data) * 2 // 3, 6):
        path.write_bytes(data[:kept])
        with pytest.raises(InputError, match=rf"^.*{name}: ") as error:
            read_rgb(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("empty.png", b"", "an empty file; accepted: PNG"),
        ("text.png", b"hello, world", "not an image; accepted: PNG"),
        ("anim.png", None, "3 frames; accepted: .* of one frame"),
        ("pages.tif", None, "3 pages; accepted: .* of one frame"),
        ("int.tif", None, "accepted: 8 or 16 bits unsigned"),
    ],
)
def test_what_is_no_photo_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes | None, line: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    elif name == "anim.png":
        frames = [Image.fromarray(PHOTO + number) for number in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    else:
        samples = np.zeros((3, 8, 8), np.uint8) if name == "pages.tif" else np.zeros((8, 8), np.int32)
        tifffile.imwrite(path, samples, photometric="minisblack")
    for read in (read_rgb, read_photo):
        with pytest.raises(InputError, match=rf"{name}: .*{line}"):
            read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_missing_files_folders_and_bombs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        read_rgb(tmp_path / "none.png")
    with pytest.raises(InputError, match="Is a directory"):
        read_rgb(tmp_path)
    bomb = png_16(tmp_path / "bomb.png", DEEP)
    data = bytearray(bomb.read_bytes())
    for side in (40_000, 80_000):
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        bomb.write_bytes(data)
        with pytest.raises(InputError, match=r"bomb\.png: .*pixels"):
            read_rgb(bomb)


def test_a_phones_multi_picture_jpeg_is_its_first_picture(tmp_path: Path) -> None:
    frames = [Image.fromarray(PHOTO), Image.fromarray(PHOTO[::2, ::2])]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert read_rgb(tmp_path / "a.jpg").shape == (64, 96, 3)
    assert image_size(tmp_path / "a.jpg") == (64, 96)
