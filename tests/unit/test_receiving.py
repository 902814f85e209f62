"""Connections to Kafka are read in large pieces and to their end, in the clear and through TLS."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import trustme
from kafka.errors import KafkaConnectionError
from kafka.net import manager, transport
from kafka.protocol import frame, parser

from worker.receiving import receive_in_large_pieces

PICTURE = bytes(100_000)
TLS_RECORD = 16 * 1024
HUNG_UP = KafkaConnectionError("socket disconnected")


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KafkaTCPTransport", "KafkaSSLTransport"):
        monkeypatch.setattr(manager, name, getattr(transport, name))
    monkeypatch.setattr(parser, "KafkaBytes", frame.KafkaBytes)
    receive_in_large_pieces()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_picture_comes_in_one_piece(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.setblocking(False)
    text = repr(ours)
    connection = manager.KafkaTCPTransport(None, ours)
    theirs.sendall(PICTURE)
    assert connection._sock.recv(4096) == PICTURE
    theirs.sendall(PICTURE + b"next")
    assert connection._sock_recv() == (PICTURE + b"next", None)
    assert connection._sock_recv() == (b"", None)  # nothing there: it did not wait
    assert repr(connection._sock) == text
    assert ours.fileno() == -1
    connection._sock.close()
    assert theirs.recv(1) == b""


def test_a_record_of_tls_comes_in_one_piece(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    ours, theirs = ends
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("kafka.test").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))

    def serve() -> None:
        with tls.wrap_socket(theirs, server_side=True) as server:
            server.sendall(PICTURE)

    serving = Thread(target=serve)
    serving.start()
    cafile = str(tmp_path / "authority.pem")
    connection = manager.KafkaSSLTransport(None, ours, host="kafka.test", ssl_cafile=cafile)
    connection._sock.do_handshake()
    assert len(connection._sock.recv(4096)) == TLS_RECORD
    assert "TLS" in repr(connection._sock)
    serving.join()
    assert connection._sock_recv() == (PICTURE[TLS_RECORD:], None)
    assert connection._sock_recv() == (b"", HUNG_UP)
    connection._sock.close()


def test_why_nothing_can_be_sent_is_heard(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came in before the end that sending met: here, that a certificate is required."""
    ours, theirs = ends
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("kafka.test").configure_cert(tls)
    authority.configure_trust(tls)
    tls.verify_mode = ssl.CERT_REQUIRED
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))

    def serve() -> None:
        with pytest.raises(ssl.SSLError):
            tls.wrap_socket(theirs, server_side=True)

    serving = Thread(target=serve)
    serving.start()
    cafile = str(tmp_path / "authority.pem")
    connection = manager.KafkaSSLTransport(None, ours, host="kafka.test", ssl_cafile=cafile)
    connection._sock.do_handshake()
    serving.join()
    monkeypatch.setattr(transport.KafkaSSLTransport, "_sock_send", lambda _: (0, HUNG_UP))
    assert "CERTIFICATE_REQUIRED" in str(connection._sock_send()[1])
    connection._sock.close()


def test_what_is_said_before_the_end_is_heard(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.setblocking(False)
    connection = manager.KafkaTCPTransport(None, ours)
    theirs.sendall(b"a wrong password")
    theirs.close()
    assert connection._sock_recv() == (b"a wrong password", None)
    assert connection._sock_recv() == (b"", HUNG_UP)
    connection._sock.close()


def test_an_answer_is_put_together_and_its_rest_is_not_copied() -> None:
    answer = parser.KafkaBytes(12)
    for piece in (b"head", b"re", b"cords!"):
        answer.write(piece)
    answer.seek(0)
    assert answer.read(4) == b"head"
    rest = answer.read()
    assert (bytes(rest), answer.tell()) == (b"records!", 12)
    assert rest.obj is answer
