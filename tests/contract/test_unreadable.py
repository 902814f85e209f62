"""What Redis keeps as a verdict and is none ends a worker with one line, not with a traceback."""

import pytest

from tests.contract.harness import Bench, job, resolver, vectors
from worker.errors import DedupError


@pytest.mark.parametrize("kept", [b"\xff", b"\0", b"\0" * 90])
def test_a_verdict_that_cannot_be_read_is_said(bench: Bench, kept: bytes) -> None:
    index = bench.index()
    placed = index.place([bench.arrival("x", vectors(1)[0])])[0]
    assert placed.sequence is not None
    assert index.settle([(bench.namespace, "x", placed.sequence, kept)]) == [kept]
    again, (resolve, _) = job(bench.arrival("x")), resolver(index)
    resolve.recognise([again])
    with pytest.raises(DedupError, match=r"the verdict of 'x' .* cannot be read .* fsck"):
        resolve.resolve([again])
