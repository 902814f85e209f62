"""Audits of the index, the command for them, and what the commands around the index have alike."""

import math
import uuid
from random import Random

import numpy as np
import pytest

from deploy.local import LocalRedis
from deploy.process import free_port
from tests.contract.harness import Bench, near, place_all, vectors
from worker import __main__ as worker
from worker import service
from worker.config import Settings
from worker.embedder import read_weights
from worker.errors import InfrastructureError
from worker.index import Index
from worker.index.auditing import Audit
from worker.index.store import Store
from worker.metrics import Metrics
from worker.service import Auditor


def test_an_audit_finds_what_probing_misses(bench: Bench) -> None:
    """Probing is led astray here: every cluster is given its neighbour's centroid."""
    rows = vectors(300)
    index = bench.index(probes=1)
    place_all(index, [*bench.arrivals("p", rows), *bench.arrivals("c", near(rows))])
    right = index.audit(bench.namespace, 80).run()
    assert right.sampled == 80
    assert right.found > 0.9 * right.duplicates > 10
    store, keys = bench.store(), bench.keys()
    table = store.command("HGETALL", keys.centroids)
    turned = dict(zip(table, [*list(table.values())[1:], *list(table.values())[:1]], strict=True))
    store.command("DEL", keys.log)
    store.command("HSET", keys.centroids, *(part for item in turned.items() for part in item))
    wrong = bench.index(probes=1).audit(bench.namespace, 80).run()
    assert wrong.duplicates > 10
    assert wrong.found < wrong.duplicates / 2


def test_an_audit_of_nothing_has_nothing_to_find(bench: Bench) -> None:
    index = bench.index()
    assert math.isnan(index.audit(bench.namespace, 10).run().recall)
    place_all(index, bench.arrivals("p", vectors(10)))
    result = index.audit(bench.namespace, 10).run()
    assert (result.sampled > 0, result.duplicates) == (True, 0)
    assert math.isnan(result.recall)


def test_an_audit_samples_old_and_young_images_alike(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbelow", Random(0).randrange)
    index = bench.index()
    place_all(index, bench.arrivals("p", vectors(400)))
    drawn = [index.audit(bench.namespace, 10)._sequences for _ in range(30)]
    assert {len(each) for each in drawn} == {10}
    assert 180 < np.concatenate(drawn).mean() < 220


def test_an_audit_that_was_interrupted_leaves_nothing_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, rows = bench.index(), vectors(20)
    place_all(index, [*bench.arrivals("p", rows), *bench.arrivals("c", near(rows))])
    audit = index.audit(bench.namespace, 40)
    with monkeypatch.context() as broken:
        broken.setattr(Store, "command", away)
        broken.setattr(Store, "commands", away)
        with pytest.raises(InfrastructureError):
            audit.step()
    assert audit.run().duplicates > 10


def away(*arguments: object) -> None:
    """A server that does not answer."""
    raise InfrastructureError("away")


def test_namespaces_are_audited_in_turn_after_a_pause_each(
    single: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gauge is not a number until something was there to find."""
    clock = [0.0]
    monkeypatch.setattr(service, "monotonic", lambda: clock[0])
    first, second = (Bench(single.client, f"{name}-{uuid.uuid4().hex}") for name in "ab")
    index, rows, metrics = first.index(), vectors(20), Metrics()
    place_all(index, first.arrivals("p", rows))
    place_all(index, [*second.arrivals("p", rows), *second.arrivals("c", near(rows))])
    auditor = Auditor(index, Settings(audit_images=100, audit_pause_seconds=10), metrics)
    audited: list[str] = []
    recalls: list[float] = []

    def audit(namespace: str, sample: int) -> Audit:
        audited.append(namespace)
        return Index.audit(index, namespace, sample)

    monkeypatch.setattr(index, "audit", audit)
    for clock[0] in range(35):
        auditor.step()
        recalls.append(metrics.audit_recall._value.get())
    assert audited == [first.namespace, second.namespace, first.namespace]
    assert list(dict.fromkeys(map(str, recalls))) == ["nan", "1.0"]


def test_audit_command(single: LocalRedis, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(single.client, f"audited-{uuid.uuid4().hex}")
    place_all(bench.index(), [*bench.arrivals("p", vectors(50)), *bench.arrivals("c", vectors(50))])
    command = ["audit", "--redis-url", single.url, "--namespace", bench.namespace]
    command += ["--threshold", "0.8", "--sample", "20", "--at-least", "0.99"]
    assert worker.main(command) == 0
    assert "recall 1.0000" in capsys.readouterr().out
    assert worker.main([*command[:3], "--namespace", "nowhere", "--threshold", "0.8"]) == 2
    capsys.readouterr()
    others = Bench(single.client, f"audited-{uuid.uuid4().hex}")
    others.index().place(others.arrivals("p", vectors(9)))
    assert worker.main([*command, "--namespace", others.namespace]) == 0
    assert "there was nothing to find" in capsys.readouterr().out
    others.store().command("HSET", others.keys().root, "serving", b"\xff")
    assert worker.main([*command, "--namespace", others.namespace]) == 1
    assert "is damaged: see `python -m worker fsck`" in capsys.readouterr().err


def test_an_audit_takes_its_threshold_from_the_environment_or_the_weights(
    redis_server: LocalRedis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which must be those that filled the namespace."""
    command = ["audit", "--sample", "500"]
    monkeypatch.setenv("DEDUP_REDIS_URL", redis_server.url)
    bench, rows = Bench(redis_server.client, "default"), vectors(40)
    index = bench.index(model=read_weights("default").model_id())
    close, far = near(rows[:20], 1), near(rows[20:], 1, noise=1.3)  # at some 0.98 and 0.6
    place_all(
        index, [*bench.arrivals("p", rows), *bench.arrivals("c", np.concatenate([close, far]))]
    )
    assert worker.main(command) == 0
    assert "20 repeat an earlier one; the index finds 20:" in capsys.readouterr().out
    monkeypatch.setenv("DEDUP_THRESHOLD", "0.4")
    assert worker.main(command) == 0
    assert "40 repeat an earlier one" in capsys.readouterr().out
    monkeypatch.delenv("DEDUP_THRESHOLD")
    bench.store().command("HSET", bench.keys().root, f"model:{bench.keys().generation}", "other")
    assert worker.main(command) == 2
    assert "was filled by model other" in capsys.readouterr().err
    monkeypatch.setenv("DEDUP_THRESHOLD", "0.8")
    assert worker.main(command) == 0


@pytest.mark.parametrize("arguments", [["--namespace", ""], ["--sample", "0"], ["--sample", "x"]])
def test_odd_arguments_are_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        worker.main(["audit", "--threshold", "0.8", *arguments])
    assert ended.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["fsck"], ["audit", "--threshold", "0.8"]])
def test_a_command_says_in_one_line_that_redis_is_away(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert worker.main([*command, "--redis-url", f"redis://127.0.0.1:{free_port()}/0"]) == 3
    assert capsys.readouterr().err.startswith("error: Redis: ")


def test_a_node_of_a_cluster_is_not_taken_for_a_server_alone(
    trio: LocalRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"audited-{number}" for number in range(16)]  # some of them on other nodes
    command = ["audit", "--redis-url", trio.url, "--threshold", "0.8", "--namespace"]
    assert {worker.main([*command, name]) for name in names} == {2, 3}
    assert "set DEDUP_REDIS_CLUSTER=true" in capsys.readouterr().err
