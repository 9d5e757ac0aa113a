"""Which items a walk over level 0 can reach, and edges for those that it cannot.

HNSW prunes links one-sidedly, so some nodes keep no incoming edge: no search finds them, however
large its pool. `repair` gives each such group an edge from a near reachable node. It never drops an
edge of the breadth-first trees that prove the others reachable, so no repair undoes another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nann.offline.builders.hnsw import Space

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int, Int32, Int64

__all__ = ["RepairReport", "repair", "unreachable_from"]

# Nodes whose possible parents are looked up together; each look-up scans the corpus once.
_LOOKUP_BLOCK = 1024
# Near parents considered for a node; more only matters when that many are full at once.
_NUM_PARENTS = 32


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What `repair` did, one number per root set where it is a tuple."""

    neighbors: Int32[np.ndarray, "N degree"]
    unreachable_before: tuple[int, ...]
    edges_added: int
    edges_replaced: int


def unreachable_from(
    neighbors: Int32[np.ndarray, "N degree"], roots: Int[np.ndarray, " R"]
) -> Int64[np.ndarray, " unreachable"]:
    """The items no path of `neighbors` leads to from any of `roots`, ascending."""
    walk = _Walk(neighbors, np.zeros(neighbors.shape, bool))
    walk.spread(roots)
    return np.flatnonzero(~walk.reached)


def repair(
    neighbors: Int32[np.ndarray, "N degree"],
    vectors: Float32[np.ndarray, "N D"],
    root_sets: Sequence[Int[np.ndarray, " R"]],
    space: Space,
) -> RepairReport:
    """Make every item reachable from each of the `root_sets`; `neighbors` itself stays as it is.

    An unreachable item is linked from its nearest reachable item (exact search in `vectors`, see
    `nann.offline.builders.hnsw.prepare_vectors`) that has a padding slot or an edge to spare; of the
    edges to spare the longest goes.

    Raises:
        ValueError: a root set is empty, or there are so many that their trees could fill every row.
    """
    if any(len(roots) == 0 for roots in root_sets) or len(root_sets) > neighbors.shape[1]:
        raise ValueError("a repair needs non-empty root sets, no more of them than a row has slots")
    table = neighbors.copy()
    protected = np.zeros(table.shape, bool)
    before: list[int] = []
    added = replaced = 0
    for roots in root_sets:
        walk = _Walk(table, protected)
        walk.spread(roots)
        before.append(int(np.count_nonzero(~walk.reached)))
        while len(pending := _fewest_incoming_first(table, np.flatnonzero(~walk.reached))):
            block = pending[:_LOOKUP_BLOCK]
            parents = _nearest(vectors, block, walk.reached & walk.has_room(), space)
            for node, near in zip(block, parents, strict=True):
                if walk.reached[node]:  # an earlier repair of this block leads here already
                    continue
                room = near[walk.has_room(near)]
                if len(room) == 0:  # all filled up within this block: the next one looks again
                    continue
                replaced_edge = _link(walk, int(room[0]), int(node), vectors, space)
                replaced += replaced_edge
                added += not replaced_edge
    return RepairReport(table, tuple(before), added, replaced)


class _Walk:
    """A breadth-first walk that remembers what it reached and protects the edges it took."""

    def __init__(self, table: Int32[np.ndarray, "N degree"], protected: Bool[np.ndarray, "N degree"]) -> None:
        self.table = table
        self.protected = protected
        self.reached: Bool[np.ndarray, " N"] = np.zeros(len(table), bool)
        self._first_edge = np.empty(len(table), np.int64)

    def spread(self, roots: Int[np.ndarray, " R"]) -> None:
        """Reach `roots` and everything they lead to."""
        frontier = np.unique(roots[~self.reached[roots]]).astype(np.int64)
        self.reached[frontier] = True
        degree = self.table.shape[1]
        while len(frontier):
            nodes = self.table[frontier].ravel()
            edges = np.flatnonzero((nodes >= 0) & ~self.reached[nodes])
            nodes = nodes[edges]
            # Assigned back to front, so that of several edges into a node the first one stays.
            self._first_edge[nodes[::-1]] = edges[::-1]
            new = np.unique(nodes).astype(np.int64)
            taken = self._first_edge[new]
            self.protected[frontier[taken // degree], taken % degree] = True
            self.reached[new] = True
            frontier = new

    def has_room(self, nodes: Int64[np.ndarray, " n"] | slice = slice(None)) -> Bool[np.ndarray, " n"]:
        """Which of `nodes` have a slot that is padding or not protected."""
        room: Bool[np.ndarray, " n"] = ((self.table[nodes] < 0) | ~self.protected[nodes]).any(axis=1)
        return room


def _fewest_incoming_first(
    table: Int32[np.ndarray, "N degree"], unreached: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """A node without incoming edges must get one anyway, and may lead to the others."""
    incoming = np.bincount(table[unreached][table[unreached] >= 0], minlength=len(table))
    return unreached[np.argsort(incoming[unreached], kind="stable")]


def _nearest(
    vectors: Float32[np.ndarray, "N D"],
    nodes: Int64[np.ndarray, " n"],
    allowed: Bool[np.ndarray, " N"],
    space: Space,
) -> Int64[np.ndarray, "n parents"]:
    import faiss

    candidates = np.flatnonzero(allowed)
    metric = faiss.METRIC_INNER_PRODUCT if space == "ip" else faiss.METRIC_L2
    k = min(_NUM_PARENTS, len(candidates))
    _, rows = faiss.knn(vectors[nodes], vectors[candidates], k, metric=metric)
    nearest: Int64[np.ndarray, "n parents"] = candidates[rows]
    return nearest


def _link(walk: _Walk, parent: int, node: int, vectors: Float32[np.ndarray, "N D"], space: Space) -> bool:
    """Point a spare slot of `parent` at `node` and walk on from there; True if an edge had to go."""
    row = walk.table[parent]
    padding = np.flatnonzero(row < 0)
    if len(padding):
        slot = int(padding[0])
    else:
        products = vectors[row] @ vectors[parent]
        length = -products if space == "ip" else (vectors[row] ** 2).sum(axis=1) - 2 * products
        slot = int(np.argmax(np.where(walk.protected[parent], -np.inf, length)))
    row[slot] = node
    walk.protected[parent, slot] = True
    walk.spread(np.array([node]))
    return len(padding) == 0
