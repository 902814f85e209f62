"""A TCP proxy on loopback that delays what passes or cuts it off."""

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

CHUNK = 65_536
HOST = "127.0.0.1"


class Proxy:
    """Passes bytes between its clients and `port`; settings hold for open connections, too."""

    def __init__(self, port: int) -> None:
        self.delay_seconds = 0.0
        self._target = port
        self._refusing = False
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection and let in no new one."""
        with self._lock:
            self._refusing = True
            for connection in self._connections:
                _close(connection)
            self._connections.clear()

    def mend(self) -> None:
        """Let in again."""
        self._refusing = False

    def redirect(self, port: int) -> None:
        """Lead everybody, those connected too, to another server."""
        self.cut()
        self._target = port
        self.mend()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                try:
                    self._serve(client)
                except OSError:  # nobody behind it, or cut off meanwhile
                    _close(client)

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection((HOST, self._target))
        with self._lock:
            self._connections += [client, server]
            refused = self._refusing
        if refused:  # asked after the connection is known to `cut`, so that none slips through
            _close(client)
            _close(server)
            return
        for source, sink in ((client, server), (server, client)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                sink.sendall(data)
        _close(source)
        _close(sink)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
