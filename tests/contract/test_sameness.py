"""Sameness rule (a) of the design: given equal scores, ids are equal across batch, lane, bucket and backend.

The scores of a real model are recorded once and replayed, so that no rounding can hide behind the rule.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_world import make_world
from tiny_models import attention, publish

from nann.engine.artifacts import Artifact
from nann.engine.backend import Tiles
from nann.engine.devices import cpu_lanes
from nann.engine.scoring.buckets import BucketGrid, Shape
from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams

N, USERS, MAX_BATCH = 250, 12, 4
PARAMS = {
    "best_first": SearchParams(ef=20, beam_width=5),
    "level": SearchParams(policy="level", level_topn=(4, 9, 12, 12, 12, 15)),
    "level_pruned": SearchParams(policy="level_pruned", level_ef=(4, 9, 20), level_steps=2),
    "exhaustive": SearchParams(policy="exhaustive"),
}


class ReplayScorer:
    """score(user, item) from a table; the item tensor is the item's own index."""

    def __init__(self, histories: np.ndarray, recorded: np.ndarray, *, max_rows: int) -> None:
        self.grid = BucketGrid(max_batch=MAX_BATCH, max_rows=max_rows)
        self.n_compilations = 0
        self.takes_comm_seq = False
        self._row = {history.tobytes(): row for row, history in enumerate(histories)}
        self._recorded = recorded

    def encode_history(self, history: np.ndarray) -> Any:
        return np.array([self._row[row.tobytes()] for row in history])

    def encode_comm_seq(self, comm_seq: np.ndarray) -> Any:
        raise AssertionError("no recorded user has one")

    def score(self, users: Any, tiles: Tiles) -> np.ndarray:
        items = tiles.items["item_index"][..., 0].astype(np.int64)
        return self._recorded[users[tiles.tile_query][:, None], items]

    def warm_up(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Recording:
    artifact: Artifact
    histories: np.ndarray
    scores: np.ndarray

    def engine(self, *, lanes: int, max_rows: int) -> SearchEngine:
        scorer = ReplayScorer(self.histories, self.scores, max_rows=max_rows)
        opened = cpu_lanes(self.artifact, [scorer] * lanes, max_batch=MAX_BATCH)
        return SearchEngine(self.artifact, opened, max_batch=MAX_BATCH)

    def queries(self, engine: SearchEngine, params: SearchParams) -> list[Any]:
        ids = self.artifact.item_ids
        return [
            engine.check(
                Query(k=15, params=params, history=ids[h[h >= 0]].tolist(), exclude=ids[:3].tolist())
            )
            for h in self.histories
        ]


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    directory: Path = tmp_path_factory.mktemp("recorded") / "1"
    make_world(directory, num_items=N)
    model = attention(N)
    manifest = publish(model, directory)
    scorer = TensorFlowScorer(
        directory, manifest, max_batch=USERS, grid=BucketGrid(max_batch=1, max_rows=256)
    )
    rng = np.random.default_rng(6)
    histories = np.full((USERS, model.history_length), -1, np.int32)
    for b in range(USERS):
        length = 1 + b % model.history_length
        histories[b, :length] = rng.integers(0, N, length)
    users = scorer.encode_history(histories)
    items = np.resize(np.arange(N), 256)
    tensors = {name: table[items][None] for name, table in model.item_state().items()}
    scores = np.concatenate(
        [scorer.score(users, Tiles(Shape(1, 256), np.array([b], np.int32), tensors)) for b in range(USERS)]
    )[:, :N]
    rounded = np.round(scores, 1)  # so that ties are common
    artifact = dataclasses.replace(
        Artifact.open(directory), item_state={"item_index": np.arange(N, dtype=np.float32)[:, None]}
    )
    return Recording(artifact, histories, rounded)


@pytest.mark.parametrize("policy", PARAMS)
def test_replayed_scores_give_equal_answers_in_every_batch_lane_and_bucket(recording, policy) -> None:
    base = recording.engine(lanes=1, max_rows=4096)
    wanted = [base.search([query], 0)[0] for query in recording.queries(base, PARAMS[policy])]
    assert len({tuple(hits.item_ids) for hits in wanted}) == USERS
    assert any(len(set(hits.scores)) < len(hits.scores) for hits in wanted)
    rng = np.random.default_rng(7)
    for max_rows in (64, 96, 256, 1024):
        engine = recording.engine(lanes=2, max_rows=max_rows)
        queries = recording.queries(engine, PARAMS[policy])
        for size in (1, 2, 3, 4):
            order = rng.permutation(USERS)
            for start in range(0, USERS, size):
                chosen = order[start : start + size]
                found = engine.search([queries[b] for b in chosen], int(rng.integers(2)))
                for b, hits in zip(chosen, found, strict=True):
                    assert (hits.item_ids, hits.scores) == (wanted[b].item_ids, wanted[b].scores)
                    assert hits.n_scored == wanted[b].n_scored
