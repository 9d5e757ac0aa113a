"""Corpus, model and graph put together in the form that the engine reads: an artifact in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.offline.benchmark.gpu.corpus import DIM, HISTORY_LENGTH, Corpus
from nann.offline.benchmark.gpu.graph import Graph
from nann.offline.benchmark.gpu.model import Weights

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64

__all__ = ["World", "WorldManifest"]

# As `nann index` has by default: the most popular items, where a walk begins beside the history.
_START_POINTS = 200


@dataclass(frozen=True, slots=True)
class WorldManifest:
    """Those fields of an artifact's manifest that a search reads."""

    num_items: int
    user_tensors: Mapping[str, Any]
    item_tensors: Mapping[str, Any]
    model_name: str = "nann-report"
    version: int = 1
    embedding_dim: int = DIM
    input_dim: int = DIM
    history_length: int = HISTORY_LENGTH
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    programs: None = None


@dataclass(frozen=True)
class World:
    """An artifact that never was on a disk: `SearchEngine` takes it in place of an opened one.

    `item_ids` are the rows themselves. `history_*` are empty: the report's queries bring their histories.
    """

    corpus: Corpus
    weights: Weights
    graph: Graph
    manifest: WorldManifest

    @classmethod
    def of(cls, corpus: Corpus, weights: Weights, graph: Graph) -> World:
        """The artifact of these three."""
        shapes = {"item_hidden": (128,), "item_query": (128,)}
        items = {name: SimpleNamespace(shape=shape, dtype="float16") for name, shape in shapes.items()}
        return cls(corpus, weights, graph, WorldManifest(corpus.num_items, {}, items))

    @property
    def num_items(self) -> int:
        return self.corpus.num_items

    @cached_property
    def item_ids(self) -> Int64[np.ndarray, " N"]:
        return np.arange(self.num_items, dtype=np.int64)

    @property
    def item_weights(self) -> Float32[np.ndarray, " N"]:
        return self.corpus.weights

    @cached_property
    def item_state(self) -> Mapping[str, np.ndarray]:
        return self.weights.encode_items(self.corpus.embeddings)

    @cached_property
    def item_vectors(self) -> Float32[np.ndarray, "N 64"]:
        return self.corpus.embeddings

    @property
    def gate(self) -> None:
        """Nothing was distilled from weights that were never trained."""
        return None

    @property
    def neighbors(self) -> tuple[Int32[np.ndarray, "N degree"], ...]:
        return self.graph.neighbors

    @property
    def entry_points(self) -> Int32[np.ndarray, " E"]:
        return self.graph.entry_points

    @property
    def walk_entry_points(self) -> Int32[np.ndarray, " E"]:
        return self.graph.entry_points

    @cached_property
    def start_points(self) -> Int32[np.ndarray, " S"]:
        order = np.argsort(-self.corpus.weights, kind="stable")
        return order[:_START_POINTS].astype(np.int32)

    @property
    def history_ids(self) -> Int64[np.ndarray, " U"]:
        return np.empty(0, dtype=np.int64)

    @property
    def history_row_splits(self) -> Int64[np.ndarray, " U+1"]:
        return np.zeros(1, dtype=np.int64)

    @property
    def history_items(self) -> Int32[np.ndarray, " events"]:
        return np.empty(0, dtype=np.int32)

    @property
    def items_parquet(self) -> None:
        return None
