"""Upkeep of clusters: splitting, moving boundary records, merging, compacting.

Owns when a cluster is rebuilt, and that nobody else does it meanwhile. A worker plans with a copy
of the records under a fenced lock; one script then swaps, and does nothing when the cluster was
rewritten meanwhile. The rule for boundary records is LIRE of SPFresh (Xu et al., SOSP 2023). It
must not know images or verdicts.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from worker.errors import InfrastructureError
from worker.index.answers import IndexSettings, Limits
from worker.index.cache import LAYOUT
from worker.index.keys import CLUSTER, NEVER_READ, State
from worker.index.planning import (
    Contents,
    Plan,
    attracted,
    compact,
    merge,
    split,
    strays,
)
from worker.index.space import Space
from worker.index.store import Argument, Store

NEIGHBOURS = 16
"""Nearest clusters that give records to a new one at once, or take those of one merged away."""

Step = Callable[[str], None]


class Maintainer:
    """Does one piece of upkeep at a time.

    `step` is told the name of each step after it is done: tests end the work there, as a crash
    would.
    """

    def __init__(
        self, store: Store, settings: IndexSettings, step: Step = lambda name: None
    ) -> None:
        self._store, self._settings, self._step = store, settings, step
        self.splits = 0

    def work(self, space: Space) -> bool:
        """Take one due cluster and rebuild it; False when none is due or another worker has it."""
        due = self._store.command("SRANDMEMBER", space.keys.due)
        return due is not None and self.work_on(space, CLUSTER.unpack(due)[0])

    def work_on(self, space: Space, cluster: int) -> bool:
        """Rebuild one cluster if it needs it; False when another worker holds its lock.

        Or when the generation or the server is another by now.
        """
        token = secrets.token_hex(16)
        with self._given_back(space, [cluster], token):
            return self._locked(space, cluster, token) and self._rebuild(space, cluster, token)

    def _locked(self, space: Space, cluster: int, token: str) -> bool:
        if self._store.command(*self._lock(space, cluster, token)):
            return True
        # redis-py asks once more where an answer is lost, and is refused what it has.
        return bool(self._store.command("GET", space.keys.lock(cluster)) == token.encode())

    def _rebuild(self, space: Space, cluster: int, token: str) -> bool:
        self._step("locked")
        for _ in range(self._settings.place_attempts):
            contents = self.read(space, cluster)
            if contents is None or not (plan := self._plan(space, contents)):
                self._store.script("release", space.keys, CLUSTER.pack(cluster), token, 1)
                # Where nothing holds any more, not even its being due could be taken back.
                return contents is not None or bool(self._store.script("served", space.keys))
            self._step("planned")
            outcome, *new = self._store.script(
                "rehome", space.keys, *plan.arguments(self._limits(space), token)
            )
            if outcome == b"done":
                self._step("swapped")
                self.splits += len(plan.new) > 1
                space.table.refresh()
                self._attract(space, [CLUSTER.unpack(each)[0] for each in new])
                if len(plan.new) != 1:
                    self._tidy(space)
                return True
            if outcome != b"changed":
                return False
        self._release(space, [cluster], token)
        return False

    def read(self, space: Space, cluster: int) -> Contents | None:
        """Read all records of a cluster; None when it is retired."""
        return next(iter(self._read_all(space, [cluster])), None)

    def _read_all(self, space: Space, clusters: list[int]) -> list[Contents]:
        """Read the clusters that are alive."""
        held = [(CLUSTER.pack(cluster), NEVER_READ) for cluster in clusters]
        read = []
        for cluster, raw in zip(clusters, self._store.read_clusters(space.keys, held), strict=True):
            if raw:
                records = np.frombuffer(raw[2], LAYOUT)
                sequences, vectors = records["sequence"].copy(), records["vector"].copy()
                read.append(Contents(cluster, State.unpack(raw[0]), sequences, vectors))
        return read

    def _plan(self, space: Space, contents: Contents) -> "Plan | None":
        space.table.refresh()
        # A worker places in one thread and looks after its clusters in another.
        with space.table.steady():
            return self._plan_steadily(space, contents)

    def _plan_steadily(self, space: Space, contents: Contents) -> "Plan | None":
        state, limit = contents.state, self._limits(space).due
        if contents.cluster not in space.table:
            return None
        if state.live < limit // 8:
            near = space.table.nearest_to(contents.cluster, NEIGHBOURS)
            full = self._full(space, contents, near)
            if neighbours := [each for each in near if each not in full]:
                return merge(space.table, contents, neighbours)
        if state.live >= limit:
            plan = split(space.table, contents)
            full = self._full(space, contents, plan.existing)
            return split(space.table, contents, full) if full else plan
        if state.length >= 1.5 * limit or state.live * 2 < state.length:
            return compact(space.table, contents)
        return None

    def _full(self, space: Space, contents: Contents, clusters: list[int]) -> set[int]:
        """Which of some clusters are gone or could not take all of one's records."""
        if not clusters:
            return set()
        states = self._store.command("HMGET", space.keys.clusters, *map(CLUSTER.pack, clusters))
        limits = self._limits(space)
        most = limits.hard - contents.state.live - limits.unplanned
        return {
            cluster
            for cluster, state in zip(clusters, states, strict=True)
            if not state or State.unpack(state).length > most
        }

    def _attract(self, space: Space, fresh: list[int]) -> None:
        """Move records of neighbouring clusters that are now nearer to a new centroid."""
        if len(fresh) < 2 or not all(cluster in space.table for cluster in fresh):
            return
        near = {n for cluster in fresh for n in space.table.nearest_to(cluster, NEIGHBOURS)}
        plans = [
            attracted(space.table, contents, fresh)
            for contents in self._read_all(space, sorted(near - set(fresh)))
        ]
        self._move(space, plans, "attract")

    def _tidy(self, space: Space) -> None:
        """Move the records of some clusters that are by now nearer to any other centroid.

        A new centroid may be the nearest of records far outside its neighbourhood, which
        `_attract` does not reach. So whenever centroids have changed the next few clusters in turn
        are looked through, wherever they are.
        """
        turn = space.table.after(space.tidied, self._settings.tidy_clusters)
        if not turn:
            return
        plans = [strays(space.table, contents) for contents in self._read_all(space, turn)]
        self._move(space, plans, "tidy")
        space.tidied = turn[-1]

    def _move(self, space: Space, plans: Sequence[Plan | None], name: str) -> None:
        """Carry out plans that leave their clusters alive; one whose lock another has is left."""
        token = secrets.token_hex(16)
        made = [plan for plan in plans if plan]
        with self._given_back(space, [plan.contents.cluster for plan in made], token):
            self._move_locked(space, made, name, token)

    def _move_locked(self, space: Space, made: list[Plan], name: str, token: str) -> None:
        locks = self._store.commands(
            [self._lock(space, plan.contents.cluster, token) for plan in made]
        )
        locked = [plan for plan, lock in zip(made, locks, strict=True) if lock]
        self._step(f"{name}: locked")
        self._store.scripts(
            "rehome",
            [(space.keys, plan.arguments(self._limits(space), token)) for plan in locked],
        )
        self._step(f"{name}: moved")
        # All of them: whose answer was lost has a lock, too.
        self._release(space, [plan.contents.cluster for plan in made], token)

    def _limits(self, space: Space) -> Limits:
        return self._settings.limits(len(space.table))

    @contextmanager
    def _given_back(self, space: Space, clusters: list[int], token: str) -> Iterator[None]:
        """Give locks back where Redis fails: or this worker, too, waits until their life ends."""
        try:
            yield
        except InfrastructureError:
            with suppress(InfrastructureError):
                self._release(space, clusters, token)
            raise

    def _release(self, space: Space, clusters: list[int], token: str) -> None:
        """Give locks back; fenced, so one that is another's stays."""
        calls = [(space.keys, (CLUSTER.pack(cluster), token, 0)) for cluster in clusters]
        self._store.scripts("release", calls)

    def _lock(self, space: Space, cluster: int, token: str) -> tuple[Argument, ...]:
        milliseconds = int(self._settings.lock_seconds * 1000)
        return ("SET", space.keys.lock(cluster), token, "NX", "PX", milliseconds)
