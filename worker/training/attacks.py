"""The attack suite: 26 edits in three tiers, fixed strengths, deterministic per file.

After the transformations of ISC-2021 and Copydays. Knows nothing of embedders.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from worker.training import edits

TIERS = ("easy", "medium", "hard")
_LINES = ["found this today", "what do you think?", "@shop  2 h", "1,204 likes", "reply", "share"]

Edit = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Attack:
    """One edit under its name."""

    name: str
    tier: str
    edit: Edit

    def __call__(self, image: Image.Image, sha256: bytes) -> Image.Image:
        """Edit; what is random (places, colours) follows from the edit and the file's SHA-256."""
        seed = hashlib.sha256(self.name.encode() + sha256).digest()
        return self.edit(image, np.random.default_rng(int.from_bytes(seed, "big")))


def _crop(area: float) -> Edit:
    return lambda image, rng: edits.crop(image, area, 1.0, *rng.random(2).tolist())


def _screenshot(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    dark, aspect = bool(rng.random() < 0.4), _pick(rng, 1.4, 1.78, 2.0)
    top = rng.uniform(0.1, 0.9)
    return edits.screenshot(image, aspect=aspect, margin=0.0, top=top, dark=dark, lines=_LINES)


def _combined(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    image = edits.crop(image, 0.6, 1.0, *rng.random(2).tolist())
    image = edits.brightness(image, _pick(rng, 0.7, 1.35))
    text, ink, bar = "look what i found", edits.WHITE, edits.BLACK
    return edits.jpeg(edits.caption(image, text, 0.12, 0.97, colour=ink, bar=bar), 25)


def _caption(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    text, ink, bar = "when you see it", edits.BLACK, edits.WHITE
    return edits.caption(image, text, 0.11, _pick(rng, 0.03, 0.97), colour=ink, bar=bar)


def _border(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return edits.border(image, 0.1, (red, green, blue))


def _pick(rng: np.random.Generator, *values: float) -> float:
    return values[int(rng.integers(len(values)))]


ATTACKS = (
    Attack("jpeg 30", "easy", lambda image, _: edits.jpeg(image, 30)),
    Attack("half size", "easy", lambda image, _: edits.scale(image, 0.5)),
    Attack("thumbnail 160", "easy", lambda image, _: edits.thumbnail(image, 160)),
    Attack("webp 50", "easy", lambda image, _: edits.webp(image, 50)),
    Attack("brightness", "easy", lambda image, r: edits.brightness(image, _pick(r, 0.75, 1.3))),
    Attack("contrast", "easy", lambda image, r: edits.contrast(image, _pick(r, 0.7, 1.4))),
    Attack("saturation", "easy", lambda image, r: edits.saturation(image, _pick(r, 0.5, 1.6))),
    Attack("sharpen", "easy", lambda image, _: edits.sharpen(image, 2.5)),
    Attack("crop 90 %", "easy", _crop(0.9)),
    Attack("watermark", "easy", lambda image, _: edits.watermark(image, "sample", 0.08, 0.3)),
    Attack("aspect 10 %", "easy", lambda image, r: edits.stretch(image, _pick(r, 0.9, 1.1))),
    Attack("jpeg 10", "medium", lambda image, _: edits.jpeg(image, 10)),
    Attack("crop 70 %", "medium", _crop(0.7)),
    Attack("grey", "medium", lambda image, _: edits.grey(image)),
    Attack("blur", "medium", lambda image, _: edits.blur(image, 0.012)),
    Attack("noise 15", "medium", lambda image, rng: edits.noise(image, 15, rng)),
    Attack("caption", "medium", _caption),
    Attack("border 10 %", "medium", _border),
    Attack("white pad to square", "medium", lambda image, _: edits.pad(image, 1.0, edits.WHITE)),
    Attack("turn 5°", "medium", lambda image, r: edits.turn(image, _pick(r, -5, 5), edits.BLACK)),
    Attack("dark", "medium", lambda image, _: edits.brightness(image, 0.45)),
    Attack("mirror", "hard", lambda image, _: edits.mirror(image)),
    Attack("quarter turn", "hard", lambda image, r: edits.quarter_turn(image, int(_pick(r, 1, 3)))),
    Attack("crop 50 %", "hard", _crop(0.5)),
    Attack("screenshot", "hard", _screenshot),
    Attack("crop+light+caption+jpeg", "hard", _combined),
)
