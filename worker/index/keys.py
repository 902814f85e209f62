"""Names, types and byte layouts of everything the index keeps in Redis.

Every key of a namespace carries the hash tag `{ns}`, the namespace percent-encoded (RFC 3986), so
no character of it can end the tag or run into another namespace; all its keys share one slot of a
Redis Cluster and one script is atomic over them. A *generation*, named at random, is one filling of
a namespace by one model: `rebuild` fills the next one while the first answers.

    dedup:namespaces      set     the namespaces that exist (percent-encoded)
    {ns}:root             hash    serving, building -> generation; model:<g> -> model id;
                                  layout:<g> -> LAYOUT; retired:<g> -> 1 until its keys are gone;
                                  topics -> how many it knows; topic:<id> -> number of a topic
    {ns}:<g>:meta         hash    sequence -> last one handed out; version -> of the centroid log;
                                  cluster -> last id handed out; salt -> of the lookups
    {ns}:<g>:centroids    hash    cluster (u32 BE) -> 128 x int8
    {ns}:<g>:clusters     hash    cluster (u32 BE) -> epoch, length, live (3 x u32 BE)
    {ns}:<g>:log          stream  <version>-1 -> retired: ids; added: (id + centroid) ...
    {ns}:<g>:c:<c>:<k>    string  chunk k of cluster c: 60 records of u64 LE sequence + 128 x int8
    {ns}:<g>:rec:<b>      hash    32 sequences: 4s+0 record, 4s+1 image id, 4s+2 verdict,
                                  4s+3 the id's earlier sequence (only after add, delete, add)
    {ns}:<g>:id:<b>       hash    SHA-256(id)[:16] -> last sequence          linear hashing
    {ns}:<g>:sha:<b>      hash    SHA-256(image)[:16] -> earliest sequence   linear hashing
    {ns}:<g>:copies:<sha> zset    sequences of living exact copies, only where there are some
    {ns}:<g>:past:<id>    zset    of SHA-256(id)[:16], only after add, delete, add: u32 partition,
                                  u48 offset, u64 sequence (BE), the last event of each partition
                                  in each life, but for what the last life's record tells
    {ns}:<g>:due          set     clusters waiting for a split, a merge or a compaction
    {ns}:<g>:lock:<c>     string  fencing token of the worker that is rebuilding cluster c

Record (BE): u8 kind (0 living, 1 exact copy, 2 deleted), 16 bytes SHA-256, u32 partition, u48
offset, u48 cluster, or for a copy the sequence of its original; a deleted one ends with the
delete's u32 partition and u48 offset. A topic that was made anew counts its offsets from 0 again,
and another topic or Kafka has offsets of its own. So what is called partition here is 65,536 times
the number of the topic, by Kafka's topic id (KIP-516), and its partition: events of different
topics are never taken for each other, and what comes from one is younger than what came before.
Partitions from FILES on are no topic's: each is a file that a rebuild read, whose lines are the
offsets, and which was before all topics.

Sixteen bytes of a SHA-256 are enough: an accident needs 2^64 images, and an attacker who spends
2^64 work makes two images of his own count as the same. Linear hashing keeps 20 to 80 fields in a
bucket and a span of 32 sequences at most 128, so with the servers' defaults (512 entries, 64 bytes)
all hashes but the two cluster tables stay in their compact encoding. A digest's bucket follows from
the SHA-1 of salt and digest, so nobody who sends events can aim at one. Layout 1, still read and
written where it is found, has no salt: there the digest itself says the bucket.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, unquote

from worker.errors import InfrastructureError

LAYOUT = "2"
LAYOUTS = ("1", LAYOUT)
"""What this version reads and writes; what it makes anew has the last one."""
NAMESPACES = "dedup:namespaces"

RECORD = 136
DIGEST = 16
SALT = 16
SPAN = 32
LOAD = 40
CHUNK = 60

FILES = 1 << 31
PARTITIONS = 1 << 16
"""Of one topic that can be told apart; and FILES // PARTITIONS topics in a namespace."""

LIVE, COPY, DELETED = 0, 1, 2
IMAGE = struct.Struct(">B16sIHIHI")
"""An image's record: kind, SHA-256, partition, offset (u48), cluster or original (u48)."""
REMOVAL = struct.Struct(">IHI")
"""What follows in the record of a deleted image: partition and offset (u48) of the delete."""
STATE = struct.Struct(">III")
CLUSTER = struct.Struct(">I")
NEVER_READ = STATE.pack(0, 0, 0)
PAST = struct.Struct(">IHIQ")
"""An event of an earlier life: partition, offset (u48), sequence of the life."""
CENTROID = 128
ADDED = CLUSTER.size + CENTROID


@dataclass(frozen=True)
class State:
    """A cluster's state: `length` counts records ever written, `live` those not zeroed."""

    epoch: int
    length: int
    live: int

    def pack(self) -> bytes:
        """The 12 bytes kept in the `clusters` hash."""
        return STATE.pack(self.epoch, self.length, self.live)

    @classmethod
    def unpack(cls, packed: bytes) -> "State":
        """Read the 12 bytes kept in the `clusters` hash."""
        return cls(*STATE.unpack(packed))


@dataclass(frozen=True)
class Keys:
    """The keys of one generation of one namespace.

    `history` is the replication id of the server that what the caller knows was read from: Redis
    makes another one wherever it may have lost writes, when it starts and when it is promoted.
    Without one nothing is claimed.
    """

    namespace: str
    generation: str
    history: str = ""

    @cached_property
    def claim(self) -> str:
        """What scripts are told; they refuse when it no longer holds."""
        return f"{self.generation}@{self.history}" if self.history else self.generation

    @cached_property
    def origin(self) -> str:
        """Where what is kept in memory was read; what comes from elsewhere may contradict it."""
        return self.prefix + self.history

    @cached_property
    def root(self) -> str:
        """The hash that says which generation answers."""
        return f"{{{encode(self.namespace)}}}:root"

    @cached_property
    def prefix(self) -> str:
        """What all keys of the generation begin with."""
        return f"{{{encode(self.namespace)}}}:{self.generation}:"

    @cached_property
    def meta(self) -> str:
        """The hash of counters."""
        return self.prefix + "meta"

    @cached_property
    def named(self) -> tuple[str, str, str]:
        """The keys a script is called with; the last one never exists.

        A script makes the names of all others itself. While a cluster moves the slot to another
        node each of the two has a part of them, and Redis would run the script on that part. Called
        with a key that is missing beside one that is not, it says TRYAGAIN instead.
        """
        return self.root, self.meta, self.prefix + "never"

    @cached_property
    def centroids(self) -> str:
        """The hash of centroids."""
        return self.prefix + "centroids"

    @cached_property
    def clusters(self) -> str:
        """The hash of cluster states."""
        return self.prefix + "clusters"

    @cached_property
    def log(self) -> str:
        """The stream of changes to the centroids."""
        return self.prefix + "log"

    @cached_property
    def due(self) -> str:
        """The set of clusters waiting for upkeep."""
        return self.prefix + "due"

    def chunk(self, cluster: int, index: int) -> str:
        """The key of one chunk of a cluster."""
        return f"{self.prefix}c:{cluster}:{index}"

    def lock(self, cluster: int) -> str:
        """The key of the lock on a cluster."""
        return f"{self.prefix}lock:{cluster}"

    def lookup(self, kind: str, digest: bytes, sequences: int, salt: bytes | None) -> str:
        """The bucket (kind `id:` or `sha:`) of a digest after so many sequences.

        Linear hashing (Litwin, VLDB 1980); the scripts have the same rule. A generation of layout 1
        has no salt.
        """
        if salt is not None:
            digest = hashlib.sha1(salt + digest, usedforsecurity=False).digest()
        buckets = sequences // LOAD + 1
        size = 1 << (buckets.bit_length() - 1)
        at = int.from_bytes(digest[:4], "big") % (2 * size)
        return f"{self.prefix}{kind}{at if at < buckets else at % size}"

    def past(self, digest: bytes) -> bytes:
        """The key of the events of an id's former lives."""
        return f"{self.prefix}past:".encode() + digest

    def record(self, sequence: int) -> tuple[str, int]:
        """The bucket of a sequence and the first of its four fields."""
        return f"{self.prefix}rec:{sequence // SPAN}", sequence % SPAN * 4


def home_of(record: bytes) -> int | None:
    """The cluster that holds an image's vector; None when it has none."""
    kind, *_, home = IMAGE.unpack_from(record)
    return int(home) if kind == LIVE else None


def encode(namespace: str) -> str:
    """Percent-encode a namespace: injective, and free of braces, colons and blanks.

    Raises ValueError for an empty one, because Redis Cluster ignores an empty hash tag.
    """
    if not namespace:
        raise ValueError("a namespace must not be empty")
    return quote(namespace, safe="")


def decode(encoded: str) -> str:
    """Undo `encode`."""
    return unquote(encoded)


def digest(text: str) -> bytes:
    """Return the short digest an image id is looked up by."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST]


def read_id(raw: bytes, sequence: int) -> str:
    """Return the image id kept for a sequence. Raises InfrastructureError where it is no text."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InfrastructureError(
            f"the index is damaged: the id of sequence {sequence} is no text; see "
            "`python -m worker fsck`"
        ) from error
