"""The one similarity: exact, the same in every shape, and sane at its edges."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from worker.vectors import (
    DIMENSIONS,
    Vectors,
    dots,
    pairwise,
    quantize,
    similarity,
    squared_norms,
)

ROWS = some.arrays(
    np.int8, st.tuples(st.integers(1, 9), st.just(DIMENSIONS)), elements=st.integers(-127, 127)
)


@given(ROWS, ROWS)
def test_similarity_is_the_exact_cosine_of_whole_numbers(queries: Vectors, stored: Vectors) -> None:
    near = similarity(queries, stored)
    for at, query in enumerate(queries.astype(int).tolist()):
        for to, other in enumerate(stored.astype(int).tolist()):
            dot = sum(a * b for a, b in zip(query, other, strict=True))
            squares = sum(a * a for a in query) * sum(b * b for b in other)
            assert near[at, to] == (dot / math.sqrt(squares) if squares else 0.0)


@given(ROWS)
def test_similarity_does_not_depend_on_the_shape_of_the_batch(rows: Vectors) -> None:
    whole = similarity(rows, rows)
    one_by_one = np.concatenate([similarity(row[None], rows) for row in rows])
    assert (whole == one_by_one).all()
    assert (pairwise(rows, rows[::-1]) == whole[range(len(rows)), range(len(rows))[::-1]]).all()


def test_products_of_extremes_are_exact() -> None:
    extreme = np.full((2, DIMENSIONS), 127, np.int8)
    extreme[1] = -127
    assert dots(extreme, extreme).tolist() == [[2064512, -2064512], [-2064512, 2064512]]
    assert squared_norms(extreme).tolist() == [2064512, 2064512]


def test_quantizing_keeps_directions() -> None:
    rows = np.random.default_rng(0).normal(size=(200, DIMENSIONS))
    packed = quantize(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (np.abs(packed).max(axis=1) == 127).all()
    assert np.abs(similarity(packed, packed) - unit @ unit.T).max() < 0.01
    assert (quantize(rows * 1e-6) == packed).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_without_a_direction_are_refused(bad: float) -> None:
    rows = np.ones((2, DIMENSIONS))
    rows[1] = bad
    with pytest.raises(ValueError, match="zero or not finite"):
        quantize(rows)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="expected rows of 128"):
        quantize(np.ones((2, 64)))
