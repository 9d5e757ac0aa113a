"""The primitives a beam search is made of, and the arrays they exchange.

A `Backend` owns memory and kernels; the loop that calls them is written once, in
`retrievers/hnsw.py`. Arrays are ragged by query: row ``b`` of a batch owns the flat range
``row_splits[b] : row_splits[b + 1]``. Scores and item indices travel inside one 64-bit *key*
whose unsigned order is the total order of the design (score descending, then item_index
ascending), so that a beam is a sorted array of integers and a merge compares one word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Float32, Int32, Int64

    from nann.engine.scoring.buckets import Plan

__all__ = ["Admission", "Backend", "Beam", "Candidates", "Frontier", "Tiles"]


@dataclass(frozen=True, slots=True)
class Admission:
    """Which items one query may return: ``mask`` (None = all) minus ``excluded``.

    ``excluded`` is sorted and unique; ``count`` is the number of admissible items.
    """

    mask: Bool[np.ndarray, " N"] | None
    excluded: Int32[np.ndarray, " n"]
    count: int


@dataclass(frozen=True, slots=True)
class Candidates:
    """Items to be scored, ragged by query: ``item_index[row_splits[b]:row_splits[b+1]]``."""

    item_index: Int32[np.ndarray, " total"]
    row_splits: Int32[np.ndarray, " batch+1"]


@dataclass(frozen=True, slots=True)
class Frontier:
    """Items to be expanded: the first ``count[b]`` of row b."""

    item_index: Int32[np.ndarray, "batch width"]
    count: Int32[np.ndarray, " batch"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of the item tensors laid out for one call of the scorer: [tiles, rows, …].

    A tile belongs to one query, ``tile_query[t]``; rows past a query's last candidate are zero.
    """

    tile_query: Int32[np.ndarray, " tiles"]
    items: Mapping[str, Any]


class Beam(Protocol):
    """A backend's own memory for one batch: pools of best nodes, visited bitmaps, counters."""

    @property
    def batch(self) -> int: ...

    @property
    def nonfinite(self) -> Int64[np.ndarray, " batch"]:
        """How many scores of each query were NaN or infinite so far."""
        ...


BeamT = TypeVar("BeamT", bound=Beam)


class Backend(Protocol[BeamT]):
    """What a device offers to the search. One instance serves one lane, so one thread at a time."""

    def begin(self, batch: int, *, with_answer: Sequence[Admission | None]) -> BeamT:
        """Take scratch for ``batch`` queries: empty pools, nothing visited.

        A query with an admission keeps a second pool, of admissible items only.
        """
        ...

    def seed(self, beam: BeamT, rows: Sequence[Int32[np.ndarray, " n"]]) -> Candidates:
        """Mark ``rows[b]`` as visited for query b and return those that were not, in order, once."""
        ...

    def expand(self, beam: BeamT, frontier: Frontier, level: int) -> Candidates:
        """Neighbours of the frontier at ``level`` not yet visited, each once, now marked visited."""
        ...

    def gather(self, candidates: Candidates, plan: Plan) -> Tiles:
        """Copy the item tensors of the planned part of the candidates into a scorer's shape."""
        ...

    def merge_beam(
        self,
        beam: BeamT,
        candidates: Candidates,
        scores: Float32[np.ndarray, " total"],
        *,
        keep: int,
        capacity: int,
        width: int,
        forget: bool,
    ) -> Frontier:
        """Let the ``keep`` best new candidates join each pool, cut it to ``capacity``, and return
        its ``width`` best nodes not expanded yet, which from now on count as expanded.

        With ``forget`` the pool's nodes become the only visited ones and none counts as expanded
        (NANN's step from one level of the graph to the next) before the frontier is chosen.
        Non-finite scores never join; they are counted.
        """
        ...

    def unvisited(self, beam: BeamT, query: int) -> Int32[np.ndarray, " n"]:
        """The items that query ``query`` has not visited, ascending."""
        ...

    def to_host(self, beam: BeamT, k: Sequence[int]) -> list[tuple[Any, Any]]:
        """The best ``k[b]`` (item_index int32, score float32) of each query, by the total order."""
        ...
