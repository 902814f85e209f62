"""Every setting: its type, bounds, default and environment variable; its flag is `worker.flags`'.

With `worker.connections` the only module that reads the environment. Everything else takes what it
needs as arguments.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import NoDecode

from worker import wellformed
from worker.connections import ENV_PREFIX, GIB, KIB, MIB, KafkaSettings, RedisSettings, Topic

# What a child process that touches strangers' files is given of the environment: how to find and
# run this Python, and how text is written. No setting, no key of a cloud.
_HARMLESS = {"PATH", "HOME", "TMPDIR", "TZ", "LANG", "LANGUAGE", "VIRTUAL_ENV", "GLIBC_TUNABLES"}
_HARMLESS_PREFIXES = ("LC_", "LD_", "DYLD_", "PYTHON", "MALLOC_")

CommaList = Annotated[tuple[str, ...], NoDecode]


class Settings(KafkaSettings, RedisSettings):
    """Everything `python -m worker` can be told."""

    # Kafka, beyond what all clients share
    verdict_topic: Topic = Field("images.verdicts", description="topic the verdicts go to")
    dead_letter_topic: Topic = Field(
        "images.dead-letter", description="topic of events that cannot be decided"
    )
    group_id: str = Field("dedup", min_length=1, description="consumer group the workers form")
    delivery: Literal["at-least-once", "exactly-once"] = Field(
        "at-least-once",
        description="exactly-once: verdicts and offsets in one Kafka transaction (KIP-447)",
    )
    session_timeout_seconds: float = Field(
        30.0, ge=1, le=1800, description="silence after which the group expels a worker"
    )
    commit_interval_seconds: float = Field(
        1.0, gt=0, le=60, description="pause between two commits of finished offsets"
    )
    poll_bytes: int = Field(
        4 * MIB,
        ge=KIB,
        le=GIB,
        description="bytes asked of Kafka, and taken from what came, at once;"
        " a longer message still comes (KIP-74)",
    )
    publish_timeout_seconds: float = Field(
        30.0, ge=1, le=600, description="longest wait for Kafka to acknowledge a batch"
    )
    transaction_timeout_seconds: float = Field(
        10.0,
        ge=1,
        le=900,  # of the brokers: transaction.max.timeout.ms
        description="exactly-once: age at which the brokers abort a dead worker's transaction",
    )
    revoke_timeout_seconds: float = Field(
        5.0,
        ge=0,
        le=300,
        description="at-least-once: how long a rebalance waits for work in flight",
    )
    shutdown_timeout_seconds: float = Field(
        25.0, ge=1, le=600, description="deadline for finishing after SIGTERM"
    )

    # What one worker may hold
    in_flight_events: int = Field(
        512, ge=1, le=100_000, description="events in work at once; more pauses the partitions"
    )
    in_flight_bytes: int = Field(
        256 * MIB,
        ge=MIB,
        description="bytes of events in work at once; more pauses, too. Of a compressed batch as"
        " many are read, or twice DEDUP_MAX_MESSAGE_BYTES",
    )
    batch_images: int = Field(
        64, ge=1, le=4096, description="most images recognised, embedded and stored at once"
    )
    batch_wait_seconds: float = Field(
        0.02,
        ge=0,
        le=1,
        description="wait for a fuller batch while more comes; up to 25 times that where much does",
    )

    # Events
    max_headers: int = Field(
        1_000, ge=1, le=100_000, description="most headers of an event; one takes some 200 bytes"
    )
    max_id_bytes: int = Field(512, ge=1, le=65_536, description="longest image id, in bytes")
    namespaces: CommaList = Field(
        (), description="namespaces events may name, e.g. default,shop; others are a dead letter"
    )
    max_attributes_bytes: int = Field(
        16 * KIB, ge=2, le=MIB, description="largest `attributes` of an event, in bytes of JSON"
    )

    max_json_bytes: int = Field(
        MIB, ge=KIB, le=GIB, description="largest event that is JSON, in bytes"
    )

    # Images
    max_image_bytes: int = Field(20 * MIB, ge=1, le=GIB, description="largest encoded image")
    max_image_pixels: int = Field(
        50_000_000, ge=1, le=2_000_000_000, description="most pixels an image's header may state"
    )
    decode_processes: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        le=256,
        description="processes that decode images (default: one a core)",
    )
    decode_timeout_seconds: float = Field(
        10.0,
        gt=0,
        le=600,
        description="processor time after which a decode is killed: a dead letter",
    )
    decode_queue: int = Field(
        64, ge=1, le=10_000, description="images that may wait for a decoding process"
    )
    decode_memory_bytes: int = Field(
        GIB, ge=64 * MIB, description="memory one decoding process may take"
    )

    # Fetching
    fetch_schemes: CommaList = Field(
        (), description="schemes of uris that may be fetched: https,http,file,s3; none by default"
    )
    fetch_hosts: CommaList = Field(
        (),
        description="hosts that may be fetched from, e.g. cdn.example.com,*.example.org;"
        " on the scheme's own port unless :PORT or :* follows",
    )
    fetch_roots: CommaList = Field((), description="folders that file:// uris may point into")
    fetch_networks: CommaList = Field(
        (), description="non-public networks that may be fetched from, e.g. 10.1.0.0/16"
    )
    fetch_buckets: CommaList = Field((), description="buckets that s3:// uris may name")
    fetch_s3_endpoint: str | None = Field(
        None, description="url of the service s3:// uris are of (default: AWS)"
    )
    fetch_s3_region: str | None = Field(
        None, description="its region (default: that of the environment or profile)"
    )
    fetch_timeout_seconds: float = Field(
        10.0, gt=0, le=600, description="longest one try of a fetch may take"
    )
    fetch_attempts: int = Field(
        3, ge=1, le=20, description="tries before a source is given up (429, 5xx, time-outs)"
    )
    fetch_retry_seconds: float = Field(
        30.0, ge=0, le=3600, description="longest all pauses between the tries of a fetch may be"
    )
    fetch_ca_file: Path | None = Field(
        None, description="PEM file of https sources' authority (default: the public ones)"
    )
    fetch_concurrency: int = Field(16, ge=1, le=1024, description="fetches at once")

    # Embedding and matching
    weights: str = Field("default", description="default, imagenet or a .safetensors file")
    embed_mode: Literal["auto", "compiled", "bf16", "fp32"] = Field(
        "auto", description="how the network is run; auto takes the fastest this machine can"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it is run")
    embed_threads: int = Field(
        2, ge=1, le=256, description="batches embedded at once, each on one core; on a GPU, one"
    )
    compiled_folder: Path = Field(
        Path("~/.cache/image-dedup-stream"), description="where compiled networks are kept"
    )
    threshold: float | None = Field(
        None, gt=0, le=1, description="similarity of a duplicate (default: the weights' own)"
    )
    matches: int = Field(
        5,
        ge=1,
        le=20,
        description="most matches a verdict lists; more than 6 take more of Redis",
    )
    cluster_limit: int = Field(
        256, ge=8, le=65_536, description="records after which a cluster is split"
    )
    first_cluster_limit: int = Field(
        4096, ge=8, le=65_536, description="the same while there are 4 clusters at most"
    )
    probes: int = Field(
        64, ge=0, le=65_536, description="most clusters looked into for an image; 0: all"
    )
    probe_margin: float = Field(
        0.18,
        ge=0,
        le=2,
        description="clusters this much less similar than the nearest are left out",
    )
    least_probes: int = Field(
        4, ge=1, le=65_536, description="clusters looked into however far away they are"
    )
    tidy_clusters: int = Field(
        4, ge=0, le=1024, description="clusters whose records are put in order as one is split"
    )
    audit_images: int = Field(
        64, ge=0, le=100_000, description="images an audit compares by brute force; 0: no audits"
    )
    audit_pause_seconds: float = Field(
        600.0, ge=1, le=86_400, description="pause between two audits of a worker"
    )
    cache_bytes: int = Field(
        512 * MIB, ge=MIB, description="memory for stored vectors kept in the worker"
    )
    tail_records: int = Field(
        8192,
        ge=1,
        le=65_536,
        description="stored vectors one script may answer; who lacks more loads clusters first",
    )
    script_arrivals: int = Field(
        64, ge=1, le=1024, description="images one script takes; more block Redis for longer"
    )
    open_namespaces: int = Field(
        256, ge=1, le=65_536, description="namespaces whose centroids a worker keeps"
    )
    lock_seconds: float = Field(
        30.0,
        ge=1,
        le=3600,
        description="how long a cluster waits for a worker that died while splitting it",
    )
    recent_writes: int = Field(
        16_384,
        ge=1,
        le=10_000_000,
        description="writes remembered, to tell which of them a fail-over of Redis lost",
    )
    place_attempts: int = Field(
        64, ge=8, le=10_000, description="rounds an image follows moving clusters before it waits"
    )

    # Watching
    http_host: str = Field(
        "127.0.0.1", description="address of /metrics, /livez and /readyz, IPv4 or IPv6"
    )
    http_port: int = Field(9400, ge=0, le=65_535, description="their port; 0 picks a free one")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged; debug has a line an event"
    )
    log_format: Literal["json", "text"] = Field("json", description="shape of a log line")

    @field_validator(
        "namespaces",
        "fetch_schemes",
        "fetch_hosts",
        "fetch_roots",
        "fetch_networks",
        "fetch_buckets",
        mode="before",
    )
    @classmethod
    def _split_commas(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str):
            # A password may hold commas, and a part of it would be in the error without its @.
            if "@" in value and info.field_name != "fetch_roots":
                raise ValueError("an @; users and passwords are settings of their own")
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("namespaces")
    @classmethod
    def _namespaces_can_be_named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return wellformed.namespaces(value)

    @field_validator("fetch_schemes")
    @classmethod
    def _schemes_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - {"http", "https", "file", "s3"})
        if unknown:
            names = ", ".join(map(wellformed.shown, unknown))
            raise ValueError(f"not http, https, file or s3: {names}")
        return value

    @property
    def batch_bytes(self) -> int:
        """Bytes that are read of a compressed batch: a large message alone can always be."""
        return max(self.in_flight_bytes, 2 * self.max_message_bytes)

    @model_validator(mode="after")
    def _topics_differ(self) -> "Settings":
        if len({self.topic, self.verdict_topic, self.dead_letter_topic}) < 3:
            raise ValueError("topic, verdict_topic and dead_letter_topic must differ")
        return self


def unknown_variables() -> dict[str, str]:
    """Variables that look like settings and are none, with the setting that may be meant, or "".

    They are no errors: where a service is called "dedup", Kubernetes itself sets DEDUP_PORT.
    """
    known = [ENV_PREFIX + name.upper() for name in Settings.model_fields]
    told = [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]
    return {
        name: next(iter(get_close_matches(name.upper(), known, 1)), "")
        for name in sorted(told)
        if name.upper() not in known
    }


def harmless_environment() -> dict[str, str]:
    """The variables that hold no secret and that a child may need to run."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _HARMLESS or name.startswith(_HARMLESS_PREFIXES)
    }
