"""Compares vectors with cluster prefixes: coarse for all of them, exactly for what may matter.

Owns the product kernel and the choice of earliest, best and top matches. It must not know Redis or
image ids.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worker.index.cache import Prefix
from worker.vectors import DIMENSIONS, LARGEST, Vectors, dots, similarity, squared_norms

SLACK = 1e-5
"""Coarse similarities are float32; whatever lies this close to a decision is computed exactly."""


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


@cache
def integer_kernel_is_exact() -> bool:
    """Whether torch multiplies int8 matrices exactly here.

    It is private to torch and three times as fast as float32 with VNNI; on processors without it
    some kernels saturate. The extreme values below would show it.
    """
    extreme = np.full((16, DIMENSIONS), LARGEST, np.int8)
    extreme[1::2] = -LARGEST
    try:
        product = _integer_product(extreme, extreme)
    except (AttributeError, RuntimeError):
        return False
    return bool((product == dots(extreme, extreme)).all())


def _integer_product(stored: Vectors, queries: Vectors) -> npt.NDArray[np.int32]:
    left, right = torch.from_numpy(stored), torch.from_numpy(queries)
    product: npt.NDArray[np.int32] = torch._int_mm(left, right.T).numpy()
    return product


def product(stored: Vectors, queries: Vectors) -> npt.NDArray[Any]:
    """Return exact dot products (n, m) of int8 rows (n, 128) and (m, 128)."""
    if integer_kernel_is_exact():
        return _integer_product(stored, queries)
    return dots(stored, queries)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on this thread: the products are tiny, and waiting for a busy core costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Hits:
    """What one query is compared with, and the coarse similarities (n,) found."""

    def __init__(self, query: Query) -> None:
        width = sum(prefix.length for prefix in query.prefixes)
        square = int(squared_norms(query.vector[None])[0])
        self.query = query
        self.near = np.empty(width, np.float32)
        self.sequences = np.empty(width, np.uint64)
        self._inverse = np.float32(1.0 / np.sqrt(max(square, 1)))
        self._starts: list[int] = []
        self._prefixes: list[Prefix] = []
        self._filled = 0

    def add(self, prefix: Prefix, products: npt.NDArray[Any]) -> None:
        """Take over the products (n,) of the query with one prefix."""
        part = slice(self._filled, self._filled + prefix.length)
        np.multiply(products, prefix.inverse_lengths * self._inverse, out=self.near[part])
        self.sequences[part] = prefix.sequences
        self._starts.append(self._filled)
        self._prefixes.append(prefix)
        self._filled = part.stop

    def choose(self, threshold: float, matches: int) -> Found:
        """Pick what the answer needs; decided by exact similarities only."""
        near, sequences = self.near, self.sequences
        # Sequence 0 is a deleted record: less one, it is the largest number there is.
        near[(sequences - np.uint64(1)) >= np.uint64(self.query.before - 1)] = -2.0
        if self.query.without:
            near[sequences == np.uint64(self.query.without)] = -2.0
        if not len(near) or (top := float(near.max())) < -1.5:
            return Found(None, None, (), len(near))
        found = self._exactly(np.flatnonzero(near >= min(top, threshold) - SLACK))
        reaching = [match for match in found if match.similarity >= threshold]
        return Found(
            earliest=min(reaching, key=lambda match: match.sequence, default=None),
            best=found[0],
            matches=tuple(reaching[:matches]),
            compared=len(near),
        )

    def _exactly(self, places: npt.NDArray[np.intp]) -> list[Match]:
        """Exact matches at some places, most similar first, the earlier first among equals."""
        owners = np.searchsorted(self._starts, places, side="right") - 1
        stored = np.stack(
            [
                self._prefixes[owner].vectors[place - self._starts[owner]]
                for owner, place in zip(owners.tolist(), places.tolist(), strict=True)
            ]
        )
        exact = similarity(self.query.vector[None], stored)[0].tolist()
        found = dict(zip(self.sequences[places].tolist(), exact, strict=True))
        ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        return [Match(sequence, near) for sequence, near in ordered]


def compare(queries: Sequence[Query], threshold: float, matches: int) -> list[Found]:
    """Compare each query with its prefixes; a prefix that many queries share is read once."""
    hits = [Hits(query) for query in queries]
    visits: dict[int, tuple[Prefix, list[int]]] = {}
    for at, query in enumerate(queries):
        for prefix in query.prefixes:
            if prefix.length:
                visits.setdefault(id(prefix), (prefix, []))[1].append(at)
    if visits:
        vectors = np.stack([query.vector for query in queries])
    with one_thread():
        for prefix, asking in visits.values():
            products = product(prefix.vectors, vectors[asking])
            for column, at in enumerate(asking):
                hits[at].add(prefix, products[:, column])
    return [each.choose(threshold, matches) for each in hits]
