"""The seam between the search and the deep model, and the one function that scores candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32, Int32

    from nann.engine.backend import Backend, Tiles
    from nann.engine.scoring.buckets import BucketGrid

__all__ = ["Scorer", "score_candidates"]

CandidatesT = TypeVar("CandidatesT")


class Scorer(Protocol):
    """A deep model, compiled for the shapes of `grid` and nothing else.

    ``users`` is the scorer's own value: the user tensors of a batch, on its device. Scores of a pair
    are bit-equal whatever shape, batch-mates or lane they were computed in. The answer of a call is not
    overwritten by the next.
    """

    @property
    def grid(self) -> BucketGrid: ...

    @property
    def takes_comm_seq(self) -> bool:
        """Whether the model can encode histories that come already embedded."""
        ...

    @property
    def n_compilations(self) -> int:
        """Programs compiled so far; constant once `warm_up` has returned."""
        ...

    def encode_history(self, history: Int32[np.ndarray, "batch length"]) -> Any:
        """User tensors of item-index histories, oldest first, -1 padded at the end."""
        ...

    def encode_comm_seq(self, comm_seq: Float32[np.ndarray, "batch width"]) -> Any:
        """User tensors of already embedded histories. Raises `Unsupported` if the model has none."""
        ...

    def score(self, users: Any, tiles: Tiles) -> Any:
        """float32 [tiles, rows], the scores of each tile's items for that tile's query, on the tiles' device.

        Tiles without a `tile_query` hold one tile of items, scored for every user: [max_batch, rows].
        """
        ...

    def warm_up(self) -> bool:
        """Compile and run every shape; whether users and pairs got the same bits in all of them.

        Raises:
            BackendError: a program failed, or gave a non-finite score.
        """
        ...


def score_candidates(
    backend: Backend[Any, CandidatesT],
    scorer: Scorer,
    users: Any,
    candidates: CandidatesT,
    probe: Callable[[str], None],
) -> None:
    """Score all candidates, in as few calls of the model as its shapes allow."""
    for tiles in backend.gather(candidates, scorer.grid):
        probe("gather")
        scores = scorer.score(users, tiles)
        probe("score")
        backend.take_scores(candidates, tiles, scores)
