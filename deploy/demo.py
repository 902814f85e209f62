"""`python -m deploy.demo`: the whole trip on this machine, start to finish, then a report.

Starts Tansu and Valkey on free loopback ports and two workers, publishes photos and edited copies
of them (or a folder of one's own), follows the verdicts, prints what came of it, writes
`demo-report.html`, and leaves no process behind. Exit status: 0 when every event was answered,
1 when not, 2 for a wrong argument, 130 when interrupted.
"""

import argparse
import http.client
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.demo_photos import Sample, write_samples
from deploy.demo_report import Report, print_table, write_report
from deploy.demo_results import Collector, Outcome
from deploy.local import HOST, LocalKafka, LocalRedis
from deploy.process import ChildFailedError, ChildProcess, Deadline, free_port
from producer.sources import count_folder
from worker.arguments import check_file, writing
from worker.errors import ConfigError

IMAGES, VERDICTS, DEAD_LETTERS = "images", "images.verdicts", "images.dead-letter"
PARTITIONS = 4
WORKERS = 2
READY_SECONDS = 300.0
IDLE_SECONDS = 120.0
STOP_SECONDS = 30.0
# Tansu holds the first join of a group for half of it.
SESSION_TIMEOUT_SECONDS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    folder: Path | None = options.images and Path(options.images).expanduser().absolute()
    if problem := (folder and _folder_problem(folder)) or _report_problem(options.report):
        console.print(f"demo: {problem}", markup=False, soft_wrap=True)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="dedup-demo-") as directory, ExitStack() as stack:
            demo = Demo(console, Path(directory), stack)
            report = demo.own_folder(folder) if folder else demo.shipped_photos()
            with writing(options.report):
                write_report(report, options.report)
    except (ChildFailedError, ConfigError) as error:
        console.print(f"demo: {error}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("demo: interrupted; everything it started is stopped")
        return 130
    print_table(report, console)
    written = escape(str(options.report))
    console.print(f"\nPairs side by side: [bold]{written}[/bold]", soft_wrap=True)
    if not report.results.complete:
        console.print(f"[red]{report.results.missing} events got no answer")
    return 1 if report.said or not report.results.complete else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description=__doc__)
    parser.add_argument("--images", help="a folder of one's own instead of the shipped photos")
    parser.add_argument("--report", type=Path, default=Path("demo-report.html"))
    return parser


def _folder_problem(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}"
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"{folder}: not allowed to read it"
    if "," in str(folder):  # the worker's list of roots is separated by commas
        return f"{folder}: a path with a comma cannot be allowed to the workers"
    if count_folder(folder) == 0:
        return f"{folder}: there are no files in it"
    return ""


def _report_problem(report: Path) -> str:
    try:
        check_file(str(report))
    except ConfigError as error:
        return str(error)
    return ""


class Demo:
    """One run; `stack` ends whatever was started, in reverse order."""

    def __init__(self, console: Console, directory: Path, stack: ExitStack) -> None:
        self._console = console
        self._directory = directory
        self._stack = stack
        self._workers: dict[int, ChildProcess] = {}  # by the port of their /readyz
        self._said = ""

    def shipped_photos(self) -> Report:
        """Photos first; when all are decided, their copies mixed with new photos."""
        first, second = self._directory / "photos", self._directory / "stream"
        first.mkdir()
        second.mkdir()
        self._start_servers()
        self._start_workers()
        truth = {_id(sample): sample for sample in write_samples(first, second)}
        self._wait_until_ready()
        with closing(self._collector()) as collector, self._progress(len(truth)) as progress:
            for folder in (first, second):
                prefix = ("--inline", "--key-prefix", f"{folder.name}/")
                if not self._publish(folder, prefix, collector, progress):
                    break
        paths = {image_id: sample.path for image_id, sample in truth.items()}
        return self._report(collector, paths, truth)

    def own_folder(self, folder: Path) -> Report:
        """Everything in a folder, unedited; the workers read the files themselves."""
        self._start_servers()
        self._start_workers("--fetch-schemes=file", f"--fetch-roots={folder}")
        self._wait_until_ready()
        total = count_folder(folder)
        with closing(self._collector()) as collector, self._progress(total) as progress:
            self._publish(folder, (), collector, progress)
        paths = {image_id: folder / image_id for image_id in collector.results.outcomes}
        return self._report(collector, paths, None)

    def _report(
        self, collector: Collector, paths: dict[str, Path], truth: dict[str, Sample] | None
    ) -> Report:
        return Report(collector.results, paths, truth, self._said)

    def _start_servers(self) -> None:
        self._redis = self._stack.enter_context(LocalRedis())
        self._kafka = self._stack.enter_context(LocalKafka())
        topics = (IMAGES, VERDICTS, DEAD_LETTERS)
        self._kafka.create_topics(dict.fromkeys(topics, PARTITIONS))
        self._console.print(
            f"Tansu (Kafka) on {self._kafka.bootstrap}, Valkey (Redis) on {HOST}:{self._redis.port}"
        )

    def _start_workers(self, *flags: str) -> None:
        for number in range(1, WORKERS + 1):
            port = free_port()
            worker = self._python(
                f"worker-{number}",
                *("-m", "worker", *self._kafka_flags(), "--redis-url", self._redis.url),
                *("--verdict-topic", VERDICTS, "--dead-letter-topic", DEAD_LETTERS),
                *("--session-timeout-seconds", str(SESSION_TIMEOUT_SECONDS)),
                *("--http-host", HOST, "--http-port", str(port), "--decode-processes", "1"),
                *("--embed-mode", "bf16"),  # compiling would take longer than the demo
                *("--log-format", "text"),
                *flags,
            )
            self._workers[port] = worker

    def _wait_until_ready(self) -> None:
        deadline = Deadline(READY_SECONDS)
        with self._console.status(f"{WORKERS} workers load the network and join the group …"):
            while not all(map(_ready, self._workers)):
                self._check_workers()
                if deadline.passed:
                    slow = next(w for port, w in self._workers.items() if not _ready(port))
                    raise slow.failure(f"a worker was not ready in {READY_SECONDS:g} s")
                time.sleep(0.1)

    def _publish(
        self, folder: Path, flags: Sequence[str], collector: Collector, progress: Progress
    ) -> bool:
        """Publish a folder and follow until all is decided; False when nothing moves any more."""
        producer = self._python(
            f"producer-{folder.name}", "-m", "producer", str(folder), *self._kafka_flags(), *flags
        )
        results, before = collector.results, collector.results.events
        deadline = Deadline(IDLE_SECONDS)
        while True:
            if new := collector.poll():
                deadline = Deadline(IDLE_SECONDS)
                progress.update(
                    progress.task_ids[0],
                    completed=len(results.outcomes),
                    description=_line(new[-1]),
                )
            self._check_workers()
            if not producer.running:
                results.events = before + _acknowledged(producer)
                if results.complete or deadline.passed:
                    break
        if producer.exit_status != 0:
            self._said += f"the producer said:\n{producer.log_tail()}"
        if not results.complete:
            for worker in self._workers.values():
                self._said += f"a worker said last:\n{worker.log_tail()}"
        return results.complete

    def _python(self, name: str, *arguments: str) -> ChildProcess:
        log = self._directory / f"{name}.log"
        child = ChildProcess([sys.executable, *arguments], log)
        self._stack.callback(child.stop, STOP_SECONDS)
        return child

    def _kafka_flags(self) -> tuple[str, ...]:
        return ("--bootstrap-servers", self._kafka.bootstrap, "--topic", IMAGES)

    def _check_workers(self) -> None:
        for worker in self._workers.values():
            if not worker.running:
                raise worker.failure(f"a worker ended with status {worker.exit_status}")

    def _collector(self) -> Collector:
        return Collector(self._kafka.bootstrap, VERDICTS, DEAD_LETTERS)

    def _progress(self, total: int) -> Progress:
        progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
        )
        progress.add_task("publishing …", total=total)
        return progress


def _acknowledged(producer: ChildProcess) -> int:
    """How many events a producer that has ended says Kafka has."""
    # Not the topic's end offsets: Tansu counts a batch as one record there.
    said = re.search(r"^(\d+) of \d+ events acknowledged", producer.log_tail(), re.MULTILINE)
    if said is None:
        raise producer.failure(f"the producer ended with status {producer.exit_status}")
    return int(said[1])


def _id(sample: Sample) -> str:
    return f"{sample.path.parent.name}/{sample.path.name}"


def _line(outcome: Outcome) -> str:
    """What the progress bar says of the latest outcome."""
    name = Path(outcome.image_id).name
    if outcome.reason:
        return f"{name}: {outcome.reason}"
    if outcome.duplicate_of is None:
        return f"{name}: unique"
    return f"{name}: {outcome.verdict} of {Path(outcome.duplicate_of).name}"


def _ready(port: int) -> bool:
    """Whether the worker that serves `port` says it is ready."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
