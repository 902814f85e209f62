"""Files made to hurt: bombs, lies, damage and disguises. Each ends as its own dead letter.

Those that may cost memory or time go through `DecoderPool`, as in production, and the test
watches what the child held.
"""

import struct
import threading
import zlib
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.faults.fuzz_corpus import (
    encode,
    photo,
    png_bomb,
    png_chunk,
    png_file,
    samples,
    scan_bomb,
    zeros,
)
from tests.faults.fuzz_images import fuzz
from worker.decoding import DecoderPool
from worker.errors import EventError, Reason
from worker.images import ImageLimits, open_rgb

LIMITS = ImageLimits()
MEMORY_BYTES = 1 << 30
PATIENCE = 300.0
SIDE = 50_000


class Watched:
    """A pool of one child and the most memory that child held."""

    def __init__(self) -> None:
        self.pool = DecoderPool(1, 64, LIMITS, 30.0, MEMORY_BYTES)
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            for pid in self.pool.pids():
                if psutil.pid_exists(pid):
                    self.peak_bytes = max(self.peak_bytes, psutil.Process(pid).memory_info().rss)

    def close(self) -> None:
        """Stop watching and decoding."""
        self._done.set()
        self._thread.join()
        self.pool.close()


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.close()


def gif_bomb(width: int, height: int) -> bytes:
    """A GIF header that states a size, and a few bytes of image."""
    small = bytearray(encode(photo(8, 8).convert("L"), "GIF"))
    struct.pack_into("<HH", small, 6, width, height)
    return bytes(small)


def webp_bomb(width: int, height: int) -> bytes:
    """A VP8X canvas of the stated size around a small frame."""
    frame = encode(photo(8, 8), "WEBP", lossless=True)[12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_bomb(width: int, height: int) -> bytes:
    """One deflated strip that claims all rows."""
    packed = zeros(8 << 20)
    tags = (
        (256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(packed)),
    )  # fmt: skip
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + bytes(4)


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG whose frame header states another size."""
    data = bytearray(samples()["jpeg"])
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


def bmp_header(width: int, height: int) -> bytes:
    """A small BMP that states another size."""
    data = bytearray(samples()["bmp"])
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


BOMBS = {
    "png": png_file(SIDE, SIDE, zeros(16 << 20), depth_colour=b"\x08\x02"),
    "gif": gif_bomb(SIDE, SIDE),
    "tiff": tiff_bomb(SIDE, SIDE),
    "webp": webp_bomb(16383, 16383),  # the format's largest
    "jpeg": jpeg_header(SIDE, SIDE),
    "bmp": bmp_header(SIDE, SIDE),
}


@pytest.mark.parametrize("kind", sorted(BOMBS))
def test_header_of_billions_of_pixels_is_refused_unread(kind: str, watched: Watched) -> None:
    error = watched.pool.submit(BOMBS[kind]).exception(PATIENCE)
    assert isinstance(error, EventError)
    assert error.reason is Reason.TOO_LARGE
    assert watched.peak_bytes < 200 << 20
    assert watched.pool.restarts == 0


def test_gif_whose_frame_outgrows_its_screen(watched: Watched) -> None:
    data = bytearray(encode(photo(8, 8).convert("L"), "GIF"))
    at = data.index(b",", 13)
    struct.pack_into("<HH", data, at + 5, SIDE, SIDE)
    error = watched.pool.submit(bytes(data)).exception(PATIENCE)
    assert isinstance(error, EventError)
    assert error.reason is Reason.TOO_LARGE


def test_tiff_with_one_giant_tile(watched: Watched) -> None:
    """A tile far larger than the image it belongs to, all of it decompressed at once."""
    packed = zeros(1 << 20)
    tags = (
        (256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
        (322, 4, SIDE - SIDE % 16), (323, 4, SIDE - SIDE % 16), (324, 4, 8), (325, 4, len(packed)),
    )  # fmt: skip
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + bytes(4)
    error = watched.pool.submit(data).exception(PATIENCE)
    assert isinstance(error, EventError)
    assert error.reason in (Reason.TOO_LARGE, Reason.UNDECODABLE)
    assert watched.peak_bytes < MEMORY_BYTES


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_png_whose_notes_are_the_bomb(chunk: bytes, watched: Watched) -> None:
    small = encode(photo(8, 8), "PNG")
    note = png_chunk(chunk, b"note\0\0" + zeros(256 << 20))
    bomb = small[:33] + note + small[33:]  # right after the header
    watched.pool.submit(bomb).exception(PATIENCE)
    assert watched.peak_bytes < 300 << 20
    assert watched.pool.restarts == 0


def test_png_whose_data_goes_on_after_the_last_row(watched: Watched) -> None:
    data = png_file(8, 8, zeros(256 << 20), depth_colour=b"\x08\x02")
    watched.pool.submit(data).exception(PATIENCE)
    assert watched.peak_bytes < 300 << 20


def test_largest_allowed_image_is_decoded_within_the_default_memory(watched: Watched) -> None:
    assert watched.pool.submit(png_bomb(7070, 7070)).result(PATIENCE).shape == (64, 64, 3)
    assert watched.pool.restarts == 0


def test_hundred_megabytes_are_refused_unread() -> None:
    with pytest.raises(EventError) as caught:
        open_rgb(samples()["jpeg"] + bytes(100 << 20), LIMITS)
    assert caught.value.reason is Reason.TOO_LARGE


@pytest.mark.parametrize("name", sorted(samples()))
def test_no_length_of_a_file_does_harm(name: str) -> None:
    """Every format, cut at 64 places: pixels (some formats cannot tell) or a dead letter."""
    data = samples()[name]
    for end in np.linspace(0, len(data) - 1, 64).astype(int):
        try:
            open_rgb(data[:end], LIMITS)
        except EventError as error:
            assert error.reason in (Reason.UNDECODABLE, Reason.UNSUPPORTED_FORMAT)


@pytest.mark.parametrize("name", sorted(samples()))
def test_quarter_of_a_file_is_undecodable(name: str) -> None:
    with pytest.raises(EventError) as caught:
        open_rgb(samples()[name][: len(samples()[name]) // 4], LIMITS)
    assert caught.value.reason is Reason.UNDECODABLE


@pytest.mark.parametrize("mutations", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_mutants_do_no_harm(mutations: int) -> None:
    report = fuzz(mutations, seed=20261122)
    assert report.findings == []
    assert report.ends.total() == mutations
    assert report.ends["pixels"] > mutations / 10  # the mutants reach the pixels
    assert report.ends["undecodable"] > mutations / 10
    assert report.peak_bytes < 150 << 20


DISGUISES = {
    "empty": (b"", "no bytes"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "html": (b"\n<!DOCTYPE html><title>404</title>", "HTML or XML"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "zip": (b"PK\x03\x04" + bytes(30), "a ZIP archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "gzip data"),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(30), "AVIF, HEIC or video"),
    "psd": (b"8BPS\0\1" + bytes(30), "a Photoshop document"),
    "ico": (b"\0\0\1\0\1\0" + bytes(30), "an icon"),
    "jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    "jxl": (b"\xff\x0a" + bytes(30), "JPEG XL"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "an unknown format"),
    "text": (b"hello, world", "an unknown format"),
    "late": (b"\0" + samples()["jpeg"], "an unknown format"),
}


@pytest.mark.parametrize("name", sorted(DISGUISES))
def test_other_formats_are_named_and_never_opened(name: str) -> None:
    data, words = DISGUISES[name]
    with pytest.raises(EventError) as caught:
        open_rgb(data, LIMITS)
    assert caught.value.reason is Reason.UNSUPPORTED_FORMAT
    assert caught.value.detail == f"{words}, not one of JPEG, PNG, WEBP, GIF, BMP, TIFF"


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_signature_alone_is_undecodable(name: str) -> None:
    with pytest.raises(EventError) as caught:
        open_rgb(samples()[name][:12], LIMITS)
    assert caught.value.reason is Reason.UNDECODABLE
    assert "0x" not in caught.value.detail  # no memory address


@pytest.mark.parametrize("tail", [b"PK\x03\x04" + bytes(64), b"<script>1</script>", b"%PDF-1.7"])
@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_polyglot_is_the_image_it_starts_as(name: str, tail: bytes) -> None:
    """What follows the picture is never looked at."""
    plain = np.asarray(open_rgb(samples()[name], LIMITS))
    assert (np.asarray(open_rgb(samples()[name] + tail, LIMITS)) == plain).all()


def test_thousand_frames_cost_one() -> None:
    frames = [Image.new("L", (64, 64), i % 256) for i in range(1000)]
    data = encode(frames[7], "GIF", save_all=True, append_images=frames)
    assert (np.asarray(open_rgb(data, LIMITS)) == 7).all()


def test_progressive_jpeg_of_ten_thousand_scans() -> None:
    """A megabyte that would take minutes."""
    with DecoderPool(1, 64, LIMITS, deadline_seconds=2.0) as pool:
        error = pool.submit(scan_bomb(10_000)).exception(PATIENCE)
        assert isinstance(error, EventError)
        assert error.reason is Reason.UNDECODABLE
        assert error.detail == "decoding took longer than 2 s"
        assert pool.submit(samples()["jpeg"]).result(PATIENCE).any()


def test_checksum_errors_of_png_are_seen() -> None:
    data = bytearray(samples()["png"])
    at = data.index(b"IDAT") + 20
    data[at] ^= 1
    with pytest.raises(EventError) as caught:
        open_rgb(bytes(data), LIMITS)
    assert caught.value.reason is Reason.UNDECODABLE


def test_tiff_directory_that_points_at_itself() -> None:
    data = bytearray(samples()["tiff"])
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    assert open_rgb(bytes(data), LIMITS).size == photo().size


def test_deflate_stream_with_a_wrong_ending() -> None:
    rows = b"".join(b"\0" + bytes(24) for _ in range(8))
    packed = zlib.compress(rows)[:-4] + b"\0\0\0\0"  # its checksum
    with pytest.raises(EventError) as caught:
        open_rgb(png_file(8, 8, packed, depth_colour=b"\x08\x02"), LIMITS)
    assert caught.value.reason is Reason.UNDECODABLE
