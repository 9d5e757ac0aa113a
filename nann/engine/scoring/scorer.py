"""The seam between the search and the deep model, and the one function that scores candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

    from nann.engine.backend import Backend, Candidates, Tiles
    from nann.engine.scoring.buckets import BucketGrid

__all__ = ["Scorer", "score_candidates"]


class Scorer(Protocol):
    """A deep model, compiled for the shapes of `grid` and nothing else.

    ``users`` is the scorer's own value: the user tensors of a batch, on its device. Scores of a pair
    are bit-equal whatever shape, batch-mates or lane they were computed in.
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

    def score(self, users: Any, tiles: Tiles) -> Float32[np.ndarray, "tiles rows"]:
        """Scores of each tile's items for that tile's query."""
        ...

    def warm_up(self) -> bool:
        """Compile and run every shape once; whether a pair scored the same bits in all of them.

        Raises:
            BackendError: a program failed, or gave a non-finite score.
        """
        ...


def score_candidates(
    backend: Backend[Any],
    scorer: Scorer,
    users: Any,
    candidates: Candidates,
    probe: Callable[[str], None],
) -> Float32[np.ndarray, " total"]:
    """Scores of all candidates, in their order, in as few calls of the model as its shapes allow."""
    total = candidates.item_index.size
    scores = np.empty(0, dtype=np.float32)
    for plan in scorer.grid.plan(candidates.row_splits.tolist()):
        tiles = backend.gather(candidates, plan)
        probe("gather")
        flat = scorer.score(users, tiles).reshape(-1)
        probe("score")
        if len(plan.segments) == 1 and plan.segments[0].stop - plan.segments[0].start == total:
            return flat[:total]  # one query alone in one call: nothing to put together
        if not scores.size:
            scores = np.empty(total, dtype=np.float32)
        for segment in plan.segments:
            count = segment.stop - segment.start
            scores[segment.start : segment.stop] = flat[segment.row : segment.row + count]
    return scores
