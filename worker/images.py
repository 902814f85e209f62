"""Encoded bytes to RGB pixels: formats, limits, orientation, and the one preprocessing.

Owns what a picture may be and how it becomes pixels; the worker, the trainer and the
evaluation all come through here. Knows nothing of events, models, processes or Kafka.

Decisions that change pixels, all named in `PREPROCESSING`:

* Several frames (GIF, WebP, APNG, MPO, TIFF): the first, or the default image of an APNG.
* EXIF orientation is applied; a damaged EXIF block counts as "upright".
* Transparency is laid on white. CMYK JPEG follows Adobe's inverted convention (Pillow).
* 16 bits are divided by 257. 32-bit integers and floats are divided by the smallest of
  1 (floats), 255 and 65535 that holds every value, else stretched from minimum to maximum.
* Embedded ICC profiles are ignored. Re-published copies mostly lose or keep the profile
  without converting, and parsing a stranger's profile costs more than decoding the photo.
* A JPEG may be decoded at 1/2, 1/4 or 1/8 in its DCT domain, never below the wanted size.
"""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import (  # the plugins register themselves; else Pillow would load all forty
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from worker.errors import EventError, Reason

PREPROCESSING = (
    "rgb-squash-v2: first frame, exif-upright, alpha on white, 16 bit / 257, icc ignored, "
    "jpeg dct scaling not below target, square by Pillow bilinear with reducing_gap 2"
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_MAX_DETAIL = 160  # characters of a decoder's message kept in a dead letter

# What Pillow raises for bad bytes, from reading it and from fuzzing. `OSError` can mean nothing
# else here: the source is memory. Everything missing from this list is a bug and surfaces.
_BAD_BYTES = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    struct.error,
    zlib.error,
    Warning,  # where the process turns warnings into errors
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageLimits:
    """What an encoded image may cost: bytes as received, pixels as its header states."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000


def sniff(data: bytes) -> str | None:
    """The allowed format whose signature `data` starts with; names and extensions never count."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    return "BMP" if data.startswith(b"BM") else None


def open_rgb(data: bytes, limits: ImageLimits, target: int | None = None) -> Image.Image:
    """Decode the first frame to an upright RGB image, fully loaded.

    `target` is the side in pixels that will be asked of `to_pixels`: a JPEG is then decoded
    no larger than needed. Raises EventError: `unsupported_format`, `too_large`, `undecodable`.
    """
    kind = check_bytes(data, limits)
    try:
        with _open(data, kind, limits) as image:
            if target is not None and kind == "JPEG":
                image.draft("RGB", (target, target))
            image.load()
            return _upright(_to_rgb(image), image)
    except Image.DecompressionBombError as error:
        raise EventError(Reason.TOO_LARGE, f"{kind}: more pixels than allowed") from error
    except MemoryError as error:
        raise EventError(Reason.TOO_LARGE, f"{kind}: decoding needs too much memory") from error
    except _BAD_BYTES as error:
        raise EventError(Reason.UNDECODABLE, f"{kind}: {_message(error)}") from error


def to_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize an RGB image to a square, whatever its aspect: uint8 (size, size, 3)."""
    square = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(square, dtype=np.uint8)


def decode(data: bytes, size: int, limits: ImageLimits) -> NDArray[np.uint8]:
    """Decode and preprocess: uint8 (size, size, 3). Raises EventError like `open_rgb`."""
    return to_pixels(open_rgb(data, limits, target=size), size)


def check_bytes(data: bytes, limits: ImageLimits) -> str:
    """Refuse by length and signature, before any decoder sees the bytes; else the format."""
    if len(data) > limits.max_bytes:
        detail = f"{len(data)} bytes, {limits.max_bytes} allowed"
        raise EventError(Reason.TOO_LARGE, detail)
    kind = sniff(data)
    if kind is None:
        raise EventError(Reason.UNSUPPORTED_FORMAT, f"{_guess(data)}, not one of {_ALLOWED}")
    return kind


def _open(data: bytes, kind: str, limits: ImageLimits) -> ImageFile.ImageFile:
    """Read the header only, with the one plugin that fits, and hold it to the pixel limit."""
    if kind == "WEBP":  # its decoder allocates the canvas while reading the header
        _check_pixels(_webp_canvas(data), limits)
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    except UnidentifiedImageError as error:  # its message holds a memory address
        raise SyntaxError("the header is damaged or of an unsupported variant") from error
    _check_pixels(image.size, limits)
    return image


def _check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        detail = f"{width} x {height} pixels, {limits.max_pixels} allowed"
        raise EventError(Reason.TOO_LARGE, detail)


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Canvas of a WebP from its first 30 bytes (RFC 9649); 0 x 0 where they are damaged."""
    head = data[:30].ljust(30, b"\0")
    chunk = head[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    """Any mode to RGB: deep samples scaled, transparency laid on white."""
    if image.mode.startswith("I;16"):
        return _grey(_sixteen_to_eight(image))
    if image.mode in ("I", "F"):
        return _grey(_deep_to_eight(np.asarray(image)))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        page = Image.new("RGB", layer.size, (255, 255, 255))
        page.paste(layer, mask=layer.getchannel("A"))
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(samples: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(samples).convert("RGB")


def _sixteen_to_eight(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    """Scale I;16, which Pillow's own conversion would clip at 255. A TIFF may hold 12 bits."""
    tags = getattr(image, "tag_v2", {})
    top = 4095 if tags.get(258) == (12,) else 65535
    # A table turns 50 Mpx without a wider copy of them.
    table = (np.arange(65536, dtype=np.uint32) * 255 + top // 2) // top
    grey: NDArray[np.uint8] = np.minimum(table, 255).astype(np.uint8)[np.asarray(image)]
    white_is_zero = tags.get(262) == 0  # Pillow inverts only up to 8 bits
    return 255 - grey if white_is_zero else grey


def _deep_to_eight(samples: NDArray[np.int32] | NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale 32-bit samples by the range they keep to; what is no number counts as 0."""
    values = np.array(samples, dtype=np.float32)  # the one copy, changed in place
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    ranges = (1.0, 255.0, 65535.0) if samples.dtype.kind == "f" else (255.0, 65535.0)
    top = next((each for each in ranges if low >= 0 and high <= each), None)
    if top is None:
        largest = max(-low, high)  # first to -1..1: the plain difference may overflow
        values /= largest
        values -= low / largest
        top = (high / largest - low / largest) or 1.0
    values *= 255.0 / top
    np.rint(values, out=values)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _upright(pixels: Image.Image, image: ImageFile.ImageFile) -> Image.Image:
    """Turn as EXIF says. The TIFF loader has done so already."""
    if image.format == "TIFF":
        return pixels
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _BAD_BYTES:
        return pixels  # the picture is whole, only its notes are damaged
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return pixels if turn is None else pixels.transpose(turn)


_ALLOWED = ", ".join(FORMATS)
_GUESSES = {
    b"%PDF": "a PDF document",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "gzip data",
    b"8BPS": "a Photoshop document",
    b"\0\0\1\0": "an icon",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}


def _guess(data: bytes) -> str:
    """Words for what the bytes are instead, never the bytes themselves."""
    if not data:
        return "no bytes"
    if data[4:8] == b"ftyp":
        return "AVIF, HEIC or video"
    for signature, words in _GUESSES.items():
        if data.startswith(signature):
            return words
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "SVG"
    if head.startswith(b"<"):
        return "HTML or XML"
    return "an unknown format"


def _message(error: BaseException) -> str:
    """A decoder's words on one printable line of bounded length."""
    words = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in words)[:_MAX_DETAIL]
