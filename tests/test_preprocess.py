"""Pixels equal timm's byte for byte, and damaged files are refused by name."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from edgepet.errors import InputError
from edgepet.images.preprocess import load_pixels, normalize, to_pixels
from edgepet.spec import Preprocess

MODES = ["RGB", "L", "LA", "P", "RGBA", "1", "CMYK"]
SHAPES = [
    (20, 20),
    (64, 64),
    (31, 90),
    (90, 31),
    (33, 47),
    (65, 64),
    (45, 80),
]  # (height, width): smaller, equal, larger
PREPROCESSES = [
    Preprocess(image_size=(64, 64)),
    Preprocess(image_size=(64, 64), crop_fraction=0.875, interpolation="bilinear"),
    Preprocess(image_size=(63, 63), crop_fraction=0.95),
    Preprocess(image_size=(64, 64), crop_fraction=0.9, crop="squash"),
    Preprocess(image_size=(64, 48), crop_fraction=1.0, crop="squash", interpolation="bilinear"),
    Preprocess(image_size=(48, 64), crop_fraction=0.875),
    Preprocess(image_size=(57, 33), crop_fraction=0.95),
    Preprocess(image_size=(36, 64), crop_fraction=0.9),  # as cameras have it
    Preprocess(image_size=(64, 65), crop_fraction=1.3),  # resized below the crop: padded
    Preprocess(image_size=(64, 65), crop_fraction=1.3, crop="squash"),
]


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def timm_transform(preprocess: Preprocess, **options: Any) -> Any:
    data = pytest.importorskip("timm.data", reason="timm is not installed")
    return data.create_transform(
        (3, *preprocess.image_size),
        is_training=False,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_fraction,
        crop_mode=preprocess.crop,
        **options,
    )


@pytest.mark.parametrize("preprocess", PREPROCESSES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_are_byte_equal_to_those_of_timm(shape: tuple[int, int], preprocess: Preprocess) -> None:
    image = noise(*shape)

    expected = timm_transform(preprocess, normalize=False)(image).numpy().transpose(1, 2, 0)

    np.testing.assert_array_equal(to_pixels(image, preprocess), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_any_mode_is_read_as_timm_reads_it(tmp_path: Path, mode: str) -> None:
    data = pytest.importorskip("timm.data", reason="timm is not installed")
    preprocess = Preprocess(image_size=(24, 24), crop_fraction=0.875)
    path = tmp_path / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    noise(40, 31, mode).save(path)
    with path.open("rb") as file:
        expected = data.ImageDataset("", reader=[(file, 0)], transform=timm_transform(preprocess))[0][0].numpy()

    np.testing.assert_array_equal(normalize(load_pixels(path, preprocess), preprocess), expected)


def test_a_palette_with_an_alpha_table_is_read_without_it_and_without_a_warning(tmp_path: Path) -> None:
    plain, see_through, preprocess = tmp_path / "plain.png", tmp_path / "alpha.png", Preprocess(image_size=(8, 8))
    noise(8, 8, "P").save(plain)
    noise(8, 8, "P").save(see_through, transparency=bytes(range(256)))

    pixels = load_pixels(see_through, preprocess)

    np.testing.assert_array_equal(pixels, load_pixels(plain, preprocess))


def turned(path: Path, image: Image.Image, orientation: object) -> Path:
    """A file of ``image`` that says how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, lossless=True)
    return path


UPRIGHT: dict[int, Callable[[Any], Any]] = {  # by EXIF's table: where row 0 and column 0 of the pixels belong
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_is_turned_once_as_its_file_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = noise(6, 10)
    path = turned(tmp_path / f"image.{suffix}", image, orientation)
    expected = UPRIGHT[orientation](np.asarray(image))
    preprocess = Preprocess(image_size=expected.shape[:2], orientation="exif")

    np.testing.assert_array_equal(load_pixels(path, preprocess), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(to_pixels(opened, preprocess), expected)


@pytest.mark.parametrize("orientation", ["none", None])
def test_an_image_is_not_turned_where_the_pack_does_not_say_so(tmp_path: Path, orientation: Any) -> None:
    image = noise(10, 10)
    path = turned(tmp_path / "image.png", image, 6)

    pixels = load_pixels(path, Preprocess(image_size=(10, 10), orientation=orientation))

    np.testing.assert_array_equal(pixels, np.asarray(image))


def test_a_photograph_of_a_phone_is_the_picture_that_a_viewer_shows(tmp_path: Path) -> None:
    """Several frames in one JPEG, EXIF in front: what viewers do is ``ImageOps.exif_transpose``."""
    path, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[0x0112] = 6
    noise(40, 30).save(path, "MPO", save_all=True, append_images=[noise(40, 30, seed=1)], exif=exif)

    pixels = load_pixels(path, Preprocess(image_size=(30, 40), orientation="exif"))

    with Image.open(path) as opened:
        np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(opened).convert("RGB")))


TURNED = Preprocess(image_size=(10, 10), orientation="exif")
DAMAGED_EXIF = [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0no TIFF at all"]


@pytest.mark.parametrize("exif", DAMAGED_EXIF)
def test_exif_data_that_are_damaged_turn_nothing(tmp_path: Path, exif: bytes) -> None:
    path, image = tmp_path / "image.png", noise(10, 10)
    image.save(path, exif=exif)

    np.testing.assert_array_equal(load_pixels(path, TURNED), np.asarray(image))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path: Path, orientation: object) -> None:
    path, image = tmp_path / "image.png", noise(10, 10)
    turned(path, image, orientation)

    np.testing.assert_array_equal(load_pixels(path, TURNED), np.asarray(image))


def test_a_gif_gives_its_first_frame(tmp_path: Path) -> None:
    path, colours = tmp_path / "image.gif", ((255, 0, 0), (0, 0, 255))
    first, second = (Image.new("RGB", (8, 8), colour) for colour in colours)
    first.save(path, save_all=True, append_images=[second])

    pixels = load_pixels(path, Preprocess(image_size=(8, 8)))

    np.testing.assert_array_equal(pixels, np.asarray(first))


@pytest.mark.skipif(not features.check("avif"), reason="needs the AVIF of Pillow 11.3")
def test_an_avif_image_is_read_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.avif"
    Image.new("RGB", (16, 16), (200, 30, 60)).save(path, quality=95)

    pixels = load_pixels(path, Preprocess(image_size=(16, 16)))

    assert np.abs(pixels.astype(int) - (200, 30, 60)).max() < 8  # it is compressed
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(path).startswith(f"{path}: is not a readable image, got ")


def test_a_heic_image_is_read_where_pillow_has_a_plug_in(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    path = tmp_path / "image.heic"
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 30, 60))).save(path, quality=95)

    pixels = load_pixels(path, Preprocess(image_size=(64, 64)))

    assert np.abs(pixels.astype(int) - (200, 30, 60)).max() < 8


def test_a_centre_crop_takes_the_middle_and_leaves_the_image_as_it_was() -> None:
    image = noise(6, 10)
    before = np.array(image)

    pixels = to_pixels(image, Preprocess(image_size=(6, 6)))

    np.testing.assert_array_equal(pixels, before[:, 2:8])
    np.testing.assert_array_equal(np.asarray(image), before)


def test_an_image_smaller_than_its_crop_is_padded_with_black_and_one_more_line_below() -> None:
    image = noise(4, 4)

    pixels = to_pixels(image, Preprocess(image_size=(7, 7), crop_fraction=1.75))

    np.testing.assert_array_equal(pixels, np.pad(np.asarray(image), ((1, 2), (1, 2), (0, 0))))


def test_normalising_a_batch_puts_channels_first_in_contiguous_float32() -> None:
    preprocess = Preprocess(image_size=(1, 2), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    pixels = np.array([[[[0, 0, 0], [255, 255, 255]]]], dtype=np.uint8)

    values = normalize(pixels, preprocess)

    np.testing.assert_array_equal(values, np.array([[[[0, 1]], [[-1, 1]], [[-4, 0]]]], dtype=np.float32))
    assert (values.dtype.name, values.flags.c_contiguous) == ("float32", True)
    np.testing.assert_array_equal(normalize(pixels[0], preprocess), values[0])


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_pixels(path, Preprocess(image_size=(224, 224)))
    return str(error.value)


def test_text_an_empty_file_and_postscript_are_not_images(tmp_path: Path) -> None:
    for content in (b"not an image", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"):
        path = tmp_path / "fake.png"
        path.write_bytes(content)

        assert refusal(path) == (
            f"{path}: is not a readable image, got bytes of no known image format\n  fix: replace the file or remove it"
        )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.png"

    assert refusal(path) == (
        f"{path}: is not a readable image, got {os.strerror(2)}\n  fix: replace the file or remove it"
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise(32, 32).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    assert refusal(path).startswith(f"{path}: is not a readable image, got ")  # the rest is the decoder's own words


def png_claiming(width: int, height: int, path: Path) -> None:
    """A PNG whose header says more pixels than it holds."""
    noise(1, 1).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def test_a_file_that_would_unpack_to_billions_of_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    png_claiming(60000, 60000, path)

    assert refusal(path).startswith(f"{path}: is not a readable image, got Image size (3600000000 pixels) exceeds")


def test_a_line_of_pixels_is_refused_before_resizing_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    noise(1, 10000).save(path)

    assert refusal(path) == (
        f"{path}: must fit 100000000 pixels when resized, got 10000 x 1 resized to 2240000 x 224\n"
        "  fix: crop the image or remove it"
    )


@pytest.mark.parametrize(
    ("dtype", "suffix", "told"),
    [
        (np.uint16, "png", "16-bit"),
        (np.uint16, "pgm", "16-bit"),
        (np.int32, "tiff", "32-bit"),
        (np.float32, "tiff", "floating-point"),
    ],
)
def test_values_that_eight_bits_would_cut_off_are_refused(dtype: type, suffix: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.full((8, 8), 300, dtype)).save(path)

    with pytest.raises(InputError) as refusal:
        load_pixels(path, Preprocess(image_size=(8, 8)))

    assert str(refusal.value) == (
        f"{path}: is not a readable image, got {told} values, which would be cut off at 255\n"
        "  fix: scale it to 8 bits a channel"
    )
    with Image.open(path) as decoded, pytest.raises(InputError, match="image: must have 8 bits a channel"):
        to_pixels(decoded, Preprocess(image_size=(8, 8)))
