"""The vectors that inner-product contenders search: every source there is, and which of them is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nann.engine.artifacts import Artifact

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

    from nann.offline.benchmark.compare.contender import UserSet

__all__ = [
    "VectorSource",
    "best_source",
    "embedding_vectors",
    "gate_vectors",
    "listed_vectors",
    "share_within",
    "vector_sources",
]

# The middle of the numbers of candidates that are reranked; less of a corpus where that is nearly all.
_WITHIN, _WITHIN_SHARE = 5000, 0.1
_USERS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class VectorSource:
    """Item vectors [N, d] and a user's vector, whose inner product stands for the deep model's score.

    ``of_users(histories)`` takes item rows, -1 padded at the end; `multiply_adds` is what one user's
    vector costs.
    """

    name: str
    items: Float32[np.ndarray, "N d"]
    of_users: Callable[[Int32[np.ndarray, "users length"]], Float32[np.ndarray, "users d"]]
    multiply_adds: float


def embedding_vectors(artifact: Artifact) -> VectorSource | None:
    """The embeddings that the graph was built on, at unit length; a user is the mean of the history's."""
    if artifact.item_vectors is None:
        return None
    vectors = np.asarray(artifact.item_vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, where=norms > 0, out=np.zeros_like(vectors))

    def of_users(histories: Int32[np.ndarray, "users length"]) -> Float32[np.ndarray, "users d"]:
        return _mean_over_history(unit, histories)

    return VectorSource("item embeddings, mean of the history", unit, of_users, float(unit.shape[1]))


def gate_vectors(artifact: Artifact) -> VectorSource | None:
    """The tables of the gate, distilled from the model, with the best history item replaced by their mean.

    The gate's estimate takes the maximum over the history's items, which no inner product can.
    """
    if artifact.gate_keys is None or artifact.gate_queries is None:
        return None
    keys = np.asarray(artifact.gate_keys, dtype=np.float32)
    items = np.asarray(artifact.gate_queries, dtype=np.float32)

    def of_users(histories: Int32[np.ndarray, "users length"]) -> Float32[np.ndarray, "users d"]:
        mean = _mean_over_history(keys, histories)
        mean[:, 0] = 1.0  # the user's bias ranks nothing; the item's is the first column of its vector
        return mean

    return VectorSource("gate tables, mean over the history", items, of_users, float(items.shape[1]))


def listed_vectors(directory: Path) -> VectorSource:
    """Vectors made elsewhere: ``items.npy`` [N, d], ``users.npy`` [U, d] and, of the same users,
    ``histories.npy`` [U, length] (item rows, oldest first, -1 padded at the end).

    A user is looked up by the history, at no cost: what made the vector is not part of the query.

    Raises:
        ValueError: asked for a history that is not listed.
    """
    items = np.load(directory / "items.npy").astype(np.float32)
    users = np.load(directory / "users.npy").astype(np.float32)
    histories = np.load(directory / "histories.npy").astype(np.int32)
    place = {history.tobytes(): row for row, history in enumerate(histories)}

    def of_users(wanted: Int32[np.ndarray, "users length"]) -> Float32[np.ndarray, "users d"]:
        try:
            rows = [place[np.ascontiguousarray(history, dtype=np.int32).tobytes()] for history in wanted]
        except KeyError:
            raise ValueError(f"{directory} has no vector for a history that is asked for") from None
        return np.asarray(users[rows])

    return VectorSource(directory.name, items, of_users, 0.0)


def vector_sources(artifact: Artifact, run_dir: Path) -> list[VectorSource]:
    """Every source this version has, and those listed in the run's directories ``vectors/NAME``."""
    listed = [listed_vectors(path.parent) for path in sorted(run_dir.glob("vectors/*/items.npy"))]
    made = [embedding_vectors(artifact), gate_vectors(artifact)]
    return [*(source for source in made if source is not None), *listed]


def _mean_over_history(
    table: Float32[np.ndarray, "N d"], histories: Int32[np.ndarray, "users length"]
) -> Float32[np.ndarray, "users d"]:
    known = histories >= 0
    total = (table[np.where(known, histories, 0)] * known[..., None]).sum(axis=1)
    mean: Float32[np.ndarray, "users d"] = total / np.maximum(known.sum(axis=1), 1)[:, None]
    return mean.astype(np.float32)


def share_within(
    source: VectorSource, users: UserSet, exhaustive: Int32[np.ndarray, "users k"], count: int
) -> float:
    """Mean share of the exhaustive answer among the `count` items with the largest inner products."""
    count = min(count, len(source.items))
    shares = []
    for start in range(0, len(users), _USERS_AT_ONCE):
        chosen = slice(start, start + _USERS_AT_ONCE)
        products = source.of_users(users.histories[chosen]) @ source.items.T
        least = np.partition(products, -count, axis=1)[:, -count]
        wanted = exhaustive[chosen]
        found = np.take_along_axis(products, np.maximum(wanted, 0), axis=1) >= least[:, None]
        shares.append((found & (wanted >= 0)).sum(axis=1) / np.maximum((wanted >= 0).sum(axis=1), 1))
    return float(np.concatenate(shares).mean())


def best_source(
    sources: Sequence[VectorSource], users: UserSet, exhaustive: Int32[np.ndarray, "users k"]
) -> tuple[VectorSource | None, dict[str, float]]:
    """The source whose nearest items hold most of the exhaustive answers of `users`, and every share."""
    shares = {
        source.name: share_within(
            source, users, exhaustive, min(_WITHIN, round(_WITHIN_SHARE * len(source.items)))
        )
        for source in sources
    }
    return max(sources, key=lambda source: shares[source.name], default=None), shares
