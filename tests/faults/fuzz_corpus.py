"""One small valid file of every kind the decoder takes, made on the spot; and bombs.

`samples()` names each kind; the unit tests decode them, the fuzzer breaks them.
"""

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image, ImageCms

WIDTH, HEIGHT = 48, 32

# Each pass of an interlaced PNG: first column, first row, steps.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def photo(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A smooth colourful picture, different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = (255 * x, 255 * y, 255 * (1 - x) * (0.5 + 0.5 * np.sin(6 * y)))
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """`image` as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    """An EXIF block that holds an orientation and some more."""
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010F] = "A camera"
    return block.tobytes()


def sixteen_bit(image: Image.Image) -> Image.Image:
    """Grey in 16 bits over the whole range (Pillow's I;16)."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


@cache
def samples() -> dict[str, bytes]:
    """Kind of file -> its bytes; all show `photo()`, in colour or grey."""
    return _jpegs() | _pngs() | _animations() | _tiffs() | _others()


def _jpegs() -> dict[str, bytes]:
    image = photo()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "jpeg": encode(image, "JPEG"),
        "jpeg-progressive": encode(image, "JPEG", progressive=True),
        "jpeg-grey": encode(image.convert("L"), "JPEG"),
        "jpeg-cmyk": encode(image.convert("CMYK"), "JPEG"),
        "jpeg-444-exif": encode(image, "JPEG", subsampling=0, exif=exif(1)),
        "jpeg-icc": encode(image, "JPEG", icc_profile=profile),
        "jpeg-restarts": encode(image, "JPEG", restart_marker_blocks=1),
        "mpo": encode(image, "MPO", save_all=True, append_images=[image.rotate(180)]),
    }


def _pngs() -> dict[str, bytes]:
    image = photo()
    palette = image.quantize(32)
    return {
        "png": encode(image, "PNG"),
        "png-grey": encode(image.convert("L"), "PNG"),
        "png-1bit": encode(image.convert("1"), "PNG"),
        "png-16bit": encode(sixteen_bit(image), "PNG"),
        "png-palette": encode(palette, "PNG"),
        "png-palette-alpha": encode(palette, "PNG", transparency=bytes(range(32))),
        "png-rgba": encode(image.convert("RGBA"), "PNG", exif=exif(1)),
        "png-interlaced": interlaced_png(image),
    }


def _animations() -> dict[str, bytes]:
    image = photo()
    frames = {"save_all": True, "append_images": [image.rotate(180)], "duration": 100}
    return {
        "gif": encode(image, "GIF"),
        "gif-animated": encode(image, "GIF", **frames),
        "gif-transparent": encode(image.quantize(32), "GIF", transparency=0),
        "apng": encode(image, "PNG", **frames),
        "webp": encode(image, "WEBP"),
        "webp-lossless": encode(image, "WEBP", lossless=True),
        "webp-alpha": encode(image.convert("RGBA"), "WEBP", exif=exif(1)),
        "webp-animated": encode(image, "WEBP", **frames),
        "tiff-pages": encode(image, "TIFF", save_all=True, append_images=[image]),
    }


def _tiffs() -> dict[str, bytes]:
    image = photo()
    packed = ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd")
    tiffs = {f"tiff-{name}": encode(image, "TIFF", compression=name) for name in packed}
    return tiffs | {
        "tiff": encode(image, "TIFF"),
        "tiff-fax": encode(image.convert("1"), "TIFF", compression="group4"),
        "tiff-16bit": encode(sixteen_bit(image), "TIFF"),
        "tiff-float": encode(image.convert("F"), "TIFF"),
        "tiff-int32": encode(image.convert("I"), "TIFF"),
        "tiff-cmyk": encode(image.convert("CMYK"), "TIFF"),
        "tiff-rgba": encode(image.convert("RGBA"), "TIFF"),
        "tiff-big": encode(image, "TIFF", big_tiff=True),
        "tiff-turned": encode(image, "TIFF", tiffinfo={274: 1}),
    }


def _others() -> dict[str, bytes]:
    image = photo()
    return {
        "bmp": encode(image, "BMP"),
        "bmp-palette": encode(image.quantize(32), "BMP"),
        "bmp-1bit": encode(image.convert("1"), "BMP"),
        "bmp-32bit": encode(image.convert("RGBA"), "BMP"),
    }


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A PNG chunk with a right checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_file(
    width: int, height: int, packed: bytes, *, depth_colour: bytes, adam7: int = 0
) -> bytes:
    """A PNG from its zlib stream. `depth_colour` is two bytes: bits, colour type."""
    header = struct.pack(">II", width, height) + depth_colour + bytes((0, 0, adam7))
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def interlaced_png(image: Image.Image) -> bytes:
    """Adam7, which Pillow reads but does not write."""
    pixels = np.asarray(image.convert("RGB"))
    rows = bytearray()
    for x, y, dx, dy in ADAM7:
        for row in pixels[y::dy, x::dx]:
            rows += b"\0" + row.tobytes()
    return png_file(*image.size, zlib.compress(rows), depth_colour=b"\x08\x02", adam7=1)


def zeros(count: int) -> bytes:
    """`count` zero bytes, deflated without ever holding them."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(block[: count & 0xFFFFF]), packer.flush()])


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose black 8-bit RGB pixels are all really there, a thousandth of their size."""
    return png_file(width, height, zeros(height * (1 + 3 * width)), depth_colour=b"\x08\x02")


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG of 49 flat Mpx whose last scan, a few bytes, comes `scans` times.

    Each takes a pass over all blocks: a minute of a processor and more in a megabyte.
    """
    data = encode(Image.new("L", (7000, 7000), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]
