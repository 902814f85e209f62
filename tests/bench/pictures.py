"""What the benches feed: real photos as JPEGs of about 100 kB, no two alike in bytes or in scene.

Owns where they come from and how they are cut; knows nothing of what is measured with them.
"""

import io
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from PIL import Image, ImageOps

from deploy.demo_photos import shipped_photos
from tests.photos import jpeg

SHAPE = (800, 600)
QUALITY = 95  # with SHAPE: about 100 kB a picture
SEED = 5
PROCESSES = 2
ORIGINALS = 400  # most photos held decoded, to cut from


def pictures(source: Path | None, count: int) -> list[bytes]:
    """`count` JPEGs. `source` is a folder or a tar of photos; None: those that packages ship.

    A source with enough JPEGs is taken as it is. From a smaller one, pieces are cut, turned and
    recoloured at random (always the same ones), so that most are of a scene of their own.
    Raises ValueError when the source holds no JPEG.
    """
    found = list(_take(source, count)) if source else []
    if source and not found:
        raise ValueError(f"{source}: no JPEG in it")
    if len(found) >= count:
        return found
    originals = [*_decoded(found[:ORIGINALS])] if found else [p for _, p in shipped_photos()]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        return list(
            pool.map(partial(_piece, originals), range(count), chunksize=max(1, count // 8))
        )


def _take(source: Path, most: int) -> Iterator[bytes]:
    if source.is_dir():
        paths = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
        yield from (path.read_bytes() for path in paths[:most])
        return
    with tarfile.open(source) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file and member.name.lower().endswith((".jpg", ".jpeg")) and most > 0:
                most -= 1
                yield file.read()


def _decoded(files: list[bytes]) -> Iterator[Image.Image]:
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            yield image.convert("RGB")


def _piece(originals: list[Image.Image], number: int) -> bytes:
    chance = random.Random(SEED * 1_000_003 + number)
    photo = chance.choice(originals)
    part = chance.uniform(0.3, 1.0)
    width, height = int(photo.width * part), int(photo.height * part)
    left = chance.randint(0, photo.width - width)
    top = chance.randint(0, photo.height - height)
    piece = photo.crop((left, top, left + width, top + height))
    if chance.random() < 0.5:
        piece = ImageOps.mirror(piece)
    piece = piece.rotate(chance.choice((0, 90, 180, 270)), expand=True).resize(SHAPE)
    channels = list(piece.split())
    chance.shuffle(channels)
    return jpeg(Image.merge("RGB", channels), QUALITY)
