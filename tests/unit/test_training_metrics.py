"""The evaluation's figures, against values worked out by hand or by brute force."""

import json

import numpy as np
import pytest

from worker.training.attacks import ATTACKS, TIERS
from worker.training.metrics import Ranking, count_false, rank
from worker.training.trial import STRANGERS, Trial, figures

NAMES = [attack.name for attack in ATTACKS]


def _ranking(true: list[float], false: list[float]) -> Ranking:
    asked = np.array(true)
    return rank(asked, np.ones(len(true), bool), [count_false(np.array(false), asked)])


def test_perfect_separation() -> None:
    ranking = _ranking([0.9, 0.8], [0.1, 0.2, 0.3])
    assert ranking.average_precision() == 1
    assert ranking.recall_at_precision(0.999) == 1
    assert ranking.threshold_at_precision(0.999) == 0.8
    assert ranking.comparisons == 5


def test_average_precision_by_hand() -> None:
    # ranked: true .9, false .8, true .7, false .6, false .5, true .4
    ranking = _ranking([0.4, 0.9, 0.7], [0.8, 0.5, 0.6])
    assert ranking.average_precision() == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert ranking.recall_at_precision(0.99) == pytest.approx(1 / 3)
    assert ranking.recall_at_precision(0.6) == pytest.approx(2 / 3)


def test_ties_count_against_the_detector() -> None:
    assert _ranking([0.5], [0.5]).average_precision() == 0.5
    assert _ranking([0.5], [0.5, 0.1, 0.1]).recall_at_false_rate(0.0) == 0


def test_no_threshold_is_precise_enough() -> None:
    ranking = _ranking([0.1], [0.9])
    assert ranking.recall_at_precision(0.99) == 0
    assert ranking.threshold_at_precision(0.99) == float("inf")


def test_figures_are_strict_json_where_nothing_is_precise_enough() -> None:
    true = np.full(2 * len(ATTACKS), 0.1, np.float32)
    false = {name: count_false(np.array([0.9]), true) for name in [*NAMES, STRANGERS]}
    found = figures(Trial("hopeless", 0.5, true, false, np.array([0.9], np.float32)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["threshold_at_precision_0.99"] is None
    assert found["threshold_at_precision_0.999"] is None
    assert set(found["recall_by_edit"].values()) == {0.0}


def test_figures_of_tiers_and_edits_by_hand() -> None:
    by_tier = {"easy": 0.9, "medium": 0.5, "hard": 0.3}
    true = np.repeat([by_tier[attack.tier] for attack in ATTACKS], 2).astype(np.float32)
    hits = dict.fromkeys([*NAMES, STRANGERS], 0.1) | {"blur": 0.4, "mirror": 0.6}
    false = {name: count_false(np.array([score]), true) for name, score in hits.items()}
    found = figures(Trial("by hand", None, true, false, np.array([0.1], np.float32)))
    assert found["recall_at_precision_0.999"] == found["recall_at_false_rate_1e-6"] == 22 / 52
    strict = [found["tiers"][tier]["recall_at_precision_0.999"] for tier in TIERS]
    assert strict == [1, 1, 0]
    rare = [found["tiers"][tier]["recall_at_false_rate_1e-6"] for tier in TIERS]
    assert rare == [1, 1, 0]
    for figure in ("recall_at_precision_0.999_by_edit", "recall_at_false_rate_1e-6_by_edit"):
        assert found[figure] == {a.name: float(a.tier == "easy") for a in ATTACKS}


def test_recall_at_a_false_rate() -> None:
    true, false = [0.9, 0.6, 0.3], [0.7, 0.5, 0.2, 0.1, 0.0, -0.1, -0.2]
    assert _ranking(true, false).recall_at_false_rate(0.1) == pytest.approx(2 / 3)
    assert _ranking(true, false).recall_at_false_rate(0.2) == 1
    with pytest.raises(ValueError, match="strongest"):
        _ranking(true, false).recall_at_false_rate(0.9)


def test_a_tier_is_ranked_among_its_own_false_pairs() -> None:
    true = np.array([0.9, 0.2])
    blocks = [count_false(np.array([0.95]), true), count_false(np.array([0.1]), true)]
    assert rank(true, np.array([True, False]), blocks[1:]).average_precision() == 1
    assert rank(true, np.array([True, False]), blocks).average_precision() == 0.5


def test_blocks_agree_with_brute_force() -> None:
    rng = np.random.default_rng(0)
    true, false = rng.normal(0.6, 0.2, 200), rng.normal(0, 0.2, (5, 900))
    ranking = rank(true, np.ones(200, bool), [count_false(block, true) for block in false])
    scores = np.concatenate([false.ravel(), true])
    labels = np.concatenate([np.zeros(false.size), np.ones(200)])
    ordered = labels[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    assert ranking.average_precision() == pytest.approx(precision[ordered == 1].mean())
