"""Connections to checked addresses only, each wait of theirs under one deadline.

Owns name look-up, the judgement on addresses, and the sockets; `worker.source_http` speaks
HTTP over them. A name is resolved here once, every address is judged, and the connection is
made to the judged address itself: no second look-up can swap it (DNS rebinding). Host header
and TLS name stay those of the uri.
"""

import contextlib
import ipaddress
import socket
import ssl
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import httpcore

from worker.errors import EventError, InfrastructureError, Reason
from worker.source_policy import Address, Deadline, Network, is_shortage

_MOST_ADDRESSES = 4  # tried of one name
_MOST_LOOKUPS = 64  # at once; one that hangs keeps its place until the resolver gives up

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # of IPv6, by RFC 4291
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address is in the last 4 bytes
# The registries of special addresses (IANA, RFC 6890), written out: what Python's `is_global`
# knows of them depends on its version.
_REFUSED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local; clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; one cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "168.63.129.16/32",  # one cloud's metadata, though a public address
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)


def is_public(address: Address) -> bool:
    """Whether an address is a plain one of the internet.

    An IPv4 address inside an IPv6 one (mapped, NAT64, 6to4) is judged as itself. Tunnels,
    multicast, reserved, private, loopback, link-local and shared addresses are not public.
    """
    inner = embedded(address)
    if inner is not None:
        return is_public(inner)
    if address.version == 6 and address not in _GLOBAL_UNICAST:
        return False
    return not any(address in network for network in _REFUSED)


def embedded(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address an IPv6 address stands for, if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


class GuardedBackend(httpcore.NetworkBackend):
    """Sockets for an `httpcore.ConnectionPool`, used from several threads.

    Each thread sets its deadline with `until`; every look-up, connect, handshake, read and
    write of that thread then ends by it, however slowly the other side drips.
    """

    def __init__(self, networks: tuple[Network, ...]) -> None:
        self._networks = networks
        self._sockets = httpcore.SyncBackend()
        self._thread = threading.local()
        self._lookups = threading.BoundedSemaphore(_MOST_LOOKUPS)
        self._streams: weakref.WeakSet[TimedStream] = weakref.WeakSet()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def until(self, deadline: Deadline) -> Iterator[None]:
        """Hold this thread's network calls to a deadline."""
        self._thread.deadline = deadline
        try:
            yield
        finally:
            del self._thread.deadline

    def left(self, error: type[httpcore.TimeoutException]) -> float:
        """Seconds this thread may still wait; raises `error` when there are none."""
        deadline: Deadline = self._thread.deadline
        left = deadline.left
        if left <= 0:
            raise error("the time is up")
        return left

    def track(self, stream: "TimedStream") -> "TimedStream":
        """Remember a connection for `shut_down`."""
        with self._lock:
            self._streams.add(stream)
        return stream

    def shut_down(self) -> None:
        """End every connection, and with it whatever another thread waits for on it."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.shut_down()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Resolve, judge, connect to what was judged.

        Raises EventError (blocked_source), and InfrastructureError when this machine is out of
        descriptors, memory or threads.
        """
        addresses = self._judged(host, self._resolve(host, port))
        failure: httpcore.NetworkError | httpcore.TimeoutException | None = None
        for address in addresses[:_MOST_ADDRESSES]:
            left = self.left(httpcore.ConnectTimeout)
            try:
                with _shortage_told():
                    stream = self._sockets.connect_tcp(
                        str(address), port, left, local_address, socket_options
                    )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return self.track(TimedStream(stream, self))
        raise failure or httpcore.ConnectError("the name has no address")

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Never."""
        raise EventError(Reason.BLOCKED_SOURCE, "a local socket")

    def _judged(self, host: str, addresses: list[Address]) -> list[Address]:
        good = [address for address in addresses if self._may_connect(address)]
        if addresses and not good:
            detail = f"{host} is at {addresses[0]}, which is not a public address"
            raise EventError(Reason.BLOCKED_SOURCE, detail)
        return good

    def _may_connect(self, address: Address) -> bool:
        if is_public(address):
            return True
        plain = embedded(address) or address
        return any(plain in network for network in self._networks)

    def _resolve(self, host: str, port: int) -> list[Address]:
        """Look a name up on a thread of its own: the system's resolver knows no deadline."""
        if not self._lookups.acquire(timeout=self.left(httpcore.ConnectTimeout)):
            raise httpcore.ConnectTimeout("name look-ups hang")
        answer: Future[list[Address]] = Future()

        def look_up() -> None:
            try:
                answer.set_result(_addresses(host, port))
            except (OSError, ValueError) as error:  # ValueError: no name at all, for IDNA
                answer.set_exception(_unresolved(error))
            finally:
                self._lookups.release()

        try:
            threading.Thread(target=look_up, name="look-up", daemon=True).start()
        except RuntimeError as error:  # this machine gives no more threads
            self._lookups.release()
            raise InfrastructureError(f"name look-up: {error}") from error
        try:
            return answer.result(self.left(httpcore.ConnectTimeout))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("name look-up took too long") from error


class TimedStream(httpcore.NetworkStream):
    """A connection whose every wait ends by the calling thread's deadline."""

    def __init__(self, stream: httpcore.NetworkStream, backend: GuardedBackend) -> None:
        self._stream, self._backend = stream, backend

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Up to `max_bytes`."""
        left = self._backend.left(httpcore.ReadTimeout)
        with _shortage_told():
            return self._stream.read(max_bytes, left)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """All of `buffer`."""
        left = self._backend.left(httpcore.WriteTimeout)
        with _shortage_told():
            self._stream.write(buffer, left)

    def close(self) -> None:
        """Close the socket."""
        self._stream.close()

    def shut_down(self) -> None:
        """Wake whoever waits on the socket. Closing alone would not."""
        raw: socket.socket = self._stream.get_extra_info("socket")
        with contextlib.suppress(OSError):  # already at its end
            socket.socket.shutdown(raw, socket.SHUT_RDWR)  # without a word of TLS

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """Shake hands, for the name of the uri."""
        left = self._backend.left(httpcore.ConnectTimeout)
        with _shortage_told():
            stream = self._stream.start_tls(ssl_context, server_hostname, left)
        return self._backend.track(TimedStream(stream, self._backend))

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks of a stream."""
        return self._stream.get_extra_info(info)


def _addresses(host: str, port: int) -> list[Address]:
    """Addresses of a name in the resolver's order, without repeats. Blocks."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in found))


@contextlib.contextmanager
def _shortage_told() -> Iterator[None]:
    """Tell a shortage of this machine from trouble of the other side.

    Only here: httpcore's pool forgets what led to an error.
    """
    try:
        yield
    except httpcore.NetworkError as error:
        if is_shortage(error):
            raise InfrastructureError(f"fetching: {error}") from error
        raise


def _unresolved(error: Exception) -> Exception:
    """What a failed look-up means. Out of descriptors, the resolver names any error but that."""
    try:
        socket.socket().close()
    except OSError as shortage:
        error = shortage
    if is_shortage(error):
        return InfrastructureError(f"name look-up: {error}")
    return httpcore.ConnectError(f"name look-up: {error}")
