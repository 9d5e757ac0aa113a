"""Beam search over an HNSW graph with the deep model as the similarity. Written once, for every backend.

expand → drop visited → gather → score → merge, until nothing is left to expand. The two policies
differ only in their stages (`policies.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nann.engine.backend import Backend, Beam
from nann.engine.retrievers.exhaustive import encode, score_items
from nann.engine.retrievers.policies import stages
from nann.engine.retrievers.retriever import Answer, PreparedQuery
from nann.engine.scoring.scorer import Scorer, score_candidates

__all__ = ["HnswRetriever"]


class HnswRetriever:
    """Walks the graph from each query's starting nodes."""

    def __init__(self, backend: Backend[Any], scorer: Scorer, *, num_items: int) -> None:
        self._backend = backend
        self._scorer = scorer
        self._num_items = num_items

    def search(self, batch: Sequence[PreparedQuery], probe: Callable[[str], None]) -> list[Answer]:
        backend, scorer = self._backend, self._scorer
        users = encode(scorer, batch)
        probe("encode")
        beam = backend.begin(len(batch), with_answer=[query.admission for query in batch])
        schedule = stages(batch[0].params)
        stage = next(schedule)
        candidates = backend.seed(beam, [query.starts for query in batch])
        probe("expand")
        counts = []
        while True:
            counts.append(np.diff(candidates.row_splits))
            scores = score_candidates(backend, scorer, users, candidates, probe)
            frontier = backend.merge_beam(
                beam,
                candidates,
                scores,
                keep=stage.keep,
                capacity=stage.capacity,
                width=stage.width,
                forget=stage.forget,
            )
            probe("merge")
            following = next(schedule, None)
            if following is None or not frontier.count.any():
                break
            # Only what will be scored is expanded: afterwards "visited" means "scored".
            candidates = backend.expand(beam, frontier, stage.level)
            probe("expand")
            stage = following
        wanted = [query.k for query in batch]
        found = backend.to_host(beam, wanted)
        remainder = self._score_remainder(users, beam, batch, [rows.size for rows, _ in found], probe)
        if any(remainder):
            found = backend.to_host(beam, wanted)
        per_query = np.stack(counts, axis=1)
        return [
            Answer(
                item_index,
                score,
                tuple(per_query[b][per_query[b] > 0].tolist()),
                remainder[b],
                int(beam.nonfinite[b]),
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
        if batch[0].params.policy != "best_first":
            return [0] * len(batch)
        scored = []
        for b, query in enumerate(batch):
            admission = query.admission
            wanted = min(query.k, self._num_items if admission is None else admission.count)
            if n_found[b] >= wanted:
                scored.append(0)
                continue
            rest = self._backend.unvisited(beam, b)
            if admission is not None:
                rest = rest if admission.mask is None else rest[admission.mask[rest]]
                rest = np.setdiff1d(rest, admission.excluded, assume_unique=True)
            capacity = query.params.ef
            chunks = score_items(
                self._backend, self._scorer, users, beam, b, rest, capacity=capacity, probe=probe
            )
            scored.append(sum(chunks))
        return scored
