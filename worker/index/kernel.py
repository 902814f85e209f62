"""Matrix products on one thread, of whole numbers, never inexact, and of floats; masks of them.

Owns the choice between torch's int8 kernel and numpy's float32, whatever is multiplied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worker.vectors import DIMENSIONS, LARGEST, Vectors, dots


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on this thread: the products are small, waiting for a busy core costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def integer_kernel_is_exact() -> bool:
    """Whether torch multiplies int8 matrices exactly here.

    It is private to torch and three times as fast as float32 with VNNI; on processors without it
    some kernels saturate. The extreme values below would show it.
    """
    extreme = np.full((16, DIMENSIONS), LARGEST, np.int8)
    extreme[1::2] = -LARGEST
    try:
        product = _integer_product(extreme, extreme)
    except (AttributeError, RuntimeError):
        return False
    return bool((product == dots(extreme, extreme)).all())


def _integer_product(left: Vectors, right: Vectors) -> npt.NDArray[np.int32]:
    product: npt.NDArray[np.int32] = torch._int_mm(
        torch.from_numpy(left), torch.from_numpy(right).T
    ).numpy()
    return product


def product(left: Vectors, right: Vectors) -> npt.NDArray[Any]:
    """Return exact dot products (n, m) of int8 rows (n, 128) and (m, 128), whole numbers."""
    if integer_kernel_is_exact():
        return _integer_product(left, right)
    return dots(left, right)


def inner(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return float32 dot products (n, m) of rows (n, k) and (m, k), on this thread.

    numpy's BLAS would wake threads of its own, which then spin beside a busy worker.
    """
    with one_thread():
        product: npt.NDArray[np.float32] = (
            torch.from_numpy(left) @ torch.from_numpy(right).T
        ).numpy()
    return product


def places_in(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return rows and columns where a mask (n, m) is true, row by row.

    As `mask.nonzero()` does, which takes fifteen times as long where few are true.
    """
    rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return rows, columns
