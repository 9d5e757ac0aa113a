"""Beam search over an HNSW graph with the deep model as the similarity. Written once, for every backend.

expand → drop visited → gather → score → merge, until nothing is left to expand. The two policies
differ only in their stages (`policies.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.backend import Backend, Beam
from nann.engine.retrievers.exhaustive import encode, score_listed
from nann.engine.retrievers.policies import Stage, stages
from nann.engine.retrievers.retriever import Answer, PreparedQuery
from nann.engine.scoring.scorer import Scorer, score_candidates

if TYPE_CHECKING:
    from jaxtyping import Int32

__all__ = ["HnswRetriever"]


class HnswRetriever:
    """Walks the graph from each query's starting nodes."""

    def __init__(self, backend: Backend[Any, Any], scorer: Scorer, *, num_items: int) -> None:
        self._backend = backend
        self._scorer = scorer
        self._num_items = num_items

    def search(self, batch: Sequence[PreparedQuery], probe: Callable[[str], None]) -> list[Answer]:
        backend, scorer = self._backend, self._scorer
        users = encode(scorer, batch)
        probe("encode")
        beam = backend.begin(
            len(batch),
            with_answer=[query.admission for query in batch],
            gates=[None if query.gate is None else query.gate.make() for query in batch],
        )
        schedule = stages(batch[0].params)
        stage: Stage | None = next(schedule)
        candidates = backend.seed(beam, [query.starts for query in batch])
        while stage is not None and candidates is not None:
            probe("expand")
            score_candidates(backend, scorer, users, candidates, probe)
            backend.merge_beam(
                beam,
                candidates,
                keep=stage.keep,
                capacity=stage.capacity,
                width=stage.width,
                forget=stage.forget,
            )
            probe("merge")
            level, admit, stage = stage.level, stage.admit, next(schedule, None)
            # Only what will be scored is expanded: afterwards "visited" means "scored".
            candidates = None if stage is None else backend.expand(beam, level, admit=admit)
        wanted = [query.k for query in batch]
        found = backend.to_host(beam, wanted)
        remainder = self._score_remainder(users, beam, batch, [rows.size for rows, _ in found], probe)
        if any(remainder):
            found = backend.to_host(beam, wanted)
        counts, nonfinite, estimated = beam.scored_per_step, beam.nonfinite, beam.estimated
        return [
            Answer(
                item_index,
                score,
                tuple(counts[counts[:, b] > 0, b].tolist()),
                remainder[b],
                int(nonfinite[b]),
                int(estimated[b]),
            )
            for b, (item_index, score) in enumerate(found)
        ]

    def _score_remainder(
        self,
        users: Any,
        beam: Beam,
        batch: Sequence[PreparedQuery],
        n_found: Sequence[int],
        probe: Callable[[str], None],
    ) -> list[int]:
        """`best_first` promises k items whenever k are admissible: score what the walk never reached."""
        none = np.empty(0, dtype=np.int32)
        if batch[0].params.policy != "best_first":
            return [0] * len(batch)
        rest = [
            self._unreached(beam, b, query) if n_found[b] < self._promised(query) else none
            for b, query in enumerate(batch)
        ]
        if not any(items.size for items in rest):
            return [0] * len(batch)
        capacity = batch[0].params.ef
        chunks = score_listed(self._backend, self._scorer, users, beam, rest, capacity=capacity, probe=probe)
        return [sum(counts) for counts in chunks]

    def _promised(self, query: PreparedQuery) -> int:
        return min(query.k, self._num_items if query.admission is None else query.admission.count)

    def _unreached(self, beam: Beam, b: int, query: PreparedQuery) -> Int32[np.ndarray, " n"]:
        """The admissible items that query b never visited."""
        rest = self._backend.unvisited(beam, b)
        if query.admission is None:
            return rest
        rest = rest if query.admission.mask is None else rest[query.admission.mask[rest]]
        return np.setdiff1d(rest, query.admission.excluded, assume_unique=True)
