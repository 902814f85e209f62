"""Where images come from: a folder, a CSV of links, or JSON lines; one `Found` for each image.

Owns reading hostile files line by line with bounded memory, and the rule for image ids: they
depend on the source alone, so publishing a source twice publishes the same ids. It must not know
Kafka or the wire format.

- folder: the path below the folder, `/` between its parts
- CSV: the first 32 hex digits of the SHA-256 of the link
- JSON lines: the line's own `image_id`; without one, the hash of its `uri` as for CSV
"""

import codecs
import csv
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from urllib.parse import urlsplit

MAX_LINE_BYTES = 4 * 1024 * 1024
LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
LINK_SCHEMES = ("http", "https", "file", "s3")


class SourceError(Exception):
    """The source as a whole cannot be read; the message is one line."""


@dataclass(frozen=True, slots=True)
class Found:
    """An image (or a delete, then perhaps without `uri`) and where in the source it stood."""

    place: str
    image_id: str
    uri: str | None
    path: Path | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A piece of the source that makes no event, and why."""

    place: str
    reason: str


Item = Found | Rejected


def id_of_link(link: str) -> str:
    """The image id of a link: the same for the same link, whatever file it stands in."""
    return hashlib.sha256(link.encode()).hexdigest()[:32]


def read_folder(folder: Path) -> Iterator[Item]:
    """Every regular file below `folder`, in sorted order; linked folders are not entered.

    Links that lead nowhere and pipes are passed over; what cannot be looked into is `Rejected`.
    """

    def complain(error: OSError) -> None:
        problems.append(Rejected(str(error.filename), error.strerror or str(error)))

    problems: list[Rejected] = []
    for parent, folders, names in os.walk(folder, onerror=complain):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            try:
                regular = _is_regular(path)
            except OSError as error:
                complain(error)
                continue
            if regular:
                relative = path.relative_to(folder).as_posix()
                # A name that is no UTF-8 still gets an id that is.
                image_id = os.fsencode(relative).decode(errors="backslashreplace")
                yield Found(image_id, image_id, path.absolute().as_uri(), path)
        yield from problems
        problems.clear()
    # Nothing follows a folder that cannot be read where it is the last, or the only one.
    yield from problems


def _is_regular(path: Path) -> bool:
    """Whether it is a file or a link to one; raises OSError where that cannot be known."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno in LEADS_NOWHERE:
            return False
        raise


def count_folder(folder: Path) -> int:
    """How many images `read_folder` is going to find."""
    return sum(isinstance(item, Found) for item in read_folder(folder))


def read_csv(file: TextIO, columns: Sequence[str], delimiter: str = ",") -> Iterator[Item]:
    """The links in the named columns of a CSV with a header; empty cells are left out.

    Without `columns`, the file must have just one. Raises SourceError for a header that does not
    fit; a row that does not is `Rejected`.
    """
    # Lines beyond the bound come in pieces, which then do not fit the header.
    lines = iter(lambda: file.readline(MAX_LINE_BYTES), "")
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise SourceError(f"header: {error}") from None
    wanted = [(name, _position(header, name)) for name in columns or _only(header, delimiter)]
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Rejected(f"line {rows.line_num}", str(error))
            continue
        if row is None:
            return
        if row:
            yield from _links_of_row(row, len(header), wanted, rows.line_num)


def _only(header: list[str], delimiter: str) -> list[str]:
    _refuse_links(header)
    if len(header) != 1:
        raise SourceError(f"name the columns of links with --column; there are {_list(header)}")
    if any(other in header[0] for other in ",;\t" if other != delimiter):
        raise SourceError(
            f"one column, {header[0][:80]!r}: a .csv is read with ',' and a .tsv with tabs between"
            " its columns; convert the file, or name that column with --column"
        )
    return header


def _position(header: list[str], name: str) -> int:
    if header.count(name) != 1:
        _refuse_links(header)
        raise SourceError(f"{header.count(name)} columns are named {name!r} of {_list(header)}")
    return header.index(name)


def _refuse_links(header: list[str]) -> None:
    """Raises SourceError where the first line is no header, whose links would be lost."""
    for cell in header:
        if _link_problem(cell) is None:
            raise SourceError(
                f"the first line holds a link, {cell[:80]!r}, where the names of the columns are"
                " wanted; put a line with names, such as 'link', before it"
            )


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names[:20])) or "none"


def _links_of_row(
    row: list[str], width: int, wanted: list[tuple[str, int]], line: int
) -> Iterator[Item]:
    if len(row) != width:
        yield Rejected(f"line {line}", f"{len(row)} fields, the header has {width}")
        return
    for name, position in wanted:
        link = row[position].strip()
        place = f"line {line}, column {name}"
        if not link:
            continue
        if problem := _link_problem(link):
            yield Rejected(place, problem)
        else:
            attributes = {"line": line, "column": name}
            yield Found(place, id_of_link(link), link, fields={"attributes": attributes})


def read_json_lines(file: BinaryIO) -> Iterator[Item]:
    """One event a line, as the worker takes it; blank lines are left out.

    Only what is needed to address the event is looked at here. Raises SourceError for a file that
    is one array: its lines, or what of them happened to be objects, would mean something else.
    """
    begun = False
    for number, line in enumerate(_bounded_lines(file), 1):
        place = f"line {number}"
        if not begun and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise SourceError(f"{place}: an array; one object a line is wanted")
        begun = begun or bool(line.strip())
        if _too_long(line):
            yield Rejected(place, f"longer than {MAX_LINE_BYTES} bytes")
        elif line.strip():
            yield _parse_line(line, place)


def _parse_line(line: bytes, place: str) -> Item:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected(place, f"not JSON: {error}")
    if not isinstance(event, dict):
        return Rejected(place, "not a JSON object")
    uri, image_id = event.pop("uri", None), event.pop("image_id", None)
    if uri is not None and (not isinstance(uri, str) or _link_problem(uri)):
        return Rejected(place, f"uri: not a link: {json.dumps(uri)[:80]}")
    if image_id is None and uri is not None:
        image_id = id_of_link(uri)
    if not isinstance(image_id, str) or not image_id:
        return Rejected(place, "neither an image_id nor a uri to make one from")
    return Found(place, image_id, uri, fields=event)


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long the beginning, the rest is read and dropped."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        if _too_long(line):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass


def _too_long(line: bytes) -> bool:
    return len(line) > MAX_LINE_BYTES and not line.endswith(b"\n")


def _link_problem(link: str) -> str | None:
    try:
        link.encode()
        parts = urlsplit(link)
    except ValueError:
        return f"not a link: {link[:80]!r}"
    addressed = bool(parts.path if parts.scheme == "file" else parts.hostname)
    if parts.scheme not in LINK_SCHEMES or not addressed:
        return f"not a link: {link[:80]!r}"
    return None
