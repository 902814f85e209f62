"""Out of descriptors, memory or threads: this machine's trouble, and never an event's."""

import contextlib
import errno
import gc
import itertools
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.trick_server import BODY, TrickServer, fetcher, resolve
from worker.errors import InfrastructureError
from worker.sources import Fetcher, SourcePolicy


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Take all descriptors this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
    taken: list[int] = []
    gc.collect()  # what other tests left open would be closed meanwhile, at any time
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def assert_paused_without_descriptors(source: Fetcher, uri: str) -> None:
    """It fails as the infrastructure, and then succeeds."""
    with no_descriptors(), pytest.raises(InfrastructureError) as caught:
        source.fetch(uri)
    assert os.strerror(errno.EMFILE) in str(caught.value)
    assert source.fetch(uri) == BODY


def test_connecting_to_an_address(server: TrickServer) -> None:
    assert_paused_without_descriptors(fetcher(), f"http://127.0.0.1:{server.port}/a.jpg")


def test_looking_up_a_name(server: TrickServer) -> None:
    """The resolver has no file to read then, and calls it whatever it likes."""
    source = fetcher(hosts=("localhost:*",))
    assert_paused_without_descriptors(source, f"http://localhost:{server.port}/a.jpg")


def test_a_name_with_another_address_to_try(
    server: TrickServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, ["127.0.0.1", "127.0.0.9"])
    source = fetcher()
    monkeypatch.setattr(socket, "create_connection", _out_of_memory_once())
    with pytest.raises(InfrastructureError, match="memory"):
        source.fetch(f"http://images.test:{server.port}/a.jpg")


def _out_of_memory_once() -> object:
    """A double of `create_connection`: memory is back for the second address, which refuses."""
    numbers = itertools.cycle((errno.ENOMEM, errno.ECONNREFUSED))

    def connect(*_: object, **__: object) -> None:
        number = next(numbers)
        raise OSError(number, os.strerror(number))

    return connect


def test_fetching_from_s3(
    server: TrickServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    policy = SourcePolicy(
        ("s3",),
        buckets=("pictures",),
        networks=("127.0.0.0/8",),
        s3_endpoint=f"http://127.0.0.1:{server.port}",
    )
    source = Fetcher(policy)
    with no_descriptors(), pytest.raises(InfrastructureError):
        source.fetch("s3://pictures/a")


def test_no_thread_for_a_look_up(server: TrickServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    source = fetcher()
    uri = f"http://127.0.0.1:{server.port}/a.jpg"
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(100):  # more often than look-ups may be under way
            with pytest.raises(InfrastructureError, match="new thread"):
                source.fetch(uri)
    assert source.fetch(uri) == BODY
