"""Files, policy and retries of `worker.sources`; HTTP is in tests/faults."""

import errno
import os
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import ConfigError, EventError, InfrastructureError, Reason
from worker.sources import Fetcher, SourcePolicy

BODY = b"\xff\xd8\xff some image"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one image, a secret beside the root."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "a.jpg").write_bytes(BODY)
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path / "root"


def fetch(uri: str, *roots: Path, max_bytes: int = 1000) -> bytes:
    """Fetch a file below `roots`."""
    policy = SourcePolicy(("file",), roots=tuple(map(str, roots)), max_bytes=max_bytes)
    return Fetcher(policy).fetch(uri)


def refusal(uri: str, *roots: Path, max_bytes: int = 1000) -> EventError:
    """The EventError a fetch ends with."""
    with pytest.raises(EventError) as caught:
        fetch(uri, *roots, max_bytes=max_bytes)
    return caught.value


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int = 1_000
) -> Callable[[], int]:
    """Make `os.NAME` fail with an errno so many times; answers how often it was called."""
    real, calls = getattr(os, name), 0

    def fail(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, name, fail)
    return lambda: calls


def test_file_below_a_root(root: Path) -> None:
    assert fetch((root / "sub" / "a.jpg").as_uri(), root) == BODY
    assert fetch((root / "sub" / "a.jpg").as_uri(), Path("/nonexistent").parent, root) == BODY
    assert fetch(f"FILE://localhost{root}/sub/a.jpg", root) == BODY


@pytest.mark.parametrize("name", ["a b.jpg", "ü.jpg", "100%.jpg", "a#b?c.jpg", "new\nline.jpg"])
def test_any_name_percent_encoded(name: str, root: Path) -> None:
    (root / name).write_bytes(BODY)
    assert fetch((root / name).as_uri(), root) == BODY


def test_nothing_is_allowed_by_default(root: Path) -> None:
    uri = (root / "sub" / "a.jpg").as_uri()
    folder = SourcePolicy(roots=(str(root),))
    for policy in (SourcePolicy(), SourcePolicy(hosts=("*",)), folder):
        for each in (uri, "https://example.com/a.jpg", "http://example.com/", "nonsense", ""):
            with pytest.raises(EventError) as caught:
                Fetcher(policy).fetch(each)
            assert caught.value.reason is Reason.BLOCKED_SOURCE


@pytest.mark.parametrize("path", ["../secret", "sub/../../secret", "sub/%2e%2e/%2e%2e/secret"])
def test_dots_do_not_leave_the_root(path: str, root: Path) -> None:
    assert refusal(f"{root.as_uri()}/{path}", root).reason is Reason.BLOCKED_SOURCE


def test_outside_is_blocked_whether_it_exists_or_not(root: Path) -> None:
    details = {refusal(f"file://{path}", root).detail for path in ("/etc/passwd", "/etc/none")}
    assert len(details) == 1
    sibling = root.with_name("root2")
    sibling.mkdir()
    (sibling / "a.jpg").write_bytes(BODY)
    assert refusal((sibling / "a.jpg").as_uri(), root).reason is Reason.BLOCKED_SOURCE


@pytest.mark.parametrize(
    "path",
    [
        "/mnt/hangs/a.jpg",
        "/mnt/hangs/%2e%2e/{name}/sub/../../../mnt/hangs/a.jpg",
        "{root}/../secret",
        "{root}x/a.jpg",
        "/",
        "//",
        "///mnt/hangs/a.jpg",
    ],
)
def test_what_is_written_outside_is_not_looked_at(
    path: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it a mount that hangs, or a file whose time of access tells something."""
    seen: set[str] = set()
    for name in ("lstat", "stat", "readlink", "open"):
        monkeypatch.setattr(os, name, recording(getattr(os, name), seen))
    error = refusal(f"file://{path.format(root=root, name=root.name)}", root)
    assert error.reason is Reason.BLOCKED_SOURCE
    assert seen <= {str(each) for each in (root, *root.parents)}


def recording(real: Callable[..., object], seen: set[str]) -> Callable[..., object]:
    """A call of `os` that remembers the paths it is given."""

    def call(path: str, *arguments: object, **keywords: object) -> object:
        seen.add(os.fspath(path))
        return real(path, *arguments, **keywords)

    return call


def test_dots_are_taken_out_before_a_path_is_looked_at(root: Path) -> None:
    uri = f"file:///mnt/hangs/..{root.parent}/../{root.parent.name}/root/sub/a.jpg"
    assert refusal(uri, root).reason is Reason.BLOCKED_SOURCE
    assert fetch(f"{root.as_uri()}/none/../sub/./a.jpg", root) == BODY
    assert fetch(f"file:///{root}/sub//a.jpg", root) == BODY


def test_a_path_without_links_is_not_resolved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes as long as all the rest."""
    resolved: set[str] = set()
    monkeypatch.setattr(os.path, "realpath", recording(os.path.realpath, resolved))
    assert fetch((root / "sub" / "a.jpg").as_uri(), root) == BODY
    assert not resolved
    (root / "link").symlink_to("sub")
    assert fetch((root / "link" / "a.jpg").as_uri(), root) == BODY
    assert str(root / "link" / "a.jpg") in resolved


def test_links_may_stay_inside_but_not_leave(root: Path) -> None:
    (root / "inside").symlink_to("sub/a.jpg")
    (root / "outside").symlink_to(root.parent / "secret")
    (root / "up").symlink_to(root.parent, target_is_directory=True)
    assert fetch((root / "inside").as_uri(), root) == BODY
    for path in ("outside", "up/secret", "up/root/../secret"):
        assert refusal(f"{root.as_uri()}/{path}", root).reason is Reason.BLOCKED_SOURCE


def test_root_may_be_a_link_itself(root: Path) -> None:
    link = root.with_name("link")
    link.symlink_to(root)
    assert fetch(f"{link.as_uri()}/sub/a.jpg", link) == BODY
    assert fetch(f"{root.as_uri()}/sub/a.jpg", link) == BODY


@pytest.mark.parametrize("path", ["late", "up/secret"])
def test_link_made_after_the_check_is_not_followed(
    path: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the path had been clean when it was resolved."""
    (root / "late").symlink_to(root.parent / "secret")
    (root / "up").symlink_to(root.parent, target_is_directory=True)
    monkeypatch.setattr(os.path, "realpath", str)
    assert refusal(f"{root.as_uri()}/{path}", root).reason in (
        Reason.BLOCKED_SOURCE,
        Reason.SOURCE_GONE,  # what Linux says of a link where a folder must be
    )


def test_only_regular_files_are_read(root: Path) -> None:
    os.mkfifo(root / "fifo")  # nobody writes: opening it the plain way would wait for ever
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(root / "socket"))
    for path in ("fifo", "socket", "sub", ""):
        assert refusal(f"{root.as_uri()}/{path}", root).reason is Reason.BLOCKED_SOURCE
    server.close()
    assert refusal("file:///dev/zero", Path("/dev")).detail == "not a regular file"


def test_loop_of_links_is_blocked(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    assert refusal(f"{root.as_uri()}/a", root).reason is Reason.BLOCKED_SOURCE


@pytest.mark.parametrize("path", ["none.jpg", "sub/none/a.jpg", "sub/a.jpg/b", "x" * 300])
def test_missing_file_is_gone(path: str, root: Path) -> None:
    assert refusal(f"{root.as_uri()}/{path}", root).reason is Reason.SOURCE_GONE


@pytest.mark.parametrize("piece", ["a/", "%61/", "../", "me/", "ü/"])
def test_endless_path_is_refused_unread(
    piece: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resolving a megabyte of one would take half a minute."""
    (root / "me").symlink_to(root)
    kept = cast(Any, urlsplit).cache_info
    resolved: list[object] = []
    monkeypatch.setattr(os.path, "realpath", resolved.append)
    for times in (4_096, 1_000_000):
        before = kept().misses
        error = refusal(f"{root.as_uri()}/{piece * times}", root)
        assert (error.reason, error.detail) == (Reason.SOURCE_GONE, "File name too long")
    assert kept().misses == before, "a megabyte was kept"
    assert resolved == []


def test_path_of_the_longest_length_is_looked_for(root: Path) -> None:
    fill = 4_096 - len(str(root)) - len("/./sub/a.jpg")
    path = f"{root}/./{'/' * fill}sub/a.jpg"
    assert fetch(f"file://{path}", root) == BODY
    encoded = "".join(f"%{ord(each):02x}" for each in path[1:])
    assert fetch(f"file://localhost/{encoded}", root) == BODY
    assert refusal(f"file://{path}x".replace("/./", "/.//"), root).reason is Reason.SOURCE_GONE


def test_size_is_limited_exactly(root: Path) -> None:
    uri = (root / "sub" / "a.jpg").as_uri()
    assert fetch(uri, root, max_bytes=len(BODY)) == BODY
    error = refusal(uri, root, max_bytes=len(BODY) - 1)
    assert error.reason is Reason.TOO_LARGE


def test_file_that_grows_while_it_is_read_is_cut_off(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "read", lambda fd, count: bytes(1000))
    assert refusal((root / "sub" / "a.jpg").as_uri(), root).reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    "uri",
    [
        "file://other.host/a.jpg",
        "file:///a.jpg?query",
        "file:///a.jpg#fragment",
        "file:relative.jpg",
        "file:///nul%00.jpg",
        "file://[::1/a.jpg",
        "file:",
    ],
)
def test_odd_file_uris_are_blocked(uri: str, root: Path) -> None:
    assert refusal(uri, root).reason is Reason.BLOCKED_SOURCE


def test_forbidden_file_is_denied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "read", errno.EACCES)
    assert refusal((root / "sub" / "a.jpg").as_uri(), root).reason is Reason.SOURCE_DENIED


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_failing_disk_is_tried_again(
    number: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = (root / "sub" / "a.jpg").as_uri()
    calls = failing(monkeypatch, "read", number, times=2)
    assert fetch(uri, root) == BODY
    assert calls() == 4  # two failures, the body, its end
    monkeypatch.undo()
    calls = failing(monkeypatch, "read", number)
    error = refusal(uri, root)
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert error.detail == f"{os.strerror(number)}, 3 tries"
    assert calls() == 3


def test_pauses_between_tries_are_drawn_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all who failed together would come back together."""
    policy = SourcePolicy(("file",), roots=(str(root),), attempts=8, retry_seconds=1e6)
    fetcher, pauses = Fetcher(policy), list[float]()
    monkeypatch.setattr(fetcher._closed, "wait", pauses.append)
    failing(monkeypatch, "read", errno.EIO)
    for _ in range(20):
        with pytest.raises(EventError):
            fetcher.fetch((root / "sub" / "a.jpg").as_uri())
    assert len(pauses) == len(set(pauses)) == 7 * 20
    for number in range(7):
        bound, drawn = 0.25 * 2**number, pauses[number::7]
        assert 0 <= min(drawn) < bound / 2 < max(drawn) <= bound


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_out_of_descriptors_is_no_fault_of_the_event(
    number: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "open", number)
    with pytest.raises(InfrastructureError):
        fetch((root / "sub" / "a.jpg").as_uri(), root)


def test_vanished_root_is_no_fault_of_the_event(root: Path) -> None:
    fetcher = Fetcher(SourcePolicy(schemes=("file",), roots=(str(root),)))
    root.rename(root.with_name("elsewhere"))
    with pytest.raises(InfrastructureError):
        fetcher.fetch((root / "sub" / "a.jpg").as_uri())


def test_closed_fetcher_does_not_blame_the_event(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = Fetcher(SourcePolicy(schemes=("file",), roots=(str(root),)))
    failing(monkeypatch, "read", errno.EIO)
    fetcher.close()
    with pytest.raises(InfrastructureError):
        fetcher.fetch((root / "sub" / "a.jpg").as_uri())


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in ("sub/a.jpg", "sub", "none", "sub/a.jpg/b"):
        try:
            fetch(f"{root.as_uri()}/{path}", root)
        except EventError:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before


NO_HOSTS = [
    *("*example.com", ".example.com", "*.", "*..example.com", "**", "a.*.example.com", "a..b", "."),
    *(
        "exa mple.com",
        "a\tb",
        "a\nb",
        "a/b",
        "a?b",
        "a#b",
        "user@h",
        "a%2fb",
        "a,b",
        "x" * 64,
        "ü" * 64,
    ),
    *(
        "h:0",
        "h:65536",
        "h:99999999",
        "h:-1",
        "h:+1",
        "h:１",
        "h:1:2",
        "h: 1",
        ":80",
        "::1:*",
        "*:x",
    ),
    *(
        "[::1",
        "::1]",
        "[::1]x",
        "[h]",
        "[]",
        "[::1]:0",
        "fe80::1%lo",
        "[fe80::1%lo]",
        ":::",
        "256.1.1.1",
    ),
    *("xn--\u0300", "a\u200db", "\ud800"),
]


@pytest.mark.parametrize(
    "wrong",
    [
        {"schemes": ("gopher",)},
        {"schemes": ("HTTP",)},
        {"roots": (), "schemes": ("file",)},
        {"hosts": (), "schemes": ("https",)},
        {"buckets": (), "schemes": ("s3",)},
        {"roots": ("relative",)},
        {"roots": ("/nonexistent/folder",)},
        {"hosts": ("https://example.com",)},
        {"hosts": ("*.*.com",)},
        {"hosts": ("",)},
        *({"hosts": (each,)} for each in NO_HOSTS),
        {"hosts": ("example.com:http",)},
        {"networks": ("10.0.0.1/8",)},
        {"networks": ("private",)},
    ],
)
def test_wrong_policy_says_so_in_one_line(wrong: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError) as caught:
        SourcePolicy(**wrong)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"fetch_{next(iter(wrong))}: ")
    assert "\n" not in str(caught.value)


URI_PARTS = st.sampled_from(
    [
        *("http:", "https:", "file:", "//", "/", "\\", "@", ":", "?", "#", "[", "]", "%", "%00"),
        *("127.0.0.1", "::1", "%zz", "..", ".", "*", "\r\n", "\0", "\ud800", "ü", "①", "xn--", "a"),
        *("xn--a\u0300", "x" * 70, "99999", "-1", "localhost", "\u2028", " ", "%ff", "&", ";", "~"),
    ]
)


@cache
def guarded() -> Fetcher:
    """A fetcher of every scheme that finds nothing anywhere."""
    return Fetcher(SourcePolicy(("http", "https", "file"), ("nowhere.test",), ("/proc/self/ns",)))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(URI_PARTS, max_size=12).map("".join)))
def test_no_uri_raises_anything_else(uri: str) -> None:
    """What is not an EventError would stop the worker."""
    for each in (uri, f"http://{uri}", f"https://{uri}/a", f"file:///proc/self/ns/{uri}"):
        with pytest.raises(EventError):
            guarded().fetch(each)
