"""What the worker is measured against, over the same pictures on the same cores.

    ideal     decode and embed as the worker does, in batches, in one process a core: no Kafka, no
              Redis, nothing else. What is left to gain is the distance to this.
    fp32 alone
              the inner loop of tests/bench/straightforward.py, without its Kafka and its Redis
    pdq       pdqhash over whole pictures, in one process a core
    phash     imagehash's pHash, likewise

Every process sets itself up and warms up before any begins; the slowest one's end counts.
"""

import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np

BATCH = 32
WARM_UP = BATCH + 1
PATIENCE_SECONDS = 600.0  # for the others to be ready: the network may be compiled meanwhile

Run = Callable[[Sequence[bytes]], None]


@dataclass(frozen=True)
class Pace:
    """What one rival needs."""

    images_per_second: float
    cpu_seconds: float  # an image


def race(rival: str, files: Sequence[bytes], processes: int, embed_mode: str) -> Pace:
    """Let `processes` of one rival share the pictures; "fp32 alone" always runs as one."""
    processes = 1 if rival == "fp32 alone" else processes
    context = get_context("spawn")
    barrier, answers = context.Barrier(processes), context.SimpleQueue()
    lanes = [
        context.Process(
            target=_lane,
            args=(rival, files[start::processes], (processes, embed_mode), barrier, answers),
        )
        for start in range(processes)
    ]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
        if lane.exitcode:
            raise RuntimeError(f"{rival} ended with status {lane.exitcode}")
    begun, ended, cpu = zip(*(answers.get() for _ in lanes), strict=True)
    return Pace(len(files) / (max(ended) - min(begun)), sum(cpu) / len(files))


def _lane(
    rival: str,
    files: Sequence[bytes],
    conditions: tuple[int, str],
    barrier: Barrier,
    answers: "SimpleQueue[Any]",
) -> None:
    run = _SETUPS[rival](*conditions)
    run(files[:WARM_UP])
    barrier.wait(PATIENCE_SECONDS)
    begun, cpu = time.monotonic(), time.process_time()
    run(files)
    answers.put((begun, time.monotonic(), time.process_time() - cpu))


def _ideal(processes: int, embed_mode: str) -> Run:
    import torch

    from worker.embedder import Embedder
    from worker.images import ImageLimits, decode

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    embedder, limits = Embedder.load(mode=embed_mode, device="cpu"), ImageLimits()

    def run(files: Sequence[bytes]) -> None:
        for start in range(0, len(files), BATCH):
            batch = [
                decode(data, embedder.input_size, limits) for data in files[start : start + BATCH]
            ]
            embedder.embed_pixels(np.stack(batch))

    return run


def _fp32(_processes: int, _embed_mode: str) -> Run:
    from tests.bench.straightforward import load

    embed = load()

    def run(files: Sequence[bytes]) -> None:
        for data in files:
            embed(data)

    return run


def _pdq(_processes: int, _embed_mode: str) -> Run:
    import pdqhash
    from PIL import Image

    def run(files: Sequence[bytes]) -> None:
        for data in files:
            pdqhash.compute(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))

    return run


def _phash(_processes: int, _embed_mode: str) -> Run:
    import imagehash
    from PIL import Image

    def run(files: Sequence[bytes]) -> None:
        for data in files:
            imagehash.phash(Image.open(io.BytesIO(data)))

    return run


_SETUPS: dict[str, Callable[[int, str], Run]] = {
    "ideal": _ideal,
    "fp32 alone": _fp32,
    "pdq": _pdq,
    "phash": _phash,
}
