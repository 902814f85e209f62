"""The worker's settings, as fetching takes them.

Owns that every limit of fetching is a setting. It must not know what they mean.
"""

from worker.config import Settings
from worker.source_policy import SourcePolicy


def source_policy(settings: Settings) -> SourcePolicy:
    """The policy a worker's settings make. Raises ConfigError where they contradict each other."""
    return SourcePolicy(
        schemes=settings.fetch_schemes,
        hosts=settings.fetch_hosts,
        roots=settings.fetch_roots,
        networks=settings.fetch_networks,
        buckets=settings.fetch_buckets,
        s3_endpoint=settings.fetch_s3_endpoint,
        s3_region=settings.fetch_s3_region,
        max_bytes=settings.max_image_bytes,
        timeout_seconds=settings.fetch_timeout_seconds,
        attempts=settings.fetch_attempts,
        retry_seconds=settings.fetch_retry_seconds,
        ca_file=str(settings.fetch_ca_file) if settings.fetch_ca_file else None,
    )
