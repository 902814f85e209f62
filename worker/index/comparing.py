"""Compares vectors with cluster prefixes: coarse for all of them, exactly for what may matter.

Owns the choice of earliest, best and top matches. It must not know Redis or
image ids.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from worker.index.cache import Prefix
from worker.index.kernel import one_thread, places_in, product
from worker.vectors import DIMENSIONS, Vectors, pairwise, squared_norms

SLACK = 1e-5
"""Coarse similarities are float32; whatever lies this close to a decision is computed exactly."""
NOTHING = -1e9
"""Below every product there can be."""
TOGETHER = 256
"""Queries compared at once: the products of more would not stay in the processor's cache."""
SHARED = 4
"""Queries that look into a cluster, on average, from which a product for each cluster pays."""


class Match(NamedTuple):
    """A stored record and its exact similarity."""

    sequence: int
    similarity: float


class Query(NamedTuple):
    """A vector, the prefixes to compare it with, and which records count.

    Only sequences below `before` count, and not `without` (the image itself, in a check).
    """

    vector: Vectors
    prefixes: Sequence[Prefix]
    before: int
    without: int = 0


class Found(NamedTuple):
    """What one query found; `matches` are the most similar ones that reach the threshold."""

    earliest: Match | None
    best: Match | None
    matches: tuple[Match, ...]
    compared: int


class Candidates(NamedTuple):
    """Records that may decide the answers of some queries, one query's behind another's.

    `counts` says how many are whose, `compared` with how many each query was compared; sequences
    are (n,), vectors (n, 128).
    """

    counts: list[int]
    sequences: npt.NDArray[np.uint64]
    vectors: Vectors
    compared: list[int]


def compare(queries: Sequence[Query], threshold: float, matches: int) -> list[Found]:
    """Compare each query with its prefixes."""
    return [
        found
        for at in range(0, len(queries), TOGETHER)
        for found in _compare(queries[at : at + TOGETHER], threshold, matches)
    ]


def _compare(queries: Sequence[Query], threshold: float, matches: int) -> list[Found]:
    asked = np.stack([query.vector for query in queries])
    lengths = np.sqrt(squared_norms(asked))
    probed = [id(prefix) for query in queries for prefix in query.prefixes]
    with one_thread():
        if len(probed) >= SHARED * len(set(probed)):
            candidates = _by_cluster(queries, asked, lengths, threshold)
        else:
            candidates = _each_by_itself(queries, lengths.tolist(), threshold)
    counts = candidates.counts
    exact = pairwise(np.repeat(asked, counts, axis=0), candidates.vectors).tolist()
    sequences = candidates.sequences.tolist()
    found, first = [], 0
    for count, compared in zip(counts, candidates.compared, strict=True):
        part = slice(first, first + count)
        found.append(_choose(sequences[part], exact[part], compared, threshold, matches))
        first += count
    return found


def _sharing(queries: Sequence[Query]) -> list[tuple[Prefix, list[int]]]:
    """Each prefix that has records, and the places of the queries that are compared with it."""
    sharing: dict[int, tuple[Prefix, list[int]]] = {}
    for at, query in enumerate(queries):
        for prefix in query.prefixes:
            if prefix.length:
                sharing.setdefault(id(prefix), (prefix, []))[1].append(at)
    return list(sharing.values())


def _by_cluster(
    queries: Sequence[Query],
    asked: Vectors,
    lengths: npt.NDArray[np.float64],
    threshold: float,
) -> Candidates:
    """Leave out all that cannot be the most similar, nor near the threshold; cluster by cluster."""
    before = np.array([query.before for query in queries], np.uint64)
    without = np.array([query.without for query in queries], np.uint64)
    earliest = before.min()
    checks = without[without > 0]
    top = np.full(len(queries), NOTHING, np.float32)
    compared = np.zeros(len(queries), np.int64)
    products = []
    for prefix, some in _sharing(queries):
        asking = np.array(some)
        near = product(asked[asking], prefix.vectors).astype(np.float32)
        near *= prefix.inverse_lengths
        near[:, prefix.dead] = NOTHING
        # What not everybody may see: records of later arrivals, and those asking themselves.
        special = prefix.sequences >= earliest
        if len(checks):
            special |= np.isin(prefix.sequences, checks)
        places = np.flatnonzero(special)
        if len(places):
            there = prefix.sequences[places]
            unseen = there >= before[asking][:, None]
            if len(checks):
                unseen |= there == without[asking][:, None]
            near[:, places] = np.where(unseen, NOTHING, near[:, places])
        best = near.max(axis=1)
        top[asking] = np.maximum(top[asking], best)
        compared[asking] += prefix.length
        products.append((prefix, asking, near, best))
    least = (np.minimum(top, threshold * lengths) - SLACK * lengths).astype(np.float32)
    least[top == NOTHING] = np.inf
    # Behind an empty part, so that there always is one.
    of, sequences = [np.zeros(0, np.intp)], [np.zeros(0, np.uint64)]
    vectors = [np.zeros((0, DIMENSIONS), np.int8)]
    for prefix, asking, near, best in products:
        reaching = (best >= least[asking]).nonzero()[0]
        if len(reaching):
            rows = near if len(reaching) == len(near) else near[reaching]
            row, place = places_in(rows >= least[asking[reaching]][:, None])
            of.append(asking[reaching[row]])
            sequences.append(prefix.sequences[place])
            vectors.append(prefix.vectors[place])
    owner = np.concatenate(of)
    order = np.argsort(owner, kind="stable")
    return Candidates(
        np.bincount(owner, minlength=len(queries)).tolist(),
        np.concatenate(sequences)[order],
        np.concatenate(vectors)[order],
        compared.tolist(),
    )


def _each_by_itself(queries: Sequence[Query], lengths: list[float], threshold: float) -> Candidates:
    """The same, query by query."""
    found = [
        _by_query(query, length, threshold) for query, length in zip(queries, lengths, strict=True)
    ]
    return Candidates(
        [len(sequences) for sequences, _, _ in found],
        np.concatenate([sequences for sequences, _, _ in found]),
        np.concatenate([vectors for _, vectors, _ in found]),
        [compared for _, _, compared in found],
    )


def _by_query(
    query: Query, length: float, threshold: float
) -> tuple[npt.NDArray[np.uint64], Vectors, int]:
    """Sequences and vectors of what may decide one query, and with how many it was compared."""
    prefixes = [prefix for prefix in query.prefixes if prefix.length]
    if not prefixes:
        return np.zeros(0, np.uint64), np.zeros((0, DIMENSIONS), np.int8), 0
    # Copying small clusters together and multiplying once is twice as fast as a product for each.
    stored = np.concatenate([prefix.vectors for prefix in prefixes])
    sequences = np.concatenate([prefix.sequences for prefix in prefixes])
    near = np.concatenate([prefix.inverse_lengths for prefix in prefixes])
    # Whole numbers below 2^24, so exact in float32; numpy would multiply int32 in float64.
    near *= product(stored, query.vector[None])[:, 0].astype(np.float32)
    near[sequences >= query.before] = NOTHING
    while (top := float(near.max())) > NOTHING:
        places = (near >= min(top, threshold * length) - SLACK * length).nonzero()[0]
        found = sequences[places]
        counts = (found > 0) & (found != query.without)
        if counts.any():
            return found[counts], stored[places[counts]], len(stored)
        near[places] = NOTHING
    return sequences[:0], stored[:0], len(stored)


def _choose(
    sequences: list[int], exact: list[float], compared: int, threshold: float, matches: int
) -> Found:
    """Pick what the answer needs: the most similar first, the earlier first among equals."""
    # Once each: a record that moves between two scripts of a batch is in both clusters for a while.
    ranked = sorted(set(zip([-near for near in exact], sequences, strict=True)))
    found = [Match(sequence, -near) for near, sequence in ranked]
    if not found or found[0].similarity < threshold:
        return Found(None, found[0] if found else None, (), compared)
    reaching = [match for match in found if match.similarity >= threshold]
    return Found(
        earliest=min(reaching, key=lambda match: match.sequence),
        best=found[0],
        matches=tuple(reaching[:matches]),
        compared=compared,
    )
