"""Photos for training and evaluation: folders and tar files in, RGB images out, split by photo.

Of weights it knows only what they say they have seen. The split looks only at a photo's bytes, so a
photo stays on its side whatever folder, archive or order it arrives in.
"""

import hashlib
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worker.errors import ConfigError, EventError
from worker.images import ImageLimits, open_rgb
from worker.weightfile import Description

WORKING_SIDE = 320  # pixels; longer short sides are reduced once, at loading
LONGEST_SIDE = 4096  # pixels; edits make up to four times as many, and WebP ends at 16,383
SAME_PICTURE = 0.995  # correlation of 16 x 16 thumbnails
SHIPPED = ("default", "rotation")  # weights
LIMITS = ImageLimits()
# What tarfile raises on an archive that was cut short or, compressed, has wrong bytes.
DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Photo:
    """One picture in memory, named `source/member`, in characters that any terminal shows."""

    name: str
    image: Image.Image
    sha256: bytes


def read_photos(sources: Iterable[str | Path]) -> list[Photo]:
    """Decode every picture of folders (recursively) and tar files; other files are passed over.

    Raises ConfigError when a source is missing, something in it cannot be read, an archive was cut
    short, or nothing in them is a picture.
    """
    photos = []
    for source in sources:
        for name, data in _members(Path(source)):
            try:
                image = open_rgb(data, LIMITS, target=WORKING_SIDE)
            except EventError:
                continue
            image = reduced(image, WORKING_SIDE)
            photos.append(Photo(_printable(name), image, hashlib.sha256(data).digest()))
    if not photos:
        raise ConfigError(f"no pictures in {', '.join(map(str, sources))}")
    return photos


def split(photos: list[Photo], held_out: float) -> tuple[list[Photo], list[Photo]]:
    """Split into (kept, held out); `held_out` is the share, decided by each photo's SHA-256."""
    bound = int(held_out * 2**32)
    kept: list[Photo] = []
    out: list[Photo] = []
    for photo in photos:
        (out if int.from_bytes(photo.sha256[:4], "big") < bound else kept).append(photo)
    return kept, out


def check_held_out(name: str, weights: Description, held_out: float) -> None:
    """Raise ConfigError where photos that these weights have learned would count as held out.

    The shipped ones have not learned a user's photos, and some weights do not say what they held
    out.
    """
    least = weights.training.get("held_out", 1.0)
    if name not in SHIPPED and held_out > least:
        raise ConfigError(
            f"{name} was trained with --held-out {least:g}: with {held_out:g}, photos it has "
            "learned would be held out"
        )


def fingerprint(photos: list[Photo]) -> str:
    """SHA-256 over the photos' own, in their order: 64 hex digits."""
    return hashlib.sha256(b"".join(photo.sha256 for photo in photos)).hexdigest()


def distinct(photos: list[Photo]) -> list[Photo]:
    """Each file's bytes once, in an order that their SHA-256 decides.

    The last bytes of it, since `split` looks at the first.
    """
    once = {photo.sha256: photo for photo in photos}
    return sorted(once.values(), key=lambda photo: photo.sha256[::-1])


def without_pictures_of(photos: list[Photo], others: list[Photo]) -> list[Photo]:
    """Leave out photos that show the very same picture as one of the others, mirrored or turned
    as it may be.

    Collections hold true copies under other bytes, and a ground truth that calls them different
    measures nothing. Judged without any embedder: coarse thumbnails that correlate above
    SAME_PICTURE, which spares even the next frame of a burst.
    """
    if not photos or not others:
        return photos
    most = _likeness(photos, others).max(1)
    return [photo for photo, like in zip(photos, most, strict=True) if like <= SAME_PICTURE]


def each_picture_once(photos: list[Photo]) -> list[Photo]:
    """Leave out photos that show the very same picture as an earlier one, judged likewise."""
    same = _likeness(photos, photos) > SAME_PICTURE
    kept: list[int] = []
    for place in range(len(photos)):
        if not same[place, kept].any():
            kept.append(place)
    return [photos[place] for place in kept]


def _likeness(photos: list[Photo], others: list[Photo]) -> NDArray[np.float32]:
    """(photos, others): the highest correlation, the others mirrored and turned as they may be."""
    wanted, known = _thumbnails(photos), _thumbnails(others)
    rows = wanted.reshape(len(wanted), -1)
    highest = np.full((len(photos), len(others)), -1, np.float32)
    for way in (known, known[:, :, ::-1]):
        for turns in range(4):
            turned = np.rot90(way, turns, (1, 2)).reshape(len(known), -1)
            np.maximum(highest, rows @ turned.T, out=highest)
    return highest


def _thumbnails(photos: list[Photo]) -> NDArray[np.float32]:
    """(n, 16, 16, 3), centred and of unit length."""
    side = (16, 16)
    small = [np.asarray(p.image.resize(side, Image.Resampling.BOX), np.float32) for p in photos]
    stack = np.stack(small)
    stack -= stack.mean((1, 2, 3), keepdims=True)
    lengths = np.linalg.norm(stack.reshape(len(stack), -1), axis=1)
    unit: NDArray[np.float32] = stack / (lengths[:, None, None, None] + 1e-6)
    return unit


def _printable(name: str) -> str:
    """Files may be named in bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    try:
        yield from _read(source)
    except (OSError, *DAMAGED) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error


def _read(source: Path) -> Iterator[tuple[str, bytes]]:
    most = LIMITS.max_bytes + 1  # enough to be refused: a video may have gigabytes
    if source.is_dir():
        for path in _files(source):
            with path.open("rb") as file:
                yield f"{source.name}/{path.relative_to(source)}", file.read(most)
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    yield member.name, stream.read(most)
    else:
        raise ConfigError(f"{source} is neither a folder nor a tar file")


def _files(folder: Path) -> list[Path]:
    # Not rglob: it passes over folders that it may not read.
    found = [Path(at, name) for at, _, names in os.walk(folder, onerror=_raise) for name in names]
    return sorted(path for path in found if path.is_file())


def _raise(error: OSError) -> None:
    raise error


def reduced(image: Image.Image, side: int) -> Image.Image:
    """Shrink until the short side is `side` pixels and the other one LONGEST_SIDE at most; smaller
    images stay as they are.
    """
    factor = min(side / min(image.size), LONGEST_SIDE / max(image.size))
    if factor >= 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
