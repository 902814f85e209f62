"""The demo's own photos and what is done to them: the known truth the verdicts are judged by.

Photos are those scikit-image and scikit-learn install. There are few, so some scenes are cut into
parts that share no pixel. What is symmetric or alike all over (a face, a flower, gravel) stays
whole: its parts would be near-copies of each other. Of the stereo pair of the motorcycle only one
is used: whether the other is a copy is a matter of taste. Owns files and truth; must not know Kafka
or verdicts.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

SEED = 20
QUALITY = 90
# Photos published first and copied; the others come later, as new ones between the copies.
ORIGINALS = 18

# package, file, columns and rows it is cut into
_SHIPPED = (
    ("skimage.data", "astronaut.png", 2, 2),
    ("sklearn.datasets.images", "china.jpg", 2, 1),
    ("skimage.data", "coffee.png", 1, 1),
    ("skimage.data", "camera.png", 2, 2),
    ("sklearn.datasets.images", "flower.jpg", 1, 1),
    ("skimage.data", "motorcycle_left.png", 2, 2),
    ("skimage.data", "chelsea.png", 1, 1),
    ("skimage.data", "rocket.jpg", 2, 1),
    ("skimage.data", "coins.png", 1, 1),
    ("skimage.data", "retina.jpg", 1, 1),
    ("skimage.data", "hubble_deep_field.jpg", 1, 1),
    ("skimage.data", "ihc.png", 1, 1),
    ("skimage.data", "moon.png", 1, 1),
    ("skimage.data", "brick.png", 1, 1),
    ("skimage.data", "grass.png", 1, 1),
    ("skimage.data", "gravel.png", 1, 1),
    ("skimage.data", "cell.png", 1, 1),
    ("skimage.data", "clock_motion.png", 1, 1),
)


class Kind(StrEnum):
    """What a file of the demo is: a photo seen first, one of its copies, or none of these."""

    ORIGINAL = "original"
    RESIZED = "resized"
    RECOMPRESSED = "recompressed"
    CROPPED = "cropped"
    RECOLOURED = "recoloured"
    CAPTIONED = "captioned"
    FRAMED = "framed"
    MIRRORED = "mirrored"
    SAME_BYTES = "same bytes"
    NEW = "new"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Sample:
    """A file the demo publishes; copies carry the `photo` they were made of."""

    path: Path
    photo: str
    kind: Kind


def write_samples(first: Path, second: Path) -> list[Sample]:
    """Fill two folders: photos, then copies of them mixed with new photos and broken files."""
    rng = random.Random(SEED)
    photos = list(shipped_photos())
    rng.shuffle(photos)
    samples = []
    for name, photo in photos[:ORIGINALS]:
        samples.append(_save(photo, first / f"{name}.jpg", name, Kind.ORIGINAL))
    later: list[tuple[str, Kind, Image.Image]] = [
        (name, kind, edit(photo, rng)) for name, photo in photos[:ORIGINALS] for kind, edit in EDITS
    ]
    later += [(name, Kind.NEW, photo) for name, photo in photos[ORIGINALS:]]
    rng.shuffle(later)
    for number, (name, kind, photo) in enumerate(later):
        quality = 30 if kind is Kind.RECOMPRESSED else QUALITY
        path = second / f"{number:03}-{name}-{kind}.jpg"
        samples.append(_save(photo, path, name, kind, quality))
    return samples + _write_others(samples, second)


def _write_others(samples: list[Sample], folder: Path) -> list[Sample]:
    """Files re-sent byte for byte, and files no worker can read."""
    others = []
    for sample in samples[:3]:
        path = folder / f"200-{sample.photo}-again.jpg"
        path.write_bytes(sample.path.read_bytes())
        others.append(Sample(path, sample.photo, Kind.SAME_BYTES))
    whole = samples[0].path.read_bytes()
    broken = {"cut-off.jpg": whole[: len(whole) // 2], "notes.txt": b"no image", "empty.png": b""}
    for name, data in broken.items():
        path = folder / f"201-{name}"
        path.write_bytes(data)
        others.append(Sample(path, name, Kind.BROKEN))
    return others


def shipped_photos() -> Iterator[tuple[str, Image.Image]]:
    """Name and pixels of every photo; parts of a scene are numbered."""
    for package, file, columns, rows in _SHIPPED:
        with as_file(files(package) / file) as path, Image.open(path) as opened:
            scene = opened.convert("RGB")
        name = Path(file).stem.replace("_", "-")
        parts = list(_parts(scene, columns, rows))
        for number, part in enumerate(parts, 1):
            yield (f"{name}-{number}" if len(parts) > 1 else name), part


def _parts(scene: Image.Image, columns: int, rows: int) -> Iterator[Image.Image]:
    width, height = scene.width // columns, scene.height // rows
    for top in range(0, height * rows, height):
        for left in range(0, width * columns, width):
            yield scene.crop((left, top, left + width, top + height))


def _save(photo: Image.Image, path: Path, name: str, kind: Kind, quality: int = QUALITY) -> Sample:
    photo.save(path, quality=quality)
    return Sample(path, name, kind)


def _resize(photo: Image.Image, rng: random.Random) -> Image.Image:
    scale = rng.uniform(0.4, 0.7)
    return photo.resize((round(photo.width * scale), round(photo.height * scale)))


def _keep(photo: Image.Image, _rng: random.Random) -> Image.Image:
    return photo


def _crop(photo: Image.Image, rng: random.Random) -> Image.Image:
    width, height = round(photo.width * 0.8), round(photo.height * 0.8)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    return photo.crop((left, top, left + width, top + height))


def _recolour(photo: Image.Image, rng: random.Random) -> Image.Image:
    warm = Image.new("RGB", photo.size, (255, 190, 120))
    toned = Image.blend(photo, warm, rng.uniform(0.1, 0.2))
    faded = ImageEnhance.Color(toned).enhance(rng.uniform(0.3, 0.7))
    return ImageEnhance.Brightness(faded).enhance(rng.uniform(0.75, 1.2))


def _caption(photo: Image.Image, _rng: random.Random) -> Image.Image:
    captioned = photo.copy()
    draw = ImageDraw.Draw(captioned)
    size = min(photo.height // 10, photo.width // 12)
    draw.rectangle((0, photo.height - 2 * size, photo.width, photo.height), fill=(20, 20, 20))
    place = (photo.width // 2, photo.height - size)
    font = ImageFont.load_default(size)
    draw.text(place, "WHEN IT IS MONDAY", fill=(255, 255, 255), font=font, anchor="mm")
    return captioned


def _frame(photo: Image.Image, rng: random.Random) -> Image.Image:
    colour = rng.choice([(250, 250, 245), (25, 25, 30), (150, 40, 40)])
    return ImageOps.expand(photo, border=photo.width // 14, fill=colour)


def _mirror(photo: Image.Image, _rng: random.Random) -> Image.Image:
    return ImageOps.mirror(photo)


EDITS: tuple[tuple[Kind, Callable[[Image.Image, random.Random], Image.Image]], ...] = (
    (Kind.RESIZED, _resize),
    (Kind.RECOMPRESSED, _keep),
    (Kind.CROPPED, _crop),
    (Kind.RECOLOURED, _recolour),
    (Kind.CAPTIONED, _caption),
    (Kind.FRAMED, _frame),
    (Kind.MIRRORED, _mirror),
)
