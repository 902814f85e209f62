"""Random views for contrastive training: a mild one stands for the stored picture, a slight and a
hard one for copies of it. After SSCD (Pizzi et al., 2022) and the ISC-2021 winners.

Every choice comes from the generator handed in, so a view is a function of (photo, seed).
Edits are applied in the order pictures meet them: geometry, light, overlays, frames, recoding.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from worker.training import edits

OneEdit = Callable[[Image.Image, Image.Image, np.random.Generator], Image.Image]

WORDS = [
    "new",
    "sale",
    "like",
    "share",
    "today",
    "look",
    "best",
    "found",
    "photo",
    "price",
    "offer",
]


def mild_view(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as stored: untouched half of the time, else lightly recoded or cropped."""
    if rng.random() < 0.5:
        return image
    if rng.random() < 0.3:
        image = edits.crop(image, rng.uniform(0.8, 1), rng.uniform(0.9, 1.1), *rng.random(2))
    if rng.random() < 0.4:
        image = _light(image, rng, 0.2)
    if rng.random() < 0.3:
        image = edits.scale(image, rng.uniform(0.5, 0.9))
    if rng.random() < 0.4:
        image = edits.jpeg(image, int(rng.integers(30, 90)))
    return image


def slight_view(image: Image.Image, other: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with one edit, as most copies have: much closer to it than any re-shot is."""
    return _ONE_EDIT[int(rng.integers(len(_ONE_EDIT)))](image, other, rng)


def hard_view(image: Image.Image, other: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as copied: several edits of any strength; `other` comes behind or upon it."""
    if rng.random() < 0.85:
        image = _geometry(image, rng)
    if rng.random() < 0.65:
        image = _colours(image, rng)
    if rng.random() < 0.4:
        image = _overlays(image, other, rng)
    if rng.random() < 0.45:
        image = _frames(image, other, rng)
    if rng.random() < 0.5:
        image = _recoding(image, rng)
    return image


def reshot(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another photo of the same thing, taken from a step aside: no copy, and hard to tell from one.

    What real ones have in common: things move against each other, the frame is another one, and
    the light may be.
    """
    points = int(rng.integers(3, 6))
    amount = rng.uniform(0.05, 0.12)
    shifts = rng.uniform(-amount, amount, (2, points, points)).astype(np.float32)
    image = edits.bend(image, *shifts)
    image = edits.crop(image, rng.uniform(0.7, 0.95), rng.uniform(0.9, 1.1), *rng.random(2))
    return _light(image, rng, 0.2)


def _one_crop(least: float, most: float) -> OneEdit:
    return lambda image, _, rng: edits.crop(
        image, rng.uniform(least, most), rng.uniform(0.9, 1.1), *rng.random(2)
    )


def _geometry(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.5:
        image = edits.mirror(image)
    if rng.random() < 0.5:
        image = edits.quarter_turn(image, int(rng.integers(1, 4)))
    if rng.random() < 0.2:
        image = edits.turn(image, rng.uniform(-15, 15), _colour(rng))
    if rng.random() < 0.6:
        area = math.exp(rng.uniform(math.log(0.25), 0))
        image = edits.crop(image, area, math.exp(rng.uniform(-0.35, 0.35)), *rng.random(2))
    if rng.random() < 0.2:
        image = edits.stretch(image, math.exp(rng.uniform(-0.3, 0.3)))
    return image


def _colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.6:
        image = _light(image, rng, 0.8)
    if rng.random() < 0.2:
        image = edits.grey(image)
    elif rng.random() < 0.15:
        image = edits.hue(image, int(rng.integers(-20, 21)))
    if rng.random() < 0.2:
        image = edits.gamma(image, *np.exp(rng.uniform(-0.35, 0.35, 3)).tolist())
    if rng.random() < 0.15:
        image = edits.sharpen(image, rng.uniform(1.5, 4))
    elif rng.random() < 0.25:
        image = edits.blur(image, rng.uniform(0.003, 0.02))
    if rng.random() < 0.2:
        image = edits.noise(image, rng.uniform(5, 25), rng)
    return image


def _light(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    factors = np.exp(rng.uniform(-strength, strength, 3)).tolist()
    for edit, factor in zip(
        (edits.brightness, edits.contrast, edits.saturation), factors, strict=True
    ):
        if rng.random() < 0.5:
            image = edit(image, factor)
    return image


def _overlays(image: Image.Image, other: Image.Image, rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.5:
        bar = _colour(rng) if rng.random() < 0.5 else None
        share, top = rng.uniform(0.06, 0.18), float(rng.choice([0.02, 0.98, rng.random()]))
        image = edits.caption(image, _words(rng, 3), share, top, colour=_colour(rng), bar=bar)
    elif kind < 0.7:
        image = edits.watermark(
            image, _words(rng, 1), rng.uniform(0.06, 0.15), rng.uniform(0.2, 0.6)
        )
    elif kind < 0.85:
        image = edits.inset(image, other, rng.uniform(0.2, 0.45), *rng.random(2).tolist())
    if rng.random() < 0.35:
        share = rng.uniform(0.1, 0.35)
        left, top = rng.random(2).tolist()
        glyph = _words(rng, 1)[0]
        image = edits.sticker(image, share, left, top, colour=_colour(rng), glyph=glyph)
    return image


def _frames(image: Image.Image, other: Image.Image, rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.25:
        return edits.border(image, rng.uniform(0.03, 0.2), _colour(rng))
    if kind < 0.5:
        return _pad(image, rng)
    if kind < 0.9:
        lines = [_words(rng, 4) for _ in range(int(rng.integers(0, 9)))]
        margin = 0.0 if rng.random() < 0.6 else rng.uniform(0.02, 0.3)
        dark = bool(rng.random() < 0.4)
        aspect, top = rng.uniform(0.9, 2.2), rng.random()
        return edits.screenshot(
            image, aspect=aspect, margin=margin, top=top, dark=dark, lines=lines
        )
    factor = rng.uniform(1.1, 1.6)
    backdrop = other.resize((round(image.width * factor), round(image.height * factor)))
    return edits.paste(backdrop, image, *rng.random(2).tolist())


def _pad(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    aspect = 1.0 if rng.random() < 0.6 else math.exp(rng.uniform(-0.6, 0.6))
    return edits.pad(image, aspect, _colour(rng))


def _recoding(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.4:
        image = edits.scale(image, rng.uniform(0.25, 0.8))
    if rng.random() < 0.15:
        return edits.webp(image, int(rng.integers(10, 70)))
    if rng.random() < 0.8:
        image = edits.jpeg(image, int(rng.integers(8, 70)))
    return image


def _colour(rng: np.random.Generator) -> edits.RGB:
    kind = rng.random()
    if kind < 0.4:
        return edits.WHITE
    if kind < 0.6:
        return edits.BLACK
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return (red, green, blue)


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count).tolist())


# Crops come twice: they are what most copies have.
_ONE_EDIT: tuple[OneEdit, ...] = (
    _one_crop(0.55, 0.97),
    _one_crop(0.4, 0.8),
    lambda image, _, rng: edits.turn(image, rng.uniform(-8, 8), _colour(rng)),
    lambda image, _, rng: edits.grey(image),
    lambda image, _, rng: edits.blur(image, rng.uniform(0.004, 0.016)),
    lambda image, _, rng: edits.noise(image, rng.uniform(5, 25), rng),
    lambda image, _, rng: _light(image, rng, 0.8),
    lambda image, _, rng: edits.jpeg(image, int(rng.integers(6, 50))),
    _overlays,
    lambda image, _, rng: edits.border(image, rng.uniform(0.04, 0.16), _colour(rng)),
    lambda image, _, rng: _pad(image, rng),
    lambda image, _, rng: edits.stretch(image, math.exp(rng.uniform(-0.2, 0.2))),
    lambda image, _, rng: edits.scale(image, rng.uniform(0.25, 0.8)),
    lambda image, _, rng: edits.mirror(image),
    lambda image, _, rng: edits.quarter_turn(image, int(rng.integers(1, 4))),
)
