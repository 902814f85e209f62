"""Images over http and https, from strangers' servers.

Owns the conversation: redirects, status codes, size. Connections are `worker.source_network`'s.
Built on httpcore rather than httpx: no proxies or certificates from the environment, no
cookies, no content decoding (so no compression bombs), no redirects but those made here.
"""

import datetime
import email.utils
import re
from collections.abc import Callable
from time import time

import httpcore
import httpx

from worker.errors import EventError, Reason
from worker.source_network import GuardedBackend
from worker.source_policy import DEFAULT_PORTS, Deadline, HostRule, SourcePolicy, Unavailable

Fields = dict[bytes, str]  # of an answer's head, names in lower case
Judge = Callable[[int, Fields, str], None]  # status, fields, host

_HEADERS = [
    (b"accept", b"image/*"),
    (b"accept-encoding", b"identity"),
    (b"user-agent", b"image-dedup-stream"),
]
_REDIRECTS = (301, 302, 303, 307, 308)
_GONE = (404, 410)
_DENIED = (401, 403, 407, 451)
_PASSING = (408, 425, 429)  # and all of 5xx
_QUOTED = re.compile(r":?\s*(bytearray\(|\bb['\"]).*", re.DOTALL)  # bytes that h11 refuses
_KEPT_CONNECTIONS = 64
_KEEP_SECONDS = 15.0
_MOST_RETRY_AFTER = 86_400.0  # seconds; whoever asks for more is not waited for either


class HttpSource:
    """Gets images by http and https as a policy allows. Thread-safe."""

    def __init__(self, policy: SourcePolicy, judge: Judge | None = None) -> None:
        """`judge` may know better what an answer other than the body means."""
        self._policy = policy
        self._judge = judge or raise_for
        self._rules = [HostRule.parse(pattern) for pattern in policy.hosts]
        self._backend = GuardedBackend(policy.parsed_networks())
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(verify=policy.ca_file or True, trust_env=False),
            max_connections=None,  # as many as threads that fetch
            max_keepalive_connections=_KEPT_CONNECTIONS,
            keepalive_expiry=_KEEP_SECONDS,
            network_backend=self._backend,
        )

    def get(self, uri: str, deadline: Deadline) -> bytes:
        """One try. Raises EventError, or Unavailable when another try may succeed.

        Raises InfrastructureError when this machine is out of descriptors or memory.
        """
        url = self._allowed(uri)
        try:
            with self._backend.until(deadline):
                return self._follow(url)
        except httpcore.TimeoutException as error:
            raise Unavailable(f"{url.host} did not answer in time") from error
        except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
            raise Unavailable(f"{url.host}: {_words(error)}") from error
        except (httpcore.LocalProtocolError, httpcore.UnsupportedProtocol) as error:
            raise EventError(Reason.BLOCKED_SOURCE, f"no valid request: {_words(error)}") from error

    def close(self) -> None:
        """Drop all connections; fetches under way fail."""
        self._backend.shut_down()
        self._pool.close()

    def _allowed(self, uri: str) -> httpx.URL:
        """Parse once, for judging and connecting alike; hold scheme and host to the policy."""
        try:
            url = httpx.URL(uri)
        except (httpx.InvalidURL, ValueError) as error:
            raise EventError(Reason.BLOCKED_SOURCE, "the uri is malformed") from error
        if url.scheme not in self._policy.schemes or url.scheme not in DEFAULT_PORTS:
            raise EventError(Reason.BLOCKED_SOURCE, f"scheme {url.scheme[:20]!r} is not allowed")
        if url.userinfo:
            raise EventError(Reason.BLOCKED_SOURCE, "the uri holds a user or password")
        host = url.raw_host.decode("ascii")
        if not any(rule.allows(url.scheme, host, url.port) for rule in self._rules):
            where = host if url.port is None else f"{host}:{url.port}"
            raise EventError(Reason.BLOCKED_SOURCE, f"host {where[:255]!r} is not allowed")
        return url

    def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(self._policy.redirects + 1):
            answer = self._ask(url)
            if isinstance(answer, bytes):
                return answer
            url = answer
        detail = f"more than {self._policy.redirects} redirects"
        raise EventError(Reason.SOURCE_UNAVAILABLE, detail)

    def _ask(self, url: httpx.URL) -> bytes | httpx.URL:
        """One request: the body, or where it is instead (already allowed)."""
        target = httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        headers = [(b"host", url.netloc), *_HEADERS]
        with self._pool.stream("GET", target, headers=headers) as response:
            fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in fields:
                return self._allowed(_joined(url, fields[b"location"]))
            self._judge(response.status, fields, url.host)
            return self._body(response, fields)

    def _body(self, response: httpcore.Response, fields: Fields) -> bytes:
        coding = fields.get(b"content-encoding", "identity")
        if coding.lower() not in ("identity", ""):
            detail = f"content encoding {coding[:20]!r}, though none was asked for"
            raise EventError(Reason.UNSUPPORTED_FORMAT, detail)
        stated = fields.get(b"content-length", "")
        if stated.isascii() and stated.isdigit():
            self._check_size(int(stated[:20]))
        body = bytearray()
        for part in response.iter_stream():
            body += part
            self._check_size(len(body))
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self._policy.max_bytes:
            detail = f"more than {self._policy.max_bytes} bytes"
            raise EventError(Reason.TOO_LARGE, detail)


def raise_for(status: int, fields: Fields, host: str) -> None:
    """Return for a body worth reading, else raise what the status means."""
    if status == 200:
        return
    detail = f"{host} answered {status}"
    if status in _GONE:
        raise EventError(Reason.SOURCE_GONE, detail)
    if status in _DENIED:
        raise EventError(Reason.SOURCE_DENIED, detail)
    if status in _PASSING or status >= 500:
        raise Unavailable(detail, _retry_after(fields.get(b"retry-after", "")))
    raise EventError(Reason.SOURCE_UNAVAILABLE, detail)


def _retry_after(value: str) -> float | None:
    """Seconds from a Retry-After header (RFC 9110, 10.2.3); None without a usable one."""
    if value.isascii() and value.isdigit():
        seconds = float(value[:10])
    elif (ahead := seconds_ahead(value)) is not None:
        seconds = ahead
    else:
        return None
    return min(max(0.0, seconds), _MOST_RETRY_AFTER)


def seconds_ahead(date: str) -> float | None:
    """How far a date of a header lies ahead of this machine's clock; None where it is no date."""
    try:
        when = email.utils.parsedate_to_datetime(date)
    except (ValueError, OverflowError):  # its numbers are a stranger's, and of any length
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return when.timestamp() - time()


def _joined(url: httpx.URL, location: str) -> str:
    try:
        return str(url.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise EventError(Reason.BLOCKED_SOURCE, "redirected to a malformed uri") from error


def _words(error: Exception) -> str:
    """What went wrong, bounded and printable. Names no path or query, nor repeats what was sent:
    a server may answer with the request, and its signature."""
    words = " ".join(_QUOTED.sub("", str(error)).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in words)[:120]
