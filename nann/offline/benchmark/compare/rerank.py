"""The deep model over candidates that something else found: the second half of every two-stage contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nann.engine.backend import Backend
from nann.engine.retrievers.exhaustive import score_listed
from nann.engine.retrievers.retriever import silent
from nann.engine.scoring.scorer import Scorer

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32, Int32

__all__ = ["Reranker"]


@dataclass(frozen=True, slots=True)
class Reranker:
    """Scores listed items on one lane, with the same calls as the engine's own search."""

    backend: Backend[Any, Any]
    scorer: Scorer

    def best(
        self,
        histories: Int32[np.ndarray, "batch length"],
        items: Sequence[Int32[np.ndarray, " n"]],
        k: int,
    ) -> list[tuple[Int32[np.ndarray, " k"], Float32[np.ndarray, " k"]]]:
        """The best k of ``items[b]`` (no repeats) for each history, by the total order, with their scores."""
        users = self.scorer.encode_history(histories)
        beam = self.backend.begin(len(histories), with_answer=[None] * len(histories))
        score_listed(self.backend, self.scorer, users, beam, items, capacity=k, probe=silent)
        return self.backend.to_host(beam, [min(k, len(rows)) for rows in items])
