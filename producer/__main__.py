"""`python -m producer SOURCE`: publish the images of a folder, a CSV of links or JSON lines.

Owns the command line, the pace, the progress bar and the exit status. Run `--help` for the rest.

    python -m producer ~/Pictures --inline
    python -m producer products.csv --column image1 --column image2 --rate 50
    zcat events.jsonl.gz | python -m producer -
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from producer.events import ENVELOPE_BYTES, EventMaker, Outgoing
from producer.inline import link_fetcher, make_ahead
from producer.publisher import Publisher, Tally
from producer.sources import (
    Item,
    Rejected,
    SourceError,
    count_folder,
    read_csv,
    read_folder,
    read_json_lines,
)
from worker.arguments import Parser, share
from worker.connections import KafkaSettings
from worker.errors import ConfigError, InfrastructureError
from worker.flags import add_flags, from_flags
from worker.messages import NAMESPACE, Op

Made = Outgoing | Rejected

OK, INCOMPLETE, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
SHOWN_PROBLEMS = 20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}

EPILOG = """\
image ids: a folder gives each file's path below it, a CSV the hash of the link, JSON lines their
own `image_id` (or the hash of `uri`); so publishing again changes nothing.

exit status: 0 everything was acknowledged, 1 something was not or a row was bad,
2 the source or Kafka cannot be used, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Publish a source; returns the exit status described in `--help`."""
    options = _parser().parse_args(arguments)
    errors = Console(stderr=True)
    try:
        settings = from_flags(KafkaSettings, options)
        with ExitStack() as stack:
            items, total = _open_source(options, stack)
            made = _make_all(items, options, settings, stack)
            run = Run(errors, options.rate)
            with _sigterm_interrupts(), _progress(errors, total) as progress:
                run.publish(made, settings, progress)
            return run.summarise(settings, options.source)
    except (ConfigError, InfrastructureError, SourceError, OSError) as error:
        errors.print(f"producer: {error}", markup=False, highlight=False, soft_wrap=True)
        return UNUSABLE
    except KeyboardInterrupt:  # a second time, while waiting for acknowledgements
        return INTERRUPTED


class Run:
    """One publication: reads, paces, reports what is wrong, and remembers what came of it."""

    def __init__(self, errors: Console, rate: float | None) -> None:
        self.tally = Tally()
        self.rejected = 0
        self.stopped = ""
        self.seconds = 0.0
        self._errors = errors
        self._rate = rate

    def publish(self, made: Iterator[Made], settings: KafkaSettings, progress: Progress) -> None:
        """Send every item; stops early when Kafka takes nothing any more, or at Ctrl-C."""
        started = time.monotonic()
        with Publisher(settings) as publisher:
            self.tally = publisher.tally
            try:
                self._send_all(made, publisher, progress)
            except KeyboardInterrupt:
                self.stopped = "interrupted"
            except InfrastructureError as error:
                self.stopped = str(error)
        for failure in self.tally.failures:
            self._say(failure)
        self.seconds = time.monotonic() - started

    def summarise(self, settings: KafkaSettings, source: str) -> int:
        """Print what came of it to standard output; returns the exit status."""
        tally = self.tally
        pace = f"{tally.acknowledged / self.seconds:.0f}/s" if self.seconds else "–"
        print(
            f"{tally.acknowledged} of {tally.sent} events acknowledged by topic {settings.topic}"
            f" ({tally.bytes / 1e6:.1f} MB, {self.seconds:.1f} s, {pace}),"
            f" {tally.failed} failed, {self.rejected} not sent"
        )
        if self.stopped:
            print(f"stopped before the end of the source: {self.stopped}")
        elif not tally.sent and not self.rejected:
            self._say(f"nothing to send in {'standard input' if source == '-' else source}")
        if self.stopped == "interrupted":
            return INTERRUPTED
        return INCOMPLETE if self.stopped or tally.failed or self.rejected else OK

    def _send_all(self, made: Iterator[Made], publisher: Publisher, progress: Progress) -> None:
        task = progress.task_ids[0]
        due = time.monotonic()
        for outgoing in made:
            progress.advance(task)
            if isinstance(outgoing, Rejected):
                self._reject(outgoing)
                continue
            if self._rate is not None:
                time.sleep(max(0.0, due - time.monotonic()))
                due = max(due, time.monotonic() - 1) + 1 / self._rate
            publisher.send(outgoing)
            if publisher.unreachable:
                raise InfrastructureError("Kafka did not acknowledge in time")

    def _reject(self, rejected: Rejected) -> None:
        self.rejected += 1
        if self.rejected <= SHOWN_PROBLEMS:
            self._say(f"{rejected.place}: {rejected.reason}")
        elif self.rejected == SHOWN_PROBLEMS + 1:
            self._say("further problems are only counted")

    def _say(self, text: str) -> None:
        printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        self._errors.print(escape(printable), style="yellow", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m producer",
        description="Publish image events to Kafka.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", help="a folder (with all below it), a .csv or .tsv of links, JSON lines, or -"
    )
    parser.add_argument(
        "--column", action="append", default=[], help="a column of links of the CSV; repeatable"
    )
    parser.add_argument(
        "--inline",
        action="store_true",
        help="send the bytes, not the uri; links are fetched, from public addresses only",
    )
    parser.add_argument(
        "--rate", type=share(0, math.inf), help="most events a second (default: no limit)"
    )
    parser.add_argument("--namespace", type=_namespace, help="for events that name none")
    parser.add_argument("--op", choices=[op.value for op in Op], help="for events that name none")
    parser.add_argument("--key-prefix", default="", help="put before every image id")
    add_flags(parser, KafkaSettings)
    return parser


def _namespace(text: str) -> str:
    if not NAMESPACE.fullmatch(text):
        raise argparse.ArgumentTypeError("wants 1 to 128 letters, digits, '.', '_' or '-'")
    return text


def _open_source(
    options: argparse.Namespace, stack: ExitStack
) -> tuple[Iterator[Item], int | None]:
    """The items of the source, and how many there are where that is cheap to know.

    Raises SourceError for a source that cannot be read, or not with these options.
    """
    path = Path(options.source)
    suffix = path.suffix.lower()
    folder = path.is_dir()
    if options.column and (folder or suffix not in CSV_DELIMITERS):
        known = " or ".join(CSV_DELIMITERS)
        raise SourceError(f"--column is for a file ending in {known}, not for {options.source}")
    if options.source == "-":
        return read_json_lines(sys.stdin.buffer), None
    if folder:
        return read_folder(path), count_folder(path)
    if suffix in CSV_DELIMITERS:
        text = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
        return read_csv(stack.enter_context(text), options.column, CSV_DELIMITERS[suffix]), None
    if suffix in JSON_SUFFIXES:
        return read_json_lines(stack.enter_context(path.open("rb"))), None
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    known = ", ".join([*CSV_DELIMITERS, *JSON_SUFFIXES])
    raise SourceError(f"{path}: neither a folder nor a file ending in {known}")


def _make_all(
    items: Iterator[Item], options: argparse.Namespace, settings: KafkaSettings, stack: ExitStack
) -> Iterator[Made]:
    """The records of all items, made while they are asked for."""
    links = options.inline and not Path(options.source).is_dir()
    room = settings.max_message_bytes - ENVELOPE_BYTES
    maker = EventMaker(
        max_message_bytes=settings.max_message_bytes,
        op=Op(options.op) if options.op else None,
        namespace=options.namespace,
        key_prefix=options.key_prefix,
        inline=options.inline,
        fetch=stack.enter_context(link_fetcher(max(1, room))) if links else None,
    )

    def make(item: Item) -> Made:
        return item if isinstance(item, Rejected) else maker.make(item)

    return make_ahead(make, items) if links else map(make, items)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: what was sent is waited for and summed up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress(console: Console, total: int | None) -> Progress:
    progress = Progress(
        TextColumn("publishing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    progress.add_task("publish", total=total)
    return progress


if __name__ == "__main__":
    sys.exit(main())
