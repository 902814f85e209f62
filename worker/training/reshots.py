"""Photos of one thing taken twice: true pairs of no copy, which count as errors for everyone.

Knows no edits: only untouched photos are compared.
"""

from dataclasses import dataclass, replace

from worker.errors import ConfigError
from worker.training.contestants import Contestant
from worker.training.trial import Pictures, describe


@dataclass(frozen=True)
class LeftOut:
    """What was left out, and by whose judgement."""

    pairs_of_originals: int
    pairs_of_strangers: int
    same_as: float  # least cosine of a pair that is left out
    judge: str
    model_id: str | None  # of the judge; None for a hash or a network of others


def without_reshots(
    pictures: Pictures, judge: Contestant, same_as: float
) -> tuple[Pictures, LeftOut]:
    """Leave out the pairs of an original or a stranger and a stored photo, at least so similar.

    One judge serves all contestants, lest each be forgiven its own errors. Raises ConfigError when
    no false pair remains.
    """
    asked, stored = (
        describe(judge, (photo.image for photo in photos))
        for photos in (pictures.asked, pictures.stored)
    )
    same = (asked @ stored.T >= same_as) & pictures.others()
    if (same == pictures.others()).all():
        raise ConfigError(f"all photos are at least {same_as:g} alike: none is left to tell apart")
    originals = len(pictures.originals)
    counts = int(same[:originals].sum()), int(same[originals:].sum())
    return replace(pictures, left_out=same), LeftOut(*counts, same_as, judge.name, judge.model_id)
