"""A server on loopback that speaks HTTP badly on purpose, and what its tests share."""

import contextlib
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from worker.errors import EventError
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
