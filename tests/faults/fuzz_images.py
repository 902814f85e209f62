"""Break image files at random and see that the decoder survives.

    python -m tests.faults.fuzz_images --mutations 100000

Every mutant goes through `DecoderPool`, as in production. Allowed ends are pixels or an
EventError for bad bytes. Not allowed, and reported with the file kept: a child that crashed,
hung or raised what `worker.images` does not list. Memory of the children is watched.
The same seed makes the same mutants.
"""

import argparse
import random
import struct
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.fuzz_corpus import samples
from worker.decoder_process import Pixels
from worker.decoding import DecoderPool
from worker.errors import EventError
from worker.images import ImageLimits

SIZE = 32
LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000)
DEADLINE_SECONDS = 5.0
MEMORY_BYTES = 256 << 20
WINDOW = 64  # mutants in flight
# What the pool says of children, not of images: each is a finding.
FINDINGS = ("the decoder died", "decoding took longer")

Mutation = Callable[[random.Random, bytearray], None]
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutant(source: random.Random) -> tuple[str, bytes]:
    """A valid file's name and what became of it after one to four mutations."""
    name = source.choice(NAMES)
    data = bytearray(samples()[name])
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        source.choice(MUTATIONS)(source, data)
        if not data:
            break
    if data.startswith(b"\x89PNG") and source.random() < 0.8:
        mend_checksums(data)  # else most mutants end at the first check
    return name, bytes(data)


def place(source: random.Random, data: bytearray) -> int:
    """Somewhere in the file, every second time among its first 128 bytes."""
    return source.randrange(min(len(data), source.choice((128, len(data)))))


def flip_bits(source: random.Random, data: bytearray) -> None:
    """One to eight bits."""
    for _ in range(source.randint(1, 8)):
        data[place(source, data)] ^= 1 << source.randrange(8)


def set_bytes(source: random.Random, data: bytearray) -> None:
    """A short run of random bytes."""
    start = place(source, data)
    for at in range(start, min(start + source.randint(1, 8), len(data))):
        data[at] = source.randrange(256)


def set_number(source: random.Random, data: bytearray) -> None:
    """A number at the edge of its type, either byte order."""
    start = place(source, data)
    width, order = source.choice((1, 2, 4)), source.choice(("little", "big"))
    number = source.choice(EDGES) & ((1 << 8 * width) - 1)
    chunk = number.to_bytes(width, "big" if order == "big" else "little")
    data[start : start + width] = chunk[: len(data) - start]


def truncate(source: random.Random, data: bytearray) -> None:
    """Cut the end off."""
    del data[source.randrange(len(data)) :]


def remove(source: random.Random, data: bytearray) -> None:
    """Take a piece out."""
    start = place(source, data)
    del data[start : start + source.randint(1, 64)]


def repeat(source: random.Random, data: bytearray) -> None:
    """Insert a piece again, up to fifty times."""
    start = place(source, data)
    piece = bytes(data[start : start + source.randint(1, 64)])
    data[start:start] = piece * source.randint(1, 50)


def splice(source: random.Random, data: bytearray) -> None:
    """Overwrite a piece with one of another file."""
    other = samples()[source.choice(NAMES)]
    start, taken = place(source, data), source.randrange(len(other))
    length = source.randint(1, 256)
    data[start : start + length] = other[taken : taken + length]


def mend_checksums(data: bytearray) -> None:
    """Make the checksums of whole PNG chunks right again."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4


NAMES = sorted(samples())
MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, set_bytes, set_number, truncate, remove, repeat, splice,
)  # fmt: skip


@dataclass
class Report:
    """What a run saw. `findings` holds the mutants that broke a rule."""

    ends: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, str, bytes]] = field(default_factory=list)
    peak_bytes: int = 0

    def take(self, name: str, data: bytes, future: Future[Pixels]) -> None:
        """Count how one mutant ended; anything but pixels or EventError raises here."""
        error = future.exception()
        if error is None:
            self.ends["pixels"] += 1
            return
        if not isinstance(error, EventError):
            raise error
        self.ends[error.reason.value] += 1
        if error.detail.startswith(FINDINGS):
            self.findings.append((name, error.detail, data))

    def weigh(self, pool: DecoderPool) -> None:
        """Note the largest child."""
        for pid in pool.pids():
            try:
                held = psutil.Process(pid).memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self.peak_bytes = max(self.peak_bytes, held)


def fuzz(mutations: int, seed: int, processes: int = 1) -> Report:
    """Run `mutations` mutants through a pool."""
    source, report = random.Random(seed), Report()
    flying: deque[tuple[str, bytes, Future[Pixels]]] = deque()
    with DecoderPool(processes, SIZE, LIMITS, DEADLINE_SECONDS, MEMORY_BYTES) as pool:
        for number in range(mutations):
            name, data = mutant(source)
            flying.append((name, data, pool.submit(data)))
            if len(flying) >= WINDOW:
                report.take(*flying.popleft())
            if number % 100 == 0:
                report.weigh(pool)
        while flying:
            report.take(*flying.popleft())
    return report


def main(argv: list[str]) -> int:
    """Print what happened; 1 when a mutant broke a rule."""
    parser = argparse.ArgumentParser(description="fuzz the image decoder")
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the mutants that broke a rule")
    options = parser.parse_args(argv)
    begun = time.monotonic()
    report = fuzz(options.mutations, options.seed, options.processes)
    print(f"{options.mutations} mutants, seed {options.seed}, {time.monotonic() - begun:.0f} s")
    print(", ".join(f"{end} {count}" for end, count in report.ends.most_common()))
    print(f"largest child {report.peak_bytes / 2**20:.0f} MiB; findings {len(report.findings)}")
    for number, (name, detail, data) in enumerate(report.findings):
        print(f"  {name}: {detail}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}-{name}").write_bytes(data)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
