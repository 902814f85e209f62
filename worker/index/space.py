"""Namespaces as a worker sees them: which generation answers, its keys, its centroid table.

Owns opening a namespace and the check of its model. It must not know records.
"""

import logging
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import lru_cache

from worker.errors import ConfigError, DedupError, ModelMismatch
from worker.index.centroids import Table
from worker.index.keys import (
    CENTROID,
    FILES,
    LAYOUT,
    LAYOUTS,
    NAMESPACES,
    PARTITIONS,
    SALT,
    Keys,
    encode,
)
from worker.index.store import Store

log = logging.getLogger(__name__)

Opener = Callable[[Store, str, str], "Space"]


class Space:
    """An opened generation of a namespace; `tidied` is the cluster this worker tidied last."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.keys = keys
        self._store = store
        self._topics: dict[str, int] = {}
        self.table = Table(store, keys)
        self.table.refresh()
        # Workers that start anew at the same cluster would never come to the others.
        self.tidied = secrets.choice(self.table.clusters() or [0])

    def partition(self, topic: str, partition: int) -> int:
        """Where the events of a topic's partition stand in records, see `keys`.

        Of a topic without an id it is the partition itself. Raises ConfigError for what cannot be
        told apart from others. Where nothing holds any more the answer means nothing, either.
        """
        if not topic:
            return partition
        number = self._topics.get(topic)
        if number is None:
            number = int(self._store.script("topic", self.keys, topic))
            if number < 0:
                return partition
            self._topics[topic] = number
        if partition >= PARTITIONS or number >= FILES // PARTITIONS:
            raise ConfigError(
                f"partition {partition} of topic {number} of namespace {self.keys.namespace!r} is "
                f"too much: it takes {PARTITIONS} partitions of {FILES // PARTITIONS} topics"
            )
        return number * PARTITIONS + partition


class Spaces:
    """The namespaces a worker has opened, the least recently used forgotten; thread-safe."""

    def __init__(
        self, store: Store, model_id: str, limit: int, opener: "Opener | None" = None
    ) -> None:
        self._store, self._model_id, self._limit = store, model_id, limit
        self._opener = opener or open_space
        self._lock = threading.RLock()
        self._open: OrderedDict[str, Space] = OrderedDict()

    def __getitem__(self, namespace: str) -> Space:
        """Return a namespace, opened now if it was not; see `open_space` for the errors."""
        with self._lock:
            space = self._open.get(namespace)
            if space is None:
                space = self._open[namespace] = self._opener(self._store, namespace, self._model_id)
                while len(self._open) > self._limit:
                    self._open.popitem(last=False)
            self._open.move_to_end(namespace)
            return space

    def forget(self, space: Space) -> None:
        """Drop one whose generation or server is another by now; it is opened anew if asked for."""
        with self._lock:
            if self._open.get(space.keys.namespace) is space:
                del self._open[space.keys.namespace]

    def opened(self) -> list[Space]:
        """Return all that are open now."""
        with self._lock:
            return list(self._open.values())


def open_space(store: Store, namespace: str, model_id: str) -> Space:
    """Open the generation that answers, creating the namespace when it is new.

    Raises ModelMismatch when another model, or another record layout, filled it.
    """
    # A generation's name is random, so what a worker cached of a lost one can never pass for it.
    offered = Keys(namespace, secrets.token_hex(4))
    store.command("SADD", NAMESPACES, encode(namespace))
    reply = store.script("ensure", offered, *_offer(model_id))
    serving, model, layout, history, evicting = (part.decode() for part in reply)
    if evicting:
        _warn_of_eviction(history, evicting)
    check_model(namespace, model_id, model)
    if layout not in LAYOUTS:
        raise ModelMismatch(
            f"namespace {namespace!r} has record layout {layout}, this version knows "
            f"{' and '.join(LAYOUTS)}: run the version that wrote it, or rebuild the namespace"
        )
    return Space(store, Keys(namespace, serving, history))


@lru_cache(maxsize=64)
def _warn_of_eviction(history: str, policy: str) -> None:
    """Once for each server that is met, however many namespaces are opened on it."""
    log.warning(
        "Redis may evict keys: images would be forgotten and the index damaged; set "
        "maxmemory-policy noeviction",
        extra={"maxmemory_policy": policy, "history": history},
    )


def _offer(model_id: str) -> tuple[str | bytes, ...]:
    """What a generation is made of, where one has to be made."""
    return model_id, LAYOUT, bytes(CENTROID), secrets.token_bytes(SALT)


def exists(store: Store, namespace: str) -> bool:
    """Whether there is such a namespace."""
    return bool(store.command("HEXISTS", Keys(namespace, "").root, "serving"))


class Building:
    """Opens the generations that one model is filling, or has filled; begins those there are not.

    What another model is filling is given up for it, also where this one answers already.

    Once it has opened one of a namespace, it opens no other: that would be filled from its middle,
    and what somebody else is filling by now would be given up for it.
    """

    def __init__(self) -> None:
        self._opened: dict[str, str] = {}  # generations by namespace

    def __call__(self, store: Store, namespace: str, model_id: str) -> Space:
        """Open a namespace. Raises ConfigError where there is none, or its generation is gone."""
        offered = Keys(namespace, secrets.token_hex(4))
        opened = self._opened.get(namespace, "")
        state, *told = store.script("begin", offered, *_offer(model_id), opened)
        if state == b"none":
            raise ConfigError(f"namespace {namespace!r} does not exist")
        if state == b"gone":
            raise ConfigError(
                f"namespace {namespace!r} is being rebuilt by someone else, or Redis has lost what "
                "was built: when nobody else does, run the rebuild again"
            )
        generation, history, given_up = (part.decode() for part in told)
        if given_up:
            extra = {"namespace": namespace, "model_id": given_up}
            log.warning("a rebuild that was begun is given up", extra=extra)
        keys = Keys(namespace, generation, history)
        self._opened[namespace] = keys.generation
        return Space(store, keys)


def serving_keys(store: Store, namespace: str) -> Keys:
    """Return the keys of the generation that answers.

    Raises ConfigError when there is none, and DedupError when what is named is none.
    """
    root = Keys(namespace, "").root
    serving = store.command("HGET", root, "serving")
    if serving is None:
        raise ConfigError(f"namespace {namespace!r} does not exist")
    if not serving.isascii():
        raise DedupError(f"{root} is damaged: see `python -m worker fsck`")
    return Keys(namespace, serving.decode())


def switch(store: Store, space: Space) -> None:
    """Let a built generation answer. Raises ConfigError when another one is being built by now."""
    if store.script("switch", space.keys) != b"switched":
        raise ConfigError(f"namespace {space.keys.namespace!r} is being rebuilt by someone else")


def remove_retired(store: Store, namespace: str) -> Counter[str]:
    """Delete the generations that answer no more; returns how many keys that were, by model."""
    root = Keys(namespace, "").root
    fields = store.command("HGETALL", root)
    removed = Counter[str]()
    for name in fields:
        kind, _, generation = name.decode().partition(":")
        if kind == "retired":
            model = fields.get(f"model:{generation}".encode(), b"?").decode()
            for page in store.pages(Keys(namespace, generation).prefix):
                removed[model] += len(page)
                store.commands([("UNLINK", key) for key in page])
            gone = [f"{field}:{generation}" for field in ("model", "layout", "retired")]
            store.command("HDEL", root, *gone)
    return removed


def check_model(namespace: str, loaded: str, stored: str) -> None:
    """Raise ModelMismatch unless the model loaded is the one that filled the namespace."""
    if stored != loaded:
        raise ModelMismatch(
            f"namespace {namespace!r} was filled by model {stored}, this worker loaded {loaded}: "
            f"start it with the weights of {stored}, or move the namespace with "
            f"`python -m worker rebuild --namespace {namespace} --to-model …`"
        )
