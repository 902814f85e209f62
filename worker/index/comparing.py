"""Compares vectors with cluster prefixes: coarse for all of them, exactly for what may matter.

Owns the choice of earliest, best and top matches. It must not know Redis or
image ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.index.cache import Prefix
from worker.index.kernel import one_thread, product
from worker.vectors import DIMENSIONS, Vectors, pairwise, squared_norms

SLACK = 1e-5
"""Coarse similarities are float32; whatever lies this close to a decision is computed exactly."""
NOTHING = -1e9
"""Below every product there can be."""


@dataclass(frozen=True)
class Match:
    """A stored record and its exact similarity."""

    sequence: int
    similarity: float


@dataclass(frozen=True)
class Query:
    """A vector, the prefixes to compare it with, and which records count.

    Only sequences below `before` count, and not `without` (the image itself, in a check).
    """

    vector: Vectors
    prefixes: Sequence[Prefix]
    before: int
    without: int = 0


@dataclass(frozen=True)
class Found:
    """What one query found; `matches` are the most similar ones that reach the threshold."""

    earliest: Match | None
    best: Match | None
    matches: tuple[Match, ...]
    compared: int


@dataclass(frozen=True)
class Candidates:
    """Records that may decide a query's answer: their sequences (n,) and vectors (n, 128)."""

    sequences: npt.NDArray[np.uint64]
    vectors: Vectors
    compared: int


def compare(queries: Sequence[Query], threshold: float, matches: int) -> list[Found]:
    """Compare each query with its prefixes."""
    with one_thread():
        candidates = [_candidates(query, threshold) for query in queries]
    vectors = [
        np.broadcast_to(q.vector, c.vectors.shape) for q, c in zip(queries, candidates, strict=True)
    ]
    if not queries:
        return []
    exact = pairwise(np.concatenate(vectors), np.concatenate([c.vectors for c in candidates]))
    ends = np.cumsum([len(each.sequences) for each in candidates])
    parts = np.split(exact, ends[:-1])
    return [
        _choose(each, near, threshold, matches)
        for each, near in zip(candidates, parts, strict=True)
    ]


def _candidates(query: Query, threshold: float) -> Candidates:
    prefixes = [prefix for prefix in query.prefixes if prefix.length]
    starts = np.cumsum([0, *(prefix.length for prefix in prefixes)])
    if not prefixes:
        return Candidates(np.zeros(0, np.uint64), np.zeros((0, DIMENSIONS), np.int8), 0)
    # Copying small clusters together and multiplying once is twice as fast as a product for each.
    stored = np.concatenate([prefix.vectors for prefix in prefixes])
    near = np.concatenate([prefix.inverse_lengths for prefix in prefixes])
    near *= product(stored, query.vector[None])[:, 0]
    length = float(np.sqrt(squared_norms(query.vector[None])[0]))
    while (top := float(near.max())) > NOTHING:
        places = np.flatnonzero(near >= min(top, threshold * length) - SLACK * length)
        sequences = _sequences_at(prefixes, starts, places)
        counts = (sequences > 0) & (sequences < query.before) & (sequences != query.without)
        if counts.any():
            return Candidates(sequences[counts], stored[places[counts]], len(stored))
        near[places] = NOTHING
    return Candidates(np.zeros(0, np.uint64), np.zeros((0, DIMENSIONS), np.int8), len(stored))


def _sequences_at(
    prefixes: Sequence[Prefix], starts: npt.NDArray[np.intp], places: npt.NDArray[np.intp]
) -> npt.NDArray[np.uint64]:
    owners = np.searchsorted(starts, places, side="right") - 1
    return np.array(
        [
            prefixes[owner].sequences[place]
            for owner, place in zip(
                owners.tolist(), (places - starts[owners]).tolist(), strict=True
            )
        ],
        np.uint64,
    )


def _choose(
    candidates: Candidates, exact: npt.NDArray[np.float64], threshold: float, matches: int
) -> Found:
    """Pick what the answer needs: the most similar first, the earlier first among equals."""
    ordered = sorted(zip((-exact).tolist(), candidates.sequences.tolist(), strict=True))
    found = [Match(sequence, -near) for near, sequence in ordered]
    reaching = [match for match in found if match.similarity >= threshold]
    return Found(
        earliest=min(reaching, key=lambda match: match.sequence, default=None),
        best=found[0] if found else None,
        matches=tuple(reaching[:matches]),
        compared=candidates.compared,
    )
