"""What ``nann extract`` writes, for a made-up corpus of any size and the model with hand-made weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nann.engine.input_rows import InputRows, hash_rows
from nann.offline.benchmark.gpu.corpus import DIM, HISTORY_LENGTH, Corpus, make_corpus
from nann.offline.benchmark.gpu.model import make_weights

__all__ = ["EVENTS_A_USER", "ITEMS_A_USER", "write_embeddings"]

# UserBehavior (Tmall, the data set of NANN's paper) has 4.2 million items, 1 million users and 100 million
# behaviours, so the stored histories of a corpus of that size take what they would take there.
ITEMS_A_USER = 4
EVENTS_A_USER = 100
_ITEMS_A_CATEGORY = 440  # 9,439 categories there
_START_POINTS = 200  # as `nann extract` writes
_MEAN_ID_STEP = 10  # ids are not dense
_ROWS_A_CHUNK = 1 << 16


def write_embeddings(directory: Path, *, num_items: int, users: int, seed: int) -> None:
    """Write SavedModel, embeddings, item tensors and histories, as input for ``nann index``.

    The first `users` user ids (1, 2, …) have histories with interests, to be asked for; those of the
    others are drawn uniformly and only take room.
    """
    from nann.offline.benchmark.growth.model import ConstructedAttention
    from nann.offline.extract_embeddings import save_serving_model

    corpus = make_corpus(num_items, users, seed=seed)
    weights = make_weights()
    module: Any = ConstructedAttention(weights, corpus.embeddings)
    save_serving_model(module, directory)
    arrays = directory / "arrays"
    arrays.mkdir()
    np.save(directory / "item_embs.npy", corpus.embeddings)
    tables = {
        name: np.lib.format.open_memmap(
            arrays / f"item_state_{name}.npy", "w+", np.float16, (num_items, *shape)
        )
        for name, shape in module.item_shapes.items()
    }
    hashes = np.empty(num_items, np.uint64)
    for start in range(0, num_items, _ROWS_A_CHUNK):
        rows = slice(start, start + _ROWS_A_CHUNK)
        hashes[rows] = hash_rows(corpus.embeddings[rows])
        for name, tensor in weights.encode_items(corpus.embeddings[rows]).items():
            tables[name][rows] = tensor
    input_rows = InputRows.of(hashes)
    np.save(arrays / "input_row_hashes.npy", input_rows.hashes)
    np.save(arrays / "input_row_items.npy", input_rows.items)
    _write_data(directory, corpus, users, seed)
    _write_model_json(directory, module, seed)


def _write_data(directory: Path, corpus: Corpus, users: int, seed: int) -> None:
    """Ids, popularity, histories and one attribute."""
    rng = np.random.default_rng([seed, 4])
    arrays, n = directory / "arrays", corpus.num_items
    item_ids = np.cumsum(rng.integers(1, 2 * _MEAN_ID_STEP, n))
    np.save(directory / "item_ids.npy", item_ids)
    np.save(arrays / "item_weights.npy", corpus.weights)
    np.save(
        arrays / "start_points.npy",
        np.argsort(-corpus.weights, kind="stable")[:_START_POINTS].astype(np.int32),
    )
    asked = [row[row >= 0] for row in corpus.history]
    n_users = max(n // ITEMS_A_USER, users)
    lengths = [*map(len, asked), *[EVENTS_A_USER] * (n_users - users)]
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    others = rng.integers(0, n, EVENTS_A_USER * (n_users - users), dtype=np.int32)
    np.save(arrays / "history_ids.npy", np.arange(1, n_users + 1, dtype=np.int64))
    np.save(arrays / "history_row_splits.npy", splits)
    np.save(arrays / "history_items.npy", np.concatenate([*asked, others]).astype(np.int32))
    categories = rng.integers(0, max(1, n // _ITEMS_A_CATEGORY), n, dtype=np.int32)
    pl.DataFrame({"item_id": item_ids, "category": categories}).write_parquet(arrays / "items.parquet")


def _write_model_json(directory: Path, module: Any, seed: int) -> None:
    def described(shapes: Any) -> dict[str, Any]:
        return {name: {"shape": list(shape), "dtype": "float32"} for name, shape in shapes.items()}

    text = {
        "model": "constructed_attention",
        "history_length": HISTORY_LENGTH,
        "input_dim": DIM,
        "embedding_dim": DIM,
        "user_tensors": described(module.user_shapes),
        "item_tensors": described(module.item_shapes),
        "training": {"note": "weights made by hand: nann/offline/benchmark/gpu/model.py"},
        "seeds": {"corpus": seed},
    }
    (directory / "model.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
