"""Reads Kafka's sockets in large pieces, and to their end.

kafka-python 3.0 asks for 4 KiB at a time: 27 calls for a picture of 100 kB, each of which lets
Python's lock go and waits for it again. Its selector also looks a socket up by its text wherever it
waits, which asks the kernel for both addresses. An answer, which may be megabytes long, it copies
five times before it looks into it. What a broker says before it hangs up is thrown
away where both come together, as when it says that a password is wrong. And for TLS with one that
says nothing it waits for ever. Owns the sockets and the buffer that do none of that; knows nothing
of what is read.
"""

import socket
import ssl
from typing import Any

from kafka.net import manager
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport
from kafka.protocol import parser
from kafka.protocol.frame import KafkaBytes

AT_ONCE = 4 * 1024 * 1024
"""Bytes. What comes in one piece need not be put together, which takes a copy."""
TLS_RECORD = 16 * 1024
"""Bytes; of TLS no more come at once."""

HANDSHAKE_SECONDS = 3.0
"""For TLS to come about; less than one try to find a broker has, so that others are asked, too."""

_Received = tuple[bytes, Exception | None]


class _Socket(socket.socket):
    """A connected socket, taken over from another object."""

    def __init__(self, connected: socket.socket) -> None:
        self._text = repr(connected)
        timeout = connected.gettimeout()
        family, kind, protocol = connected.family, connected.type, connected.proto
        super().__init__(family, kind, protocol, fileno=connected.detach())
        self.settimeout(timeout)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """At least as much as was asked for, where it is there."""
        return super().recv(max(size, AT_ONCE), flags)

    def __repr__(self) -> str:
        return self._text


class _TlsSocket(ssl.SSLSocket):
    def recv(self, size: int = TLS_RECORD, flags: int = 0) -> bytes:
        """At least as much as was asked for, where it is there."""
        return super().recv(max(size, TLS_RECORD), flags)

    def __repr__(self) -> str:
        return f"<TLS socket {self.fileno()}>"


class _Tcp(KafkaTCPTransport):  # type: ignore[misc]
    def __init__(self, net: Any, sock: socket.socket, host: str | None = None) -> None:
        super().__init__(net, _Socket(sock), host=host)

    def _sock_recv(self) -> _Received:
        return _before_the_end(*super()._sock_recv())


class _Tls(KafkaSSLTransport):  # type: ignore[misc]
    @staticmethod
    def _build_ssl_context(config: dict[str, Any]) -> ssl.SSLContext:
        context: ssl.SSLContext = KafkaSSLTransport._build_ssl_context(config)
        context.sslsocket_class = _TlsSocket
        return context

    async def handshake(self) -> None:
        """Agree on TLS. Raises OSError, of which TimeoutError is one."""
        late = self._net.call_later(HANDSHAKE_SECONDS, self._hang_up)
        try:
            await super().handshake()
        except OSError as error:
            self._sock.close()  # nobody else would
            if late.is_done:
                raise TimeoutError(f"no answer within {HANDSHAKE_SECONDS:g} s") from error
            raise
        finally:
            self._net.cancel(late)

    def _sock_send(self) -> tuple[int, Exception | None]:
        """As kafka-python, but where nothing can be sent any more, why may be there to be read."""
        sent, error = super()._sock_send()
        if error is not None and self._sock is not None:
            error = self._sock_recv()[1] or error
        return sent, error

    def _hang_up(self) -> None:
        """Let whoever waits for the socket see its end; SSLSocket's own would forget the TLS."""
        socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _sock_recv(self) -> _Received:
        return _before_the_end(*super()._sock_recv())


class _Frame(KafkaBytes):  # type: ignore[misc]
    """An answer, or its length, while it comes in."""

    _idx: int

    def write(self, data: bytes) -> None:
        """Put it behind what came before; a bytearray would copy it once more on the way."""
        start = self._idx
        self._idx += len(data)
        with memoryview(self) as whole:
            whole[start : self._idx] = data

    def read(self, nbytes: int | None = None) -> Any:
        """A copy of so many bytes; all that is left is not copied."""
        if nbytes is not None:
            return super().read(nbytes)
        rest = memoryview(self)[self._idx :]
        self._idx = len(self)
        return rest


def _before_the_end(data: bytes, error: Exception | None) -> _Received:
    """What came, if anything did; the end comes again."""
    return (data, None) if data else (data, error)


def receive_in_large_pieces() -> None:
    """Let all connections to Kafka that this process makes from now on be read so."""
    manager.KafkaTCPTransport = _Tcp
    manager.KafkaSSLTransport = _Tls
    parser.KafkaBytes = _Frame
