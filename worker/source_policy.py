"""What may be fetched, and for how long: the policy every kind of source is held to.

Owns the policy, its validation, and the words sources share. Opens nothing.
"""

import errno
import ipaddress
import re
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from worker import wellformed
from worker.errors import ConfigError

# The schemes there are, each with the field that must name what it may fetch.
ALLOWED_BY = {"https": "hosts", "http": "hosts", "file": "roots", "s3": "buckets"}
DEFAULT_PORTS = {"https": 443, "http": 80}
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_BUCKET = re.compile(r"[a-zA-Z0-9._-]{1,255}")  # what botocore signs for, access points aside
_RULE = re.compile(r"(\[(?P<address>[^\]]*)\]|(?P<name>[^:\[\]]+))(:(?P<port>[0-9]{1,5}|\*)?)?")
_NAME = re.compile(r"([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class SourcePolicy:
    """Everything is forbidden until a field allows it.

    `hosts` holds names, `*.example.com` (any depth, not example.com itself) or `*`, each for
    the scheme's own port, or with `:PORT` or `:*`. An address is a name like any other;
    an IPv6 one wants brackets before a port.
    `networks` are non-public networks, in CIDR, that may be connected to all the same.
    """

    schemes: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()  # folders; a file must lie below one, symbolic links resolved
    networks: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ()  # of s3
    s3_endpoint: str | None = None  # of a service other than AWS; None: the region's
    s3_region: str | None = None  # None: what botocore finds
    max_bytes: int = 20 * 1024 * 1024
    timeout_seconds: float = 10.0  # of one try, from name look-up to the last byte
    attempts: int = 3
    retry_seconds: float = 30.0  # all pauses between tries together
    redirects: int = 3
    ca_file: str | None = None  # PEM; None: the certifi bundle

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            if scheme not in ALLOWED_BY:
                known = ", ".join(ALLOWED_BY)
                raise ConfigError(f"fetch_schemes: {scheme!r} is not one of {known}")
            if not getattr(self, needed := ALLOWED_BY[scheme]):
                told = f"{scheme} may fetch nothing unless {needed} are named"
                raise ConfigError(f"fetch_{needed}: {told}")
        for bucket in self.buckets:
            if not _BUCKET.fullmatch(bucket):
                raise ConfigError(f"fetch_buckets: {bucket!r} is not the name of a bucket")
        if self.s3_endpoint is not None and not _is_endpoint(self.s3_endpoint):
            raise ConfigError("fetch_s3_endpoint: not an http(s) url without user and password")
        for root in self.roots:
            if not Path(root).is_absolute():
                raise ConfigError(f"fetch_roots: {root!r} is not an absolute path")
            if not Path(root).is_dir():
                raise ConfigError(f"fetch_roots: {root!r} is no folder, or may not be looked into")
        for pattern in self.hosts:
            HostRule.parse(pattern)
        self.parsed_networks()

    def parsed_networks(self) -> tuple[Network, ...]:
        """`networks` as objects."""
        try:
            return tuple(ipaddress.ip_network(text) for text in self.networks)
        except ValueError as error:
            raise ConfigError(f"fetch_networks: {error}") from error


@dataclass(frozen=True)
class HostRule:
    """One entry of `SourcePolicy.hosts`."""

    name: str  # lower case, punycode; "" for any host
    below: bool  # the names below `name` instead of itself
    port: int | None  # None: the scheme's own
    any_port: bool

    @classmethod
    def parse(cls, pattern: str) -> "HostRule":
        """Raises ConfigError."""
        try:
            name, port = _name_and_port(pattern)
            below = name == "*" or name.startswith("*.")
            ascii_name = "" if name == "*" else _ascii_host(name.removeprefix("*."))
        except ValueError as error:
            raise ConfigError(f"fetch_hosts: {wellformed.shown(pattern)} {error}") from error
        return cls(ascii_name, below, int(port) if port.isdigit() else None, port == "*")

    def allows(self, scheme: str, host: str, port: int | None) -> bool:
        """Whether a uri's scheme, host (as `httpx.URL.raw_host` has it) and port may be used."""
        wanted = self.port or DEFAULT_PORTS[scheme]
        if not self.any_port and (port or DEFAULT_PORTS[scheme]) != wanted:
            return False
        host = host.lower().rstrip(".")
        if not self.below:
            return host == self.name
        return not self.name or host.endswith("." + self.name)


def _name_and_port(pattern: str) -> tuple[str, str]:
    """A rule's host, without brackets, and its port: digits, * or nothing. Raises ValueError."""
    if _is_ipv6(pattern):
        return pattern, ""
    found = _RULE.fullmatch(pattern)
    if found is None:
        raise ValueError("is not a host")
    port = found["port"] or ""
    if port.isdigit() and not 0 < int(port) < 65_536:
        raise ValueError("has a port that is none")
    address = found["address"]
    if address is not None and not _is_ipv6(address):
        raise ValueError("is not an IPv6 address")
    return address or found["name"], port


def _ascii_host(name: str) -> str:
    """A name or an address as `httpx.URL.raw_host` has it. Raises ValueError where it is neither.

    httpx's own, because names that look alike to one version of IDNA are another's to the next.
    """
    try:
        host = httpx.URL(scheme="http", host=name).raw_host.decode("ascii")
    except httpx.InvalidURL as error:
        raise ValueError("is not a host") from error
    host = host.lower().removesuffix(".")
    if not (_is_ipv6(host) or _NAME.fullmatch(host)):
        raise ValueError("is not a host")
    return host


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.IPv6Address(text).scope_id is None
    except ValueError:
        return False


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    plain = not (parts.query or parts.fragment or "@" in url)
    return parts.scheme in DEFAULT_PORTS and bool(parts.hostname) and plain


class Unavailable(Exception):
    """One try failed in a way another may not; `retry_after` is what the source asked for."""

    def __init__(self, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


def is_shortage(error: BaseException | None) -> bool:
    """Whether this machine is out of descriptors or memory, by an error or what led to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _SHORTAGE:
            return True
        error = error.__cause__
    return False


class Deadline:
    """A point in time, handed down through every wait of one try."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative once it has passed."""
        return self._end - time.monotonic()
