"""The whole trip against the clock, beside what it could be at best and what is usual.

    make bench ARGS="--images 1500 --photos DIR_OR_TAR --json FILE --plot FILE.svg"

Fills a topic with JPEGs of about 100 kB (inline, then as file:// events), lets a worker drain it,
sends the same bytes again as exact copies, measures latency under load, and adds workers. In the
same run, on the same cores: decoding and embedding alone ("ideal"), the worker one writes first
("fp32"), PDQ and pHash. Caveats: tests/bench/README.md.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import latency
from tests.bench.pictures import pictures
from tests.bench.report import STEADY, Results, Round, plot, print_results, summary
from tests.bench.rig import (
    PARTITIONS,
    Drained,
    Rig,
    Servers,
    add_broker,
    file_events,
    inline_events,
    pick_broker,
    serving,
)
from tests.bench.rivals import Pace, race
from tests.stream.harness import by_uri, inline

WARM_UP = 64
RIVALS = ("ideal", "fp32 alone", "pdq", "phash")
STRAIGHTFORWARD = ("-m", "tests.bench.straightforward")
ROUNDS = 5  # of the worker and its rivals, in turns: whatever disturbs a machine does not last
SCALING_ROUNDS = 5  # of numbers of workers, likewise, up and down in turns
SCALING_NAMESPACES = 3  # drained at once, each with all pictures: a topic that is long for many
STEADY_ROUNDS = 3  # of the latency at the load at which it is stated, likewise
SLOW_IMAGES = 200  # of the rivals that take longer, fewer do
LOADS = (0.1, 0.3, 0.5, STEADY, 0.85, 0.95)  # of the measured maximum


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write what is asked for."""
    options = _parser().parse_args(argv)
    files = pictures(options.photos, options.images)
    size = sum(map(len, files)) / len(files)
    print(f"{len(files)} JPEGs of {size / 1000:.0f} kB, {os.cpu_count()} cores", flush=True)
    results, broker = Results(), pick_broker(options.broker)
    with tempfile.TemporaryDirectory(prefix="dedup-bench-") as directory:
        bench = Bench(Path(directory), files, broker, options.embed_mode, results)
        bench.one_worker(options.decode_processes, options.seconds)
        for number in range(SCALING_ROUNDS):
            counts = sorted(options.workers, reverse=number % 2 == 1)
            drained = {count: bench.scaling(count, number) for count in counts}
            results.scaling.append(dict(sorted(drained.items())))
    print_results(results)
    if options.plot:
        plot(results.latency(), options.plot)
    if options.json:
        options.json.write_text(json.dumps({"broker": broker, **summary(results)}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pipeline", description=__doc__)
    add = parser.add_argument
    add("--images", type=int, default=1500, help="pictures in the topic (default 1500)")
    add("--photos", type=Path, help="folder or tar of JPEGs; default: photos packages ship")
    add("--seconds", type=float, default=15.0, help="of each latency measurement")
    add("--embed-mode", default="auto", help="the workers', and the ideal loop's")
    add("--decode-processes", type=int, default=os.cpu_count() or 1, help="of the one worker")
    add("--workers", type=_counts, default=(1, 2, 4), help="numbers to compare: 1,2,4, or none")
    add_broker(parser)
    add("--plot", type=Path, help="draw latency against load (.svg or .png)")
    add("--json", type=Path, help="write the summary")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    """Numbers of workers; each must divide the partitions, or one would have more than others."""
    counts = tuple(int(part) for part in text.split(",") if part.strip() and part != "none")
    if any(count < 1 or PARTITIONS % count for count in counts):
        raise argparse.ArgumentTypeError(f"each must divide {PARTITIONS}")
    return counts


@dataclass
class Bench:
    """The measurements, in the order they are made."""

    directory: Path
    files: list[bytes]
    broker: str
    embed_mode: str
    results: Results

    def rivals(self, servers: Servers, rig: Rig, number: int) -> dict[str, Pace]:
        """Measure all of them, for the n-th time; the ideal first, right after the worker."""
        found = {}
        for name in RIVALS:
            files = self.files if name == "ideal" else self.files[:SLOW_IMAGES]
            found[name] = race(name, files, os.cpu_count() or 1, self.embed_mode)
        found["fp32"] = self.straightforward(servers, rig, number)
        for name, pace in found.items():
            print(f"{name}: {pace.images_per_second:.0f} images/s", flush=True)
        return found

    def straightforward(self, servers: Servers, rig: Rig, number: int) -> Pace:
        """Let the worker one writes first drain, on the same servers, for the n-th time.

        The one measured stands still meanwhile.
        """
        files = self.files[:SLOW_IMAGES]
        with Rig(self.directory, servers, 1, command=STRAIGHTFORWARD) as plain:
            plain.drain(inline_events(f"plain-warm-up-{number}", files[:WARM_UP]))
            with rig.stopped():
                drained = plain.drain(inline_events(f"plain-{number}", files))
        return Pace(drained.images_per_second, drained.worker_cpu)

    def one_worker(self, decode_processes: int, seconds: float) -> None:
        """Throughput, exact copies, file:// events and latency of one worker."""
        with serving(self.broker) as servers, self._rig(servers, 1, decode_processes) as rig:
            found = self.results
            for number in range(ROUNDS):
                drained = self._drain(rig, f"inline-{number}", "image")
                found.rounds.append(Round(drained, self.rivals(servers, rig, number)))
            found.exact = self._drain(rig, "inline-0", "copy")
            folder = self.directory / "files"
            folder.mkdir()
            found.files = rig.drain(file_events("files", self.files, folder))
            uris = [path.as_uri() for path in sorted(folder.iterdir())]
            self._latencies(rig, uris, seconds)
            found.redelivered += rig.redelivered()

    def _latencies(self, rig: Rig, uris: list[str], seconds: float) -> None:
        """Of both kinds of events at all loads, each measurement so many seconds long."""
        kinds = (("inline", self.files, inline), ("file://", uris, by_uri))
        top = self.results.new.images_per_second
        for load in (1 / top, *LOADS):
            rate = load * top
            for number in range(STEADY_ROUNDS if load == STEADY else 1):
                for kind, each, make in kinds:
                    count = max(latency.LEAST_EVENTS, round(rate * seconds))
                    run = f"{kind[:4]}-{rate:.0f}-{number}"
                    measured = latency.measure(rig, latency.stream(run, each, make, count), rate)
                    loads = self.results.latencies.setdefault(kind, {})
                    loads.setdefault(rate, []).append(measured)
                    half = f"p50 {1e3 * measured.p50_seconds:.0f} ms"
                    print(f"{kind}, {rate:.0f}/s: {half}", flush=True)

    def scaling(self, workers: int, number: int) -> Drained:
        """Throughput and cost of several workers, each decoding in one process, for the n-th time.

        What counts is the second of two long drains: what has just begun is slower, Kafka's JVM
        above all, and each worker while it fills its memory for the first time; and so is what has
        little left to do, as four workers would have most of the time where one still has enough.
        """
        with serving(self.broker) as servers, self._rig(servers, workers, 1) as rig:
            for drain in ("before", "scaling"):
                runs = [f"{drain}-{number}-{at}" for at in range(SCALING_NAMESPACES)]
                events = [event for run in runs for event in inline_events(run, self.files)]
                drained = rig.drain(events)
            self.results.redelivered += rig.redelivered()
        print(f"{workers} workers: {drained.images_per_second:.0f} images/s", flush=True)
        return drained

    def _rig(self, servers: Servers, workers: int, decode_processes: int) -> Rig:
        return Rig(
            self.directory,
            servers,
            workers,
            embed_mode=self.embed_mode,
            decode_processes=decode_processes,
        )

    def _drain(self, rig: Rig, run: str, ids: str) -> Drained:
        rig.drain(inline_events(f"warm-up-{run}", self.files[:WARM_UP], ids))
        drained = rig.drain(inline_events(run, self.files, ids))
        print(f"{run}, {ids}: {drained.images_per_second:.0f} images/s", flush=True)
        return drained


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
