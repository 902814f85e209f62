"""Records lie in the cluster they are nearest to, so that few probes find them."""

from dataclasses import replace

import numpy as np

from tests.contract.harness import MODEL, Bench, place_all, vectors
from worker.index.keys import State
from worker.index.space import open_space
from worker.index.splitting import Maintainer
from worker.vectors import directions_of


def misplaced(bench: Bench) -> int:
    """How many records are nearer to another cluster's centroid than to their own's."""
    store = bench.store()
    space, reader = open_space(store, bench.namespace, MODEL), Maintainer(store, bench.settings)
    count = 0
    for cluster in space.table.clusters():
        contents = reader.read(space, cluster)
        assert contents is not None
        rows = contents.vectors[contents.living]
        own = (directions_of(rows) @ space.table.directions_of([cluster]).T)[:, 0]
        count += int((space.table.nearest(rows, without=cluster)[1] > own + 1e-4).sum())
    return count


def test_records_come_to_lie_where_they_belong(bench: Bench) -> None:
    """Random directions are the hardest: any two clusters may be neighbours."""
    left = []
    for tidied in (0, 1000):
        place_all(bench.index(tidy_clusters=tidied), bench.arrivals("p", vectors(1200)), 64)
        bench.assert_whole()
        left.append(misplaced(bench))
        bench = replace(bench, namespace=bench.namespace + "+")
    assert left[0] > 0
    assert left[1] == 0


def test_clusters_begin_large_and_become_smaller(bench: Bench) -> None:
    """And not all at once; one that nothing comes to is split when something does."""
    index = bench.index(cluster_limit=16, first_cluster_limit=64, probes=8)
    settings = replace(bench.settings, cluster_limit=16, first_cluster_limit=64)
    rows, numbers = vectors(3500), []
    for first in range(0, len(rows), 50):
        place_all(index, bench.arrivals(f"p{first}", rows[first : first + 50]))
        states = bench.store().command("HVALS", bench.keys().clusters)
        due = settings.limits(len(states)).due
        assert max(State.unpack(state).live for state in states) <= 2 * due
        numbers.append(len(states))
    assert numbers[0] == 1
    assert numbers[-1] >= 250
    assert np.diff(numbers).max() <= 25
    bench.assert_whole()


def test_clusters_take_turns(bench: Bench) -> None:
    place_all(bench.index(), bench.arrivals("p", vectors(200)))
    table = open_space(bench.store(), bench.namespace, MODEL).table
    clusters = sorted(table.clusters())
    assert table.after(clusters[0], 2) == clusters[1:3]
    assert table.after(clusters[-1], 2) == clusters[:2]
    assert table.after(clusters[-2], 10**6) == [clusters[-1], *clusters[:-1]]
