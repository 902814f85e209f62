"""Encoded bytes to RGB pixels: limits, formats, orientation, and the one preprocessing.

Knows nothing of events, models or Kafka.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

PREPROCESSING = "rgb-squash-v1"


@dataclass(frozen=True)
class ImageLimits:
    """What an encoded image may cost: bytes as received, pixels as its header states."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000


def open_rgb(data: bytes, limits: ImageLimits, target: int | None = None) -> Image.Image:
    """Decode to an upright RGB image."""
    image = Image.open(io.BytesIO(data))
    if target is not None:
        image.draft("RGB", (target, target))
    return ImageOps.exif_transpose(image).convert("RGB")


def to_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize an RGB image to a square, whatever its aspect: uint8 (size, size, 3)."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0))


def decode(data: bytes, size: int, limits: ImageLimits) -> NDArray[np.uint8]:
    """Decode and preprocess: uint8 (size, size, 3)."""
    return to_pixels(open_rgb(data, limits, target=size), size)
