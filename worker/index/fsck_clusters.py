"""What `fsck` checks of clusters: their table, its log, upkeep that is due, their records.

Owns what must hold of them. It reads only, and must not know images.
"""

import numpy as np

from worker.index.cache import LAYOUT
from worker.index.centroid_log import Log, replay
from worker.index.fsck_notes import Notes, counter
from worker.index.keys import CENTROID, CHUNK, CLUSTER, NEVER_READ, RECORD, STATE, State

AT_ONCE = 32
"""Clusters read at once: 1 MB where they are as large as they should be."""


def check_clusters(notes: Notes) -> None:
    """Check all clusters; notes where each vector was found."""
    table = _table(notes, notes.keys.clusters, STATE.size)
    if not table:
        notes.say("there is no cluster")
    _check_centroids(notes, set(table))
    clusters = list(table)
    for start in range(0, len(clusters), AT_ONCE):
        part = clusters[start : start + AT_ONCE]
        held = [(CLUSTER.pack(cluster), NEVER_READ) for cluster in part]
        raws = notes.store.read_clusters(notes.keys, held)
        # One that is not answered was retired since the pass began.
        read = {each: raw for each, raw in zip(part, raws, strict=True) if raw is not None}
        # Where they are fewer than a damaged state counts, it says nothing of chunks, either.
        whole = {
            cluster: state
            for cluster, (state, _, records) in read.items()
            if _has_its_records(notes, cluster, State.unpack(state), records)
        }
        _check_ends(notes, whole)


def _table(notes: Notes, key: str, size: int) -> dict[int, bytes]:
    """By cluster what a hash holds, where that is of its size."""
    found = notes.store.command("HGETALL", key)
    whole = {
        CLUSTER.unpack(cluster)[0]: value
        for cluster, value in found.items()
        if (len(cluster), len(value)) == (CLUSTER.size, size)
    }
    if len(whole) < len(found):
        notes.say(f"{key} has entries of a wrong size")
    return whole


def _check_centroids(notes: Notes, alive: set[int]) -> None:
    table = _table(notes, notes.keys.centroids, CENTROID)
    members = notes.store.command("SMEMBERS", notes.keys.due)
    due = {CLUSTER.unpack(each)[0] for each in members if len(each) == CLUSTER.size}
    if len(due) < len(members):
        notes.say("upkeep is due for what is no cluster")
    log = replay(notes.store, notes.keys, notes.version)
    _check_counters(notes, log, alive | table.keys())
    for cluster in (table.keys() ^ alive) - log.lately:
        notes.say(f"cluster {cluster} is without a state or centroid")
    for cluster in due - alive - log.lately:
        notes.say(f"cluster {cluster} is retired, and upkeep is due")
    table = {c: centroid for c, centroid in table.items() if c not in log.lately}
    added = {c: centroid for c, centroid in log.added.items() if c not in log.lately}
    # Where old entries are trimmed, the table may hold clusters that are older than the log.
    held = table if log.whole else {c: table[c] for c in added.keys() & table.keys()}
    if held != added or log.retired & table.keys():
        notes.say("the centroid table is not what its log says")


def _check_counters(notes: Notes, log: Log, known: set[int]) -> None:
    """The counters are read after all that they must have counted."""
    for name in log.odd:
        notes.say(f"the log of centroids has an entry that is none: {name!r}")
    if not notes.version <= log.version <= (counter(notes.store, notes.keys, "version") or 0):
        notes.say("the log ends at another version than the counter says")
    highest = max(known | log.added.keys() | log.retired, default=0)
    if (counter(notes.store, notes.keys, "cluster") or 0) < highest:
        notes.say("the counter 'cluster' would hand out ids of clusters that there were")


def _has_its_records(notes: Notes, cluster: int, state: State, packed: bytes) -> bool:
    if len(packed) != state.length * RECORD:
        notes.say(f"cluster {cluster} has not as many records as it says")
        return False
    _check_records(notes, cluster, state, packed)
    return True


def _check_records(notes: Notes, cluster: int, state: State, packed: bytes) -> None:
    records = np.frombuffer(packed, LAYOUT)
    sequences = records["sequence"][records["sequence"] > 0]
    if len(sequences) != state.live:
        notes.say(f"cluster {cluster} has not as many living records as it says")
    if len(np.unique(sequences)) != len(sequences):
        notes.say(f"cluster {cluster} holds a sequence twice")
    if records["vector"][records["sequence"] == 0].any():
        notes.say(f"cluster {cluster} keeps the vector of a deleted image")
    if len(sequences) and (highest := int(sequences.max())) > notes.last:
        problem = f"cluster {cluster} holds a sequence never handed out"
        notes.say_unless_handed_out(problem, highest)
    sequences = sequences[sequences <= notes.last]
    for sequence in sequences[notes.found[sequences] > 0]:
        other = notes.found[sequence]
        notes.say(f"cluster {cluster} holds sequence {sequence}, which is in {other}, too")
    notes.found[sequences] = cluster


def _check_ends(notes: Notes, states: dict[int, bytes]) -> None:
    """No chunk is longer than its records: the next one would be appended behind the rest."""
    keys, commands = notes.keys, notes.store.commands
    sizes = [
        (cluster, keys.chunk(cluster, at), min(CHUNK, length - at * CHUNK) * RECORD)
        for cluster, state in states.items()
        for length in (State.unpack(state).length,)
        for at in range(-(-length // CHUNK))
    ]
    found = commands([("STRLEN", key) for _, key, _ in sizes])
    longer = {c for (c, _, size), length in zip(sizes, found, strict=True) if length > size}
    # Where the state is still the same, nothing had been appended when the lengths were asked for.
    now = commands([("HGET", keys.clusters, CLUSTER.pack(cluster)) for cluster in longer])
    for cluster, state in zip(longer, now, strict=True):
        if state == states[cluster]:
            notes.say(f"cluster {cluster} has bytes behind its last record")
