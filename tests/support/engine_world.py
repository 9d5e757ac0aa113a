"""Small worlds for engine tests: random graphs, an integer-valued scorer, artifacts without a SavedModel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nann.engine.artifacts import (
    FORMAT_VERSION,
    GATE_KEYS,
    GATE_QUERIES,
    Artifact,
    GateSpec,
    Manifest,
    TensorSpec,
    hash_files,
    read_manifest,
    write_manifest,
)
from nann.engine.backend import Tiles
from nann.engine.devices import cpu_lanes
from nann.engine.scoring.buckets import BucketGrid
from nann.engine.search_engine import SearchEngine

HISTORY_LENGTH = 6
DIM = 8


class IntegerScorer:
    """score(user, item) = user · item over small integers, so equal scores (ties) are common and exact.

    The user vector is the sum of the history items' vectors, taken modulo 7 so that users differ.
    """

    def __init__(self, item_vectors: np.ndarray, *, max_batch: int, max_rows: int = 256) -> None:
        self.item_vectors = item_vectors
        self.grid = BucketGrid(max_batch=max_batch, max_rows=max_rows)
        self.n_compilations = 0
        self.takes_comm_seq = True
        self.calls: list[tuple[int, int]] = []

    def encode_history(self, history: np.ndarray) -> Any:
        return np.stack([user_vector(self.item_vectors, row) for row in history])

    def encode_comm_seq(self, comm_seq: np.ndarray) -> Any:
        return comm_seq[:, :DIM]

    def score(self, users: Any, tiles: Tiles) -> np.ndarray:
        vectors = tiles.items["item_vector"].astype(np.float32)
        self.calls.append(vectors.shape[:2])
        return np.einsum("td,trd->tr", users[tiles.tile_query], vectors).astype(np.float32)

    def warm_up(self) -> bool:
        self.n_compilations = len(list(self.grid.shapes()))
        return True


def user_vector(item_vectors: np.ndarray, history: np.ndarray) -> np.ndarray:
    known = history[history >= 0]
    return (item_vectors[known].astype(np.int64).sum(axis=0) % 7 - 3).astype(np.float32)


@dataclass(frozen=True)
class World:
    """A corpus, its graph and its scores; ``scores(history)`` is the whole truth for one user."""

    directory: Path
    item_ids: np.ndarray
    item_vectors: np.ndarray
    neighbors: tuple[np.ndarray, np.ndarray]
    entry_points: np.ndarray

    def scores(self, history: np.ndarray) -> np.ndarray:
        return self.item_vectors.astype(np.float32) @ user_vector(self.item_vectors, history)

    def engine(self, *, lanes: int = 1, max_batch: int = 8, max_rows: int = 256) -> SearchEngine:
        artifact = Artifact.open(self.directory)
        scorer = IntegerScorer(self.item_vectors, max_batch=max_batch, max_rows=max_rows)
        opened = cpu_lanes(artifact, [scorer] * lanes, max_batch=max_batch)
        return SearchEngine(artifact, opened, max_batch=max_batch, max_k=10_000)


def make_world(
    directory: Path,
    *,
    num_items: int = 200,
    degree: int = 6,
    seed: int = 0,
    start_points: int = 5,
    entries: int = 8,
    string_ids: bool = False,
    connected: bool = True,
) -> World:
    """Write an artifact over a random graph; ``connected`` threads a ring through all nodes."""
    rng = np.random.default_rng(seed)
    arrays = directory / "arrays"
    arrays.mkdir(parents=True)
    item_vectors = rng.integers(-3, 4, (num_items, DIM)).astype(np.float16)
    item_ids = np.cumsum(rng.integers(1, 5, num_items)).astype(np.int64)
    level_0 = random_table(rng, num_items, degree, np.arange(num_items))
    if connected:
        level_0[:, 0] = (np.arange(num_items) + 1) % num_items
    upper = np.sort(rng.permutation(num_items)[: max(entries, num_items // 4)])
    level_1 = np.full((num_items, degree), -1, dtype=np.int32)
    level_1[upper] = upper[random_table(rng, len(upper), degree, np.arange(len(upper)))]
    level_1[level_1[:, 0] == level_1[:, 1], 1:] = -1
    level_1 = _pack_rows(level_1)
    entry_points = np.sort(rng.permutation(upper)[:entries]).astype(np.int64)
    weights = rng.random(num_items).astype(np.float32)
    users = np.arange(1, 21, dtype=np.int64) * 10
    np.save(arrays / "item_embs.npy", item_vectors.astype(np.float32))
    np.save(arrays / "item_weights.npy", weights / weights.sum())
    np.save(arrays / "item_state_item_vector.npy", item_vectors)
    np.save(arrays / "enter_points.npy", entry_points)
    np.save(arrays / "start_points.npy", np.argsort(-weights)[:start_points].astype(np.int32))
    np.save(arrays / "neighbors_level_0.npy", level_0)
    np.save(arrays / "neighbors_level_1.npy", level_1)
    np.save(arrays / "history_ids.npy", users)
    np.save(arrays / "history_row_splits.npy", np.arange(len(users) + 1, dtype=np.int64) * 4)
    np.save(arrays / "history_items.npy", rng.integers(0, num_items, len(users) * 4).astype(np.int32))
    names: Any = item_ids
    import polars as pl

    if string_ids:
        names = [f"item-{i:07d}" for i in item_ids]
        pl.DataFrame({"item_id": names}).write_parquet(arrays / "item_id_strings.parquet")
    else:
        np.save(arrays / "item_ids.npy", item_ids)
    pl.DataFrame(
        {
            "item_id": names,
            "title": [f"Item {i}" for i in range(num_items)],
            "category": np.arange(num_items) % 5,
            "year": [None if i % 10 == 0 else 1980 + i % 30 for i in range(num_items)],
            "genres": [["a", "b"] if i % 2 else ["c"] for i in range(num_items)],
        }
    ).write_parquet(arrays / "items.parquet")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model_name="world",
        version=1,
        model_type="integer",
        num_items=num_items,
        embedding_dim=DIM,
        history_length=HISTORY_LENGTH,
        input_dim=2,
        item_id_type="str" if string_ids else "int",
        user_id_type="int",
        user_tensors={"user_vector": TensorSpec(shape=(DIM,), dtype="float32")},
        item_tensors={"item_vector": TensorSpec(shape=(DIM,), dtype="float16")},
    )
    write_manifest(directory, manifest.model_copy(update={"files": hash_files(directory)}))
    return World(directory, np.asarray(names), item_vectors, (level_0, level_1), entry_points)


def add_gate(directory: Path, *, seed: int = 0, dim: int = 3, context_dim: int = 2) -> None:
    """Give an artifact gate tables of random numbers: estimates that say nothing of a score."""
    manifest = read_manifest(directory)
    rng = np.random.default_rng(seed)
    for name in (GATE_KEYS, GATE_QUERIES):
        rows = rng.normal(size=(manifest.num_items, 1 + dim + context_dim)).astype(np.float16)
        np.save(directory / "arrays" / name, rows)
    spec = GateSpec(dim=dim, context_dim=context_dim, residual_weight=0.75, rmse=2.0)
    write_manifest(directory, manifest.model_copy(update={"gate": spec, "files": hash_files(directory)}))


def random_table(rng: np.random.Generator, rows: int, degree: int, pool: np.ndarray) -> np.ndarray:
    """A [rows, degree] neighbour table with rows of random length, -1 padded, without repeats in a row."""
    table = np.full((rows, degree), -1, dtype=np.int32)
    for row in range(rows):
        n = int(rng.integers(1, degree + 1))
        chosen = rng.permutation(pool)[:n]
        table[row, : len(chosen)] = chosen
    return table


def _pack_rows(table: np.ndarray) -> np.ndarray:
    """Move the -1 of each row to its end."""
    order = np.argsort(table < 0, axis=1, kind="stable")
    return np.take_along_axis(table, order, axis=1)
