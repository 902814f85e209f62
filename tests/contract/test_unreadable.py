"""What Redis keeps as a verdict and is none ends a worker with one line, not with a traceback."""

import hashlib

import pytest
from prometheus_client import Counter

from tests.contract.harness import Bench, vectors
from worker.errors import DedupError
from worker.jobs import Job, Lease
from worker.messages import ImageEvent, Op, Record
from worker.metrics import Metrics
from worker.resolving import Resolver
from worker.retrying import Persistence


@pytest.mark.parametrize("kept", [b"\xff", b"\0", b"\0" * 90])
def test_a_verdict_that_cannot_be_read_is_said(bench: Bench, kept: bytes) -> None:
    index = bench.index()
    placed = index.place([bench.arrival("x", vectors(1)[0])])[0]
    assert placed.sequence is not None
    assert index.settle([(bench.namespace, "x", placed.sequence, kept)]) == [kept]
    metrics = Metrics()
    resolver = Resolver(
        index=index,
        persist=Persistence("Redis", Counter("errors", "Errors", ["kind"], registry=None)),
        metrics=metrics,
        model_id="model-a",
        threshold=0.8,
        on_step=lambda step: None,
    )
    again = Job(
        Record("images", 0, 1, 0, b"x", b"x"),
        Lease(("images", 0)),
        event=ImageEvent("x", Op.ADD, bench.namespace),
        sha256=hashlib.sha256(b"x").digest(),
    )
    resolver.recognise([again])
    with pytest.raises(DedupError, match=r"the verdict of 'x' .* cannot be read .* fsck"):
        resolver.resolve([again])
