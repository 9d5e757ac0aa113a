"""What the experiments read: exhaustive scores of held-out users, answers of train users, neighbour lists.

WORK/{validation,test}/{hist,scores}.npy, WORK/answers.npz, WORK/nearest.npy, WORK/co_read.npy. A file that is
there already stays.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams
from nann.offline.benchmark.replay import graphs
from nann.offline.benchmark.replay.measure import K
from nann.offline.builders.hnsw import build_hnsw
from nann.offline.data.dataset import Dataset, EvalSplit

if TYPE_CHECKING:
    from jaxtyping import Int32

__all__ = ["prepare"]

_CHUNK = 16384
# A position before the eighth behaviour has too short a history to learn from (rules.eval_position).
_FIRST_POSITION = 7
_BATCH = 16
_LANES = 2


def prepare(run: Path, work: Path, *, n_validation: int, n_test: int, seed: int) -> None:
    """Write what is missing of WORK from RUN/{data,embeddings,index}."""
    dataset = Dataset.load(run / "data")
    sizes: dict[EvalSplit, int] = {"validation": n_validation, "test": n_test}
    for split, limit in sizes.items():
        if not (work / split / "scores.npy").exists():
            _write_scores(run / "index", dataset, split, limit, seed, work / split)
    if not (work / "answers.npz").exists():
        histories = _train_histories(dataset, seed)
        np.savez(work / "answers.npz", history=histories, items=_answers(run / "index", dataset, histories))
    if not (work / "nearest.npy").exists():
        embeddings = np.load(run / "embeddings" / "item_embs.npy")
        # Level 0 has room for 32, so with as many nearest items it holds nothing else.
        np.save(work / "nearest.npy", build_hnsw(embeddings, m=16, nearest=32).neighbors[0])
    if not (work / "co_read.npy").exists():
        user = np.repeat(np.arange(dataset.num_users, dtype=np.int32), dataset.user_lengths)
        train = np.isin(user, dataset.users_of("train"))
        table = graphs.co_read(
            dataset.user_items[train], user[train], dataset.num_items, window=10, degree=16
        )
        np.save(work / "co_read.npy", table)


def _write_scores(index: Path, dataset: Dataset, split: EvalSplit, limit: int, seed: int, out: Path) -> None:
    import tensorflow as tf

    _, histories, _ = dataset.eval_samples(split)
    rows = np.random.default_rng(seed).permutation(len(histories))[:limit]
    histories = histories[np.sort(rows)]
    out.mkdir(parents=True, exist_ok=True)
    module: Any = tf.saved_model.load(str(index))
    names = list(module.signatures["encode_items"].structured_outputs)
    states = {name: np.load(index / "arrays" / f"item_state_{name}.npy", mmap_mode="r") for name in names}
    score = tf.function(module.signatures["score"], jit_compile=True)
    chunks = []
    for start in range(0, dataset.num_items, _CHUNK):
        tensors = {name: state[start : start + _CHUNK].astype(np.float32) for name, state in states.items()}
        short = _CHUNK - len(tensors[names[0]])  # one shape, so that XLA compiles once
        chunks.append({n: tf.constant(np.pad(t, ((0, short), (0, 0)))[None]) for n, t in tensors.items()})
    table = np.lib.format.open_memmap(
        out / "scores.part.npy", "w+", np.float32, (len(histories), dataset.num_items)
    )
    for row, history in enumerate(histories):
        user = module.signatures["encode_user"](history=tf.constant(history[None]))
        scores = [score(**user, **chunk)["score"].numpy()[0] for chunk in chunks]
        table[row] = np.concatenate(scores)[: dataset.num_items]
    table.flush()
    np.save(out / "hist.npy", histories)
    (out / "scores.part.npy").rename(out / "scores.npy")


def _train_histories(dataset: Dataset, seed: int) -> Int32[np.ndarray, "queries length"]:
    """The history before one random behaviour of every train user."""
    users = dataset.users_of("train")
    users = users[dataset.user_lengths[users] > _FIRST_POSITION + 1]
    position = np.random.default_rng(seed).integers(_FIRST_POSITION, dataset.user_lengths[users])
    start = dataset.user_row_splits[users]
    length = np.minimum(position, dataset.history_length)
    slots = np.arange(dataset.history_length)
    source = np.minimum((start + position - length)[:, None] + slots, len(dataset.user_items) - 1)
    return np.where(slots < length[:, None], dataset.user_items[source], -1).astype(np.int32)


def _answers(
    index: Path, dataset: Dataset, histories: Int32[np.ndarray, "queries length"]
) -> Int32[np.ndarray, "queries k"]:
    """The top K that a walk of recall 0.988 (Brunch-small, `ef` 300) finds, -1 padded."""
    engine = SearchEngine.load(index, lanes=_LANES, max_batch=_BATCH, max_k=K, intra_op_threads=1)
    engine.warm_up()
    params = SearchParams(policy="best_first", ef=300, beam_width=64, max_steps=64)
    ids = dataset.item_ids
    row_of = {item: row for row, item in enumerate(ids.tolist())}
    found = np.full((len(histories), K), -1, np.int32)

    def run(lane: int) -> None:
        for first in range(lane * _BATCH, len(histories), _LANES * _BATCH):
            queries = [
                engine.check(Query(k=K, params=params, history=ids[row[row >= 0]].tolist()))
                for row in histories[first : first + _BATCH]
            ]
            for row, hits in enumerate(engine.search(queries, lane), start=first):
                found[row, : len(hits.item_ids)] = [row_of[item] for item in hits.item_ids]

    with ThreadPoolExecutor(_LANES) as pool:
        list(pool.map(run, range(_LANES)))
    return found
