"""The file of events that a rebuild reads before the topic: JSON lines, in their order.

Owns reading it and where its events stand: in a partition beyond all of a topic's, made from the
file's bytes. So the same file is recognised when it is read again, and a changed one is no other's
lines. It must not know what becomes of the events.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from zlib import crc32

from worker.errors import ConfigError, EventError
from worker.index.keys import FILES
from worker.messages import MessageLimits, Record, parse

NAMED = 3
"""Lines told of that are no events."""


def read_events(path: str, limits: MessageLimits) -> Iterator[Record]:
    """Check a file (`-`: standard input), then return its events, one a line, blank lines aside.

    Raises ConfigError, before anything is returned, for a file that cannot be read or has lines
    that are no events: one of them may be a delete.
    """
    try:
        file = _open(path)
        partition = FILES | _checksum(file, replace(limits, namespaces=())) % FILES
    except OSError as error:
        raise ConfigError(f"--events: {error}") from None
    return _records(file, partition)


def _open(path: str) -> IO[bytes]:
    """A file that can be read twice."""
    if path != "-":
        return Path(path).open("rb")
    file = TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.seek(0)
    return file


def _checksum(file: IO[bytes], limits: MessageLimits) -> int:
    """Read all of it. Raises ConfigError for lines that are no events."""
    checksum = bad = 0
    some: list[str] = []
    for number, line in enumerate(file, 1):
        checksum = crc32(line, checksum)
        try:
            if line.strip():
                parse(Record("", 0, number, 0, None, line), limits)
        except EventError as error:
            bad += 1
            if bad <= NAMED:
                some.append(f"line {number}: {error}")
    if bad:
        raise ConfigError(f"--events: lines that are no events: {bad}, such as {'; '.join(some)}")
    return checksum


def _records(file: IO[bytes], partition: int) -> Iterator[Record]:
    with file:
        file.seek(0)
        for number, line in enumerate(file):
            if line.strip():
                yield Record("", partition, number, 0, None, line)
