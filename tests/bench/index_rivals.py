"""What the index is measured against: numpy brute force, and faiss IVF-Flat in the same process.

Each runs on one thread, in the batches the index gets. Knows nothing of Redis.
"""

import os
import time
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from tests.bench.index_data import Real
from worker.index.kernel import one_thread, product
from worker.vectors import Vectors, directions_of, squared_norms

BATCH = 64
FAISS_LISTS_TRAINED_ON = 64
PART = 100_000
"""Rows turned into float32 at once."""


def brute_force(
    stored: Vectors, queries: Vectors, real: Real, threshold: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """For each query, whether its photo reaches the threshold, and whether any image does."""
    lengths = np.sqrt(squared_norms(queries))
    own = np.einsum(
        "ij,ij->i", queries.astype(np.float32), stored[real.original].astype(np.float32)
    ) / (lengths * np.sqrt(squared_norms(stored[real.original])))
    best = np.full(len(queries), -1.0)
    for start in range(0, len(stored), 50_000):
        part = stored[start : start + 50_000]
        with one_thread():
            near = product(part, queries) / np.sqrt(squared_norms(part))[:, None]
        best = np.maximum(best, near.max(axis=0) / lengths)
    return own >= threshold, best >= threshold


def brute_force_time(stored: Vectors, queries: Vectors) -> float:
    """Median seconds an image of one float32 product with everything, in batches."""
    starts = range(0, min(len(queries), 5 * BATCH), BATCH)
    asked = [queries[start : start + BATCH].astype(np.float32) for start in starts]
    seconds = [0.0] * len(asked)
    for at in range(0, len(stored), PART):  # ten million float32 rows would take 5 GB
        rows = stored[at : at + PART].astype(np.float32).T
        for number, part in enumerate(asked):
            with threadpool_limits(1):
                began = time.perf_counter()
                (part @ rows).max(axis=1)
                seconds[number] += time.perf_counter() - began
    return float(np.median([each / len(part) for each, part in zip(seconds, asked, strict=True)]))


def faiss_lists(
    stored: Vectors,
    queries: Vectors,
    real: Real,
    reaching: npt.NDArray[np.bool_],
    *,
    recall: float,
) -> dict[str, Any]:
    """IVF-Flat in process: the fewest probes with the recall wanted, and its median time.

    Lists are four times the root of what is stored; faiss' guidelines to choose an index advise 4
    to 16 times up to a million vectors.
    """
    inverted: Any
    lists = round(4 * len(stored) ** 0.5)
    faiss.omp_set_num_threads(os.cpu_count() or 1)  # to be built with; what is timed has one
    asked = directions_of(queries)
    quantizer = faiss.IndexFlatIP(128)
    index = faiss.IndexIVFFlat(quantizer, 128, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 8
    every = max(1, len(stored) // (lists * FAISS_LISTS_TRAINED_ON))
    index.train(directions_of(stored[::every]))
    for start in range(0, len(stored), PART):
        index.add(directions_of(stored[start : start + PART]))
    lists_of = np.zeros(len(stored), np.int64)
    inverted = index.invlists
    for number in range(lists):
        size = inverted.list_size(number)
        lists_of[faiss.rev_swig_ptr(inverted.get_ids(number), size)] = number
    _, order = quantizer.search(asked, min(lists, 1024))
    homes = lists_of[real.original][:, None]
    rank = np.where((order == homes).any(1), (order == homes).argmax(1), lists)[reaching]
    probes = next((p for p in range(1, lists) if (rank < p).mean() >= recall), lists)
    index.nprobe = probes
    faiss.omp_set_num_threads(1)
    times = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        began = time.perf_counter()
        index.search(part, 5)
        times.append((time.perf_counter() - began) / len(part))
    return {
        "faiss_p50_seconds": float(np.median(times)),
        "faiss_probes": probes,
        "faiss_lists": lists,
        "faiss_recall": float((rank < probes).mean()),
    }
