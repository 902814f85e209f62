"""Fetching over HTTP from a server on loopback that plays every trick, and really is there.

Names are resolved by a double of `getaddrinfo` where a test needs other answers than this
machine's; everything from the socket on is real.
"""

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.errors import EventError, InfrastructureError, Reason
from worker.sources import Fetcher, SourcePolicy

BODY = b"\xff\xd8\xff an image"
PATIENCE = 60.0

Handler = Callable[[socket.socket, int], None]


class TrickServer:
    """Speaks HTTP badly on purpose. `paths` says what to do; `asked` counts requests."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.paths: dict[str, bytes | Handler | list[bytes]] = {}
        self.asked: Counter[str] = Counter()
        self.requests: list[bytes] = []
        self.connections = 0
        self.closing = threading.Event()
        self.tls: ssl.SSLContext | None = None
        self._listener = socket.create_server((address, port))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.closing(connection):
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            while (request := self._request(connection)) is not None:
                path = request.split(b" ")[1].decode()
                self.requests.append(request)
                self.asked[path] += 1
                action = self.paths.get(path, answer(404))
                if isinstance(action, list):
                    action = action[min(self.asked[path], len(action)) - 1]
                if callable(action):
                    action(connection, self.asked[path])
                    return
                connection.sendall(action)
            connection.close()

    def _request(self, connection: socket.socket) -> bytes | None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            part = connection.recv(65536)
            if not part:
                return None
            request += part
        return request

    def close(self) -> None:
        """Stop accepting and dripping."""
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE)


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A response with a right length. Underscores in names become dashes."""
    fields = {"content_length": str(len(body)), **headers}
    lines = [f"HTTP/1.1 {status} x", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.fixture
def server() -> Iterator[TrickServer]:
    server = TrickServer()
    server.paths["/a.jpg"] = answer(200, BODY)
    yield server
    server.close()


def fetcher(**options: Any) -> Fetcher:
    """A fetcher that may use this machine's loopback."""
    defaults = {
        "schemes": ("http", "https"),
        "hosts": ("127.0.0.1:*", "images.test:*"),
        "networks": ("127.0.0.0/8",),
        "timeout_seconds": 20.0,
    }
    return Fetcher(SourcePolicy(**{**defaults, **options}))


def fetch(server: TrickServer, path: str, **options: Any) -> bytes:
    """Get a path of the trick server."""
    return fetcher(**options).fetch(f"http://127.0.0.1:{server.port}{path}")


def refusal(server: TrickServer, path: str, **options: Any) -> EventError:
    """The EventError a fetch ends with."""
    with pytest.raises(EventError) as caught:
        fetch(server, path, **options)
    return caught.value


def resolve(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Answer look-ups in turn (the last one for ever); returns the names asked for."""
    asked: list[str] = []

    real = socket.getaddrinfo

    def look_up(host: str, port: int, *others: Any, **named: Any) -> list[Any]:
        if host.replace(".", "").isdigit():  # an address already judged
            return real(host, port, *others, **named)
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    monkeypatch.setattr("worker.source_network.socket.getaddrinfo", look_up)
    return asked


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
    error = refusal(server, "/x?signature=secret")
    assert server.asked["/x?signature=secret"] == 1
    server.paths["/x"] = answer(status)
    error = refusal(server, "/x")
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


def test_retry_after_beyond_the_budget_gives_up_at_once(server: TrickServer) -> None:
    server.paths["/x"] = answer(429, retry_after="9" * 9)
    error = refusal(server, "/x", retry_seconds=5.0)
    assert (error.reason, server.asked["/x"]) == (Reason.SOURCE_UNAVAILABLE, 1)


def test_silence_ends_at_the_deadline(server: TrickServer) -> None:
    def hang(connection: socket.socket, _: int) -> None:
        server.closing.wait(PATIENCE)

    server.paths["/x"] = hang
    error = refusal(server, "/x", timeout_seconds=0.2, attempts=2)
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


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_three_redirects_are_followed_and_four_are_not(server: TrickServer, status: int) -> None:
    for step in range(4):
        server.paths[f"/{step}"] = answer(status, b"moved", location=f"{step + 1}?sig=s")
        server.paths[f"/{step}?sig=s"] = server.paths[f"/{step}"]
    server.paths["/4?sig=s"] = answer(200, BODY)
    assert fetch(server, "/1") == BODY
    error = refusal(server, "/0")
    assert (error.reason, error.detail) == (Reason.SOURCE_UNAVAILABLE, "more than 3 redirects")


@pytest.mark.parametrize(
    "location",
    [
        "http://localhost:{port}/a.jpg",  # another host
        "http://127.0.0.2:{port}/a.jpg",
        "//evil.example/a.jpg",
        "https://images.example/a.jpg",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "gopher://127.0.0.1:{port}/",
        "http://user:pass@127.0.0.1:{port}/a.jpg",
        "http://[::ffff:127.0.0.1]:{port}/a.jpg",
        "http://127.0.0.1:{port}@evil.example/",
        "http://evil\x00.example/",
        "http://[::1",
        ":http://[",  # httpx lets a plain ValueError through
    ],
)
def test_every_redirect_is_checked_again(server: TrickServer, location: str) -> None:
    server.paths["/x"] = answer(302, location=location.format(port=server.port))
    schemes = ("http", "https", "file")
    error = refusal(server, "/x", schemes=schemes, roots=("/etc",), attempts=1)
    assert error.reason in (Reason.BLOCKED_SOURCE, Reason.SOURCE_UNAVAILABLE)
    if "\x00" not in location:  # that is no header at all
        assert error.reason is Reason.BLOCKED_SOURCE
    assert server.asked == Counter({"/x": 1})


def test_redirect_to_a_private_address_by_name_is_blocked(
    server: TrickServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.paths["/x"] = answer(302, location="http://images.test/latest/meta-data")
    resolve(monkeypatch, ["127.0.0.1"], ["169.254.169.254"])
    error = refusal(server, "/x")
    assert error.reason is Reason.BLOCKED_SOURCE
    assert error.detail == "images.test is at 169.254.169.254, which is not a public address"


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "localhost"),
        "[::ffff:127.0.0.1]",
    ],
)
def test_loopback_in_any_spelling_is_blocked_by_default(server: TrickServer, host: str) -> None:
    source = fetcher(hosts=("*:*",), networks=())
    with pytest.raises(EventError) as caught:
        source.fetch(f"http://{host}:{server.port}/a.jpg")
    assert caught.value.reason is Reason.BLOCKED_SOURCE
    assert server.connections == 0


def test_only_judged_addresses_of_a_name_are_connected_to(
    server: TrickServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, ["10.0.0.1", "169.254.169.254", "127.0.0.1"])
    assert fetcher().fetch(f"http://images.test:{server.port}/a.jpg") == BODY
    assert f"host: images.test:{server.port}" in server.requests[0].decode().lower()


def test_rebound_name_changes_nothing(server: TrickServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look-up would answer this machine; there is none."""
    outside = TrickServer("127.0.0.2", server.port)
    outside.paths["/a.jpg"] = answer(200, b"outside")
    asked = resolve(monkeypatch, ["127.0.0.2"], ["127.0.0.1"])
    source = fetcher(networks=("127.0.0.2/32",))
    assert source.fetch(f"http://images.test:{server.port}/a.jpg") == b"outside"
    assert asked == ["images.test"]
    source.close()
    with pytest.raises(EventError) as caught:
        fetcher(networks=("127.0.0.2/32",)).fetch(f"http://images.test:{server.port}/a.jpg")
    assert caught.value.reason is Reason.BLOCKED_SOURCE
    assert server.connections == 0
    outside.close()


def test_second_address_is_tried_when_the_first_refuses(
    server: TrickServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, ["127.0.0.9", "127.0.0.1"])
    assert fetcher().fetch(f"http://images.test:{server.port}/a.jpg") == BODY


def test_unknown_name_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("worker.source_network.socket.getaddrinfo", unknown)
    with pytest.raises(EventError) as caught:
        fetcher(attempts=2).fetch("http://images.test/a.jpg")
    assert caught.value.reason is Reason.SOURCE_UNAVAILABLE
    assert "Name or service not known" in caught.value.detail


def test_hanging_look_up_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(
        "worker.source_network.socket.getaddrinfo", lambda *_, **__: answered.wait(PATIENCE) and []
    )
    with pytest.raises(EventError) as caught:
        fetcher(attempts=1, timeout_seconds=0.2).fetch("http://images.test/a.jpg")
    answered.set()
    assert caught.value.reason is Reason.SOURCE_UNAVAILABLE


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://127.0.0.1/a.jpg",
        "HTTPS://127.0.0.1:{port}/a.jpg",
        "http://",
        "http:///a.jpg",
        "http:127.0.0.1/a.jpg",
        "http://user@127.0.0.1:{port}/a.jpg",
        "http://user:pass@127.0.0.1:{port}/a.jpg",
        "http://evil.test\\@127.0.0.1:{port}/a.jpg",
        "http://127.0.0.1:{port}/a\r\nHost: evil",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:{port}.evil.test/",
        "http://[fe80::1%25lo]/",
        "http://" + "a" * 300 + ".test/",
        "http://..test/",
        "\nhttp://127.0.0.1:{port}/a.jpg",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
    ],
)
def test_odd_uris_are_blocked(server: TrickServer, uri: str) -> None:
    source = fetcher(schemes=("http",), hosts=("127.0.0.1:*", "*.test"))
    with pytest.raises(EventError) as caught:
        source.fetch(uri.format(port=server.port))
    assert caught.value.reason in (Reason.BLOCKED_SOURCE, Reason.SOURCE_UNAVAILABLE)
    assert server.connections == 0


def test_proxies_and_credentials_of_the_environment_are_ignored(
    server: TrickServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trap = TrickServer()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{trap.port}")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password pass")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert fetch(server, "/a.jpg") == BODY
    assert trap.connections == 0
    assert b"authorization" not in server.requests[0].lower()
    trap.close()


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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key for images.test, signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=images.test"),
            *("-addext", "subjectAltName=DNS:images.test"),
            *("-out", str(paths[0]), "-keyout", str(paths[1])),
        ],
        check=True,
        capture_output=True,
    )
    return paths


def test_tls_checks_the_name_of_the_uri_at_the_judged_address(
    server: TrickServer, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str | None] = []
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(*certificate)
    server.tls.sni_callback = lambda _, name, __: names.append(name)
    asked = resolve(monkeypatch, ["127.0.0.1"])
    uri = f"https://images.test:{server.port}/a.jpg"
    assert fetcher(ca_file=str(certificate[0])).fetch(uri) == BODY
    assert (names, asked) == (["images.test"], ["images.test"])
    for wrong, options in (
        (uri, {}),  # an unknown authority
        (uri.replace("images.test", "127.0.0.1"), {"ca_file": str(certificate[0])}),
    ):
        with pytest.raises(EventError) as caught:
            fetcher(attempts=1, **options).fetch(wrong)
        assert caught.value.reason is Reason.SOURCE_UNAVAILABLE
        assert "CERTIFICATE_VERIFY_FAILED" in caught.value.detail
