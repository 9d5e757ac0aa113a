"""Score everything: the oracle, and the cheapest way to answer when few items are admissible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.backend import Backend, Beam, Candidates
from nann.engine.retrievers.policies import NO_LIMIT
from nann.engine.retrievers.retriever import Answer, PreparedQuery
from nann.engine.scoring.scorer import Scorer, score_candidates

if TYPE_CHECKING:
    from jaxtyping import Int32

__all__ = ["ExhaustiveRetriever", "encode", "score_items"]


def encode(scorer: Scorer, batch: Sequence[PreparedQuery]) -> Any:
    """The user tensors of a batch whose queries all bring a history, or all a comm_seq."""
    histories = [query.history for query in batch if query.history is not None]
    if histories:
        return scorer.encode_history(np.stack(histories))
    return scorer.encode_comm_seq(np.stack([query.comm_seq for query in batch if query.comm_seq is not None]))


def score_items(
    backend: Backend[Any],
    scorer: Scorer,
    users: Any,
    beam: Beam,
    query: int,
    items: Int32[np.ndarray, " n"],
    *,
    capacity: int,
    probe: Callable[[str], None],
) -> Iterator[int]:
    """Score ``items`` for one query of the batch and merge them into its beam, chunk by chunk.

    Yields the number of items of each chunk. One query at a time fills the widest shape, where a
    pair is cheapest; a chunk of several such calls amortises the merge.
    """
    step = 4 * scorer.grid.max_rows
    for start in range(0, items.size, step):
        chunk = items[start : start + step]
        splits = np.zeros(beam.batch + 1, dtype=np.int32)
        splits[query + 1 :] = chunk.size
        candidates = Candidates(chunk, splits)
        scores = score_candidates(backend, scorer, users, candidates, probe)
        backend.merge_beam(beam, candidates, scores, keep=NO_LIMIT, capacity=capacity, width=0, forget=False)
        probe("merge")
        yield chunk.size


class ExhaustiveRetriever:
    """Scores every admissible item of the corpus."""

    def __init__(self, backend: Backend[Any], scorer: Scorer, *, num_items: int) -> None:
        self._backend = backend
        self._scorer = scorer
        self._all_items = np.arange(num_items, dtype=np.int32)

    def search(self, batch: Sequence[PreparedQuery], probe: Callable[[str], None]) -> list[Answer]:
        users = encode(self._scorer, batch)
        probe("encode")
        beam = self._backend.begin(len(batch), with_answer=[None] * len(batch))
        capacity = max(query.k for query in batch)
        chunks = [
            tuple(
                score_items(
                    self._backend,
                    self._scorer,
                    users,
                    beam,
                    b,
                    self._admissible(query),
                    capacity=capacity,
                    probe=probe,
                )
            )
            for b, query in enumerate(batch)
        ]
        found = self._backend.to_host(beam, [query.k for query in batch])
        return [
            Answer(item_index, score, chunks[b], 0, int(beam.nonfinite[b]))
            for b, (item_index, score) in enumerate(found)
        ]

    def _admissible(self, query: PreparedQuery) -> Int32[np.ndarray, " n"]:
        admission = query.admission
        if admission is None:
            return self._all_items
        items = self._all_items if admission.mask is None else self._all_items[admission.mask]
        return np.setdiff1d(items, admission.excluded, assume_unique=True)
