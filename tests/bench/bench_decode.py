"""What decoding costs in a loop, in threads and in killable processes.

    python -m tests.bench.bench_decode [--images FOLDER] [--size 128] [--json FILE]

Photos of two sizes are decoded again and again, the three ways in turn, several rounds, and the
best round counts: other work on the machine only ever makes a round worse. Processor time is of
this process and the decoders together; `own` is the part of this process, which shares its
interpreter with the rest of the worker. Wall time per image depends on free cores.
"""

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from deploy.demo_photos import shipped_photos
from tests.photos import jpeg
from worker.decoding import DecoderPool
from worker.images import ImageLimits, decode

SHAPES = {"500x375": ((500, 375), 90), "1200x900": ((1200, 900), 88)}
LIMITS = ImageLimits()


@dataclass(frozen=True)
class Cost:
    """Milliseconds an image: processor time in all, of this process alone, and on the wall."""

    cpu_ms: float
    own_ms: float
    wall_ms: float


def photos(folder: Path | None, shape: tuple[int, int], quality: int, count: int) -> list[bytes]:
    """JPEGs of one shape, cut at random from a folder's photos or from the shipped ones."""
    source = random.Random(1)
    if folder:
        paths = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
        )
        originals = [Image.open(path).convert("RGB") for path in paths[:count]]
    else:
        originals = [photo.convert("RGB") for _, photo in shipped_photos()]
    return [jpeg(_crop(source.choice(originals), shape, source), quality) for _ in range(count)]


def _crop(photo: Image.Image, shape: tuple[int, int], source: random.Random) -> Image.Image:
    part = source.uniform(0.6, 1.0)
    width, height = int(photo.width * part), int(photo.height * part)
    left = source.randint(0, photo.width - width)
    top = source.randint(0, photo.height - height)
    return photo.crop((left, top, left + width, top + height)).resize(shape)


def own_cpu() -> float:
    """Processor seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def decoders_cpu(pool: DecoderPool) -> float:
    """Processor seconds of a pool's children so far (Linux: fields 14 and 15 of stat)."""
    ticks = 0
    for pid in pool.pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


def measured(run: Callable[[], object], images: int, others: Callable[[], float]) -> Cost:
    """Cost of one run; `others` reads the processor time of other processes."""
    own, other, wall = own_cpu(), others(), time.perf_counter()
    run()
    wall, own, other = time.perf_counter() - wall, own_cpu() - own, others() - other
    return Cost(*(1e3 * seconds / images for seconds in (own + other, own, wall)))


def compare(files: Sequence[bytes], size: int, workers: int, rounds: int) -> dict[str, Cost]:
    """Cheapest round of each way."""
    seen: dict[str, list[Cost]] = {"loop": [], "threads": [], "processes": []}
    with ThreadPoolExecutor(workers) as threads, DecoderPool(workers, size, LIMITS) as pool:

        def one(data: bytes) -> object:
            return decode(data, size, LIMITS)

        def through_pool() -> None:
            for future in [pool.submit(data) for data in files]:
                future.result()

        through_pool()  # starts the children
        for _ in range(rounds):
            seen["loop"].append(measured(lambda: [*map(one, files)], len(files), lambda: 0.0))
            seen["threads"].append(
                measured(lambda: [*threads.map(one, files)], len(files), lambda: 0.0)
            )
            cost = measured(through_pool, len(files), lambda: decoders_cpu(pool))
            seen["processes"].append(cost)
    return {way: min(costs, key=lambda cost: cost.cpu_ms) for way, costs in seen.items()}


def main(argv: list[str]) -> int:
    """Print a table; write JSON when asked."""
    parser = argparse.ArgumentParser(description="decoding in a loop, threads and processes")
    parser.add_argument("--images", type=Path, help="folder of JPEGs; default: the shipped photos")
    parser.add_argument("--count", type=int, default=400, help="images a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="threads, and processes")
    parser.add_argument("--size", type=int, default=128, help="side of the pixels made")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    results: dict[str, object] = {}
    print(f"{'photos':10}{'kB':>5}  {'way':10}{'cpu ms':>8}{'own ms':>8}{'wall ms':>8}")
    for name, (shape, quality) in SHAPES.items():
        files = photos(options.images, shape, quality, options.count)
        kilobytes = sum(map(len, files)) / len(files) / 1000
        costs = compare(files, options.size, options.workers, options.rounds)
        results[name] = {"kilobytes": kilobytes} | {way: asdict(c) for way, c in costs.items()}
        for way, cost in costs.items():
            figures = f"{cost.cpu_ms:8.2f}{cost.own_ms:8.2f}{cost.wall_ms:8.2f}"
            print(f"{name:10}{kilobytes:5.0f}  {way:10}{figures}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
