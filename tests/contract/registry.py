"""Everything that claims to be a Backend, a Retriever or a Scorer: one line each covers a newcomer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engine_world import HISTORY_LENGTH, IntegerScorer, make_world
from tiny_models import TinyModel, attention, publish, real_model

from nann.engine.backend import Backend
from nann.engine.cpu.backend import CpuBackend
from nann.engine.retrievers.exhaustive import ExhaustiveRetriever
from nann.engine.retrievers.hnsw import HnswRetriever
from nann.engine.retrievers.retriever import Retriever
from nann.engine.scoring.buckets import MAX_ROWS, BucketGrid
from nann.engine.scoring.scorer import Scorer
from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer

__all__ = ["BACKENDS", "MAX_BATCH", "RETRIEVERS", "SCORERS", "ScorerCase"]

MAX_BATCH = 4


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


BACKENDS: dict[str, Callable[..., Backend[Any]]] = {
    "cpu": CpuBackend,
}
RETRIEVERS: dict[str, Callable[..., Retriever]] = {
    "hnsw": HnswRetriever,
    "exhaustive": ExhaustiveRetriever,
}
# The served model is checked at its real widths in every shape that serving compiles.
SCORERS: dict[str, Callable[[Path], ScorerCase]] = {
    "integer": _integer,
    "tensorflow-tiny-attention": _tensorflow(attention, 512),
    "tensorflow-attention_dnn": _tensorflow(_real("attention_dnn"), MAX_ROWS),
    "tensorflow-dnn": _tensorflow(_real("dnn"), 256),
    "tensorflow-two_sided": _tensorflow(_real("two_sided"), 256),
}
