"""Real photos for the embedder's tests: tiles of those the scikit packages ship."""

import io
import tarfile
from functools import lru_cache
from pathlib import Path

import skimage
import sklearn
from PIL import Image, ImageStat

FOLDERS = (
    Path(skimage.__file__).parent / "data",
    Path(sklearn.__file__).parent / "datasets" / "images",
)
TILE = 96  # pixels
PER_PHOTO = 40
FLAT = 12  # grey levels of deviation; sky and paper are no pictures to tell apart


@lru_cache(maxsize=1)
def tiles() -> tuple[Image.Image, ...]:
    """Non-overlapping tiles of every shipped photo, plain ones left out."""
    found = []
    for path in sorted(p for folder in FOLDERS for p in folder.iterdir()):
        if path.suffix not in (".png", ".jpg"):
            continue
        image = Image.open(path).convert("RGB")
        places = [
            (x, y)
            for y in range(0, image.height - TILE + 1, TILE)
            for x in range(0, image.width - TILE + 1, TILE)
        ]
        cut = [image.crop((x, y, x + TILE, y + TILE)) for x, y in places[:PER_PHOTO]]
        found += [tile for tile in cut if ImageStat.Stat(tile.convert("L")).stddev[0] > FLAT]
    return tuple(found)


def encoded(image: Image.Image, quality: int = 92) -> bytes:
    """JPEG bytes."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def write_tar(path: Path, images: list[Image.Image]) -> Path:
    """A tar file of JPEG photos and one file that is none."""
    with tarfile.open(path, "w") as archive:
        for place, image in enumerate(images):
            _add(archive, f"photos/{place:05d}.jpg", encoded(image))
        _add(archive, "photos/readme.txt", b"not a picture")
    return path


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
