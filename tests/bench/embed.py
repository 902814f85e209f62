"""The embedding modes side by side: speed, and how far each is from fp32.

    make bench-embed ARGS="--images 256 --photos DIR_OR_TAR --json FILE"

Every mode embeds the same pictures, and a copy of each in half the size and at a low quality, in
turns of short rounds. Exit status 1 when a mode's vector is further from fp32's than a cosine of
0.9995, or when more than one in a hundred copies would be told to repeat another picture than by
fp32, or none. Pairs of a copy and a picture that cross the threshold are counted, too. What modes
do to the evaluation's µAP is tests/unit/test_training_evaluate.py's.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.bench.pictures import pictures
from tests.photos import jpeg
from worker.embedder import Embedder
from worker.images import ImageLimits, decode
from worker.vectors import quantize, similarity

NEAR_ENOUGH = 0.9995  # cosine to fp32
MOST_CHANGED = 0.01  # of the copies, those that may have another verdict
BATCHES = (1, 8, 64)
ROUNDS = 5
COPY_QUALITY = 40

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Mode:
    """One way to run the network, against fp32 on the same device's pictures."""

    mode: str
    device: str
    load_seconds: float
    least_cosine: float
    most_moved: float  # greatest change of a similarity between a copy and a picture
    pairs: int
    pairs_crossing: int  # of them, those that come to lie on the threshold's other side
    verdicts: int  # of the copies among the pictures
    verdicts_changed: int  # of them, those that name another picture, or none, or now one
    images_per_second: dict[int, float]  # by batch
    cpu_seconds: dict[int, float]  # an image, by batch


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write what is asked for."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    files = pictures(options.photos, options.images)
    embedders, loading = _load(options.weights)
    size, limits = embedders["fp32"].input_size, ImageLimits()
    pixels = np.stack([decode(data, size, limits) for data in [*files, *map(_copy, files)]])
    vectors = {name: each.embed_pixels(pixels) for name, each in embedders.items()}
    speeds = {name: dict.fromkeys(BATCHES, (0.0, 0.0)) for name in embedders}
    for _ in range(ROUNDS):
        for name, embedder in embedders.items():
            for batch in BATCHES:
                paced = _pace(embedder, pixels, batch, options.seconds / ROUNDS)
                speeds[name][batch] = max(speeds[name][batch], paced)
    modes = [
        Mode(
            mode=embedder.mode,
            device=embedder.device,
            load_seconds=loading[name],
            **_agreement(vectors["fp32"], vectors[name], embedder.threshold),
            images_per_second={batch: fast for batch, (fast, _) in speeds[name].items()},
            cpu_seconds={batch: cpu for batch, (_, cpu) in speeds[name].items()},
        )
        for name, embedder in embedders.items()
    ]
    _print(modes)
    if options.json:
        options.json.write_text(json.dumps({"modes": [asdict(m) for m in modes]}, indent=1) + "\n")
    return 0 if all(map(_near_enough, modes)) else 1


def _near_enough(mode: Mode) -> bool:
    same = mode.verdicts_changed <= MOST_CHANGED * mode.verdicts
    return same and mode.least_cosine >= NEAR_ENOUGH


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.embed", description=__doc__)
    add = parser.add_argument
    add("--images", type=int, default=256, help="pictures, and as many copies (default 256)")
    add("--photos", type=Path, help="folder or tar of JPEGs; default: photos packages ship")
    add("--weights", default="default", help="default, imagenet or a .safetensors file")
    add("--seconds", type=float, default=5.0, help="of measuring each mode and batch")
    add("--threads", type=int, default=1, help="of torch (default 1, as the worker's)")
    add("--json", type=Path, help="write the figures")
    return parser


def _load(weights: str) -> tuple[dict[str, Embedder], dict[str, float]]:
    """Every mode this machine has, fp32 first, and the seconds each took to load."""
    wanted = [("fp32", "cpu"), ("bf16", "cpu"), ("compiled", "cpu")]
    if torch.cuda.is_available():
        wanted += [("fp32", "cuda"), ("bf16", "cuda")]
    embedders, seconds = {}, {}
    for mode, device in wanted:
        begun = time.monotonic()
        embedder = Embedder.load(weights, mode=mode, device=device)
        name = mode if device == "cpu" else f"{mode}, {device}"
        if embedder.mode != mode:
            print(f"{name}: cannot be had here, it would run as {embedder.mode}")
            continue
        embedders[name], seconds[name] = embedder, time.monotonic() - begun
    return embedders, seconds


def _copy(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        half = image.convert("RGB").resize((max(1, image.width // 2), max(1, image.height // 2)))
        return jpeg(half, COPY_QUALITY)


def _pace(embedder: Embedder, pixels: Pixels, batch: int, seconds: float) -> tuple[float, float]:
    """Images a second and processor seconds an image, for at least `seconds`."""
    done, begun, cpu = 0, time.perf_counter(), time.process_time()
    while not done or time.perf_counter() - begun < seconds:
        start = done % max(1, len(pixels) - batch + 1)
        done += len(embedder.embed_pixels(pixels[start : start + batch]))
    spent = time.process_time() - cpu
    return done / (time.perf_counter() - begun), spent / done


def _agreement(
    exact: NDArray[np.float32], other: NDArray[np.float32], threshold: float
) -> dict[str, Any]:
    """How far vectors are from fp32's; the first half are pictures, the second their copies."""
    half = len(exact) // 2
    near, nearly = (
        similarity(quantize(rows[half:]), quantize(rows[:half])) for rows in (exact, other)
    )
    return {
        "least_cosine": float((exact * other).sum(1).min()),
        "most_moved": float(np.abs(near - nearly).max()),
        "pairs": near.size,
        "pairs_crossing": int(((near >= threshold) != (nearly >= threshold)).sum()),
        "verdicts": half,
        "verdicts_changed": int((_earliest(near, threshold) != _earliest(nearly, threshold)).sum()),
    }


def _earliest(near: NDArray[np.float64], threshold: float) -> NDArray[np.intp]:
    """The first picture that reaches the threshold, for each copy; -1: none."""
    reaching = near >= threshold
    return np.where(reaching.any(1), reaching.argmax(1), -1)


def _print(modes: list[Mode]) -> None:
    print(
        "| mode | load s | " + " | ".join(f"{b} at once: images/s, CPU ms" for b in BATCHES), end=""
    )
    print(" | least cosine | most moved | pairs crossing | verdicts changed |")
    print("|---" * (len(BATCHES) + 6) + "|")
    for each in modes:
        cells = [
            f"{each.images_per_second[b]:.0f}, {1e3 * each.cpu_seconds[b]:.2f}" for b in BATCHES
        ]
        print(
            f"| {each.mode}, {each.device} | {each.load_seconds:.1f} | {' | '.join(cells)}", end=""
        )
        print(f" | {each.least_cosine:.6f} | {each.most_moved:.4f}", end="")
        print(f" | {each.pairs_crossing} of {each.pairs}", end="")
        print(f" | {each.verdicts_changed} of {each.verdicts} |")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
