"""Images in S3, and in services that speak like it, by links signed here.

Owns signing, which is botocore's: its chain of credentials (environment, files, roles), the
endpoints of regions, Signature Version 4 in the query. A link is then fetched as any other by
`worker.source_http`, guarded alike, but from the endpoint's own host alone and without redirects:
a signature goes nowhere else. It must not know formats, events or what is tried again.
"""

from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from worker.errors import ConfigError, EventError, InfrastructureError, Reason
from worker.source_http import Fields, HttpSource, raise_for, seconds_ahead
from worker.source_policy import Deadline, SourcePolicy

if TYPE_CHECKING:  # an optional extra
    from botocore.client import BaseClient

_SPARE_SECONDS = 60  # a link is good for longer than one try, should clocks differ
_EARLY_SECONDS = 14 * 60  # a link from the future is good, too, while that is a quarter of an hour
_REFUSED = (400, 401, 403)


class S3Source:
    """Gets `s3://bucket/key`, the key as it stands, from the buckets a policy names. Thread-safe.

    Raises ConfigError when botocore or credentials are missing, or the endpoint is none.
    """

    def __init__(self, policy: SourcePolicy) -> None:
        self._buckets = policy.buckets
        self._expires = int(policy.timeout_seconds) + _SPARE_SECONDS
        self._client = _client(policy)
        endpoint = urlsplit(self._client.meta.endpoint_url)
        # AWS answers at the endpoint's name and, for most buckets, at one below it.
        below = () if policy.s3_endpoint else (f"*.{endpoint.netloc}",)
        hosts = (endpoint.netloc, *below)
        own = replace(policy, schemes=(endpoint.scheme,), hosts=hosts, redirects=0)
        self._http = HttpSource(own, _judge)

    def get(self, uri: str, deadline: Deadline) -> bytes:
        """One try. Raises as `HttpSource.get`; InfrastructureError when nothing can be signed."""
        bucket, _, key = uri[len("s3:") :].removeprefix("//").partition("/")
        if bucket not in self._buckets:
            raise EventError(Reason.BLOCKED_SOURCE, f"bucket {bucket[:63]!r} is not allowed")
        if not key or not {".", ".."}.isdisjoint(key.split("/")):
            # Dots would be resolved on the way, and the link would be another one's.
            raise EventError(Reason.BLOCKED_SOURCE, "no key, or one with . or .. in it")
        try:
            link = self._client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=self._expires
            )
        except _faults() as error:  # a role that cannot be taken just now, say
            raise InfrastructureError(f"s3: no signature ({type(error).__name__})") from error
        return self._http.get(link, deadline)

    def close(self) -> None:
        """Drop all connections; fetches under way fail."""
        self._http.close()


def _judge(status: int, fields: Fields, host: str) -> None:
    """As `raise_for`, but that a wrong clock of this machine is no fault of the event.

    A link signed too early or too late is answered like a wrong one, in words of each service's
    own; the date of the answer tells, without the body.
    """
    ahead = seconds_ahead(fields.get(b"date", "")) if status in _REFUSED else None
    if ahead is not None and not -_EARLY_SECONDS < ahead < _SPARE_SECONDS:
        way = "behind" if ahead > 0 else "ahead of"
        raise InfrastructureError(
            f"s3: {host} answered {status}; this machine's clock is {abs(ahead):.0f} s {way} its"
        )
    raise_for(status, fields, host)


def _client(policy: SourcePolicy) -> "BaseClient":
    try:
        import botocore.session
        from botocore.config import Config
    except ImportError as error:
        raise ConfigError(
            "fetch_schemes: s3 needs botocore: pip install 'image-dedup-stream[s3]'"
        ) from error
    style = "path" if policy.s3_endpoint else "virtual"
    config = Config(signature_version="s3v4", s3={"addressing_style": style})
    try:
        session = botocore.session.get_session()
        credentials = session.get_credentials()
        client = session.create_client(
            "s3", region_name=policy.s3_region, endpoint_url=policy.s3_endpoint, config=config
        )
    except _faults() as error:
        raise ConfigError(f"fetch_schemes: s3: {error}") from error
    if credentials is None:
        raise ConfigError(
            "fetch_schemes: s3 needs credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
            " a profile or a role"
        )
    return client


def _faults() -> tuple[type[Exception], ...]:
    """What botocore's providers of credentials let out, beside its own errors.

    Those of the service that gives roles (ClientError); of a program's output (ValueError); of
    files and programs that are gone (OSError); credentials renewed that are over (RuntimeError).
    """
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, ValueError, OSError, RuntimeError
