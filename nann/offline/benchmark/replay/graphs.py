"""Neighbour tables [N, degree], -1 padded, that were tried and lost; those that won are in the product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["co_read", "nsg", "pruned", "score_vectors"]


@njit(cache=True, nogil=True)
def pruned(vectors: Any, table: Any, alpha: float, degree: int) -> Any:
    """Vamana's rule: of each row, nearest first, drop what is `alpha` times nearer to an item kept (L2)."""
    out = np.full((len(table), degree), -1, np.int32)
    for i in range(len(table)):
        n = 0
        for node in table[i]:
            if node < 0 or n == degree:
                break
            distance = ((vectors[i] - vectors[node]) ** 2).sum()
            keep = True
            for j in range(n):
                between = ((vectors[out[i, j]] - vectors[node]) ** 2).sum()
                if alpha * alpha * between <= distance:
                    keep = False
                    break
            if keep:
                out[i, n] = node
                n += 1
    return out


def co_read(
    items: Int32[np.ndarray, " events"],
    user: Int32[np.ndarray, " events"],
    num_items: int,
    *,
    window: int,
    degree: int,
) -> Int32[np.ndarray, "N degree"]:
    """For each item those most often read within `window` places of it, weighted by 1 / distance."""
    from scipy.sparse import coo_matrix

    left, right, weight = [], [], []
    for gap in range(1, window + 1):
        same = (user[:-gap] == user[gap:]) & (items[:-gap] != items[gap:])
        left += [items[:-gap][same], items[gap:][same]]
        right += [items[gap:][same], items[:-gap][same]]
        weight.append(np.full(2 * np.count_nonzero(same), 1 / gap, np.float32))
    pairs = coo_matrix(
        (np.concatenate(weight), (np.concatenate(left), np.concatenate(right))), (num_items, num_items)
    ).tocsr()
    table = np.full((num_items, degree), -1, np.int32)
    for i in range(num_items):
        row = slice(pairs.indptr[i], pairs.indptr[i + 1])
        best = np.argsort(-pairs.data[row], kind="stable")[:degree]
        table[i, : len(best)] = pairs.indices[row][best]
    return table


def nsg(
    vectors: Float32[np.ndarray, "N d"], nearest: Int32[np.ndarray, "N count"], degree: int
) -> Int32[np.ndarray, "N degree"]:
    """faiss' NSG of up to `degree` neighbours, from ready lists of nearest items (L2)."""
    import faiss as library

    faiss: Any = library
    index = faiss.IndexNSGFlat(vectors.shape[1], degree, faiss.METRIC_L2)
    lists = nearest.astype(np.int64)
    # A list of an item must be full: where it is not, its nearest item stands again.
    lists = np.where(lists < 0, np.maximum(lists[:, :1], 0), lists)
    index.build(vectors, lists)
    graph = index.nsg.get_final_graph()
    table = faiss.rev_swig_ptr(graph.data, graph.N * graph.K).reshape(graph.N, graph.K)
    return np.array(table, dtype=np.int32)


def score_vectors(scores: Float32[np.ndarray, "users N"], width: int) -> Float32[np.ndarray, "N width"]:
    """Items by how they are scored: the first `width` principal components of users' standardised scores."""
    scores = np.asarray(scores)
    rows = (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)
    rows -= rows.mean(axis=0, keepdims=True)  # how popular an item is with everyone is no direction
    values, directions = np.linalg.eigh(rows @ rows.T)
    vectors: Float32[np.ndarray, "N width"] = rows.T @ directions[:, np.argsort(-values)[:width]]
    return np.ascontiguousarray(vectors, dtype=np.float32)
