"""Photos of one thing taken twice: true pairs of no copy, which count as errors for everyone.

Knows no edits: only untouched originals and stored photos are compared.
"""

from dataclasses import dataclass, replace

import numpy as np

from worker.training.contestants import Contestant
from worker.training.trial import Pictures, describe


@dataclass(frozen=True)
class LeftOut:
    """What was left out, and by whose judgement."""

    pairs: int
    same_as: float  # least cosine of a pair that is left out
    judge: str
    model_id: str | None  # of the judge; None for a hash or a network of others


def without_reshots(
    pictures: Pictures, judge: Contestant, same_as: float
) -> tuple[Pictures, LeftOut]:
    """Leave out the pairs of an untouched original and another stored photo, at least so similar.

    One judge serves all contestants, lest each be forgiven its own errors. Strangers keep all
    their pairs: these are asked untouched, so leaving out would decide what is measured.
    """
    rows = describe(judge, [photo.image for photo in pictures.stored])
    originals = len(pictures.originals)
    same = rows[:originals] @ rows.T >= same_as
    same[np.arange(originals), np.arange(originals)] = False
    told = LeftOut(int(same.sum()), same_as, judge.name, judge.model_id)
    return replace(pictures, left_out=same), told
