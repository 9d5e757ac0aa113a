"""`scan.cu` against NumPy: inner products with unit vectors, for any tile, batch and number of dimensions."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_kernels import REAL, SMALL, program

from nann.engine.cuda.modules import BlockSizes

F32, I32, I64 = np.float32, np.int32, np.int64


def scan(
    sizes: BlockSizes, vectors: np.ndarray, queries: np.ndarray, *, first: int, rows: int, seed: int = 0
) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1).astype(F32)
    batch, stride = len(queries), rows + 3
    products = np.full((batch, stride), np.inf, F32)
    tile, depth = sizes.scan_tile, sizes.scan_depth
    program("scan.cu", sizes).run(
        "inner_products",
        (-(-rows // tile), -(-batch // tile)),
        tile * tile // 16,
        [
            *(vectors, norms, I64(first), I32(rows), queries, I32(batch), I32(vectors.shape[1])),
            *(products, I64(stride)),
        ],
        shared_bytes=8 * depth * (tile + 4),
        seed=seed,
    )
    assert np.isinf(products[:, rows:]).all()
    return products[:, :rows]


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-3, 4, shape).astype(F32)


def wanted(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Sums of small integers are exact, so that only the division rounds."""
    norms = np.linalg.norm(vectors, axis=1).astype(F32)
    products = queries @ vectors.T
    return np.divide(products, norms, where=norms > 0, out=np.zeros_like(products))


@pytest.mark.parametrize("dim", [1, 3, 16, 17, 40])
@pytest.mark.parametrize(
    ("batch", "first", "rows"), [(1, 0, 1), (4, 5, 32), (33, 0, 70), (3, 69, 1), (64, 3, 31)]
)
def test_products_with_any_part_of_the_items(dim, batch, first, rows) -> None:
    rng = np.random.default_rng(dim)
    vectors, queries = integers(rng, 70, dim), integers(rng, batch, dim)
    vectors[::9] = 0
    if first + rows > 70:
        rows = 70 - first
    found = scan(SMALL, vectors, queries, first=first, rows=rows, seed=batch)
    np.testing.assert_array_equal(found, wanted(vectors[first : first + rows], queries))


def test_the_real_tile() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = integers(rng, 200, 64), integers(rng, 65, 64)
    np.testing.assert_array_equal(
        scan(REAL, vectors, queries, first=7, rows=190), wanted(vectors[7:197], queries)
    )


def test_a_product_does_not_depend_on_who_else_asks() -> None:
    rng = np.random.default_rng(1)
    vectors, queries = rng.normal(size=(90, 33)).astype(F32), rng.normal(size=(40, 33)).astype(F32)
    together = scan(SMALL, vectors, queries, first=0, rows=90)
    for b in (0, 31, 39):
        alone = scan(SMALL, vectors, queries[b : b + 1], first=40, rows=50)
        np.testing.assert_array_equal(alone[0].view(I32), together[b, 40:].view(I32))
    np.testing.assert_allclose(together, wanted(vectors, queries), rtol=1e-5, atol=1e-5)
