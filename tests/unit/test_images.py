"""What `worker.images` makes of every kind of file it allows, and its limits."""

import dataclasses
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tests.faults.fuzz_corpus import (
    HEIGHT,
    WIDTH,
    encode,
    exif,
    photo,
    png_file,
    samples,
    sixteen_bit,
    zeros,
)
from worker.errors import EventError, Reason
from worker.images import FORMATS, ImageLimits, decode, open_rgb, sniff, to_pixels

LIMITS = ImageLimits()
COLOURLESS = ("grey", "1bit", "16bit", "float", "int32", "fax")
SEE_THROUGH = ("png-palette-alpha", "gif-transparent")  # show less of the photo


def pixels(data: bytes) -> np.ndarray:
    """RGB samples of a file as signed numbers."""
    return np.asarray(open_rgb(data, LIMITS)).astype(int)


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> EventError:
    """The EventError a file ends with."""
    with pytest.raises(EventError) as caught:
        open_rgb(data, limits)
    return caught.value


def thumbnail(image: Image.Image) -> np.ndarray:
    """Means over 8 x 8 pixels, in which dithering disappears."""
    return np.asarray(image.reduce(8)).astype(int)


@pytest.mark.parametrize("name", sorted(samples().keys() - set(SEE_THROUGH)))
def test_every_kind_shows_the_photo(name: str) -> None:
    reference = photo().convert("L") if any(part in name for part in COLOURLESS) else photo()
    shown = open_rgb(samples()[name], LIMITS)
    assert (shown.mode, shown.size) == ("RGB", (WIDTH, HEIGHT))
    assert np.abs(thumbnail(shown) - thumbnail(reference.convert("RGB"))).mean() < 8


def test_formats_are_those_promised() -> None:
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}
    assert {sniff(data) for data in samples().values()} == set(FORMATS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    undo = {
        1: (),
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }[orientation]
    stored = photo()
    for turn in undo:
        stored = stored.transpose(turn)
    options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
    shown = open_rgb(encode(stored, kind, **options), LIMITS)
    assert shown.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(photo()).astype(int)).mean() < 5


def test_damaged_exif_hides_no_picture() -> None:
    block = bytearray(exif(6))
    block[10:14] = b"\xff\xff\xff\xff"  # where the directory starts
    assert open_rgb(encode(photo(), "PNG", exif=bytes(block)), LIMITS).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(kind: str, mode: str) -> None:
    layer = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (0, 0, 4, 8))
    options = {"lossless": True} if kind == "WEBP" else {}
    shown = pixels(encode(layer.convert(mode), kind, **options))
    assert (shown[:, :4] == 0).all()
    assert (shown[:, 4:] == 255).all()


def test_transparent_palette_and_colour_key_lie_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert (pixels(encode(image, "PNG", transparency=1)) == 255).all()
    assert (pixels(encode(image, "GIF", transparency=1)) == 255).all()
    assert (pixels(encode(Image.new("RGB", (4, 4)), "PNG", transparency=(0, 0, 0))) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(kind: str) -> None:
    ramp = Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))
    assert (pixels(encode(ramp, kind))[..., 0].ravel() == np.arange(256)).all()


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats_are_read_by_the_range_they_keep_to(top: float) -> None:
    ramp = np.linspace(0, top, 256, dtype=np.float32).reshape(16, 16)
    assert (pixels(encode(Image.fromarray(ramp), "TIFF"))[..., 0].ravel() == np.arange(256)).all()


def test_other_floats_are_stretched_and_what_is_no_number_is_black() -> None:
    odd = np.array([[-3e38, 0.0, 3e38, np.nan, np.inf]], dtype=np.float32)
    assert pixels(encode(Image.fromarray(odd), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 128, 128]
    flat = np.full((2, 2), -7.0, dtype=np.float32)
    assert (pixels(encode(Image.fromarray(flat), "TIFF")) == 0).all()


def test_cmyk_jpeg_is_not_a_negative() -> None:
    white = encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert (pixels(white) > 250).all()


@pytest.mark.parametrize("name", ["gif-animated", "apng", "webp-animated", "tiff-pages", "mpo"])
def test_several_frames_show_the_first(name: str) -> None:
    with Image.open(io.BytesIO(samples()[name])) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert np.abs(pixels(samples()[name]) - np.asarray(photo()).astype(int)).mean() < 12


def test_icc_profile_changes_nothing() -> None:
    assert (pixels(samples()["jpeg-icc"]) == pixels(samples()["jpeg"])).all()


@pytest.mark.parametrize("size", [64, 96, 128, 160])
def test_jpeg_is_scaled_while_decoding_but_never_below_the_target(size: int) -> None:
    data = encode(photo(500, 375), "JPEG", quality=95)
    image = open_rgb(data, LIMITS, target=size)
    assert image.size != (500, 375)
    assert min(image.size) >= size
    exact = to_pixels(open_rgb(data, LIMITS), size).astype(int)
    assert np.abs(decode(data, size, LIMITS) - exact).mean() < 2


def test_small_jpeg_is_decoded_whole() -> None:
    data = encode(photo(100, 90), "JPEG")
    assert open_rgb(data, LIMITS, target=91).size == (100, 90)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (7, 5), (641, 480)])
def test_pixels_are_a_square_of_any_shape(shape: tuple[int, int]) -> None:
    square = decode(encode(photo(*shape), "PNG"), 64, LIMITS)
    assert square.shape == (64, 64, 3)
    assert square.dtype == np.uint8


def test_byte_limit_is_exact() -> None:
    data = samples()["jpeg"]
    exact = ImageLimits(max_bytes=len(data))
    assert open_rgb(data, exact).size == (WIDTH, HEIGHT)
    error = refusal(data, dataclasses.replace(exact, max_bytes=len(data) - 1))
    assert error.reason is Reason.TOO_LARGE
    assert error.detail == f"{len(data)} bytes, {len(data) - 1} allowed"


@pytest.mark.parametrize("name", sorted(samples()))
def test_pixel_limit_is_exact(name: str) -> None:
    exact = ImageLimits(max_pixels=WIDTH * HEIGHT)
    assert open_rgb(samples()[name], exact).size == (WIDTH, HEIGHT)
    error = refusal(samples()[name], ImageLimits(max_pixels=WIDTH * HEIGHT - 1))
    assert error.reason is Reason.TOO_LARGE
    assert error.detail == f"{WIDTH} x {HEIGHT} pixels, {WIDTH * HEIGHT - 1} allowed"


def test_pixel_limit_holds_before_any_pixel_is_decoded() -> None:
    data = png_file(7000, 7001, zeros(1 << 20), depth_colour=b"\x08\x02")
    tracemalloc.start()
    error = refusal(data, ImageLimits(max_pixels=49_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.detail == "7000 x 7001 pixels, 49000000 allowed"
    assert peak < 1 << 20


@pytest.mark.parametrize("name", ["webp", "webp-lossless", "webp-alpha", "webp-animated"])
def test_webp_is_held_to_the_limit_before_its_decoder_sees_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its decoder allocates the whole canvas on being opened."""
    monkeypatch.setattr(Image, "open", None)
    error = refusal(samples()[name], ImageLimits(max_pixels=WIDTH * HEIGHT - 1))
    assert error.detail == f"{WIDTH} x {HEIGHT} pixels, {WIDTH * HEIGHT - 1} allowed"


def test_detail_of_a_refusal_is_short_and_printable() -> None:
    damaged = samples()["png"].replace(b"IDAT", b"\n\x00T\xff")
    error = refusal(damaged)
    assert error.reason is Reason.UNDECODABLE
    assert error.detail.isprintable()
    assert len(error.detail) < 200


def test_sixteen_bit_sample_is_what_it_says() -> None:
    with Image.open(io.BytesIO(encode(sixteen_bit(photo()), "PNG"))) as image:
        assert image.mode == "I;16"
