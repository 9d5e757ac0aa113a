"""Inner-product candidates, ranked by the deep model: what a vector database and a reranker would answer.

The items with the best inner products with one vector of the user are scored by the model; nothing else
is. Item vectors are taken at unit length; the user's is the mean of those of the history's items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.backend import Backend
from nann.engine.retrievers.exhaustive import encode
from nann.engine.retrievers.policies import NO_LIMIT
from nann.engine.retrievers.retriever import Answer, PreparedQuery
from nann.engine.scoring.scorer import Scorer, score_candidates

if TYPE_CHECKING:
    from jaxtyping import Float32

__all__ = ["InnerProductRetriever"]


class InnerProductRetriever:
    """Scores the `ef` items nearest to the user by inner product; `params.ef` is its whole cost.

    `item_vectors` are those that the backend scans. Without them no query of this policy passes the check.
    """

    def __init__(
        self, backend: Backend[Any, Any], scorer: Scorer, *, item_vectors: Float32[np.ndarray, "N dim"] | None
    ) -> None:
        self._backend = backend
        self._scorer = scorer
        self._item_vectors = item_vectors

    def search(self, batch: Sequence[PreparedQuery], probe: Callable[[str], None]) -> list[Answer]:
        backend, count = self._backend, batch[0].params.ef
        users = encode(self._scorer, batch)
        probe("encode")
        beam = backend.begin(len(batch), with_answer=[query.admission for query in batch])
        candidates = backend.nearest(beam, np.stack([self._vector(query) for query in batch]), count)
        probe("scan")
        score_candidates(backend, self._scorer, users, candidates, probe)
        backend.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=count, width=0, forget=False)
        probe("merge")
        found = backend.to_host(beam, [query.k for query in batch])
        (scored,), nonfinite = beam.scored_per_step, beam.nonfinite
        return [
            Answer(item_index, score, (int(scored[b]),), 0, int(nonfinite[b]))
            for b, (item_index, score) in enumerate(found)
        ]

    def _vector(self, query: PreparedQuery) -> Float32[np.ndarray, " dim"]:
        assert query.history is not None
        assert self._item_vectors is not None
        known = query.history[query.history >= 0]
        if not known.size:
            return np.zeros(self._item_vectors.shape[1], dtype=np.float32)
        vectors = self._item_vectors[known].astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, norms, where=norms > 0, out=np.zeros_like(vectors)).mean(axis=0)  # type: ignore[no-any-return]
