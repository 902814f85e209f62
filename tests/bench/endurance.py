"""How long a worker takes to be ready, and whether its memory stays what it is.

    make bench-endurance ARGS="--events 200000 --plot FILE.svg --json FILE"

Starts a worker with nothing compiled, and again with what that one left ("warm"). Then sends it
small JPEGs in rounds, three tenths of them exact copies, every tenth round in a namespace of its
own, and looks at the resident memory of worker and decoders after each. Small pictures, because
there are many: what grows with the number of events shows, what a large picture takes does not.
"""

import argparse
import io
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.bench.pictures import pictures
from tests.bench.processes import usage
from tests.bench.rig import Rig, add_broker, inline_events, pick_broker, serving
from tests.photos import jpeg
from tests.stream.harness import Event

ROUND = 2_000
ROUNDS_PER_NAMESPACE = 10
SMALL = (160, 120)
QUALITY = 60
COPIES = 0.3
SETTLED = 0.1  # of the run, after which memory is to stay


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write what is asked for."""
    options = _parser().parse_args(argv)
    broker = pick_broker(options.broker)
    with tempfile.TemporaryDirectory(prefix="dedup-bench-") as directory:
        folder = Path(directory)
        settings = {"compiled_folder": folder / "compiled", "embed_mode": options.embed_mode}
        with serving(broker) as servers:
            with Rig(folder, servers, 1, **settings) as rig:
                cold = rig.ready_seconds
            with Rig(folder, servers, 1, **settings) as rig:
                warm = rig.ready_seconds
                print(f"ready after {cold:.1f} s cold, {warm:.1f} s warm", flush=True)
                memory = endure(rig, options.events)
    settled = memory[int(SETTLED * len(memory)) :]
    found: dict[str, Any] = {
        "broker": broker,
        "ready_seconds_cold": cold,
        "ready_seconds_warm": warm,
        "events": ROUND * len(memory),
        "rss_bytes": memory,
        "peak_rss_bytes": max(memory),
        "settled_low_to_high": max(settled) / min(settled),
    }
    apart = 100 * (found["settled_low_to_high"] - 1)
    low, high = min(settled) / 1e6, max(settled) / 1e6
    print(f"after the first {SETTLED:.0%}: {low:.0f} to {high:.0f} MB, {apart:.1f} % apart")
    if options.plot:
        plot(memory, options.plot)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def endure(rig: Rig, events: int) -> list[int]:
    """Resident bytes of worker and decoders after each round of ROUND events."""
    small = [small_jpeg(data) for data in pictures(None, ROUND)]
    memory = []
    for number in range(max(1, round(events / ROUND))):
        drained = rig.drain(events_of(number, small))
        memory.append(usage(rig.pids()).rss_bytes)
        print(
            f"{ROUND * len(memory):,} events: {memory[-1] / 1e6:.0f} MB, "
            f"{drained.images_per_second:.0f} images/s",
            flush=True,
        )
    return memory


def small_jpeg(data: bytes) -> bytes:
    """The same picture, small."""
    with Image.open(io.BytesIO(data)) as image:
        return jpeg(image.resize(SMALL), QUALITY)


def events_of(number: int, small: Sequence[bytes]) -> list[Event]:
    """A round: every picture under other bytes than before, or as an exact copy within the round.

    What follows the end of a JPEG is ignored by decoders, and makes it another file.
    """
    chance = random.Random(number)
    files = [data + chance.randbytes(12) for data in small]
    for at in range(1, len(files)):
        if chance.random() < COPIES:
            files[at] = files[at - 1]
    namespace = f"namespace-{number // ROUNDS_PER_NAMESPACE}"
    return inline_events(namespace, files, f"round-{number}")


def plot(memory: Sequence[int], path: Path) -> None:
    """Draw memory over events."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    axes.plot([ROUND * (at + 1) / 1e3 for at in range(len(memory))], [m / 1e6 for m in memory])
    axes.set(xlabel="thousand events", ylabel="resident MB, worker and decoders")
    axes.set_ylim(0, 1.1 * max(memory) / 1e6)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.endurance", description=__doc__)
    add = parser.add_argument
    add("--events", type=int, default=200_000, help="events in all (default 200000)")
    add("--embed-mode", default="auto", help="the worker's")
    add_broker(parser)
    add("--plot", type=Path, help="draw memory over events (.svg or .png)")
    add("--json", type=Path, help="write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
