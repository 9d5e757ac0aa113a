"""Everything that claims to be a Backend, a Retriever or a Scorer: one line each covers a newcomer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from engine_world import HISTORY_LENGTH, IntegerScorer, make_world
from tiny_models import TinyModel, attention, publish, real_model

from nann.engine.backend import Backend, Tiles
from nann.engine.cpu.backend import CpuBackend
from nann.engine.retrievers.exhaustive import ExhaustiveRetriever
from nann.engine.retrievers.hnsw import HnswRetriever
from nann.engine.retrievers.inner_product import InnerProductRetriever
from nann.engine.retrievers.retriever import Retriever
from nann.engine.scoring.buckets import MAX_ROWS, BucketGrid
from nann.engine.scoring.scorer import Scorer
from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer

__all__ = ["BACKENDS", "MAX_BATCH", "RETRIEVERS", "SCORERS", "AdaptedScorer", "BackendCase", "ScorerCase"]

MAX_BATCH = 4


@dataclass(frozen=True)
class BackendCase:
    """A kind of backend, and how tests look at what it keeps to itself.

    ``make(num_items=, neighbors=, item_state=, max_batch=, max_pairs=)`` is one lane; `rows_of` and
    `frontier_of` give item indices by query, `to_host` and `to_device` move arrays.
    """

    make: Callable[..., Backend[Any, Any]]
    grid: Callable[..., BucketGrid]
    rows_of: Callable[[Any], list[list[int]]]
    frontier_of: Callable[[Any], list[list[int]]]
    to_host: Callable[[Any], np.ndarray]
    to_device: Callable[[np.ndarray], Any]


class AdaptedScorer:
    """A scorer of the CPU for a backend whose arrays may be elsewhere, in that backend's shapes."""

    def __init__(self, case: BackendCase, scorer: Scorer) -> None:
        self._case = case
        self._scorer = scorer
        grid = case.grid(max_batch=scorer.grid.max_batch, max_rows=scorer.grid.max_rows)
        self.grid = grid if set(grid.shapes()) <= set(scorer.grid.shapes()) else scorer.grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score(self, users: Any, tiles: Tiles) -> Any:
        items = {name: self._case.to_host(tensor) for name, tensor in tiles.items.items()}
        on_host = Tiles(tiles.shape, self._case.to_host(tiles.tile_query), items)
        return self._case.to_device(self._scorer.score(users, on_host))


def _cpu_rows(candidates: Any) -> list[list[int]]:
    return [candidates.item_index[a:b].tolist() for a, b in pairwise(candidates.row_splits)]


def _cpu_frontier(beam: Any) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(beam.frontier, beam.frontier_count, strict=True)]


@dataclass(frozen=True)
class ScorerCase:
    """A scorer over a small corpus, and what the tests must know to feed it."""

    scorer: Scorer
    item_state: Mapping[str, np.ndarray]
    num_items: int
    history_length: int
    comm_seq: Callable[[np.ndarray], np.ndarray] | None


def _integer(directory: Path) -> ScorerCase:
    world = make_world(directory, num_items=90)
    scorer = IntegerScorer(world.item_vectors, max_batch=MAX_BATCH, max_rows=512)
    return ScorerCase(scorer, {"item_vector": world.item_vectors}, 90, HISTORY_LENGTH, None)


def _tensorflow(make: Callable[[int], TinyModel], max_rows: int) -> Callable[[Path], ScorerCase]:
    def build(directory: Path) -> ScorerCase:
        model = make(90)
        make_world(directory, num_items=model.num_items)
        manifest = publish(model, directory)
        grid = BucketGrid(max_batch=MAX_BATCH, max_rows=max_rows)
        scorer = TensorFlowScorer(directory, manifest, max_batch=MAX_BATCH, grid=grid)
        return ScorerCase(scorer, model.item_state(), model.num_items, model.history_length, model.comm_seq)

    return build


def _real(name: str) -> Callable[[int], TinyModel]:
    return lambda num_items: real_model(name, num_items)


def _inner_product(backend: Backend[Any, Any], scorer: Scorer, *, num_items: int) -> Retriever:
    return InnerProductRetriever(backend, scorer, item_vectors=np.ones((num_items, 2), np.float32))


BACKENDS: dict[str, BackendCase] = {
    "cpu": BackendCase(CpuBackend, BucketGrid, _cpu_rows, _cpu_frontier, np.asarray, np.asarray),
}
RETRIEVERS: dict[str, Callable[..., Retriever]] = {
    "hnsw": HnswRetriever,
    "exhaustive": ExhaustiveRetriever,
    "inner_product": _inner_product,
}
# The served model is checked at its real widths in every shape that serving compiles.
SCORERS: dict[str, Callable[[Path], ScorerCase]] = {
    "integer": _integer,
    "tensorflow-tiny-attention": _tensorflow(attention, 512),
    "tensorflow-attention_dnn": _tensorflow(_real("attention_dnn"), MAX_ROWS),
    "tensorflow-dnn": _tensorflow(_real("dnn"), 256),
    "tensorflow-two_sided": _tensorflow(_real("two_sided"), 256),
}
