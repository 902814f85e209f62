"""`python -m worker [COMMAND]`: run a worker, or one of the commands around it.

Wiring only: reads the settings, builds the parts, hands them to each other.
"""

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from queue import SimpleQueue
from threading import Thread

from worker import flags, logs, memory, threads
from worker.arguments import Parser
from worker.config import Settings, unknown_variables
from worker.errors import ConfigError, DedupError, InfrastructureError
from worker.service import Service

COMMANDS = {
    "train": ("worker.training.train", "train the network on photos"),
    "average": ("worker.training.average", "average two trainings of the network"),
    "evaluate": ("worker.training.evaluate", "measure weights on edited photos"),
    "calibrate": ("worker.training.calibrate", "propose a threshold for one's own pictures"),
    "fsck": ("worker.index.fsck", "check every invariant of the index"),
    "audit": ("worker.index.audit", "compare the index with brute force on a sample"),
    "rebuild": ("worker.index.rebuild", "fill a namespace again, with another model"),
}


def main(argv: list[str]) -> int:
    """Dispatch; a wrong setting is one line and exit status 2, a service that is away 3, ^C 130."""
    try:
        if argv and argv[0] in COMMANDS:
            module = importlib.import_module(COMMANDS[argv[0]][0])
            return _told(lambda: int(module.main(argv[1:])))
        if argv and not argv[0].startswith("-"):
            raise ConfigError(f"there is no command {argv[0]!r}: {', '.join(COMMANDS)}")
        return run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except InfrastructureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except DedupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _told(command: Callable[[], int]) -> int:
    """Its exit status, or the one of a shell's command whose reader has gone, as `head` does."""
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the end would flush
        return 128 + signal.SIGPIPE
    return status


def run(argv: list[str]) -> int:
    """Run a worker until SIGTERM or SIGINT. Exit status 0: everything in flight was finished."""
    memory.keep_freed()
    threads.interrupt_nobody()
    release = version("image-dedup-stream")
    parser = _parser(release)
    settings = flags.from_flags(Settings, parser.parse_args(argv))
    logs.configure(settings.log_level, settings.log_format)
    log = logging.getLogger(__name__)
    for name, meant in unknown_variables().items():
        log.warning("there is no such setting", extra={"variable": name, "meant": meant})
    service = Service(settings, release)
    _stop_at_signals(service)
    try:
        return service.run()
    except ConfigError:
        raise
    except Exception:
        log.exception("worker died")
        return 1


def _stop_at_signals(service: Service) -> None:
    """Have SIGTERM and SIGINT stop the worker.

    A second signal may come while the first is handled, and finds all locks as they are: the
    handler does one thing only, which may be interrupted by itself. A thread does the rest.
    """
    asked: SimpleQueue[None] = SimpleQueue()

    def stop() -> None:
        asked.get()
        service.stop()

    Thread(target=stop, name="signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.put(None))


def _parser(release: str) -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:10} {about}" for name, (_, about) in COMMANDS.items())
    parser = Parser(
        prog="python -m worker",
        usage="%(prog)s [SETTINGS] | %(prog)s COMMAND …",
        description="Consume image events from Kafka, publish which earlier image each repeats.",
        epilog=f"commands (each with --help of its own):\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=release)
    flags.add_flags(parser, Settings)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
