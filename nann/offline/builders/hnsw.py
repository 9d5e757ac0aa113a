"""HNSW graphs built by faiss, in the arrays that NANN's search walks.

faiss keeps all neighbour lists in one flat array: node i owns ``neighbors[offsets[i]:offsets[i + 1]]``,
level l of it the slots ``cum_nneighbor_per_level[l]`` to ``cum_nneighbor_per_level[l + 1]``, filled
from the left and padded with -1. NANN searches levels 0 and 1 and scores every item above them, so
those two tables and the entry points are all that is kept (reference/nann.md, "Index").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from nann.offline.builders.nearest import join, nearest_lists, reverse_lists

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64, UInt8

__all__ = [
    "DEFAULT_SEED",
    "MIN_ENTRY_POINTS",
    "HnswGraph",
    "Space",
    "build_hnsw",
    "prepare_vectors",
    "to_ragged",
]

Space: TypeAlias = Literal["cosine", "l2", "ip"]

# The seed faiss' HNSW draws its levels from when nobody sets one; NANN's graphs were built with it.
DEFAULT_SEED = 12345
# Design, "Search semantics": below this many entry points the next lower level's items are added.
MIN_ENTRY_POINTS = 64
_ENTRY_LEVEL = 2  # 0-based; faiss counts levels from 1, NANN's rule is ``levels > 2``
_MIN_M = 2  # with fewer slots a repaired row has no room beside its protected edges


@dataclass(frozen=True, slots=True)
class HnswGraph:
    """A built graph over N items; every node is an item index.

    `neighbors` holds level 0 [N, 2m] and level 1 [N, m], padded with -1 at the end of a row; an item
    that is not on level 1 has an all-padding row there. `nearest` > 0: level 0 is made of so many nearest
    items and of those that have the item among theirs (`builders.nearest`), not of HNSW's own links.
    `entry_points` is NANN's own set (0-based level >= 2; empty in a tiny corpus), `walk_entry_points`
    that set filled up to 64 from the next lower levels in item order. `own_level_0` are HNSW's own links of
    level 0, whatever `nearest` is.
    """

    neighbors: tuple[Int32[np.ndarray, "N degree0"], Int32[np.ndarray, "N degree1"]]
    item_levels: UInt8[np.ndarray, " N"]
    entry_points: Int64[np.ndarray, " E"]
    walk_entry_points: Int64[np.ndarray, " W"]
    m: int
    ef_construction: int
    space: Space
    seed: int
    nearest: int
    own_level_0: Int32[np.ndarray, "N degree0"]

    @property
    def num_items(self) -> int:
        return len(self.item_levels)


def build_hnsw(
    embeddings: Float32[np.ndarray, "N D"],
    *,
    m: int = 16,
    ef_construction: int = 100,
    space: Space = "cosine",
    seed: int = DEFAULT_SEED,
    nearest: int = 0,
    num_threads: int | None = None,
) -> HnswGraph:
    """Build the graph over `embeddings`: up to 2m neighbours an item on level 0, m above it.

    The result depends on the arguments alone: faiss' build (1.15 and later) gives the same graph for
    any `num_threads` (None = all cores).

    Raises:
        ValueError: an argument is out of range, or the embeddings are not a finite float32 matrix.
    """
    import faiss

    if m < _MIN_M or ef_construction < 1:
        raise ValueError(
            f"m must be at least {_MIN_M} and ef_construction at least 1: {m}, {ef_construction}"
        )
    if not 0 <= nearest <= 2 * m:
        raise ValueError(f"nearest must be from 0 to 2m = {2 * m}, the degree of level 0, not {nearest}")
    vectors = prepare_vectors(embeddings, space)
    metric = faiss.METRIC_INNER_PRODUCT if space == "ip" else faiss.METRIC_L2
    index: Any = faiss.IndexHNSWFlat(vectors.shape[1], m, metric)
    index.hnsw.efConstruction = ef_construction
    index.hnsw.rng = faiss.RandomGenerator(seed)  # type: ignore[attr-defined]  # missing from its stubs
    threads_before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads or threads_before)
    try:
        # One call: faiss inserts the upper levels of a batch first, so the graph depends on the batches.
        index.add(vectors)
    finally:
        faiss.omp_set_num_threads(threads_before)
    levels = faiss.vector_to_array(index.hnsw.levels) - 1
    entry_points = np.flatnonzero(levels >= _ENTRY_LEVEL)
    level_0 = own_level_0 = _level_table(index, levels, 0)
    if nearest:
        lists = nearest_lists(index, vectors, nearest, num_threads=num_threads)
        level_0 = join(lists, reverse_lists(lists, 2 * m), 2 * m)
    return HnswGraph(
        neighbors=(level_0, _level_table(index, levels, 1)),
        item_levels=levels.astype(np.uint8),
        entry_points=entry_points,
        walk_entry_points=_filled_up(entry_points, levels),
        m=m,
        ef_construction=ef_construction,
        space=space,
        seed=seed,
        nearest=nearest,
        own_level_0=own_level_0,
    )


def prepare_vectors(embeddings: Float32[np.ndarray, "N D"], space: Space) -> Float32[np.ndarray, "N D"]:
    """The vectors whose L2 distance (`ip`: inner product) orders neighbours in `space`.

    Raises:
        ValueError: `space` is unknown, or the embeddings are not a finite, non-empty float32 matrix.
    """
    if space not in get_args(Space):
        raise ValueError(f"space must be one of {', '.join(get_args(Space))}, not {space!r}")
    if embeddings.ndim != 2 or embeddings.dtype != np.float32 or 0 in embeddings.shape:
        raise ValueError(
            f"embeddings must be a non-empty float32 matrix, not {embeddings.dtype} {list(embeddings.shape)}"
        )
    finite_rows = np.isfinite(embeddings).all(axis=1)
    if not finite_rows.all():
        row = int(np.argmin(finite_rows))
        raise ValueError(
            f"{np.count_nonzero(~finite_rows)} embeddings are not finite, the first is row {row}"
        )
    vectors = np.ascontiguousarray(embeddings)
    if space != "cosine":
        return vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    # A zero vector has no direction; it stays at the origin, equally far from every unit vector.
    return vectors / np.where(norms > 0, norms, np.float32(1))


def to_ragged(
    table: Int32[np.ndarray, "N degree"],
) -> tuple[Int64[np.ndarray, " edges"], Int64[np.ndarray, " N+1"]]:
    """A padded table as NANN's ``values`` and ``row_splits``."""
    present = table >= 0
    row_splits = np.zeros(len(table) + 1, np.int64)
    np.cumsum(present.sum(axis=1), out=row_splits[1:])
    return table[present].astype(np.int64), row_splits


def _level_table(index: Any, levels: Int32[np.ndarray, " N"], level: int) -> Int32[np.ndarray, "N degree"]:
    import faiss

    begin, end = faiss.vector_to_array(index.hnsw.cum_nneighbor_per_level)[level : level + 2]
    on_level = np.flatnonzero(levels >= level)
    table = np.full((len(levels), int(end - begin)), -1, np.int32)
    if len(on_level):
        offsets = faiss.vector_to_array(index.hnsw.offsets)[on_level].astype(np.int64)
        flat = faiss.vector_to_array(index.hnsw.neighbors)
        table[on_level] = flat[offsets[:, None] + np.arange(begin, end)]
    return table


def _filled_up(
    entry_points: Int64[np.ndarray, " E"], levels: Int32[np.ndarray, " N"]
) -> Int64[np.ndarray, " W"]:
    """`entry_points` followed by items of the next lower levels, in order, until there are 64."""
    missing = max(MIN_ENTRY_POINTS - len(entry_points), 0)
    lower = [np.flatnonzero(levels == level) for level in range(_ENTRY_LEVEL - 1, -1, -1)]
    return np.concatenate([entry_points, np.concatenate(lower)[:missing]])
