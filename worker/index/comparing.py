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


@dataclass(frozen=True, slots=True)
class Match:
    """A stored record and its exact similarity."""

    sequence: int
    similarity: float


@dataclass(frozen=True, slots=True)
class Query:
    """A vector, the prefixes to compare it with, and which records count.

    Only sequences below `before` count, and not `without` (the image itself, in a check).
    """

    vector: Vectors
    prefixes: Sequence[Prefix]
    before: int
    without: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What one query found; `matches` are the most similar ones that reach the threshold."""

    earliest: Match | None
    best: Match | None
    matches: tuple[Match, ...]
    compared: int


@dataclass(frozen=True, slots=True)
class Candidates:
    """Records that may decide a query's answer: their sequences (n,) and vectors (n, 128)."""

    sequences: npt.NDArray[np.uint64]
    vectors: Vectors
    compared: int


def compare(queries: Sequence[Query], threshold: float, matches: int) -> list[Found]:
    """Compare each query with its prefixes."""
    if not queries:
        return []
    asked = np.stack([query.vector for query in queries])
    lengths = np.sqrt(squared_norms(asked)).tolist()
    with one_thread():
        candidates = [
            _candidates(query, length, threshold)
            for query, length in zip(queries, lengths, strict=True)
        ]
    counts = [len(each.sequences) for each in candidates]
    exact = pairwise(
        np.repeat(asked, counts, axis=0), np.concatenate([each.vectors for each in candidates])
    ).tolist()
    sequences = np.concatenate([each.sequences for each in candidates]).tolist()
    found, first = [], 0
    for each, count in zip(candidates, counts, strict=True):
        part = slice(first, first + count)
        found.append(_choose(sequences[part], exact[part], each.compared, threshold, matches))
        first += count
    return found


def _candidates(query: Query, length: float, threshold: float) -> Candidates:
    """Leave out all that cannot be the most similar, nor near the threshold."""
    prefixes = [prefix for prefix in query.prefixes if prefix.length]
    if not prefixes:
        return Candidates(np.zeros(0, np.uint64), np.zeros((0, DIMENSIONS), np.int8), 0)
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
            return Candidates(found[counts], stored[places[counts]], len(stored))
        near[places] = NOTHING
    return Candidates(sequences[:0], stored[:0], len(stored))


def _choose(
    sequences: list[int], exact: list[float], compared: int, threshold: float, matches: int
) -> Found:
    """Pick what the answer needs: the most similar first, the earlier first among equals."""
    found = [Match(sequence, near) for sequence, near in zip(sequences, exact, strict=True)]
    found.sort(key=lambda match: (-match.similarity, match.sequence))
    reaching = [match for match in found if match.similarity >= threshold]
    return Found(
        earliest=min(reaching, key=lambda match: match.sequence, default=None),
        best=found[0] if found else None,
        matches=tuple(reaching[:matches]),
        compared=compared,
    )
