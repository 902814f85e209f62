"""Packing a decision and rendering it: every field comes back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.config import Settings
from worker.decide import MICRO, Decision, Near, pack, render, unpack
from worker.index.index import LONGEST_VERDICT
from worker.messages import ImageEvent, Op, VerdictKind

nears = st.builds(Near, st.integers(1, 2**40), st.integers(-MICRO, MICRO))


@st.composite
def decisions(draw: st.DrawFn) -> Decision:
    kind = draw(st.sampled_from(VerdictKind))
    matches = tuple(draw(st.lists(nears, max_size=20))) if kind != "unique" else ()
    best = matches[0] if matches else draw(st.none() | nears)
    return Decision(
        kind=kind,
        threshold_micro=draw(st.integers(0, MICRO)),
        clusters_probed=draw(st.integers(0, 65_536)),
        vectors_compared=draw(st.integers(0, 10**8)),
        truncated=draw(st.booleans()),
        duplicate_of=None if kind == "unique" else draw(nears),
        best=best,
        matches=matches,
    )


@given(decisions())
def test_unpack_is_the_inverse_of_pack(decision: Decision) -> None:
    assert unpack(pack(decision)) == decision


@given(decisions(), st.data())
def test_a_piece_of_a_decision_is_none(decision: Decision, data: st.DataObject) -> None:
    packed = pack(decision)
    piece = packed[: data.draw(st.integers(0, len(packed) - 1))]
    for other in (piece, packed + b"\0", b"\x03" + packed[1:], b"\x10" + packed[1:]):
        with pytest.raises(ValueError, match="decision"):
            unpack(other)


def test_five_matches_fit_what_redis_keeps_compact() -> None:
    matches = tuple(Near(10_000_000 + n, 900_000) for n in range(5))
    decision = Decision(
        VerdictKind.DUPLICATE, 800_000, 32, 40_000, False, matches[4], matches[0], matches
    )
    assert len(pack(decision)) <= 64


def test_as_many_matches_as_may_be_asked_for_fit_what_the_index_keeps() -> None:
    limits = Settings.model_fields["matches"].metadata
    (most,) = [limit.le for limit in limits if hasattr(limit, "le")]
    matches = tuple(Near(2**48 - n, MICRO) for n in range(most))
    decision = Decision(
        VerdictKind.DUPLICATE, MICRO, 65_536, 2**32, True, matches[-1], matches[0], matches
    )
    assert len(pack(decision)) <= LONGEST_VERDICT


def test_rendering_is_the_same_but_for_the_time() -> None:
    event = ImageEvent(
        "b", Op.ADD, "shop", attributes={"sku": 1}, occurred_at="2026-01-01T00:00:00Z"
    )
    decision = Decision(
        VerdictKind.DUPLICATE,
        800_000,
        3,
        99,
        True,
        Near(1, 812_345),
        Near(2, 900_000),
        (Near(2, 900_000), Near(1, 812_345)),
    )
    names = {1: "first", 2: "second"}
    verdicts = [
        json.loads(render(unpack(pack(decision)), event, "v" * 32, names, "model").to_json())
        for _ in range(2)
    ]
    for verdict in verdicts:
        verdict.pop("decided_at")
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] == {
        "schema": 1,
        "verdict_id": "v" * 32,
        "image_id": "b",
        "namespace": "shop",
        "verdict": "duplicate",
        "duplicate_of": "first",
        "similarity": 0.812345,
        "best_match": {"image_id": "second", "similarity": 0.9},
        "matches": [
            {"image_id": "second", "similarity": 0.9},
            {"image_id": "first", "similarity": 0.812345},
        ],
        "threshold": 0.8,
        "model_id": "model",
        "clusters_probed": 3,
        "vectors_compared": 99,
        "truncated": True,
        "occurred_at": "2026-01-01T00:00:00Z",
        "attributes": {"sku": 1},
    }
