"""Whom the HTTP source may talk to: redirects, addresses, names, odd uris, proxies, TLS.

Names are resolved by a double of `getaddrinfo` where a test needs other answers than this
machine's; everything from the socket on is real.
"""

import socket
import ssl
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.unit.trick_server import (
    BODY,
    PATIENCE,
    TrickServer,
    answer,
    fetch,
    fetcher,
    refusal,
    resolve,
)
from worker.errors import EventError, Reason


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


SIGNED = "/a.jpg?X-Amz-Signature=hush-1&token=hush-2"


@pytest.mark.parametrize(
    "response",
    [
        *(answer(status) for status in (204, 400, 401, 403, 404, 410, 451, 429, 500, 503)),
        answer(302, location="https://elsewhere.test/b.jpg?X-Amz-Signature=hush-3#hush-4"),
        answer(302, location="http://user:hush-5@127.0.0.1/b.jpg"),
        answer(302, location="http://[x/b.jpg?hush-6"),
        answer(302, location="x:hush-7"),
        answer(302, location="http://127.0.0.1:1/b.jpg?hush-8"),
        answer(302, location="/hush-9\x00"),
        answer(302, location=SIGNED),  # for ever
        answer(200, BODY, content_encoding="gzip"),
        b"HTTP/1.1 200 x\r\ncontent-length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 x\r\ncontent-length: 9\r\n\r\nshort",
        f"GET {SIGNED} HTTP/1.1\r\n\r\n".encode(),  # an echo
        f"HTTP/1.1 200 x\r\nGET {SIGNED} HTTP/1.1\r\n\r\n".encode(),
        f"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\nGET {SIGNED}\r\n".encode(),
        b"",
    ],
)
def test_no_error_of_a_signed_link_shows_what_it_was_signed_with(
    server: TrickServer, response: bytes
) -> None:
    server.paths[SIGNED] = lambda it, _: it.sendall(response)
    error = refusal(server, SIGNED, attempts=1)
    assert not any(each in str(error) for each in ("hush", "Signature", "a.jpg", "b.jpg"))


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://user:hush@127.0.0.1/hush?hush#hush",
        "https://user:hush@127.0.0.1/hush?hush#hush",
        "https://elsewhere.test/hush?hush#hush",
        "https://127.0.0.1:hush/hush",
        "https://[x/hush",
        "http://127.0.0.1:1/hush?hush#hush",
        "http://127.0.0.1:1/\x00hush",
        "file:///hush?hush#hush",
        "file://elsewhere.test/hush",
        "file:///etc/hush",
        "file:hush",
        "s3://bucket/hush",
        "data:image/png;base64,hush",
        "hush@127.0.0.1/hush",
        "//user:hush@127.0.0.1/hush",
        "/x?hush&t=12:30",
        "//cdn.test/a?hush&e=12:30",
        "?hush:1",
        "hush hush:x",
        "1hush:x",
        " hush://127.0.0.1/",
        "hush\u00fc:x",
        "a=hush:x",
    ],
)
def test_no_error_of_a_uri_shows_more_than_its_scheme_and_host(uri: str) -> None:
    source = fetcher(schemes=("http", "https", "file"), roots=("/etc",), attempts=1)
    with pytest.raises(EventError) as caught:
        source.fetch(uri)
    assert "hush" not in str(caught.value)


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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The certificate of an authority, and the chain and key it made for images.test."""
    folder = tmp_path_factory.mktemp("tls")
    authority, server = folder / "authority.pem", folder / "server.pem"
    made = trustme.CA()
    made.cert_pem.write_to_path(str(authority))
    made.issue_cert("images.test").private_key_and_cert_chain_pem.write_to_path(str(server))
    return authority, server


def test_tls_checks_the_name_of_the_uri_at_the_judged_address(
    server: TrickServer, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str | None] = []
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(certificate[1])
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


def test_authorities_of_the_environment_are_ignored(
    server: TrickServer,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Those that are trusted are the setting's, or else certifi's: neither more nor fewer."""
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(certificate[1])
    resolve(monkeypatch, ["127.0.0.1"])
    before = trusted()
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert trusted() == before != []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with pytest.raises(EventError, match="CERTIFICATE_VERIFY_FAILED"):
        fetcher(attempts=1).fetch(f"https://images.test:{server.port}/a.jpg")


def trusted() -> list[Any]:
    """The authorities of a fetcher that is told of none."""
    context: Any = fetcher()._http._pool._ssl_context
    return list(context.get_ca_certs())
