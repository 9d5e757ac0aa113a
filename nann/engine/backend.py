"""The primitives a beam search is made of. The loop that calls them is written once, in `retrievers/`.

A `Backend` owns memory and kernels; what it hands out (a beam, candidates, tiles) is its own and stays
where its kernels run. Scores and item indices travel inside one 64-bit *key* whose unsigned order is
the total order of the design (score descending, then item_index ascending), so that a beam is a sorted
array of integers and a merge compares one word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Float32, Int32, Int64

    from nann.engine.gate import Gate
    from nann.engine.scoring.buckets import BucketGrid, Shape

__all__ = ["Admission", "Backend", "Beam", "Tiles"]


@dataclass(frozen=True, slots=True)
class Admission:
    """Which items one query may return: ``mask`` (None = all) minus ``excluded``.

    ``excluded`` is sorted and unique; ``count`` is the number of admissible items.
    """

    mask: Bool[np.ndarray, " N"] | None
    excluded: Int32[np.ndarray, " n"]
    count: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of the item tensors laid out for one call of the scorer: [tiles, rows, …].

    A tile belongs to one query, ``tile_query[t]``; rows past a query's last candidate are zero. Without
    a `tile_query` the items are one tile, [1, rows, …], to be scored for every user of the batch.
    `place` is the backend's note of where the scores belong.
    """

    shape: Shape
    tile_query: Any | None
    items: Mapping[str, Any]
    place: Any = None


class Beam(Protocol):
    """A backend's own memory for one batch: pools of best nodes, visited bitmaps, frontier, counters."""

    @property
    def batch(self) -> int: ...

    @property
    def nonfinite(self) -> Int64[np.ndarray, " batch"]:
        """How many scores of each query were NaN or infinite so far."""
        ...

    @property
    def scored_per_step(self) -> Int32[np.ndarray, "steps batch"]:
        """How many candidates each query got from `seed` or `nearest` and from each `expand`."""
        ...

    @property
    def estimated(self) -> Int64[np.ndarray, " batch"]:
        """How many items each query's gate made an estimate of so far, an item once for each meeting."""
        ...


BeamT = TypeVar("BeamT", bound=Beam)
CandidatesT = TypeVar("CandidatesT")


class Backend(Protocol[BeamT, CandidatesT]):
    """What a device offers to the search. One instance serves one lane, so one thread at a time.

    One step is ``expand → gather → (the scorer) → take_scores → merge_beam``. Everything a method
    returns is valid until the lane's next `begin`; candidates and tiles until the next of their kind.
    """

    @property
    def launches(self) -> int:
        """Kernels launched on a device so far; 0 where there is none."""
        ...

    def begin(
        self,
        batch: int,
        *,
        with_answer: Sequence[Admission | None],
        gates: Sequence[Gate | None] | None = None,
    ) -> BeamT:
        """Take scratch for ``batch`` queries: empty pools, nothing visited.

        A query with an admission keeps a second pool, of admissible items only. `gates` are what `expand`
        chooses candidates by; None for a query that takes them all.

        Raises:
            Unsupported: there is a gate, and the backend was given no tables for one.
        """
        ...

    def seed(self, beam: BeamT, rows: Sequence[Int32[np.ndarray, " n"]]) -> CandidatesT:
        """Candidates: ``rows[b]`` for query b, each item once, those not visited so far; visited now."""
        ...

    def listed(self, beam: BeamT, rows: Sequence[Int32[np.ndarray, " n"] | range]) -> CandidatesT:
        """Candidates: ``rows[b]`` for query b as they are. Nothing becomes visited, no step is counted."""
        ...

    def nearest(self, beam: BeamT, vectors: Float32[np.ndarray, "batch dim"], count: int) -> CandidatesT:
        """Candidates: the ``count`` items whose unit vectors have the largest inner products with
        ``vectors[b]``, by the total order; visited now. A scan of the corpus, without the model.

        Raises:
            Unsupported: the backend was given no item vectors.
        """
        ...

    def expand(self, beam: BeamT, level: int, *, admit: int = 0) -> CandidatesT | None:
        """Candidates: neighbours of the frontier at ``level`` not visited so far, each once; visited now.

        They come in any order. None when no query has a frontier. With ``admit`` > 0, of a query with a
        gate only the neighbours that pass it (`Gate`), the best ``admit`` of them by (estimate descending,
        item_index ascending); the others stay unvisited. A neighbour of several frontier nodes counts by
        the largest of its estimates.
        """
        ...

    def gather(self, candidates: CandidatesT, grid: BucketGrid) -> Iterator[Tiles]:
        """Lay all candidates out in the grid's shapes and copy their item tensors there, call by call.

        The next tiles may overwrite the last: hand their scores to `take_scores` first.
        """
        ...

    def take_scores(self, candidates: CandidatesT, tiles: Tiles, scores: Any) -> None:
        """Accept what the scorer made of ``tiles``: float32 [tiles, rows], or [users, rows] without a
        `tile_query`, where the tiles live."""
        ...

    def merge_beam(
        self, beam: BeamT, candidates: CandidatesT, *, keep: int, capacity: int, width: int, forget: bool
    ) -> None:
        """Let the ``keep`` best candidates join each pool, cut it to ``capacity``, and make its ``width``
        best nodes not expanded yet the frontier; from now on they count as expanded.

        With ``forget`` the pool's nodes become the only visited ones and none counts as expanded
        (NANN's step from one level of the graph to the next) before the frontier is chosen.
        Non-finite scores never join; they are counted.
        """
        ...

    def unvisited(self, beam: BeamT, query: int) -> Int32[np.ndarray, " n"]:
        """The items that query ``query`` has not visited, ascending."""
        ...

    def to_host(
        self, beam: BeamT, k: Sequence[int]
    ) -> list[tuple[Int32[np.ndarray, " k"], Float32[np.ndarray, " k"]]]:
        """The best ``k[b]`` (item_index, score) of each query, by the total order."""
        ...
