"""Score everything: the oracle, and the cheapest way to answer when few items are admissible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.backend import Backend, Beam
from nann.engine.retrievers.policies import NO_LIMIT
from nann.engine.retrievers.retriever import Answer, PreparedQuery
from nann.engine.scoring.scorer import Scorer, score_candidates

if TYPE_CHECKING:
    from jaxtyping import Int32

__all__ = ["ExhaustiveRetriever", "encode", "score_listed"]


def encode(scorer: Scorer, batch: Sequence[PreparedQuery]) -> Any:
    """The user tensors of a batch whose queries all bring a history, or all a comm_seq."""
    histories = [query.history for query in batch if query.history is not None]
    if histories:
        return scorer.encode_history(np.stack(histories))
    return scorer.encode_comm_seq(np.stack([query.comm_seq for query in batch if query.comm_seq is not None]))


def score_listed(
    backend: Backend[Any, Any],
    scorer: Scorer,
    users: Any,
    beam: Beam,
    items: Sequence[Int32[np.ndarray, " n"] | range],
    *,
    capacity: int,
    probe: Callable[[str], None],
) -> list[list[int]]:
    """Score ``items[b]`` for query b of the batch and merge them into its beam, chunk by chunk.

    Returns the number of items of each chunk that had some, by query.
    """
    step = scorer.grid.scan_rows
    scored: list[list[int]] = [[] for _ in items]
    for start in range(0, max(map(len, items)), step):
        chunk = [rows[start : start + step] for rows in items]
        candidates = backend.listed(beam, chunk)
        score_candidates(backend, scorer, users, candidates, probe)
        backend.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=capacity, width=0, forget=False)
        probe("merge")
        for b, rows in enumerate(chunk):
            scored[b] += [len(rows)] if len(rows) else []
    return scored


class ExhaustiveRetriever:
    """Scores every admissible item of the corpus."""

    def __init__(self, backend: Backend[Any, Any], scorer: Scorer, *, num_items: int) -> None:
        self._backend = backend
        self._scorer = scorer
        self._num_items = num_items

    def search(self, batch: Sequence[PreparedQuery], probe: Callable[[str], None]) -> list[Answer]:
        users = encode(self._scorer, batch)
        probe("encode")
        beam = self._backend.begin(len(batch), with_answer=[None] * len(batch))
        items = [self._admissible(query) for query in batch]
        capacity = max(query.k for query in batch)
        chunks = score_listed(self._backend, self._scorer, users, beam, items, capacity=capacity, probe=probe)
        found = self._backend.to_host(beam, [query.k for query in batch])
        nonfinite = beam.nonfinite
        return [
            Answer(item_index, score, tuple(chunks[b]), 0, int(nonfinite[b]))
            for b, (item_index, score) in enumerate(found)
        ]

    def _admissible(self, query: PreparedQuery) -> Int32[np.ndarray, " n"] | range:
        admission = query.admission
        if admission is None:
            return range(self._num_items)
        allowed = np.ones(self._num_items, np.bool_) if admission.mask is None else admission.mask.copy()
        allowed[admission.excluded] = False
        return np.flatnonzero(allowed).astype(np.int32)
