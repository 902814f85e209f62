"""The index's only way to Redis: scripts, run in pipelines, and errors said in the project's words.

Owns script loading, the spreading of a batch over Redis Cluster nodes and the translation of the
client's errors. It must not know what the scripts mean.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib.resources import files
from itertools import islice
from typing import Any, TypeVar

import redis
from redis.cluster import RedisCluster
from redis.exceptions import MovedError, NoScriptError, RedisClusterException, RedisError

from worker.errors import InfrastructureError
from worker.index.keys import Keys

Client = redis.Redis | RedisCluster
Argument = str | bytes | int
T = TypeVar("T")

PIPELINE = 256
"""Commands sent before answers are read: bounds the buffers on both sides."""

CLUSTERS = 16
"""Clusters one script reads: some 400 kB, or 3 MB of the larger ones that are few; twice as much
where they wait for a split."""
SCRIPTS = 4
"""Such scripts in one pipeline: some MB on the way."""


@cache
def script_text(name: str) -> str:
    """Return a script's text, the shared functions in front."""
    folder = files("worker.index")
    return "\n".join((folder / f"{part}.lua").read_text() for part in ("common", name))


@cache
def script_digest(name: str) -> str:
    """Return the SHA-1 Redis knows a script by."""
    return hashlib.sha1(script_text(name).encode(), usedforsecurity=False).hexdigest()


class Store:
    """Runs the index's scripts and plain commands; every failure is an InfrastructureError."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def script(self, name: str, keys: Keys, *arguments: Argument) -> Any:
        """Run one script on one generation of a namespace."""
        return self.scripts(name, [(keys, arguments)])[0]

    def scripts(self, name: str, calls: Sequence[tuple[Keys, Sequence[Argument]]]) -> list[Any]:
        """Run a script once for each call, in order within a namespace; answers in call order."""
        commands: list[tuple[Argument, ...]] = [
            ("EVALSHA", script_digest(name), len(keys.named), *keys.named, keys.claim, *arguments)
            for keys, arguments in calls
        ]
        replies = self.commands(commands)
        missing = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            # A restarted or new server has no scripts. Nothing of these calls was executed.
            self.call(partial(self._client.script_load, script_text(name)))
            again = self.commands([commands[at] for at in missing])
            for at, reply in zip(missing, again, strict=True):
                replies[at] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise InfrastructureError(f"Redis: {reply}") from reply
        return replies

    def read_clusters(
        self, keys: Keys, held: Sequence[tuple[bytes, bytes]]
    ) -> Iterator[tuple[bytes, int, bytes] | None]:
        """Yield what each (cluster, state held) lacks: state, index of the first record, records.

        None for a cluster that is retired, or when nothing holds any more.
        """
        for start in range(0, len(held), CLUSTERS * SCRIPTS):
            parts = [
                held[at : at + CLUSTERS]
                for at in range(start, min(start + CLUSTERS * SCRIPTS, len(held)), CLUSTERS)
            ]
            calls = [(keys, [each for pair in part for each in pair]) for part in parts]
            for part, raw in zip(parts, self.scripts("read", calls), strict=True):
                for at in range(len(part)):
                    state, first, records = raw[3 * at : 3 * at + 3] or (b"", 0, b"")
                    yield (state, first, records) if state else None

    def commands(self, commands: Iterable[tuple[Argument, ...]]) -> list[Any]:
        """Run plain commands in pipelines; a command's own error is answered in its place."""
        waiting = list(commands)
        replies: list[Any] = []
        for start in range(0, len(waiting), PIPELINE):
            replies += self.call(partial(self._send, waiting[start : start + PIPELINE]))
        return replies

    def command(self, *arguments: Argument) -> Any:
        """Run one plain command."""
        return self.call(partial(self._client.execute_command, *arguments))

    def pages(self, prefix: str) -> Iterator[list[bytes]]:
        """Yield all keys that begin with `prefix`, some hundred at a time; walks the whole server.

        The prefix is taken literally: namespaces are percent-encoded, so it has no wildcard.
        """
        keys = iter(self._client.scan_iter(match=prefix + "*", count=1000))
        while page := self.call(lambda: list(islice(keys, PIPELINE))):
            yield page

    def call(self, action: Callable[[], T]) -> T:
        """Run an action on the client, its errors turned into InfrastructureError."""
        try:
            return action()
        except MovedError as error:
            raise InfrastructureError(
                "Redis: this is a node of a cluster: set DEDUP_REDIS_CLUSTER=true"
            ) from error
        except (RedisError, RedisClusterException, OSError) as error:
            raise InfrastructureError(f"Redis: {error or type(error).__name__}") from error

    def _send(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, RedisError) and not isinstance(reply, NoScriptError):
                raise reply
        return replies
