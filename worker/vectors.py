"""Vectors as the index stores them, and the one similarity there is.

Owns the int8 form of an embedding and the cosine between two of them. The products are sums of at
most 128 x 127 x 127 < 2^24, which float32 holds exactly in any order of addition, and the final
division is done in float64 on whole numbers: so a similarity is the same on every machine and in
every batch shape. It must not know where vectors come from or where they are kept.
"""

import numpy as np
import numpy.typing as npt

DIMENSIONS = 128
LARGEST = 127

Vectors = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float64]


def quantize(embeddings: npt.NDArray[np.floating]) -> Vectors:
    """Turn float rows (n, 128) into int8 rows (n, 128); each row's largest component becomes ±127.

    A scale per row costs nothing, since cosine ignores it. Raises ValueError for another width,
    for a row of zeros and for components that are not finite: such rows have no direction.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != DIMENSIONS:
        raise ValueError(f"expected rows of {DIMENSIONS}, got shape {rows.shape}")
    largest = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    if not np.isfinite(largest).all() or (largest == 0).any():
        raise ValueError("a vector is zero or not finite")
    quantized: Vectors = np.rint(rows / largest * LARGEST).astype(np.int8)
    return quantized


def dots(queries: Vectors, stored: Vectors) -> npt.NDArray[np.float32]:
    """Return the integer dot products, (m, 128) by (n, 128) to (m, n), held exactly in float32."""
    product: npt.NDArray[np.float32] = queries.astype(np.float32) @ stored.astype(np.float32).T
    return product


def squared_norms(vectors: Vectors) -> npt.NDArray[np.int64]:
    """Return the squared lengths (n,) of int8 rows (n, 128), as whole numbers."""
    wide = vectors.astype(np.int64)
    norms: npt.NDArray[np.int64] = (wide * wide).sum(axis=1)
    return norms


def similarity(queries: Vectors, stored: Vectors) -> Floats:
    """Return the cosine of every pair, (m, 128) by (n, 128) to (m, n) float64 in [-1, 1].

    A row of zeros (a deleted record) is at 0 from everything.
    """
    squares = squared_norms(queries)[:, None] * squared_norms(stored)[None, :]
    return cosine(dots(queries, stored), squares)


def pairwise(queries: Vectors, stored: Vectors) -> Floats:
    """Return the cosine of each row with its partner, (n, 128) and (n, 128) to (n,)."""
    products = np.einsum("ij,ij->i", queries.astype(np.float32), stored.astype(np.float32))
    return cosine(products, squared_norms(queries) * squared_norms(stored))


def cosine(
    products: npt.NDArray[np.floating] | npt.NDArray[np.integer], squares: npt.NDArray[np.int64]
) -> Floats:
    """Return products / sqrt(squares) in float64: every operation is exactly rounded (IEEE 754).

    `squares` is the product of the two squared norms, a whole number below 2^53.
    """
    lengths = np.sqrt(squares.astype(np.float64))
    result: Floats = np.divide(
        products.astype(np.float64), lengths, out=np.zeros(squares.shape), where=squares > 0
    )
    return result


def directions_of(vectors: Vectors) -> npt.NDArray[np.float32]:
    """Return int8 rows (n, 128) as float32 unit rows; a row of zeros stays zero."""
    rows = vectors.astype(np.float32)
    lengths = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    unit: npt.NDArray[np.float32] = np.divide(
        rows, lengths, out=np.zeros_like(rows), where=lengths > 0
    )
    return unit
