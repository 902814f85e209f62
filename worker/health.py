"""`/livez`, `/readyz` and `/metrics` over HTTP.

Knows only callables that answer; what they check is wired by the loop.
"""

import json
import socket
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

Check = Callable[[], bool]


class HealthServer:
    """Serves the three paths from a daemon thread until closed."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        live: Mapping[str, Check],
        ready: Mapping[str, Check],
    ) -> None:
        """Bind `host:port` (0 picks a free port). Raises OSError when it cannot.

        An IPv6 address may have brackets; of a name with addresses of both kinds, IPv4 is meant.
        """

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds a client may keep a connection without asking

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif path in ("/livez", "/readyz"):
                    found = {
                        name: check()
                        for name, check in (live if path == "/livez" else ready).items()
                    }
                    status = 200 if all(found.values()) else 503
                    self._answer(status, "application/json", json.dumps(found).encode() + b"\n")
                else:
                    self._answer(404, "text/plain", b"/metrics /livez /readyz\n")

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not news."""

        family, address = _address(host, port)

        class Server(ThreadingHTTPServer):
            address_family = family
            daemon_threads = True

        self._server = Server(address, Handler)
        self.port = int(self._server.server_address[1])
        self._thread = Thread(target=self._server.serve_forever, name="health", daemon=True)

    def __enter__(self) -> "HealthServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The kind of address to listen at, and the address. Raises OSError for an unknown name."""
    found = socket.getaddrinfo(
        host.removeprefix("[").removesuffix("]") or None,
        port,
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )
    family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, address
