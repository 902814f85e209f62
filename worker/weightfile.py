"""The embedder's weights on disk: safetensors (no code runs on reading), fp16, self-describing.

The metadata says everything a vector depends on besides the numbers: preprocessing, pooling, input
size; and what travels with them: the calibrated threshold, how they were trained, how they did.
Knows neither images nor devices.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from worker.errors import ConfigError
from worker.network import PER_IMAGE, POOLING_EXPONENT

POOLING = f"gem-{POOLING_EXPONENT:g}, unit length, whitened"
FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What travels with the numbers."""

    preprocessing: str
    input_size: int  # pixels a side
    threshold: float  # similarity from which two pictures are called copies
    pooling: str = POOLING
    normalisation: str = PER_IMAGE
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Tensors by name (float32) and their description."""

    tensors: dict[str, Tensor]
    description: Description

    def model_id(self) -> str:
        """Hash of all that decides a vector: 16 hex digits."""
        about = self.description
        parts = (about.preprocessing, about.normalisation, about.pooling, str(about.input_size))
        digest = hashlib.sha256("|".join(parts).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def save(path: Path, weights: Weights) -> None:
    """Write the parameters as fp16, the few statistics as float32; counters are left out.

    An older file is replaced only when the new one is complete. Raises ConfigError where the file
    cannot be written.
    """
    tensors = {
        name: value.detach().cpu().to(_stored_as(name)).contiguous()
        for name, value in weights.tensors.items()
        if value.is_floating_point()
    }
    about = {"format": FORMAT, **asdict(weights.description)}
    # Not safetensors' own writing: its files are for their owner alone, whatever the umask.
    data = safetensors_torch.save(tensors, {"embedder": json.dumps(about, sort_keys=True)})
    write_whole(path, data)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file only when the new one is complete. Raises ConfigError where that fails."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def read(path: Path, sha256: str | None = None) -> Weights:
    """Read and check.

    Raises ConfigError for a missing, unreadable, foreign, damaged or unexpected file.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"no weights file at {path}")
        with path.open("rb") as stream:  # safetensors calls a file missing that it may not read
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if sha256 not in (None, found):
        raise ConfigError(
            f"{path} is not the file this version was released with (SHA-256 differs)"
        )
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["embedder"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if about.pop("format") != FORMAT:
            raise ConfigError(f"{path} has an unknown format; this version reads {FORMAT}")
        return Weights(tensors, Description(**about))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        detail = str(error).splitlines()[0]
        raise ConfigError(f"{path} does not hold embedder weights: {detail}") from error


def _stored_as(name: str) -> torch.dtype:
    return torch.float32 if ".running_" in name else torch.float16
