"""One contestant through the attack suite: scores of every query against every stored picture.

Queries are the attacked originals and the untouched strangers; stored are originals and
distractors. Owns the scoring; knows no files and draws nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worker.training.attacks import ATTACKS, TIERS
from worker.training.contestants import Contestant, Rows
from worker.training.metrics import FalsePairs, Ranking, count_false, rank
from worker.training.photos import Photo

AT_ONCE = 32  # pictures edited and described together
STRANGERS = "strangers"
AT_THRESHOLD = (  # figures that are another threshold's once that is another one
    "threshold",
    "recall_at_threshold",
    "recall_at_threshold_by_edit",
    "strangers_called_duplicates",
)


@dataclass(frozen=True)
class Pictures:
    """Who is asked about and who is stored."""

    originals: list[Photo]
    strangers: list[Photo]  # queries without a stored original
    distractors: list[Photo]
    left_out: NDArray[np.bool_] | None = None  # (asked, stored) pairs that count as nothing

    @property
    def asked(self) -> list[Photo]:
        """Originals, then strangers."""
        return self.originals + self.strangers

    @property
    def stored(self) -> list[Photo]:
        """Originals, then distractors."""
        return self.originals + self.distractors

    def others(self) -> NDArray[np.bool_]:
        """(asked, stored): which stored pictures are false hits for a query."""
        others = np.ones((len(self.asked), len(self.stored)), bool)
        np.fill_diagonal(others[: len(self.originals)], False)
        return others if self.left_out is None else others & ~self.left_out


@dataclass(frozen=True)
class Pair:
    """A query and a stored picture, for the contact sheets."""

    edit: str
    query: Photo
    stored: Photo
    score: float


@dataclass(frozen=True)
class Trial:
    """All scores of one contestant."""

    name: str
    threshold: float | None
    true: NDArray[np.float32]  # (attacks * originals,), attack by attack
    blocks: dict[str, FalsePairs]  # by attack, and the strangers
    nearest_strangers: NDArray[np.float32]  # (strangers,) best score of each
    misses: list[Pair] = field(default_factory=list)
    false_hits: list[Pair] = field(default_factory=list)

    def ranking(self, names: Sequence[str]) -> Ranking:
        """Rank the true pairs of some attacks among their false pairs and the strangers'."""
        originals = len(self.true) // len(ATTACKS)
        chosen = np.repeat([attack.name in names for attack in ATTACKS], originals)
        blocks = [self.blocks[name] for name in (*names, STRANGERS) if name in self.blocks]
        return rank(self.true, chosen, blocks)


def run_trial(who: Contestant, pictures: Pictures, tick: Callable[[], None]) -> Trial:
    """Describe everything, then score; `tick` is called after each of the 2 + attacks rounds."""
    rows = describe(who, (photo.image for photo in pictures.stored))
    tick()
    queries = {}
    for attack in ATTACKS:
        edited = (attack(photo.image, photo.sha256) for photo in pictures.originals)
        queries[attack.name] = describe(who, edited)
        tick()
    queries[STRANGERS] = describe(who, (photo.image for photo in pictures.strangers))
    tick()
    return _score(who, pictures, rows, queries)


def describe(who: Contestant, images: Iterable[Image.Image]) -> Rows:
    """Rows (n, d) of some pictures, taken and described AT_ONCE together."""
    coming, rows = iter(images), []
    while some := list(islice(coming, AT_ONCE)):
        rows.append(who.describe(some))
    return np.concatenate(rows)


def _score(who: Contestant, pictures: Pictures, rows: Rows, queries: dict[str, Rows]) -> Trial:
    count = len(pictures.originals)
    originals = rows[:count]
    true = np.concatenate([(queries[a.name] * originals).sum(1) for a in ATTACKS])
    stored, others = pictures.stored, pictures.others()
    blocks: dict[str, FalsePairs] = {}
    hits: list[Pair] = []
    nearest = np.empty(0, np.float32)
    for name, asked in queries.items():
        scores = asked @ rows.T
        askers, false = pictures.originals, others[:count]
        if name == STRANGERS:
            askers, false, nearest = pictures.strangers, others[count:], scores.max(1)
        blocks[name] = count_false(scores[false], true)
        scores[~false] = -2
        for query in np.argsort(-scores.max(1))[:12]:
            best = int(scores[query].argmax())
            hits.append(Pair(name, askers[query], stored[best], float(scores[query, best])))
    misses = _misses(true, pictures.originals)
    hits.sort(key=lambda pair: -pair.score)
    return Trial(who.name, who.threshold, true, blocks, nearest, misses, hits[:24])


def _misses(true: NDArray[np.float32], originals: list[Photo]) -> list[Pair]:
    pairs = []
    for place in np.argsort(true)[:24]:
        attack, photo = divmod(int(place), len(originals))
        original = originals[photo]
        pairs.append(Pair(ATTACKS[attack].name, original, original, float(true[place])))
    return pairs


def figures(trial: Trial) -> dict[str, Any]:
    """Every figure of the report, ready for JSON: None where no threshold is precise enough."""
    everything = trial.ranking([attack.name for attack in ATTACKS])
    precise, strict = map(everything.threshold_at_precision, (0.99, 0.999))
    found: dict[str, Any] = {
        **_summary(everything),
        "threshold_at_precision_0.99": _finite(precise),
        "threshold_at_precision_0.999": _finite(strict),
        "comparisons": everything.comparisons,
        "tiers": {tier: _summary(trial.ranking(_names(tier))) for tier in TIERS},
        "recall_by_edit": _by_edit(trial.true >= precise),
        "recall_at_precision_0.999_by_edit": _by_edit(trial.true >= strict),
        "recall_at_false_rate_1e-6_by_edit": _by_edit(
            trial.true > everything.limit_at_false_rate(1e-6)
        ),
    }
    if trial.threshold is not None:
        reached = trial.true >= trial.threshold
        flagged = float(np.mean(trial.nearest_strangers >= trial.threshold))
        told = (trial.threshold, float(np.mean(reached)), _by_edit(reached), flagged)
        found |= zip(AT_THRESHOLD, told, strict=True)
    return found


def _summary(ranking: Ranking) -> dict[str, float]:
    return {
        "micro_average_precision": ranking.average_precision(),
        "recall_at_precision_0.99": ranking.recall_at_precision(0.99),
        "recall_at_precision_0.999": ranking.recall_at_precision(0.999),
        "recall_at_false_rate_1e-6": ranking.recall_at_false_rate(1e-6),
    }


def _names(tier: str) -> list[str]:
    return [attack.name for attack in ATTACKS if attack.tier == tier]


def _finite(threshold: float) -> float | None:
    return threshold if math.isfinite(threshold) else None


def _by_edit(found: NDArray[np.bool_]) -> dict[str, float]:
    recall = found.reshape(len(ATTACKS), -1).mean(1)
    return {attack.name: float(share) for attack, share in zip(ATTACKS, recall, strict=True)}
