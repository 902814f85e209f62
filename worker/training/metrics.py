"""Figures of a copy detector: scores of pairs in, recalls and precisions out. Pure numpy.

A pair is (query, stored picture). Pairs of all queries are ranked together by score, since one
threshold serves every query: micro average precision as in ISC-2021 (Douze et al., 2021).
False pairs count as ranked before true ones of equal score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]
STRONGEST = 4096  # false scores kept of each block, for the false-positive rate


@dataclass(frozen=True)
class FalsePairs:
    """One block of false pairs, summed up: how many reach each of the asked scores."""

    reaching: NDArray[np.int64]  # (asked,)
    strongest: NDArray[np.float64]  # descending
    count: int


@dataclass(frozen=True)
class Ranking:
    """True pairs by falling score, and what stands among them."""

    true: NDArray[np.float64]  # (n,) descending
    above: NDArray[np.int64]  # (n,) false pairs that score at least as high
    strongest: NDArray[np.float64]  # strongest false scores, descending
    comparisons: int

    def average_precision(self) -> float:
        """Micro average precision."""
        return float(np.mean(self._precision()))

    def recall_at_precision(self, precision: float) -> float:
        """Highest recall of any threshold whose precision is at least the wanted one."""
        hits = np.arange(1, len(self.true) + 1)
        return float(hits[self._precision() >= precision].max(initial=0) / len(self.true))

    def threshold_at_precision(self, precision: float) -> float:
        """The threshold behind `recall_at_precision`; infinite where there is none."""
        count = round(self.recall_at_precision(precision) * len(self.true))
        return float(self.true[count - 1]) if count else float("inf")

    def recall_at_false_rate(self, rate: float) -> float:
        """Recall when at most `rate` of all comparisons are false hits."""
        return float(np.mean(self.true > self.limit_at_false_rate(rate)))

    def limit_at_false_rate(self, rate: float) -> float:
        """The score that pairs must exceed in `recall_at_false_rate`.

        Raises ValueError where so many false scores were not kept.
        """
        allowed = int(rate * self.comparisons)
        if allowed >= len(self.strongest):
            raise ValueError(f"only the {len(self.strongest)} strongest false scores were kept")
        return float(self.strongest[allowed])

    def _precision(self) -> NDArray[np.float64]:
        hits = np.arange(1, len(self.true) + 1)
        return hits / (hits + self.above)


def count_false(scores: Scores, asked: Scores) -> FalsePairs:
    """Sum up one block of false scores against all true scores."""
    ordered = np.sort(scores, axis=None)
    reaching = len(ordered) - np.searchsorted(ordered, asked, side="left")
    return FalsePairs(reaching, ordered[::-1][:STRONGEST].astype(np.float64), len(ordered))


def rank(true: Scores, chosen: NDArray[np.bool_], blocks: Sequence[FalsePairs]) -> Ranking:
    """Rank the chosen true pairs among the blocks' false ones; `true` is what was asked there."""
    order = np.flatnonzero(chosen)[np.argsort(-true[chosen], kind="stable")]
    above = np.sum([block.reaching[order] for block in blocks], axis=0)
    strongest = np.sort(np.concatenate([block.strongest for block in blocks]))[::-1]
    count = len(order) + sum(block.count for block in blocks)
    return Ranking(true[order].astype(np.float64), above, strongest, count)
