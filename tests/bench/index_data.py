"""Vectors for the bench of the index: real embeddings, their edits, and distractors like them.

Distractors are drawn from a Gaussian mixture (256 components with full covariances, each shrunk a
tenth towards that of all photos) fitted to the embeddings of real photos: the share of components
was chosen so that the nearest neighbours among as many distractors as photos are as similar as
among the photos themselves; `likeness` prints both. Photos repeat each other more at the far end
(bursts, shelves of one shop) than distractors do.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from deploy.demo_photos import shipped_photos
from worker.embedder import Embedder
from worker.images import to_pixels
from worker.training.attacks import ATTACKS
from worker.training.photos import Photo, read_photos
from worker.vectors import Vectors, quantize

Rows = npt.NDArray[np.float32]
COMPONENTS = 256
SHRINKAGE = 0.1
CROPS = 2_000  # photos made of the shipped ones when none are given
BATCH = 128


@dataclass(frozen=True)
class Real:
    """Embeddings of photos (n, 128), of edits (m, 128), and which photo each edit is of (m,)."""

    photos: Rows
    edits: Rows
    original: npt.NDArray[np.int64]
    threshold: float
    model_id: str


def real_vectors(sources: list[Path], edits: int, cache: Path) -> Real:
    """Embed photos and `edits` edits of them, one of the attack suite each; kept in `cache`."""
    embedder = Embedder.load()
    names = "|".join(str(source) for source in sources)
    path = cache / f"{embedder.model_id}-{zlib.crc32(names.encode()):08x}-{edits}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        photos = read_photos(sources) if sources else _crops()
        rng = np.random.default_rng(0)
        original = rng.choice(len(photos), min(edits, len(photos)), replace=False)
        edited = [
            ATTACKS[int(rng.integers(len(ATTACKS)))](photos[at].image, photos[at].sha256)
            for at in original
        ]
        np.savez(
            path,
            photos=_embed(embedder, [photo.image for photo in photos]),
            edits=_embed(embedder, edited),
            original=original,
        )
    kept = np.load(path)
    return Real(
        kept["photos"], kept["edits"], kept["original"], embedder.threshold, embedder.model_id
    )


def _embed(embedder: Embedder, images: Sequence[Image.Image]) -> Rows:
    parts = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        pixels = [to_pixels(image, embedder.input_size) for image in part]
        parts.append(embedder.embed_pixels(np.stack(pixels)))
    return np.concatenate(parts)


def _crops() -> list[Photo]:
    """Random quarter-size crops of the photos packages ship: few scenes, but many textures."""
    rng = np.random.default_rng(0)
    shipped = [(name, image.convert("RGB")) for name, image in shipped_photos()]
    crops = []
    for number in range(CROPS):
        name, image = shipped[number % len(shipped)]
        width, height = image.width // 3, image.height // 3
        left = int(rng.integers(image.width - width))
        top = int(rng.integers(image.height - height))
        crop = image.crop((left, top, left + width, top + height))
        crops.append(Photo(f"{name}-{number}", crop, hashlib.sha256(crop.tobytes()).digest()))
    return crops


class Distractors:
    """The mixture; `sample` draws from it, the same rows for the same seed."""

    def __init__(self, photos: Rows) -> None:
        components = min(COMPONENTS, max(1, len(photos) // 30))
        members = _k_means(photos, components)
        whole = np.cov(photos.T)
        self._parts: list[tuple[float, Rows, Rows]] = []
        for component in range(components):
            rows = photos[members == component]
            if len(rows) >= 2:
                spread = _shrunk(np.cov(rows.T), whole, min(1.0, SHRINKAGE * 128 / len(rows)))
                values, axes = np.linalg.eigh(spread)
                factor = (axes * np.sqrt(np.maximum(values, 0))).astype(np.float32)
                self._parts.append((len(rows) / len(photos), rows.mean(axis=0), factor))

    def sample(self, count: int, seed: int) -> Vectors:
        """Draw `count` int8 rows."""
        return quantize(self.floats(count, seed))

    def floats(self, count: int, seed: int) -> Rows:
        """Draw `count` unit rows."""
        rng = np.random.default_rng(seed)
        weights = np.array([weight for weight, _, _ in self._parts])
        counts = rng.multinomial(count, weights / weights.sum())
        rows = np.concatenate(
            [
                mean + rng.standard_normal((n, 128), np.float32) @ factor.T
                for n, (_, mean, factor) in zip(counts, self._parts, strict=True)
            ]
        )
        rng.shuffle(rows)
        unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


def likeness(photos: Rows, distractors: Rows) -> dict[str, list[float]]:
    """Quantiles of the similarity to the nearest other: among photos, distractors, and between."""
    steps = [0.05, 0.25, 0.5, 0.75, 0.95]

    def nearest(rows: Rows, others: Rows) -> list[float]:
        near = rows @ others.T
        if rows is others:
            np.fill_diagonal(near, -1)
        return [round(float(value), 3) for value in np.quantile(near.max(axis=1), steps)]

    return {
        "photos": nearest(photos, photos),
        "distractors": nearest(distractors, distractors),
        "distractor to photo": nearest(distractors, photos),
    }


def _shrunk(own: npt.NDArray[np.float64], whole: npt.NDArray[np.float64], share: float) -> Rows:
    scaled = whole * np.trace(own) / np.trace(whole)
    shrunk: Rows = ((1 - share) * own + share * scaled).astype(np.float32)
    return shrunk


def _k_means(rows: Rows, count: int) -> npt.NDArray[np.intp]:
    centres = rows[np.random.default_rng(0).choice(len(rows), count, replace=False)]
    for _ in range(15):
        members: npt.NDArray[np.intp] = (rows @ centres.T).argmax(axis=1)
        for centre in range(count):
            if (members == centre).any():
                mean = rows[members == centre].mean(axis=0)
                centres[centre] = mean / np.linalg.norm(mean)
    return members
