"""The graph of the report: near neighbours, thinned out by direction, linked both ways.

The two levels have the form of an artifact's (docs/artifact.md): fixed degree, -1 padded. Where a real
artifact comes from faiss's HNSW, this one is built in bulk, because 1.3 million insertions take minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.offline.benchmark.gpu.edges import choose_all, join_all, link_unreached, reverse, spread
from nann.offline.benchmark.gpu.neighbors import nearest_neighbors

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["DEGREE", "Graph", "NearItems", "build_graph", "find_near_items", "link", "reachable"]

DEGREE = 32
_NUM_NEIGHBORS = 48  # candidates that the edges of an item are chosen from
_FORWARD = 20  # of the edges, before others' edges to the item are added
# HNSW's levels thin out by a factor of M; NANN's M is 32 (reference/nann.md, "Index").
_LEVEL_FACTOR = 32
_MIN_ENTRY_POINTS = 64
_REPAIRS = 4


@dataclass(frozen=True, slots=True)
class Graph:
    """Neighbour tables of level 0 and 1, [N, 32], and the items of level 2, where walks may begin.

    `unreachable` counts items that no path of level 0 leads to from any entry point.
    """

    neighbors: tuple[Int32[np.ndarray, "N degree"], Int32[np.ndarray, "N degree"]]
    entry_points: Int32[np.ndarray, " E"]
    unreachable: int


@dataclass(frozen=True, slots=True)
class NearItems:
    """Lists of near items that a graph's edges are chosen from: of every item, and among `upper` alone.

    `upper` are the items of level 1, ascending; `among_upper` holds positions in it.
    """

    of_all: Int32[np.ndarray, "N k"]
    upper: Int32[np.ndarray, " U"]
    among_upper: Int32[np.ndarray, "U k"]


def find_near_items(
    vectors: Float32[np.ndarray, "N dim"],
    *,
    seed: int = 0,
    near_blocks: int = 16,
    blocks_a_call: int = 1,
    device: Any = None,
) -> NearItems:
    """The part of the work that a device does; parameters as in `nearest_neighbors`."""
    n = len(vectors)
    rng = np.random.default_rng([seed, 2])
    n_upper = max(min(n, 2 * _MIN_ENTRY_POINTS), n // _LEVEL_FACTOR)
    upper = np.sort(rng.choice(n, n_upper, replace=False)).astype(np.int32)

    def near(rows: np.ndarray) -> np.ndarray:
        return nearest_neighbors(
            rows, _NUM_NEIGHBORS, near_blocks=near_blocks, blocks_a_call=blocks_a_call, device=device
        )

    return NearItems(near(vectors), upper, near(np.ascontiguousarray(vectors[upper])))


def build_graph(vectors: Float32[np.ndarray, "N dim"], near: NearItems, *, seed: int = 0) -> Graph:
    """Both levels over `vectors` by Euclidean distance: the part of the work that the host does."""
    rng = np.random.default_rng([seed, 3])
    upper = near.upper
    n_entries = min(len(upper), max(_MIN_ENTRY_POINTS, len(upper) // _LEVEL_FACTOR))
    entries = np.sort(rng.choice(upper, n_entries, replace=False))
    ground = link(vectors, near.of_all)
    among = link(np.ascontiguousarray(vectors[upper]), near.among_upper)
    level_1 = np.full((len(vectors), DEGREE), -1, dtype=np.int32)
    level_1[upper] = np.where(among >= 0, upper[among], -1)
    unreachable = _repair(ground, near.of_all, entries)
    return Graph((ground, level_1), entries, unreachable)


def link(
    vectors: Float32[np.ndarray, "N dim"], near: Int32[np.ndarray, "N k"]
) -> Int32[np.ndarray, "N degree"]:
    """Edges in both directions from lists of near items, at most `DEGREE` each, -1 at the end of a row.

    An item keeps its nearest neighbours, but none that is nearer to one it keeps already than to the
    item itself (Malkov and Yashunin 2018, algorithm 4, without its "extend"); what is left of the degree
    is filled with the nearest of the others.
    """
    forward = np.full((len(vectors), _FORWARD), -1, dtype=np.int32)
    choose_all(vectors, near, forward)
    starts, sources = reverse(forward)
    table = np.full((len(vectors), DEGREE), -1, dtype=np.int32)
    join_all(vectors, forward, starts, sources, table)
    return table


def reachable(table: Int32[np.ndarray, "N degree"], roots: Int32[np.ndarray, " R"]) -> np.ndarray:
    """Which items a path leads to from any of `roots`."""
    reached = np.zeros(len(table), dtype=np.bool_)
    spread(table, roots.astype(np.int64), reached)
    return reached


def _repair(table: np.ndarray, near: np.ndarray, roots: np.ndarray) -> int:
    """Link unreachable items from their nearest reachable neighbour; how many are left unreachable.

    A link may take the place of an edge that others need, hence the rounds.
    """
    for _ in range(_REPAIRS):
        reached = reachable(table, roots)
        if reached.all():
            return 0
        link_unreached(table, near, reached)
    return int((~reachable(table, roots)).sum())
