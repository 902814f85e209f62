"""Photos for tests: what installed packages ship, and as many different scenes as a test wants."""

import io
import random
from functools import cache

import numpy as np
from PIL import Image, ImageOps

from deploy.demo_photos import shipped_photos

SCENE_PIXELS = 160


@cache
def photos() -> dict[str, Image.Image]:
    """The shipped photos by name."""
    return dict(shipped_photos())


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Encode."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def scene(number: int) -> Image.Image:
    """A picture like no other number's: parts of three photos side by side, turned and coloured.

    The same for the same number, always.
    """
    chance = random.Random(number)
    canvas = Image.new("RGB", (SCENE_PIXELS, SCENE_PIXELS))
    half = SCENE_PIXELS // 2
    places = [(0, 0, SCENE_PIXELS, half), (0, half, half, half), (half, half, half, half)]
    if chance.random() < 0.5:
        places = [(top, left, height, width) for left, top, width, height in places]
    for left, top, width, height in places:
        photo = photos()[chance.choice(sorted(photos()))]
        size = chance.randint(min(photo.size) // 4, min(photo.size) // 2)
        x = chance.randint(0, photo.width - size)
        y = chance.randint(0, photo.height - size)
        part = photo.crop((x, y, x + size, y + size)).resize((width, height))
        channels = list(part.split())
        chance.shuffle(channels)
        part = Image.merge("RGB", channels)
        if chance.random() < 0.3:
            part = ImageOps.invert(part)
        canvas.paste(part, (left, top))
    return canvas


def near_copy(image: Image.Image) -> Image.Image:
    """The same picture a shade lighter: other bytes, near-identical pixels."""
    return Image.fromarray(np.minimum(np.asarray(image).astype(np.int16) + 2, 255).astype(np.uint8))
