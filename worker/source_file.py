"""Images from folders of this machine.

Owns the walk from an allowed root down to a regular file. A path that is not written below a root
is refused unseen. Of others every component is opened relative to the one above without following
links. Where that does not arrive, the path is resolved and walked once more, so symbolic links
inside a root work. Whatever is swapped meanwhile, nothing outside the root is opened, and no FIFO
or device is waited for. A disk that hangs cannot be interrupted.

What errors mean: no such file is the event's fault (`source_gone`), so is a forbidden one
(`source_denied`). A root that has vanished, or a process out of descriptors or memory, is the
infrastructure's. Anything else (EIO, ESTALE, a mount that times out) may pass, so it is tried
again, and then given up as `source_unavailable`: one rotten sector must not stop a partition.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from worker.errors import EventError, InfrastructureError, Reason
from worker.source_policy import SourcePolicy, Unavailable, is_shortage

_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_LEAST, _MOST = 4096, 1024 * 1024  # bytes read at once
_LONGEST = (
    4_096  # bytes of a path, as Linux has it; resolving a longer one takes time by its square
)
_LONGEST_URI = len("file://localhost") + 3 * _LONGEST  # each byte percent-encoded

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_DENIED = (errno.EACCES, errno.EPERM)
_MAYBE_A_LINK = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR)


class FileSource:
    """Reads images below the roots of a policy. Thread-safe."""

    def __init__(self, policy: SourcePolicy) -> None:
        self._roots = tuple(Path(root) for root in policy.roots)
        self._max_bytes = policy.max_bytes

    def get(self, uri: str) -> bytes:
        """One try. Raises EventError, InfrastructureError, or Unavailable when it may pass."""
        try:
            path = os.path.normpath("/" + _path(uri).lstrip("/"))
            found = self._as_written(path)
            if found is None:
                root, below = self._confined(Path(path))
                with _opened(root, below) as file:
                    found = self._read(file)
            return found
        except OSError as error:
            raise _meaning(error) from error

    def _as_written(self, path: str) -> bytes | None:
        """What is there, without a look at where links lead; None where one may be in the way."""
        for root in self._roots:
            above = f"{root}/"
            if path.startswith(above):
                try:
                    with _opened(root, tuple(path.removeprefix(above).split("/"))) as file:
                        return self._read(file)
                except OSError as error:
                    if error.errno not in _MAYBE_A_LINK:
                        raise
        return None

    def _confined(self, written: Path) -> tuple[Path, tuple[str, ...]]:
        """The root a path leads below, and the way from there. Links are resolved, but only of a
        path that lies below a root as it is written: what is elsewhere is not looked at.
        """
        roots = [(each, Path(os.path.realpath(each))) for each in self._roots]
        if not any(written.is_relative_to(each) for pair in roots for each in pair):
            raise _outside()
        real = Path(os.path.realpath(written))
        for each, root in roots:
            if real.is_relative_to(root):
                if not root.is_dir():
                    raise InfrastructureError(f"the folder {each} is gone")
                return root, real.relative_to(root).parts
        raise _outside()

    def _read(self, file: int) -> bytes:
        told = os.fstat(file)
        if not stat.S_ISREG(told.st_mode):
            raise EventError(Reason.BLOCKED_SOURCE, "not a regular file")
        if told.st_size > self._max_bytes:
            raise self._too_large(told.st_size)
        parts, total = [], 0
        while part := os.read(file, min(max(told.st_size, _LEAST), _MOST)):
            parts.append(part)
            total += len(part)
            if total > self._max_bytes:  # it grows while it is read
                raise self._too_large(total)
        return b"".join(parts)

    def _too_large(self, size: int) -> EventError:
        return EventError(Reason.TOO_LARGE, f"{size} bytes, {self._max_bytes} allowed")


def _outside() -> EventError:
    return EventError(Reason.BLOCKED_SOURCE, "the file is not below an allowed folder")


def _too_long() -> OSError:
    return OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _path(uri: str) -> str:
    """The absolute path of a file uri (RFC 8089): no host but this one, no query.

    Raises EventError, and OSError where it is too long.
    """
    if len(uri) > _LONGEST_URI:  # urlsplit would keep it in its cache
        raise _too_long()
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise EventError(Reason.BLOCKED_SOURCE, "the uri is malformed") from error
    raw = unquote_to_bytes(parts.path)
    if len(raw) > _LONGEST:
        raise _too_long()
    path = os.fsdecode(raw)
    if parts.netloc not in ("", "localhost"):
        raise EventError(Reason.BLOCKED_SOURCE, "a file uri of another host")
    if parts.query or parts.fragment:
        raise EventError(Reason.BLOCKED_SOURCE, "a file uri with ? or #; percent-encode them")
    if not path.startswith("/") or "\0" in path:
        raise EventError(Reason.BLOCKED_SOURCE, "a file uri without an absolute path")
    return path


@contextlib.contextmanager
def _opened(root: Path, below: tuple[str, ...]) -> Iterator[int]:
    """Walk down from `root`, following no link, and open what is at the end."""
    if not below:
        raise EventError(Reason.BLOCKED_SOURCE, "not a regular file")
    with contextlib.ExitStack() as stack:
        place = os.open(root, _FOLDER)
        stack.callback(os.close, place)
        for name in below[:-1]:
            place = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=place)
            stack.callback(os.close, place)
        file = os.open(below[-1], _FILE, dir_fd=place)
        stack.callback(os.close, file)
        yield file


def _meaning(error: OSError) -> Exception:
    """Whose fault a failed call is (see the top)."""
    words = os.strerror(error.errno or 0)
    if error.errno in _GONE:
        return EventError(Reason.SOURCE_GONE, words)
    if error.errno in _DENIED:
        return EventError(Reason.SOURCE_DENIED, words)
    if error.errno in _NOT_A_FILE:
        return EventError(Reason.BLOCKED_SOURCE, "not a regular file")
    if is_shortage(error):
        return InfrastructureError(f"reading a file: {words}")
    return Unavailable(words)
