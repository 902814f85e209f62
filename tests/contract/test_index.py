"""What every caller of the index relies on, on one server and on a cluster."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis

from tests.contract.harness import Bench, earliest_ids, maintain, near, place_all, vectors, verdict
from worker.errors import InfrastructureError, ModelMismatch
from worker.index import Answer
from worker.index.keys import NAMESPACES, encode
from worker.index.store import PIPELINE, Store


def test_first_is_unique_and_its_near_copy_names_it(bench: Bench) -> None:
    index, rows = bench.index(), vectors(2)
    first, other, copy = index.place(
        [*bench.arrivals("photo", rows), bench.arrival("copy", near(rows[:1])[0])]
    )
    assert (first.outcome, first.sequence, first.earliest, first.best) == ("placed", 1, None, None)
    assert other.earliest is None
    assert other.best is not None and other.best.image_id == "photo-0"
    assert copy.earliest is not None and copy.earliest.image_id == "photo-0"
    assert copy.earliest.similarity > 0.9
    assert copy.matches == (copy.earliest,)
    bench.assert_whole()


def test_earliest_is_not_the_most_similar(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    copies = [near(rows, seed, noise)[0] for seed, noise in ((1, 0.3), (2, 0.2), (3, 0.02))]
    answers = index.place([bench.arrival(f"p{at}", row) for at, row in enumerate(copies)])
    last = index.place([bench.arrival("last", rows[0])])[0]
    assert earliest_ids(answers) == [None, "p0", "p0"]
    assert last.earliest is not None and last.earliest.image_id == "p0"
    assert last.best is not None and last.best.image_id == "p2"
    assert [match.image_id for match in last.matches] == ["p2", "p1", "p0"]


def test_matches_are_limited(bench: Bench) -> None:
    index, row = bench.index(matches=2), vectors(1)
    index.place([bench.arrival(f"p{at}", near(row, at)[0]) for at in range(6)])
    assert len(index.place([bench.arrival("last", row[0])])[0].matches) == 2


def test_same_bytes_are_exact_without_a_vector(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    original = bench.arrival("original", rows[0], bytes="same")
    assert index.recognise([original]) == [None]
    index.place([original])
    copy = bench.arrival("copy", bytes="same")
    answer = index.recognise([copy])[0]
    assert answer is not None and answer.outcome == "exact" and answer.sequence == 2
    assert answer.exact_of is not None and answer.exact_of.image_id == "original"
    assert index.recognise([copy]) == [answer]
    bench.assert_whole()


def test_settled_image_is_seen_with_its_first_verdict(bench: Bench) -> None:
    index, arrival = bench.index(), bench.arrival("a", vectors(1)[0])
    sequence = index.place([arrival])[0].sequence
    assert sequence == 1
    assert index.settle([(bench.namespace, "a", 1, verdict(1))]) == [verdict(1)]
    assert bench.index().settle([(bench.namespace, "a", 1, verdict(2))]) == [verdict(1)]
    for answer in (*index.recognise([arrival]), *index.place([arrival])):
        assert answer is not None
        assert (answer.outcome, answer.verdict, answer.sequence) == ("seen", verdict(1), 1)


def test_of_two_verdicts_told_at_once_the_first_stays(bench: Bench) -> None:
    """As when an event is delivered twice; others of its bucket and of another one are beside."""
    index = bench.index()
    index.place(bench.arrivals("p", vectors(40)))
    told = [(at, verdict(at)) for at in range(40)]
    told[20:20] = [(19, verdict(99))]
    entries = [(bench.namespace, f"p-{at}", at + 1, each) for at, each in told]
    kept = index.settle(entries)
    assert kept[20] == kept[19] == verdict(19)
    assert [*kept[:20], *kept[21:]] == [verdict(at) for at in range(40)]
    assert index.settle(entries) == kept
    bench.assert_whole()


@pytest.mark.parametrize("verdict", [b"", b"x" * 257])
def test_verdicts_have_a_size(bench: Bench, verdict: bytes) -> None:
    index = bench.index()
    index.place([bench.arrival("a", vectors(1)[0])])
    with pytest.raises(ValueError, match="1 to 256"):
        index.settle([(bench.namespace, "a", 1, verdict)])


def test_a_verdict_for_another_image_is_refused(bench: Bench) -> None:
    index = bench.index()
    index.place([bench.arrival("a", vectors(1)[0])])
    assert index.settle([(bench.namespace, "b", 1, verdict())]) == [None]


def test_same_id_with_other_bytes_is_a_conflict(bench: Bench) -> None:
    index, rows = bench.index(), vectors(2)
    index.place([bench.arrival("a", rows[0], bytes="one")])
    other = bench.arrival("a", rows[1], bytes="two")
    recognised, placed = index.recognise([other])[0], index.place([other])[0]
    assert recognised is not None
    assert recognised.outcome == placed.outcome == "conflict"
    bench.assert_whole()


def test_a_check_leaves_no_trace_and_never_finds_itself(bench: Bench) -> None:
    index, rows = bench.index(), vectors(2)
    index.place(bench.arrivals("p", rows))
    before = bench.sequences()
    stranger = bench.arrival("new", near(rows[:1])[0], store=False)
    itself = bench.arrival("p-0", rows[0], store=False, bytes="edited")
    assert index.recognise([stranger, itself]) == [None, None]
    found, own = index.place([stranger, itself])
    assert found.sequence is None and earliest_ids([found]) == ["p-0"]
    assert own.earliest is None and own.best is not None and own.best.image_id == "p-1"
    exact = index.recognise([bench.arrival("x", store=False, bytes="p-1")])[0]
    assert exact is not None and exact.outcome == "exact" and exact.sequence is None
    assert index.recognise([bench.arrival("p-1", store=False)]) == [None]
    assert bench.sequences() == before


def test_repeating_a_call_changes_nothing(bench: Bench) -> None:
    index, rows = bench.index(), vectors(60)
    arrivals = [*bench.arrivals("p", rows), *bench.arrivals("copy", near(rows))]
    first = place_all(index, arrivals)
    again = place_all(bench.index(), arrivals)
    assert [a.sequence for a in first] == list(range(1, 121))
    for one, two in zip(first, again, strict=True):
        assert (one.sequence, one.earliest, one.best) == (two.sequence, two.earliest, two.best)
        assert one.matches == two.matches
    assert bench.sequences() == 120
    bench.assert_whole()


def test_a_repeated_call_answers_for_the_vector_stored_first(bench: Bench) -> None:
    """Another machine may embed a bit differently; the answer must not."""
    index, rows = bench.index(), vectors(2)
    index.place([bench.arrival("a", rows[0])])
    arrival = bench.arrival("b", near(rows[:1])[0])
    first = index.place([arrival])[0]
    again = bench.index().place([replace(arrival, vector=rows[1])])[0]
    assert again.earliest == first.earliest


def test_a_lost_answer_is_found_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    index, rows = bench.index(), vectors(1)
    index.place([bench.arrival("a", rows[0])])
    arrival = bench.arrival("b", near(rows)[0])
    executed = Store._send

    def lose(self: Store, commands: object) -> list[object]:
        executed(self, commands)  # type: ignore[arg-type]
        raise ConnectionResetError("the answer was lost")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_send", lose)
        with pytest.raises(InfrastructureError, match="lost"):
            index.place([arrival])
    answer = index.place([arrival])[0]
    assert (answer.sequence, earliest_ids([answer])) == (2, ["a"])
    assert bench.sequences() == 2
    bench.assert_whole()


def test_same_id_twice_in_a_batch_is_one_image(bench: Bench) -> None:
    index, arrival = bench.index(), bench.arrival("a", vectors(1)[0])
    answers = index.place([arrival, arrival])
    assert [answer.sequence for answer in answers] == [1, 1]
    assert [answer.earliest for answer in answers] == [None, None]


def test_another_model_is_refused_with_an_instruction(bench: Bench) -> None:
    bench.index().open(bench.namespace)
    with pytest.raises(ModelMismatch, match="rebuild --namespace"):
        bench.index(model="model-b").open(bench.namespace)


def test_namespaces_do_not_see_each_other(bench: Bench) -> None:
    index, row = bench.index(), vectors(1)[0]
    names = [bench.namespace + end for end in ("", "}", "{a}", ":1", "%7D", "/../", " ")]
    arrivals = [bench.arrival("a", row, namespace=name) for name in names]
    assert index.recognise(arrivals) == [None] * len(names)
    assert all(answer.best is None for answer in index.place(arrivals))
    assert {answer.sequence for answer in index.place(arrivals)} == {1}
    assert index.forget(names[0], "a", (0, 99))
    assert index.names(names[1], [1]) == {1: "a"}
    for name in names:
        replace(bench, namespace=name).assert_whole()


def test_what_stores_nothing_makes_no_namespace(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    check = bench.arrival("c", near(rows)[0], store=False)

    def keys() -> list[bytes]:
        pages = bench.store().pages(f"{{{encode(bench.namespace)}}}")
        return [name for page in pages for name in page]

    assert not index.forget(bench.namespace, "x", (0, 1))
    assert index.recognise([check]) == [None]
    assert index.place([check]) == [Answer("placed")]
    assert keys() == []
    assert not bench.store().command("SISMEMBER", NAMESPACES, encode(bench.namespace))
    bench.index().place([bench.arrival("p", rows[0])])
    assert earliest_ids(index.place([check])) == ["p"]
    assert index.forget(bench.namespace, "p", (0, 9))
    assert bench.store().command("SISMEMBER", NAMESPACES, encode(bench.namespace))
    bench.assert_whole()


def test_a_check_of_another_model_is_refused_once_there_is_a_namespace(bench: Bench) -> None:
    other, rows = bench.index(model="model-b"), vectors(1)
    check = bench.arrival("c", rows[0], store=False)
    assert other.recognise([check]) == [None]
    bench.index().open(bench.namespace)
    for ask in (other.recognise, other.place):
        with pytest.raises(ModelMismatch):
            ask([check])
    with pytest.raises(ModelMismatch):
        other.forget(bench.namespace, "x", (0, 1))


def test_layouts_that_are_known_are_served_and_others_are_refused(bench: Bench) -> None:
    index, rows = bench.index(), vectors(60)
    index.open(bench.namespace)
    store, keys = bench.store(), bench.keys()
    layout = f"layout:{keys.generation}"
    store.command("HSET", keys.root, layout, "1")
    store.command("HDEL", keys.meta, "salt")
    place_all(bench.index(), bench.arrivals("p", rows))
    assert earliest_ids(bench.index().place([bench.arrival("c", near(rows)[7])])) == ["p-7"]
    bench.assert_whole()
    store.command("HSET", keys.root, layout, "3")
    with pytest.raises(ModelMismatch, match="layout 3, this version knows 1 and 2"):
        bench.index().open(bench.namespace)


def test_a_walk_over_all_keys_says_in_one_line_that_redis_is_away(bench: Bench) -> None:
    index = bench.index()
    place_all(index, bench.arrivals("p", vectors(300)))

    def broken(**_: object) -> Iterator[bytes]:
        yield from [b"key"] * (PIPELINE + 1)
        raise redis.ConnectionError("gone")

    client = bench.connect()
    client.scan_iter = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(InfrastructureError, match="Redis: gone"):
        list(Store(client).pages(bench.keys().prefix))


def test_an_empty_namespace_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="empty"):
        bench.index().open("")


def test_names_are_kept_and_unknown_ones_left_out(bench: Bench) -> None:
    index = bench.index()
    index.place([bench.arrival("a", vectors(1)[0])])
    index.forget(bench.namespace, "a", (0, 99))
    assert bench.index().names(bench.namespace, [1, 2]) == {1: "a"}


def test_a_server_that_lost_its_scripts_gets_them_again(bench: Bench) -> None:
    index, rows = bench.index(), vectors(2)
    index.place([bench.arrival("a", rows[0])])
    bench.connect().script_flush()
    assert index.place([bench.arrival("b", rows[1])])[0].sequence == 2


def test_a_vector_is_needed_to_place(bench: Bench) -> None:
    with pytest.raises(ValueError, match="no vector"):
        bench.index().place([bench.arrival("a")])


def test_many_images_split_into_clusters_and_all_are_found(bench: Bench) -> None:
    index, rows = bench.index(), vectors(400)
    place_all(index, bench.arrivals("p", rows))
    assert index.stats()["clusters"] > 10
    bench.assert_whole()
    found = bench.index().place(
        [bench.arrival(f"c{at}", row, store=False) for at, row in enumerate(near(rows))]
    )
    assert earliest_ids(found) == [f"p-{at}" for at in range(400)]


def test_identical_vectors_split_too(bench: Bench) -> None:
    index, row = bench.index(), vectors(1)[0]
    arrivals = [bench.arrival(f"p{at}", row) for at in range(150)]
    answers = place_all(index, arrivals)
    maintain(index)
    assert earliest_ids(answers) == [None] + ["p0"] * 149
    assert index.stats()["clusters"] >= 4
    bench.assert_whole()


def test_a_small_cache_evicts_and_finds_the_same(bench: Bench) -> None:
    rows = vectors(300)
    place_all(bench.index(), bench.arrivals("p", rows))
    small = bench.index(cache_bytes=20_000)
    found = small.place(
        [bench.arrival(f"c{at}", row, store=False) for at, row in enumerate(near(rows[:40]))]
    )
    assert earliest_ids(found) == [f"p-{at}" for at in range(40)]
    assert small.stats()["cache_bytes"] <= 20_000


def test_a_worker_far_behind_loads_the_clusters_first(bench: Bench) -> None:
    rows = vectors(120)
    slow, fast = bench.index(tail_records=4, cluster_limit=512), bench.index(cluster_limit=512)
    slow.place([bench.arrival("first", rows[0])])
    place_all(fast, bench.arrivals("p", rows[1:]))
    answer = slow.place([bench.arrival("c", near(rows[-1:])[0])])[0]
    assert earliest_ids([answer]) == ["p-118"]
    assert answer.vectors_compared >= 120
    assert answer.cluster_records == answer.vectors_compared, "the only cluster"


def test_budget_and_margin_limit_the_probes_and_say_so(bench: Bench) -> None:
    rows = vectors(400)
    place_all(bench.index(), bench.arrivals("p", rows))
    ask = [bench.arrival("c", rows[7], store=False)]
    few = bench.index(probes=2, probe_margin=2.0).place(ask)[0]
    assert (few.clusters_probed, few.truncated) == (2, True)
    none_left_out = bench.index(probes=1000, probe_margin=2.0).place(ask)[0]
    assert not none_left_out.truncated and none_left_out.clusters_probed > 10
    near_only = bench.index(probes=1000, probe_margin=0.0, least_probes=1).place(ask)[0]
    assert (near_only.clusters_probed, near_only.truncated) == (1, False)


def test_the_least_probes_are_made_however_far_away_and_cut_nothing_short(bench: Bench) -> None:
    index = bench.index()
    place_all(index, bench.arrivals("p", vectors(300)))
    ask = [bench.arrival("c", vectors(1, seed=5)[0], store=False)]
    for probes, least, made in ((1000, 3, 3), (2, 3, 2), (1000, 10**6, index.stats()["clusters"])):
        answer = bench.index(probes=probes, probe_margin=0.0, least_probes=least).place(ask)[0]
        assert (answer.clusters_probed, answer.truncated) == (made, False)


def test_only_so_many_namespaces_stay_open(bench: Bench) -> None:
    index, rows = bench.index(open_namespaces=2), vectors(4)
    names = [f"{bench.namespace} {number}" for number in range(4)]
    for name, row in zip(names, rows, strict=True):
        index.place([bench.arrival("p", row, namespace=name)])
    assert [space.keys.namespace for space in index._spaces.opened()] == names[2:]
    again = index.place([bench.arrival("q", near(rows)[0], namespace=names[0])])
    assert earliest_ids(again) == ["p"]


def test_an_arrival_waits_only_so_long_for_a_cluster_that_another_rebuilds(bench: Bench) -> None:
    index, rows = bench.index(cluster_limit=8, place_attempts=2), vectors(33)
    index.place(bench.arrivals("p", rows[:32]))
    bench.store().command("SET", bench.keys().lock(1), "another worker")
    late = bench.arrival("late", rows[32])
    with pytest.raises(InfrastructureError, match="after 2 rounds"):
        index.place([late])
    bench.store().command("DEL", bench.keys().lock(1))
    assert index.place([late])[0].sequence == 33
    bench.assert_whole()
