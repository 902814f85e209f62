"""Talking HTTP: status codes, retries, deadlines, sizes; from a server that plays every trick."""

import contextlib
import random
import socket
import threading
import time

import pytest

from tests.unit.trick_server import (
    BODY,
    PATIENCE,
    Handler,
    TrickServer,
    answer,
    fetch,
    fetcher,
    refusal,
)
from worker.errors import EventError, InfrastructureError, Reason
from worker.source_http import _retry_after


def test_image_arrives(server: TrickServer) -> None:
    source = fetcher()
    for _ in range(3):
        assert source.fetch(f"http://127.0.0.1:{server.port}/a.jpg") == BODY
    assert server.connections == 1  # kept alive
    request = server.requests[0].decode().lower()
    assert f"host: 127.0.0.1:{server.port}" in request
    assert "accept-encoding: identity" in request


def test_chunked_body_and_body_until_close(server: TrickServer) -> None:
    chunked = b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n"
    server.paths["/chunked"] = chunked + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    server.paths["/close"] = lambda it, _: it.sendall(b"HTTP/1.1 200 x\r\n\r\n" + BODY)
    assert fetch(server, "/chunked") == b"abcde"
    assert fetch(server, "/close") == BODY


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, Reason.SOURCE_GONE),
        (410, Reason.SOURCE_GONE),
        (401, Reason.SOURCE_DENIED),
        (403, Reason.SOURCE_DENIED),
        (451, Reason.SOURCE_DENIED),
        (400, Reason.SOURCE_UNAVAILABLE),
        (204, Reason.SOURCE_UNAVAILABLE),
        (304, Reason.SOURCE_UNAVAILABLE),
        (418, Reason.SOURCE_UNAVAILABLE),
    ],
)
def test_final_status_is_asked_once(server: TrickServer, status: int, reason: Reason) -> None:
    server.paths["/x"] = answer(status)
    error = refusal(server, "/x")
    assert server.asked["/x"] == 1
    assert (error.reason, error.detail) == (reason, f"127.0.0.1 answered {status}")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_passing_trouble_is_tried_again(server: TrickServer, status: int) -> None:
    server.paths["/x"] = [answer(status), answer(status), answer(200, BODY)]
    assert fetch(server, "/x") == BODY
    assert server.asked["/x"] == 3
    server.paths["/y"] = answer(status)
    error = refusal(server, "/y", attempts=2)
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert error.detail == f"127.0.0.1 answered {status}, 2 tries"
    assert server.asked["/y"] == 2


def test_retry_after_is_honoured_within_the_budget(
    server: TrickServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 20))
    server.paths["/x"] = [
        answer(503, retry_after="7"),
        answer(503, retry_after=later),
        answer(503, retry_after="soon"),
        answer(200, BODY),
    ]
    source = fetcher(attempts=4, retry_seconds=60.0)
    pauses: list[float] = []
    monkeypatch.setattr(source._closed, "wait", pauses.append)
    assert source.fetch(f"http://127.0.0.1:{server.port}/x") == BODY
    assert 7 <= pauses[0] < 8
    assert 15 < pauses[1] < 21
    assert pauses[2] <= 1


FOREVER = "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00", 0, 0),  # naive: taken for UTC
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400, 86_400),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 86_400, 86_400),
        ("9" * 5000, 86_400, 86_400),
        ("{later}", 100, 120),
        ("{naive}", 100, 120),
    ],
)
def test_retry_after_is_bounded(value: str, least: float, most: float) -> None:
    clock = time.gmtime(time.time() + 120)
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", clock)
    naive = time.strftime("%a, %d %b %Y %H:%M:%S", clock)
    seconds = _retry_after(value.format(later=later, naive=naive))
    assert seconds is not None and least <= seconds <= most


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", ",", "soon", "-1", "1.5", "1e9", "nan", "inf", "\xb2", "Mon,"),
        *(FOREVER, FOREVER.replace("Mon", "")),
        "Mon, 01 Jan 10000 00:00:00 GMT",
        "Mon, 99999999999999999999 Jan 2024 00:00:00 GMT",
        "Mon, 01 Jan 2024 99999999999999999999:00:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 2024 00:00:00 +9999",
        "Mon, 01 Jan " + "9" * 5000 + " 00:00:00 GMT",
    ],
)
def test_retry_after_that_says_nothing_is_none(value: str) -> None:
    assert _retry_after(value) is None


def test_retry_after_without_meaning_costs_one_event(server: TrickServer) -> None:
    server.paths["/x"] = answer(503, retry_after=FOREVER)
    error = refusal(server, "/x", attempts=2)
    assert (error.reason, server.asked["/x"]) == (Reason.SOURCE_UNAVAILABLE, 2)


def test_retry_after_beyond_the_budget_gives_up_at_once(server: TrickServer) -> None:
    server.paths["/x"] = answer(429, retry_after="9" * 9)
    error = refusal(server, "/x", retry_seconds=5.0)
    assert (error.reason, server.asked["/x"]) == (Reason.SOURCE_UNAVAILABLE, 1)


def test_silence_ends_at_the_deadline(server: TrickServer) -> None:
    def hang(connection: socket.socket, _: int) -> None:
        server.closing.wait(PATIENCE)

    server.paths["/x"] = hang
    error = refusal(server, "/x", timeout_seconds=1.0, attempts=2)
    assert error.detail == "127.0.0.1 did not answer in time, 2 tries"
    assert server.asked["/x"] == 2


def drip(server: TrickServer, head: bytes, each: bytes) -> Handler:
    """Send `head`, then `each` for ever, never pausing long enough for a read to time out."""

    def send(connection: socket.socket, _: int) -> None:
        connection.sendall(head)
        while not server.closing.wait(0.02):
            connection.sendall(each)

    return send


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 x\r\n", b"HTTP/1.1 200 x\r\n\r\n", b""])
def test_slow_drip_of_headers_or_body_ends_at_the_deadline(
    server: TrickServer, head: bytes
) -> None:
    server.paths["/x"] = drip(server, head, b"a: b\r\n" if head else b"H")
    error = refusal(server, "/x", timeout_seconds=0.3, attempts=1)
    assert error.reason is Reason.SOURCE_UNAVAILABLE


def test_endless_headers_are_refused(server: TrickServer) -> None:
    server.paths["/x"] = drip(server, b"HTTP/1.1 200 x\r\n", b"a: " + b"b" * 60_000 + b"\r\n")
    assert refusal(server, "/x", attempts=1).reason is Reason.SOURCE_UNAVAILABLE


@pytest.mark.parametrize(
    "response",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 x\r\ncontent-length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 x\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"",
    ],
)
def test_broken_answers_are_tried_again(server: TrickServer, response: bytes) -> None:
    server.paths["/x"] = lambda it, _: it.sendall(response)
    error = refusal(server, "/x", attempts=2)
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert server.asked["/x"] == 2


def test_size_is_limited_exactly_when_stated(server: TrickServer) -> None:
    assert fetch(server, "/a.jpg", max_bytes=len(BODY)) == BODY
    assert refusal(server, "/a.jpg", max_bytes=len(BODY) - 1).reason is Reason.TOO_LARGE


def test_size_stated_too_large_is_not_read(server: TrickServer) -> None:
    server.paths["/x"] = b"HTTP/1.1 200 x\r\ncontent-length: 99999999999\r\n\r\n"
    assert refusal(server, "/x").reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("head", "each"),
    [
        (b"HTTP/1.1 200 x\r\n\r\n", bytes(1 << 16)),
        (
            b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n",
            b"10000\r\n" + bytes(1 << 16) + b"\r\n",
        ),
    ],
)
def test_endless_body_is_cut_off(server: TrickServer, head: bytes, each: bytes) -> None:
    sent = 0

    def flood(connection: socket.socket, _: int) -> None:
        nonlocal sent
        connection.sendall(head)
        while not server.closing.is_set():
            connection.sendall(each)
            sent += len(each)

    server.paths["/x"] = flood
    assert refusal(server, "/x", max_bytes=1 << 20).reason is Reason.TOO_LARGE
    assert sent < 64 << 20


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip"])
def test_content_encoding_is_refused_unread(server: TrickServer, coding: str) -> None:
    server.paths["/x"] = answer(200, b"\x1f\x8b", content_encoding=coding)
    assert refusal(server, "/x").reason is Reason.UNSUPPORTED_FORMAT
    server.paths["/y"] = answer(200, BODY, content_encoding="identity")
    assert fetch(server, "/y") == BODY


def test_cookies_are_not_kept(server: TrickServer) -> None:
    server.paths["/x"] = answer(200, BODY, set_cookie="a=b")
    source = fetcher()
    for _ in range(2):
        source.fetch(f"http://127.0.0.1:{server.port}/x")
    assert b"cookie" not in server.requests[1].lower()


def test_close_ends_what_is_under_way_without_blame(server: TrickServer) -> None:
    source = fetcher()
    begun = threading.Event()

    def hang(connection: socket.socket, _: int) -> None:
        begun.set()
        server.closing.wait(PATIENCE)

    server.paths["/x"] = hang
    ends: list[Exception] = []

    def run() -> None:
        try:
            source.fetch(f"http://127.0.0.1:{server.port}/x")
        except (EventError, InfrastructureError) as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(PATIENCE)
    source.close()
    thread.join(PATIENCE)
    assert [type(end) for end in ends] == [InfrastructureError]


def test_close_interrupts_the_pause_between_tries(server: TrickServer) -> None:
    server.paths["/x"] = answer(503, retry_after="1000")
    source = fetcher(retry_seconds=10_000.0)
    ends: list[Exception] = []

    def run() -> None:
        try:
            source.fetch(f"http://127.0.0.1:{server.port}/x")
        except (EventError, InfrastructureError) as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not server.asked["/x"]:
        time.sleep(0.01)
    source.close()
    thread.join(PATIENCE)
    assert [type(end) for end in ends] == [InfrastructureError]


def test_many_threads_share_a_fetcher(server: TrickServer) -> None:
    source = fetcher()
    got: list[bytes] = []

    def run() -> None:
        got.extend(source.fetch(f"http://127.0.0.1:{server.port}/a.jpg") for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert got == [BODY] * 160


def test_random_answers_raise_nothing_else(server: TrickServer) -> None:
    """What is not an EventError would stop the worker."""
    source = random.Random(3)
    dates = (FOREVER, "Wed, 21 Oct 2015 07:28:00 GMT", "Fri, 31 Dec 9999 23:59:59 -2359")
    answers = [
        answer(200, BODY),
        answer(302, location="/x?a"),
        answer(503, retry_after="0"),
        *(answer(503, retry_after=date) for date in dates),
        b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nt: x\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(200, BODY),
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n",
    ]

    def broken(connection: socket.socket, _: int) -> None:
        data = bytearray(source.choice(answers))
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(data))
            data[at : at + source.randint(0, 3)] = source.randbytes(source.randint(0, 3))
        connection.sendall(data)

    server.paths["/x"] = broken
    getter, images = fetcher(attempts=1), 0
    for _ in range(300):
        with contextlib.suppress(EventError):
            getter.fetch(f"http://127.0.0.1:{server.port}/x")
            images += 1
    assert 0 < images < 300
